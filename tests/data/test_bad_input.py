"""One table of what a user may get wrong: each case with its message, or the rule that counts it.

The modules' own tests go further; this is the list to read.
"""

import dataclasses
import re

import numpy as np
import pytest

from configs import kuairand as kuairand_config
from hstu_jax.config import resolve
from hstu_jax.data import event_store, sample_weights, sampler_files, windowing
from hstu_jax.features import columns, id_mapping


def with_field(path, value):
    raw = kuairand_config.get_config()
    *sections, name = path.split(".")
    section = raw
    for part in sections:
        section = section[part]
    with section.ignore_type():
        setattr(section, name, value)
    resolve.resolve(raw)


def write(folder, parts, **events):
    new = {
        name: np.array(values, values.dtype if isinstance(values, np.ndarray) else None)
        for name, values in events.items()
    }
    new_events = dataclasses.replace(parts["events"], **new)
    event_store.write_store(folder / "store", **{**parts, "events": new_events})


def read_edges(folder, lines):
    path = folder / "edges.tsv"
    path.write_text("userid:int64\titemid:int64\tweight:float\n" + lines)
    sampler_files.read_columns(path, sampler_files.EDGE_COLUMNS)


def int64(*values):
    return np.array(values, np.int64)


REFUSED = {
    "unknown config field": (
        lambda folder, parts: with_field("train.num_stepz", 3),
        AttributeError,
        'Did you mean "num_steps"',
    ),
    "wrong type": (
        lambda folder, parts: with_field("train.num_steps", "many"),
        TypeError,
        "train.num_steps='many': must be of type int, not str.",
    ),
    "broken relation between fields": (
        lambda folder, parts: with_field("model.item_tower.mlp.hidden_units", (32,)),
        ValueError,
        "model.item_tower.mlp.hidden_units=32: the item tower's width must equal",
    ),
    "an average that is not kept": (
        lambda folder, parts: with_field("eval.use_dense_ema", False),
        ValueError,
        "eval.use_dense_ema=False: has no effect, since train.dense_optimizer.ema.decay=0.0",
    ),
    "missing data": (
        lambda folder, parts: event_store.open_store(folder / "nothing"),
        FileNotFoundError,
        "make the data with `python -m hstu_jax.prepare sample",
    ),
    "broken line of a sampler's file": (
        lambda folder, parts: read_edges(folder, "7\t11\t1\n7\televen\t1\n"),
        ValueError,
        "edges.tsv line 3: itemid='eleven': must be int64 (1 such lines in all).",
    ),
    "negative sample weight": (
        lambda folder, parts: sample_weights.read_sample_weights(
            event_store.write_store(
                folder / "store",
                **{**parts, "users": parts["users"] | {"heft": np.array([1.0, -2.0])}},
            ),
            "heft",
        ),
        ValueError,
        "users.parquet row 1: heft=-2.0: must be finite and not negative (1 rows in all).",
    ),
    "missing column": (
        lambda folder, parts: event_store.write_store(
            folder / "store", **{**parts, "users": {"user_id": parts["users"]["user_id"]}}
        ),
        ValueError,
        "users.parquet column user_active_degree: missing",
    ),
    "wrong dtype": (
        lambda folder, parts: write(folder, parts, action=np.zeros(5, np.float32)),
        TypeError,
        "events.arrow column action: dtype float32 found, int32 expected",
    ),
    "times in milliseconds": (
        lambda folder, parts: write(
            folder, parts, timestamp_s=int64(1, 2, 2, 3, 1_649_349_856_990)
        ),
        ValueError,
        "row 4: timestamp_s=1649349856990: looks like milliseconds",
    ),
    "times out of order": (
        lambda folder, parts: write(folder, parts, timestamp_s=int64(100, 200, 150, 50, 60)),
        ValueError,
        "row 2: timestamp_s=150: out of order",
    ),
    "unequal side sequences": (
        lambda folder, parts: write(folder, parts, watch_time_s=np.zeros(4, np.float32)),
        ValueError,
        "events.arrow: columns of unequal length",
    ),
    "ids out of range": (
        lambda folder, parts: id_mapping.check_ids(int64(3, 9, 12), feature="video", num_buckets=9),
        ValueError,
        "features.video.num_buckets=9: id 9 is outside 0..8 (2 such values in all); set it to at",
    ),
    "NaN watch time": (
        lambda folder, parts: write(
            folder, parts, watch_time_s=np.array([1, np.nan, 0, 0, 2], np.float32)
        ),
        ValueError,
        "row 1: watch_time_s=nan: must be finite and not negative (1 rows in all)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_message(case, tmp_path, store_parts):
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=re.escape(message)):
        call(tmp_path, store_parts)


DAY = windowing.SECONDS_PER_DAY


@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("empty history", lambda stats: stats["windows_with_empty_history"]),
        ("empty window", lambda stats: stats["dropped_windows"]["no positive event"]),
    ],
)
def test_counted_by_a_rule(case, count, store_parts):
    # User 0 begins with a click (an empty history) and has a day without any positive.
    times = int64(10, DAY, 2 * DAY, 10, 3 * DAY)
    events = dataclasses.replace(
        store_parts["events"], timestamp_s=times, action=np.array([1, 0, 1, 1, 1], np.int32)
    )
    options = windowing.WindowOptions(utc_offset_s=0)
    stats = windowing.build_windows(events, options=options).stats
    assert count(stats) == {"empty history": 2, "empty window": 1}[case]
