"""Rankings without a model: global and last-day popularity, and item-to-item co-occurrence.

Item-kNN is in `item_knn.py` and shares the tuning and the scoring of histories with co-occurrence.

Everything here gives scores for `catalogue.ranks_from_scores`, so that a model and its baselines
are ranked by one piece of code, on the same positives and exclusions.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from hstu_jax.metrics import catalogue, histories
from hstu_jax.metrics.histories import PairCounts, TuneResult, Windows

_PAIRS_PER_CHUNK = 4_000_000


@dataclasses.dataclass(frozen=True)
class CooccurrenceOptions:
    """One variant of item-to-item co-occurrence.

    Attributes:
        last_items: how many of the latest history items speak, at least 1.
        source: what is counted in training windows. "history_to_window": pairs (one of the last
            items of the history, positive of the window); "same_window": ordered pairs of different
            positives of one window.
        weighting: of a count c[i, j], with n[i] and m[j] the pairs from i and to j: "count" c;
            "inverse_sqrt" c / sqrt(n[i]); "cosine" c / sqrt(n[i] m[j]).
        positives_only: only positive history items speak, and are counted as history.
    """

    last_items: int = 10
    source: Literal["history_to_window", "same_window"] = "history_to_window"
    weighting: Literal["count", "inverse_sqrt", "cosine"] = "inverse_sqrt"
    positives_only: bool = True

    def __post_init__(self):
        if self.last_items < 1:
            raise ValueError(f"last_items={self.last_items}: must be at least 1; 10 is usual.")


def make_grid(
    *, last_items: tuple[int, ...], positives_only: tuple[bool, ...] = (True, False)
) -> tuple[CooccurrenceOptions, ...]:
    """Every variant with these values of two fields."""
    return tuple(
        CooccurrenceOptions(last, source, weighting, only)
        for source, only, last, weighting in itertools.product(
            ("history_to_window", "same_window"),
            positives_only,
            last_items,
            ("count", "inverse_sqrt", "cosine"),
        )
    )


GRID = make_grid(last_items=(10, 20))


def global_popularity(items: Int[np.ndarray, "T"], *, num_items: int) -> Float[np.ndarray, "N"]:
    """How often each item occurs.

    Args:
        items: item index of every training event (or positive) that is to count.
        num_items: N.

    Returns:
        Counts as float64.
    """
    return np.bincount(items, minlength=num_items).astype(np.float64)


def last_day_popularity(
    items: Int[np.ndarray, "T"], day: Int[np.ndarray, "T"], *, num_items: int
) -> Float[np.ndarray, "N"]:
    """How often each item occurs on the last day there is.

    Args:
        items: item index of every training event (or positive) that is to count.
        day: its day number.
        num_items: N.

    Returns:
        Counts as float64; zeros without events.
    """
    if items.size == 0:
        return np.zeros(num_items)
    return global_popularity(items[day == day.max()], num_items=num_items)


def same_for_all(scores: Float[np.ndarray, "N"]) -> catalogue.ScoreBlock:
    """A block function that gives every query-user the same scores."""
    return lambda start, stop: np.broadcast_to(scores, (stop - start, scores.size))


def count_pairs(train: Windows, options: CooccurrenceOptions, *, num_items: int) -> PairCounts:
    """Pairs of the training windows.

    Args:
        train: windows whose positives may be known.
        options: `weighting` is not used here.
        num_items: N.

    Returns:
        The counts.
    """
    if options.source == "history_to_window":
        left_items, left_start, left_end = histories.last_history_items(
            train, last_items=options.last_items, positives_only=options.positives_only
        )
    else:
        left_items = train.positive_items
        left_start, left_end = train.positive_offsets[:-1], train.positive_offsets[1:]
    right_start, right_end = train.positive_offsets[:-1], train.positive_offsets[1:]
    pairs = (left_end - left_start) * (right_end - right_start)
    # Cut where the running number of pairs passes a multiple of the chunk size.
    chunk = np.cumsum(pairs) // _PAIRS_PER_CHUNK
    cuts = np.flatnonzero(np.diff(chunk, prepend=-1))
    keys, counts = [], []
    for start, stop in itertools.pairwise([*cuts, pairs.size]):
        window = slice(start, stop)
        left_slot, left_of = histories.expand_slices(left_start[window], left_end[window])
        # Every left entry meets all positives of its window.
        right_slot, left_entry = histories.expand_slices(
            right_start[window][left_of], right_end[window][left_of]
        )
        left = left_items[left_slot][left_entry].astype(np.int64)
        right = train.positive_items[right_slot]
        key = left * num_items + right
        if options.source == "same_window":
            key = key[left != right]
        key, count = np.unique(key, return_counts=True)
        keys.append(key)
        counts.append(count)
    if not keys:
        keys, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    key, place = np.unique(np.concatenate(keys), return_inverse=True)
    count = np.bincount(place, weights=np.concatenate(counts), minlength=key.size)
    offsets = np.searchsorted(key, np.arange(num_items + 1) * num_items)
    return PairCounts(offsets, key % num_items, count.astype(np.float64))


def cooccurrence_scores(
    pair_counts: PairCounts,
    queries: Windows,
    options: CooccurrenceOptions,
    *,
    popularity: Float[np.ndarray, "N"],
) -> catalogue.ScoreBlock:
    """A block function: sum of weighted counts over the last items of each query's history.

    score[j] = sum over the last items i of weight(i, j), plus a term far below one count that puts
    items without any count in the order of popularity.

    Args:
        pair_counts: from `count_pairs` with the same options.
        queries: windows to score; their positives are not looked at.
        options: the variant.
        popularity: from `global_popularity`.

    Returns:
        A function of (start, stop) that gives scores [stop - start, N].
    """
    num_items = popularity.size
    source = np.repeat(np.arange(num_items), np.diff(pair_counts.offsets))
    weights = pair_counts.counts
    if options.weighting != "count":
        sources = np.bincount(source, weights=pair_counts.counts, minlength=num_items)
        weights = weights / np.sqrt(sources[source])
    if options.weighting == "cosine":
        targets = np.bincount(pair_counts.items, weights=pair_counts.counts, minlength=num_items)
        weights = weights / np.sqrt(targets[pair_counts.items])
    return histories.history_scores(
        PairCounts(pair_counts.offsets, pair_counts.items, weights),
        queries,
        last_items=options.last_items,
        positives_only=options.positives_only,
        popularity=popularity,
    )


def tune(
    train: Windows,
    validation: Windows,
    *,
    popularity: Float[np.ndarray, "N"],
    excluded_offsets: Int[np.ndarray, "W_and_one"],
    excluded_items: Int[np.ndarray, "excluded"],
    catalogue_mask: Bool[np.ndarray, "N"] | None = None,
    grid: tuple[CooccurrenceOptions, ...] = GRID,
    max_windows: int = 1000,
) -> TuneResult:
    """The variant of a fixed grid with the best recall@10 on validation windows.

    Args:
        train: windows to count pairs in.
        validation: windows to rank.
        popularity: from `global_popularity`, of the training events.
        excluded_offsets: items of each validation window that are not ranked, as in `catalogue`.
        excluded_items: same.
        catalogue_mask: as in `catalogue`.
        grid: variants to try.
        max_windows: validation windows used, evenly spaced among all.

    Returns:
        `TuneResult`.

    Raises:
        ValueError: no validation positive can be ranked.
    """
    counted: dict[tuple, PairCounts] = {}

    def variants():
        for options in grid:
            key = (options.source,)
            if options.source == "history_to_window":
                key += (options.last_items, options.positives_only)
            if key not in counted:
                counted[key] = count_pairs(train, options, num_items=popularity.size)

            def scores(queries, options=options, pairs=counted[key]):
                return cooccurrence_scores(pairs, queries, options, popularity=popularity)

            yield options, scores

    return histories.best_variant(
        variants(),
        validation,
        num_items=popularity.size,
        excluded_offsets=excluded_offsets,
        excluded_items=excluded_items,
        catalogue_mask=catalogue_mask,
        max_windows=max_windows,
    )
