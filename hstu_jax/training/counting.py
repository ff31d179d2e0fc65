"""Baselines that need no training: popularity and co-occurrence, counted in the training windows.

From the event store to the plain arrays of `hstu_jax.metrics.baselines`. Used beside every
evaluation of the loop and in the closing table.
"""

import numpy as np

from hstu_jax.config import schema
from hstu_jax.data import event_store, list_store, records, windowing
from hstu_jax.data import schema as data_schema
from hstu_jax.metrics import baselines
from hstu_jax.training import evaluation

_DAY_S = 86_400


def counting_baselines(
    store: event_store.EventStore, eval_set: evaluation.EvalSet, config: schema.EvalConfig
) -> tuple[dict[str, evaluation.Evaluation], str]:
    """Co-occurrence, last-day popularity and global popularity of the training data's positives.

    Co-occurrence is the one variant that is best on the validation split, of a fixed grid and of
    pairs counted in the training windows or in days.

    Returns:
        The rankings by name, and a line that names the co-occurrence variant.
    """
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
    queries = _windows(store, store.windows, "validation")
    candidates = {
        name: (train, _tune(train, queries, popular, validation))
        for name, train in _training_windows(store).items()
    }
    chosen, (train, tuned) = max(candidates.items(), key=lambda item: item[1][1].recall)
    counts = baselines.count_pairs(train, tuned.options, num_items=num_items)
    scores = {
        "co-occurrence": baselines.cooccurrence_scores(
            counts,
            _windows(store, store.windows, eval_set.split),
            tuned.options,
            popularity=popular,
        ),
        "last-day": baselines.same_for_all(last_day),
        "popularity": baselines.same_for_all(popular),
    }
    num_tried = sum(len(tuned.tried) for _, tuned in candidates.values())
    note = (
        f"co-occurrence: best of {num_tried} variants on validation (recall@10 "
        f"{tuned.recall:.4f}): "
        f"pairs of {chosen}, {tuned.options}"
    )
    return {name: evaluation.rank(eval_set, block, config) for name, block in scores.items()}, note


def _training_windows(store: event_store.EventStore) -> dict[str, baselines.Windows]:
    """What pairs may be counted in: the training windows, and days if those are something else."""
    windows = {"the training windows": _windows(store, store.windows, "train")}
    recorded = dict(store.stats["window_options"])
    # Windows of list columns are the rows themselves; their events are no log to cut again.
    if recorded["mode"] not in ("day", list_store.WINDOW_MODE):
        recorded |= {"mode": "day", "positive_actions": tuple(recorded["positive_actions"])}
        options = windowing.WindowOptions(**recorded)
        days = windowing.build_windows(store.events, options=options).windows
        windows["days"] = _windows(store, days, "train")
    return windows


def _tune(
    train: baselines.Windows,
    queries: baselines.Windows,
    popularity: np.ndarray,
    validation: evaluation.EvalSet,
) -> baselines.TuneResult:
    return baselines.tune(
        train,
        queries,
        popularity=popularity,
        excluded_offsets=validation.seen_offsets,
        excluded_items=validation.seen_items,
        catalogue_mask=validation.catalogue_mask,
    )


def _windows(
    store: event_store.EventStore, table: records.Windows, split: str
) -> baselines.Windows:
    chosen = np.flatnonzero(table.split == data_schema.SPLIT_NAMES.index(split))
    starts, counts = table.positive_offsets[chosen], np.diff(table.positive_offsets)[chosen]
    events = store.events
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
