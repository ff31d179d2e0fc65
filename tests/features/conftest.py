"""A small event store with random lengths, and configurations that read it."""

import dataclasses

import numpy as np
import pytest

from hstu_jax.config import data_schema as config_schema
from hstu_jax.config import model_schema, schema
from hstu_jax.data import event_store
from hstu_jax.data import schema as data_schema

FIRST_TIME_S = 1_650_000_000
CATEGORIES = data_schema.USER_CATEGORIES


def _build_columns(history_lens, num_positives, *, num_items, seed, gap_s, splits):
    """One window per user: that many history events, then that many positives at the request."""
    rng = np.random.default_rng(seed)
    history, positives = np.array(history_lens), np.array(num_positives)
    sizes = history + positives
    first = np.cumsum(sizes) - sizes
    user = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    place = np.arange(len(user)) - np.repeat(first, sizes)
    is_positive = place >= np.repeat(history, sizes)
    # All positives of a window carry the request's own second, the hardest case for "before".
    steps = np.minimum(place, np.repeat(history, sizes))
    time_s = FIRST_TIME_S + steps * gap_s + 7 * user
    request = FIRST_TIME_S + history * gap_s + 7 * np.arange(len(sizes))
    events = event_store.Events(
        user_index=user,
        item_index=rng.integers(0, num_items, len(user), dtype=np.int32),
        timestamp_s=time_s.astype(np.int64),
        action=rng.integers(1, 256, len(user), dtype=np.int32),
        watch_time_s=rng.uniform(0.5, 90, len(user)).astype(np.float32),
    )
    windows = event_store.Windows(
        user_index=np.arange(len(sizes), dtype=np.int32),
        history_start=first.astype(np.int64),
        history_end=(first + history).astype(np.int64),
        request_time_s=request.astype(np.int64),
        split=np.array(splits, dtype=np.int8),
        positive_offsets=np.concatenate([[0], np.cumsum(positives)]).astype(np.int64),
        positive_events=np.flatnonzero(is_positive).astype(np.int64),
    )
    users = {"user_id": np.arange(len(sizes), dtype=np.int64) + 1000}
    users |= {name: rng.integers(0, 9, len(sizes), dtype=np.int32) for name in CATEGORIES}
    counts = np.bincount(events.item_index, minlength=num_items).astype(np.int64)
    items = event_store.ItemTable(item_id=np.arange(num_items, dtype=np.int64), train_count=counts)
    return events, windows, users, items


@pytest.fixture
def make_store(tmp_path):
    """Function: lengths of histories and positives -> an opened store on disk."""
    made = []

    def make(
        history_lens, num_positives=None, *, num_items=50, seed=0, gap_s=61, splits=None, **replace
    ):
        num = len(history_lens)
        if num_positives is None:
            num_positives = np.random.default_rng(seed + 1).integers(1, 6, num)
        splits = np.zeros(num) if splits is None else splits
        events, windows, users, items = _build_columns(
            history_lens, num_positives, num_items=num_items, seed=seed, gap_s=gap_s, splits=splits
        )
        if "train_count" in replace:
            counts = np.array(replace.pop("train_count"), dtype=np.int64)
            items = dataclasses.replace(items, train_count=counts)
        made.append(tmp_path / f"store_{len(made)}")
        return event_store.write_store(
            made[-1],
            events=events,
            windows=windows,
            users=users,
            items=items,
            vocabularies={},
            stats={},
        )

    return make


@pytest.fixture(scope="session")
def make_config():
    """Function: fields of the `data` section and a few others -> a configuration."""

    def make(*, contextual=2, max_seq_len=20, seed=0, num_items=50, query_time=True, **data):
        sampler = {
            name.removeprefix("sampler_"): data.pop(name)
            for name in list(data)
            if name.startswith("sampler_")
        }
        names = ("user_id", *CATEGORIES)[:contextual]
        item = schema.IdFeature(num_buckets=num_items, embedding_dim=64, embedding_name="item")
        features = {"uih_seq__video_id": item, "cand_seq__video_id": item}
        features |= {n: schema.IdFeature(num_buckets=1000, embedding_dim=8) for n in names}
        groups = {
            "uih": ("uih_seq__video_id",),
            "candidate": ("cand_seq__video_id",),
            "uih_action": ("uih_seq__action_weight",),
            "uih_watchtime": ("uih_seq__watch_time",),
            "uih_timestamp": ("uih_seq__action_timestamp",),
        }
        if names:
            groups["contextual"] = names
        if query_time:
            groups["query_time"] = ("request_time",)
        return schema.Config(
            seed=seed,
            features=features,
            feature_groups=groups,
            data=config_schema.DataConfig(
                **{"batch_size": 8, "block_len": 16} | data,
                negative_sampler=config_schema.NegativeSamplerConfig(
                    **{"num_sample": 12} | sampler
                ),
            ),
            model=model_schema.ModelConfig(
                user_tower=model_schema.UserTowerConfig(max_seq_len=max_seq_len)
            ),
        )

    return make
