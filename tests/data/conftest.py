"""Small event stores for the tests of `hstu_jax/data`."""

import numpy as np
import pytest

from hstu_jax.data import event_store, schema
from hstu_jax.data.records import Events, ItemTable, Windows


@pytest.fixture
def store_parts():
    """Arguments of `write_store` for two users, three items and two windows."""
    return {
        "events": Events(
            user_index=np.array([0, 0, 0, 1, 1], np.int32),
            item_index=np.array([0, 1, 2, 0, 2], np.int32),
            timestamp_s=np.array([100, 200, 200, 50, 60], np.int64),
            action=np.array([1, 32, 66, 0, 129], np.int32),
            watch_time_s=np.array([1.5, 0.0, 9.25, 3.0, 4.0], np.float32),
        ),
        "windows": Windows(
            user_index=np.array([0, 1], np.int32),
            history_start=np.array([0, 3], np.int64),
            history_end=np.array([1, 4], np.int64),
            request_time_s=np.array([200, 60], np.int64),
            split=np.array([0, 2], np.int8),
            positive_offsets=np.array([0, 1, 2], np.int64),
            positive_events=np.array([2, 4], np.int64),
        ),
        "users": {
            "user_id": np.array([7, 9], np.int64),
            **{name: np.array([1, 0], np.int32) for name in schema.USER_CATEGORIES},
        },
        "items": ItemTable(
            item_id=np.array([11, 12, 13], np.int64),
            train_count=np.array([4, 1, 0], np.int64),
        ),
        "vocabularies": {name: ["word"] for name in schema.USER_CATEGORIES},
        "stats": {"source": "test"},
    }


@pytest.fixture
def store_path(tmp_path, store_parts):
    """Folder of a written small store."""
    return event_store.write_store(tmp_path / "store", **store_parts).path
