"""Rankings without a model: global and last-day popularity, and item-to-item co-occurrence.

Everything here gives scores for `catalogue.ranks_from_scores`, so that a model and its baselines
are ranked by one piece of code, on the same positives and exclusions. NumPy only; arrays come from
the event store, cut by the caller to what may be known (training data only).
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from hstu_jax.metrics import catalogue, ranking

_PAIRS_PER_CHUNK = 4_000_000
# Decides among items that no history item speaks for; far below the smallest co-occurrence score.
_POPULARITY_TIE_BREAK = 1e-6


@dataclasses.dataclass(frozen=True)
class Windows:
    """Histories and positives of query-users, as slices of the event list.

    Attributes:
        event_items: item index of every event; a user's events are adjacent, oldest first.
        event_is_positive: whether the event counts as a positive.
        history_start: first event of the window's history.
        history_end: one past its last event.
        positive_offsets: positives of window w are `positive_items[offsets[w]:offsets[w + 1]]`.
        positive_items: item indices.
    """

    event_items: Int[np.ndarray, "events"]
    event_is_positive: Bool[np.ndarray, "events"]
    history_start: Int[np.ndarray, "W"]
    history_end: Int[np.ndarray, "W"]
    positive_offsets: Int[np.ndarray, "W_and_one"]
    positive_items: Int[np.ndarray, "positives"]

    def take(self, windows: Int[np.ndarray, "some"]) -> "Windows":
        """The same events with some of the windows, in the given order."""
        offsets, items = take_lists(self.positive_offsets, self.positive_items, windows)
        return dataclasses.replace(
            self,
            history_start=self.history_start[windows],
            history_end=self.history_end[windows],
            positive_offsets=offsets,
            positive_items=items,
        )


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


GRID = tuple(
    CooccurrenceOptions(last_items, source, weighting, positives_only)
    for source, positives_only, last_items, weighting in itertools.product(
        ("history_to_window", "same_window"),
        (True, False),
        (10, 20),
        ("count", "inverse_sqrt", "cosine"),
    )
)


@dataclasses.dataclass(frozen=True)
class PairCounts:
    """How often item j followed item i: a sparse [N, N] matrix by rows.

    Attributes:
        offsets: entries of item i are offsets[i]:offsets[i + 1].
        items: j of each entry, ascending within a row.
        counts: at least 1.
    """

    offsets: Int[np.ndarray, "N_and_one"]
    items: Int[np.ndarray, "entries"]
    counts: Float[np.ndarray, "entries"]


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """The best variant and what every variant reached on the validation windows.

    Attributes:
        options: the variant with the highest recall@10; the first of equals.
        recall: its recall@10.
        tried: (options, recall@10) of the whole grid.
    """

    options: CooccurrenceOptions
    recall: float
    tried: tuple[tuple[CooccurrenceOptions, float], ...]


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
        left_items, left_start, left_end = _last_items(train, options)
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
        left_slot, left_of = _expand_slices(left_start[window], left_end[window])
        # Every left entry meets all positives of its window.
        right_slot, left_entry = _expand_slices(
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
    prior = _POPULARITY_TIE_BREAK * popularity / max(popularity.max(initial=0.0), 1.0)
    items, item_start, item_end = _last_items(queries, options)

    def score_block(start: int, stop: int):
        slot, row = _expand_slices(item_start[start:stop], item_end[start:stop])
        spoken = items[slot]
        entry, speaker = _expand_slices(
            pair_counts.offsets[spoken], pair_counts.offsets[spoken + 1]
        )
        cell = row[speaker] * num_items + pair_counts.items[entry]
        size = (stop - start) * num_items
        scores = np.bincount(cell, weights=weights[entry], minlength=size)
        return scores.reshape(stop - start, num_items) + prior

    return score_block


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
    num_windows = validation.history_start.size
    chosen = np.unique(np.linspace(0, max(num_windows - 1, 0), max_windows).astype(np.int64))
    chosen = chosen[chosen < num_windows]
    validation = validation.take(chosen)
    excluded_offsets, excluded_items = take_lists(excluded_offsets, excluded_items, chosen)
    counted: dict[tuple, PairCounts] = {}
    tried = []
    for options in grid:
        key = (options.source,)
        if options.source == "history_to_window":
            key += (options.last_items, options.positives_only)
        if key not in counted:
            counted[key] = count_pairs(train, options, num_items=popularity.size)
        ranks = catalogue.ranks_from_scores(
            cooccurrence_scores(counted[key], validation, options, popularity=popularity),
            num_items=popularity.size,
            positive_offsets=validation.positive_offsets,
            positive_items=validation.positive_items,
            excluded_offsets=excluded_offsets,
            excluded_items=excluded_items,
            catalogue_mask=catalogue_mask,
        )
        if ranks.num_ranked == 0:
            raise ValueError(
                f"validation={num_windows} windows: must hold a positive that can be ranked; "
                "there is nothing to tune on."
            )
        metrics = ranking.user_metrics(ranks.ranks, validation.positive_offsets, cutoffs=(10,))
        tried.append((options, metrics.means()["recall@10"]))
    best = max(tried, key=lambda pair: pair[1])
    return TuneResult(best[0], best[1], tuple(tried))


def take_lists(
    offsets: Int[np.ndarray, "W_and_one"],
    items: Int[np.ndarray, "entries"],
    chosen: Int[np.ndarray, "some"],
) -> tuple[Int[np.ndarray, "some_and_one"], Int[np.ndarray, "chosen_entries"]]:
    """Offsets and items of some of the lists, in the given order."""
    slot, _ = _expand_slices(offsets[:-1][chosen], offsets[1:][chosen])
    sizes = np.diff(offsets)[chosen]
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), items[slot]


def _last_items(windows, options):
    """Items that may speak, and each window's slice of them (the last ones of its history)."""
    if options.positives_only:
        kept = np.flatnonzero(windows.event_is_positive)
        start = np.searchsorted(kept, windows.history_start)
        end = np.searchsorted(kept, windows.history_end)
        items = windows.event_items[kept]
    else:
        start, end, items = windows.history_start, windows.history_end, windows.event_items
    return items, np.maximum(start, end - options.last_items), end


def _expand_slices(start, end):
    """Concatenated ranges start[i]:end[i], and for each entry the i it came from."""
    sizes = (end - start).astype(np.int64)
    owner = np.repeat(np.arange(sizes.size), sizes)
    before = np.cumsum(sizes) - sizes
    return np.arange(owner.size) - before[owner] + start[owner], owner
