"""Baselines that need no training: popularity and co-occurrence, counted in the training windows.

From the event store to the plain arrays of `hstu_jax.metrics.baselines`. Used beside every
evaluation of the loop and in the closing table.
"""

import numpy as np

from hstu_jax.config import schema
from hstu_jax.data import event_store
from hstu_jax.data import schema as data_schema
from hstu_jax.metrics import baselines
from hstu_jax.training import evaluation

_DAY_S = 86_400


def counting_baselines(
    store: event_store.EventStore, eval_set: evaluation.EvalSet, config: schema.EvalConfig
) -> tuple[dict[str, evaluation.Evaluation], str]:
    """Co-occurrence, last-day popularity and global popularity of the training data's positives.

    Co-occurrence is the one variant of a fixed grid that is best on the validation split.

    Returns:
        The rankings by name, and a line that names the co-occurrence variant.
    """
    train = _baseline_windows(store, "train")
    num_items = store.num_items
    events = store.windows.positive_events[
        evaluation.ragged_positions(*_positive_slices(store, "train"))
    ]
    items = store.events.item_index[events].astype(np.int64)
    offset_s = store.stats["window_options"]["utc_offset_s"]
    day = (store.events.timestamp_s[events] + offset_s) // _DAY_S
    popular = baselines.global_popularity(items, num_items=num_items)
    last_day = baselines.last_day_popularity(items, day, num_items=num_items)

    validation = evaluation.make_eval_set(
        store, split="validation", exclude_seen=config.exclude_seen
    )
    tuned = baselines.tune(
        train,
        _baseline_windows(store, "validation"),
        popularity=popular,
        excluded_offsets=validation.seen_offsets,
        excluded_items=validation.seen_items,
        catalogue_mask=validation.catalogue_mask,
    )
    counts = baselines.count_pairs(train, tuned.options, num_items=num_items)
    scores = {
        "co-occurrence": baselines.cooccurrence_scores(
            counts,
            _baseline_windows(store, eval_set.split),
            tuned.options,
            popularity=popular,
        ),
        "last-day": baselines.same_for_all(last_day),
        "popularity": baselines.same_for_all(popular),
    }
    note = f"co-occurrence: best of {len(tuned.tried)} variants on validation: {tuned.options}"
    return {name: evaluation.rank(eval_set, block, config) for name, block in scores.items()}, note


def _baseline_windows(store: event_store.EventStore, split: str) -> baselines.Windows:
    chosen = store.windows_of_split(split)
    table, events = store.windows, store.events
    starts, counts = _positive_slices(store, split)
    positions = table.positive_events[evaluation.ragged_positions(starts, counts)]
    wanted = data_schema.action_mask(tuple(store.stats["window_options"]["positive_actions"]))
    is_hated = (events.action & data_schema.ACTION_BITS["hate"]) != 0
    return baselines.Windows(
        event_items=events.item_index.astype(np.int64),
        event_is_positive=((events.action & wanted) != 0) & ~is_hated,
        history_start=table.history_start[chosen],
        history_end=table.history_end[chosen],
        positive_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        positive_items=events.item_index[positions].astype(np.int64),
    )


def _positive_slices(store: event_store.EventStore, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Where a split's positives stand in `positive_events`: (starts, counts)."""
    chosen = store.windows_of_split(split)
    return store.windows.positive_offsets[chosen], np.diff(store.windows.positive_offsets)[chosen]
