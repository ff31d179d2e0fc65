"""What baselines have in common: windows as plain arrays, scores from histories, and tuning.

Item-to-item weights are made in `baselines.py` (co-occurrence) and `item_knn.py`; here they become
scores of a query's history, and the variant that is best on validation windows is chosen. Arrays
come from the event store, cut by the caller to what may be known.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int

from hstu_jax.metrics import catalogue, ranking

# Decides among items that no history item speaks for; far below the smallest weight of a pair.
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
        num_windows: validation windows that were ranked, evenly spaced among all of them.
    """

    options: Any
    recall: float
    tried: tuple[tuple[Any, float], ...]
    num_windows: int


def history_scores(
    weights: PairCounts,
    queries: Windows,
    *,
    last_items: int,
    positives_only: bool,
    popularity: Float[np.ndarray, "N"],
) -> catalogue.ScoreBlock:
    """A block function: sum of the weights from the last items of each query's history.

    score[j] = sum over the last items i of weight(i, j) + 1e-6 popularity[j] / its maximum.

    Args:
        weights: in place of counts, any weight that is not negative.
        queries: windows to score; their positives are not looked at.
        last_items: how many of the latest history items speak; 0 = all.
        positives_only: only positive history items speak.
        popularity: of the items; orders those without any weight.

    Returns:
        A function of (start, stop) that gives scores [stop - start, N].
    """
    num_items = popularity.size
    table = scipy.sparse.csr_array(
        (weights.counts, weights.items, weights.offsets), shape=(num_items, num_items)
    )
    prior = _POPULARITY_TIE_BREAK * popularity / max(popularity.max(initial=0.0), 1.0)
    items, item_start, item_end = last_history_items(
        queries, last_items=last_items, positives_only=positives_only
    )

    def score_block(start: int, stop: int):
        slot, row = expand_slices(item_start[start:stop], item_end[start:stop])
        # An item that occurs twice stays twice, in its place: sums are in the order of history.
        offsets = np.searchsorted(row, np.arange(stop - start + 1))
        spoken = scipy.sparse.csr_array(
            (np.ones(slot.size), items[slot], offsets), shape=(stop - start, num_items)
        )
        return (spoken @ table).toarray() + prior

    return score_block


def best_variant(
    variants: Iterable[tuple[Any, Callable[[Windows], catalogue.ScoreBlock]]],
    validation: Windows,
    *,
    num_items: int,
    excluded_offsets: Int[np.ndarray, "W_and_one"],
    excluded_items: Int[np.ndarray, "excluded"],
    catalogue_mask: Bool[np.ndarray, "N"] | None = None,
    max_windows: int = 1000,
) -> TuneResult:
    """The variant of any baseline with the best recall@10 on validation windows.

    Args:
        variants: options, and what scores windows with them.
        validation: windows to rank.
        num_items: N.
        excluded_offsets: as for `tune`, and the rest.
        excluded_items: same.
        catalogue_mask: same.
        max_windows: same.

    Raises:
        ValueError: no validation positive can be ranked.
    """
    num_windows = validation.history_start.size
    chosen = np.unique(np.linspace(0, max(num_windows - 1, 0), max_windows).astype(np.int64))
    chosen = chosen[chosen < num_windows]
    validation = validation.take(chosen)
    excluded_offsets, excluded_items = take_lists(excluded_offsets, excluded_items, chosen)
    tried = []
    for options, scores in variants:
        ranks = catalogue.ranks_from_scores(
            scores(validation),
            num_items=num_items,
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
    return TuneResult(best[0], best[1], tuple(tried), len(chosen))


def take_lists(
    offsets: Int[np.ndarray, "W_and_one"],
    items: Int[np.ndarray, "entries"],
    chosen: Int[np.ndarray, "some"],
) -> tuple[Int[np.ndarray, "some_and_one"], Int[np.ndarray, "chosen_entries"]]:
    """Offsets and items of some of the lists, in the given order."""
    slot, _ = expand_slices(offsets[:-1][chosen], offsets[1:][chosen])
    sizes = np.diff(offsets)[chosen]
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), items[slot]


def last_history_items(
    windows: Windows, *, last_items: int, positives_only: bool
) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, "W"], Int[np.ndarray, "W"]]:
    """Items that may speak, and each window's slice of them: the last ones of its history."""
    if positives_only:
        kept = np.flatnonzero(windows.event_is_positive)
        start = np.searchsorted(kept, windows.history_start)
        end = np.searchsorted(kept, windows.history_end)
        items = windows.event_items[kept]
    else:
        start, end, items = windows.history_start, windows.history_end, windows.event_items
    return items, np.maximum(start, end - last_items) if last_items else start, end


def expand_slices(start, end):
    """Concatenated ranges start[i]:end[i], and for each entry the i it came from."""
    sizes = (end - start).astype(np.int64)
    owner = np.repeat(np.arange(sizes.size), sizes)
    before = np.cumsum(sizes) - sizes
    return np.arange(owner.size) - before[owner] + start[owner], owner
