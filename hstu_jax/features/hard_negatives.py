"""`HardNegativeSampler`: up to Hn negatives of each user, from the user's own list of items.

Here: the choice from the list, the same for all queries of a user, and what is left out of it. Not
here: the lists (`sampler_inputs.py`), the simple negatives drawn beside (`negatives.py`) and the
batch (`packing.py`, the next file on the path).
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt

from hstu_jax.config import sampler_schema
from hstu_jax.features import sampler_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnHardNegatives:
    """Hard negatives of a list of users.

    Attributes:
        item_index: one row per user; 0 where there is none.
        mask: the ones that are there, the first of each row.
    """

    item_index: Int[np.ndarray, "n Hn"]
    mask: Bool[np.ndarray, "n Hn"]


class HardNegativeSampler:
    """Chooses hard negatives from the edges of each user.

    Args:
        edges: the items of every user, in the file's order.
        num_sample: Hn, of a user, at most.
        strategy: "full" = the first Hn in the file's order; "random" = Hn without replacement, all
            choices equally likely.
        exclude_positives: leave out items that are positives of the user's own window.

    Source: TorchEasyRec 1.3.16, `HardNegativeSampler`, whose graph engine gives the first
    `num_hard_sample` neighbours of a user ("full") for each of the user's positives. There a hard
    negative may be the query's own positive, and more hard negatives in a batch than users break
    HSTU Match; neither is so here.
    """

    def __init__(
        self,
        edges: sampler_inputs.HardEdges,
        *,
        num_sample: int,
        strategy: sampler_schema.HardSampleStrategy = "full",
        exclude_positives: bool = True,
    ):
        self._edges, self._num_sample = edges, num_sample
        self._strategy, self._exclude_positives = strategy, exclude_positives

    @property
    def num_sample(self) -> int:
        """Hn."""
        return self._num_sample

    @property
    def is_random(self) -> bool:
        """Whether `draw` depends on its salt."""
        return self._strategy == "random"

    def draw(
        self,
        window: Int[np.ndarray, "n"],
        *,
        salt: Int[np.ndarray, "n"],
        positive_row: Int[np.ndarray, "p"],
        positive_item: Int[np.ndarray, "p"],
    ) -> DrawnHardNegatives:
        """Hard negatives of windows' users, each row a function of its own arguments alone.

        Args:
            window: the windows; one may come twice.
            salt: decides the random choice, together with the user.
            positive_row: place in `window` of each positive.
            positive_item: item_index of each positive.
        """
        row, place, item = self._listed(self._edges.list_of_window[window])
        if self._exclude_positives:
            is_positive = _is_pair(row, item, positive_row, positive_item)
            row, place, item = row[~is_positive], place[~is_positive], item[~is_positive]
        if self.is_random:
            user = _mix(self._edges.number_of_window[window])[row]
            key = _mix(_mix(salt[row].astype(np.uint64) ^ user) ^ _mix(place))
            order = np.lexsort((key, row))
            row, item = row[order], item[order]
        first = np.searchsorted(row, row, side="left")
        rank = np.arange(len(row)) - first
        is_taken = rank < self._num_sample
        row, rank, item = row[is_taken], rank[is_taken], item[is_taken]
        item_index = np.zeros((len(window), self._num_sample), dtype=np.int32)
        mask = np.zeros(item_index.shape, dtype=bool)
        item_index[row, rank] = item
        mask[row, rank] = True
        return DrawnHardNegatives(item_index=item_index, mask=mask)

    def summary(
        self,
        window: Int[np.ndarray, "n"],
        *,
        positive_row: Int[np.ndarray, "p"],
        positive_item: Int[np.ndarray, "p"],
    ) -> str:
        """One line about the table and about the windows it is used for.

        Args:
            window: the windows.
            positive_row: place in `window` of each positive.
            positive_item: item_index of each positive.
        """
        edges = self._edges
        list_index = edges.list_of_window[window]
        num_with = int(np.count_nonzero(edges.count[list_index]))
        lists, place = np.unique(list_index, return_inverse=True)
        row, _, item = self._listed(lists)
        num_conflicts = int(_is_pair(place[positive_row], positive_item, row, item).sum())
        done = "left out there" if self._exclude_positives else "kept (exclude_positives=False)"
        return (
            f"{edges.num_lines - edges.num_dropped:,} hard edges ({edges.num_dropped:,} dropped: "
            f"unknown user or item); up to {self._num_sample} a user, {self._strategy}; "
            f"{num_with:,} of {len(window):,} windows have some; {num_conflicts:,} positives "
            f"are hard negatives of their user, {done}"
        )

    def _listed(
        self, list_index: Int[np.ndarray, "n"]
    ) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"], Int[np.ndarray, "_"]]:
        """(row, place in its list, item) of every edge of the lists."""
        count = self._edges.count[list_index]
        row = np.repeat(np.arange(len(list_index)), count)
        place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        return row, place, self._edges.item_index[self._edges.start[list_index][row] + place]


def _is_pair(
    row: Int[np.ndarray, "n"],
    item: Int[np.ndarray, "n"],
    other_row: Int[np.ndarray, "p"],
    other_item: Int[np.ndarray, "p"],
) -> Bool[np.ndarray, "n"]:
    """Which (row, item) are among the other pairs."""
    width = np.int64(max(item.max(initial=0), other_item.max(initial=0)) + 1)
    return np.isin(row * width + item, other_row * width + other_item)


def _mix(values: Integer[np.ndarray, "n"]) -> UInt[np.ndarray, "n"]:
    """Bits that look random and are a bijection of the values (the finaliser of SplitMix64)."""
    bits = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
