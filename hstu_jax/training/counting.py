"""Baselines that need no training: popularity, co-occurrence and item-kNN of the training windows.

From the event store to the plain arrays of `hstu_jax.metrics`. Used beside every evaluation of the
loop and in the closing table.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from hstu_jax.config import schema
from hstu_jax.data import event_store, list_store, records, windowing
from hstu_jax.data import schema as data_schema
from hstu_jax.metrics import baselines, catalogue, histories, item_knn
from hstu_jax.training import evaluation

_DAY_S = 86_400
# Leave-one-out data is counted in single events (what follows what) and in runs of events.
_LEAVE_ONE_OUT_RUNS = (1, 20)
_LEAVE_ONE_OUT_LAST_ITEMS = (1, 5, 10, 20)


@dataclasses.dataclass(frozen=True)
class _Training:
    """What may be known: the positives of the training windows, by user, oldest first."""

    user: Int[np.ndarray, "positives"]
    item: Int[np.ndarray, "positives"]
    timestamp_s: Int[np.ndarray, "positives"]


def counting_baselines(
    store: event_store.EventStore, eval_set: evaluation.EvalSet, config: schema.EvalConfig
) -> tuple[dict[str, evaluation.Evaluation], str]:
    """Co-occurrence, item-kNN, last-day and global popularity of the training data's positives.

    Co-occurrence and item-kNN are each the one variant that is best on the validation split, of a
    fixed grid, judged by at most 1,000 windows evenly spaced in it; pairs are counted in the
    training windows or in days, for leave-one-out in runs of 1 and 20 events. The last day's
    popularity is left out where times are positions. Days begin where the store's `utc_offset_s`
    has them: at UTC+8 as KuaiRand's do, which MovieLens and other interaction files are cut by too.

    Returns:
        The rankings by name, and lines that name the chosen variants.
    """
    num_items = store.num_items
    training = _training_positives(store)
    popular = baselines.global_popularity(training.item, num_items=num_items)
    validation = evaluation.make_eval_set(
        store, split="validation", exclude_seen=config.exclude_seen, catalogue=config.catalogue
    )
    scores, notes = {}, []
    for name, find in (("co-occurrence", _cooccurrence), ("item-knn", _item_knn)):
        scores[name], note = find(store, training, eval_set, validation, popular)
        notes.append(f"{name}: {note}")
    if store.stats.get("event_times") != "position":
        offset_s = store.stats["window_options"]["utc_offset_s"]
        day = (training.timestamp_s + offset_s) // _DAY_S
        last_day = baselines.last_day_popularity(training.item, day, num_items=num_items)
        scores["last-day"] = baselines.same_for_all(last_day)
    scores["popularity"] = baselines.same_for_all(popular)
    ranked = {name: evaluation.rank(eval_set, block, config) for name, block in scores.items()}
    return ranked, "\n".join(notes)


def _training_positives(store: event_store.EventStore) -> _Training:
    events = store.windows.positive_events[
        evaluation.ragged_positions(*_positive_slices(store, "train"))
    ]
    events = events[np.argsort(store.events.user_index[events], kind="stable")]
    return _Training(
        user=store.events.user_index[events].astype(np.int64),
        item=store.events.item_index[events].astype(np.int64),
        timestamp_s=store.events.timestamp_s[events],
    )


def _cooccurrence(
    store: event_store.EventStore,
    training: _Training,
    eval_set: evaluation.EvalSet,
    validation: evaluation.EvalSet,
    popular: np.ndarray,
) -> tuple[catalogue.ScoreBlock, str]:
    """Scores of the best variant, and what it is."""
    queries = _windows(store, store.windows, "validation")
    grid = _cooccurrence_grid(store)
    candidates = {
        name: (train, _tune(train, queries, popular, validation, grid))
        for name, train in _training_windows(store).items()
    }
    chosen, (train, tuned) = max(candidates.items(), key=lambda item: item[1][1].recall)
    counts = baselines.count_pairs(train, tuned.options, num_items=len(popular))
    tested = _windows(store, store.windows, eval_set.split)
    block = baselines.cooccurrence_scores(counts, tested, tuned.options, popularity=popular)
    num_tried = sum(len(tuned.tried) for _, tuned in candidates.values())
    return block, f"{_best_of(num_tried, tuned)}: pairs of {chosen}, {tuned.options}"


def _item_knn(
    store: event_store.EventStore,
    training: _Training,
    eval_set: evaluation.EvalSet,
    validation: evaluation.EvalSet,
    popular: np.ndarray,
) -> tuple[catalogue.ScoreBlock, str]:
    """Scores of the best variant, and what it is."""
    tuned, similarities = item_knn.tune(
        training.user,
        training.item,
        _windows(store, store.windows, "validation"),
        popularity=popular,
        excluded_offsets=validation.seen_offsets,
        excluded_items=validation.seen_items,
        catalogue_mask=validation.catalogue_mask,
    )
    tested = _windows(store, store.windows, eval_set.split)
    block = item_knn.scores(similarities, tested, tuned.options, popularity=popular)
    return block, f"{_best_of(len(tuned.tried), tuned)}: {tuned.options}"


def _best_of(num_tried: int, tuned: histories.TuneResult) -> str:
    return (
        f"best of {num_tried} variants on {tuned.num_windows:,} validation windows "
        f"(recall@10 {tuned.recall:.4f})"
    )


def _cooccurrence_grid(
    store: event_store.EventStore,
) -> tuple[baselines.CooccurrenceOptions, ...]:
    options = store.stats["window_options"]
    if options["mode"] != windowing.LEAVE_ONE_OUT:
        return baselines.GRID
    wanted = data_schema.action_mask(tuple(options["positive_actions"]))
    all_positive = bool(((store.events.action & wanted) != 0).all())
    return baselines.make_grid(
        last_items=_LEAVE_ONE_OUT_LAST_ITEMS,
        # Where every event is a positive both values give the same.
        positives_only=(True,) if all_positive else (True, False),
    )


def _training_windows(store: event_store.EventStore) -> dict[str, histories.Windows]:
    """What pairs may be counted in: the training windows, and days if those are something else.

    Of leave-one-out data: single events and runs of events, since a window may hold a whole user.
    """
    recorded = dict(store.stats["window_options"])
    # Windows of list columns are the rows themselves; their events are no log to cut again.
    if recorded["mode"] == list_store.WINDOW_MODE:
        return {"the training windows": _windows(store, store.windows, "train")}
    recorded["positive_actions"] = tuple(recorded["positive_actions"])

    def cut(**changes) -> histories.Windows:
        options = windowing.WindowOptions(**recorded | changes)
        table = windowing.build_windows(store.events, options=options).windows
        return _windows(store, table, "train")

    if recorded["mode"] == windowing.LEAVE_ONE_OUT:
        return {f"runs of {size} events": cut(window_events=size) for size in _LEAVE_ONE_OUT_RUNS}
    windows = {"the training windows": _windows(store, store.windows, "train")}
    if recorded["mode"] != "day":
        windows["days"] = cut(mode="day")
    return windows


def _tune(
    train: histories.Windows,
    queries: histories.Windows,
    popularity: np.ndarray,
    validation: evaluation.EvalSet,
    grid: tuple[baselines.CooccurrenceOptions, ...],
) -> histories.TuneResult:
    return baselines.tune(
        train,
        queries,
        popularity=popularity,
        excluded_offsets=validation.seen_offsets,
        excluded_items=validation.seen_items,
        catalogue_mask=validation.catalogue_mask,
        grid=grid,
    )


def _windows(
    store: event_store.EventStore, table: records.Windows, split: str
) -> histories.Windows:
    chosen = np.flatnonzero(table.split == data_schema.SPLIT_NAMES.index(split))
    starts, counts = table.positive_offsets[chosen], np.diff(table.positive_offsets)[chosen]
    events = store.events
    positions = table.positive_events[evaluation.ragged_positions(starts, counts)]
    wanted = data_schema.action_mask(tuple(store.stats["window_options"]["positive_actions"]))
    is_hated = (events.action & data_schema.ACTION_BITS["hate"]) != 0
    return histories.Windows(
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
