"""`NegativeSampler`: items drawn by weight, shared by a group's queries, never its positives.

Here: the item distribution, exact exclusion, log probabilities. Not here: where weights come from
(`item_weights.py`), which positives a group has (`packing.py`), and the log-Q correction itself
(`hstu_jax.losses`).
"""

import numpy as np
from jaxtyping import Float, Int

# With less weight than this left beside the positives, rejection would draw most items in vain.
_MIN_REJECTION_SHARE = 0.5


class NegativeSampler:
    """Draws item indices with probability weight / sum(weights), with replacement.

    Args:
        weights: one per item_index; 0 = never drawn.
        origin: where the weights come from; shown in messages.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0.

    Source: docs/model.md, "Negative samplers". The reference gives up excluding positives
    after three rejected rounds, so that with a tiny catalogue a positive may be its own negative;
    here exclusion is exact, whatever it takes.
    """

    def __init__(self, weights: Float[np.ndarray, "N"], *, origin: str = "weights"):
        bad = ~np.isfinite(weights) | (weights < 0)
        if bad.any():
            at = int(np.argmax(bad))
            raise ValueError(
                f"{origin} row {at}: weight={weights[at]}: must be finite and not negative "
                f"({int(bad.sum())} rows in all)."
            )
        # Items without weight are left out, so that rounding in the sums can never draw one.
        self._items = np.flatnonzero(weights)
        if len(self._items) == 0:
            raise ValueError(
                f"{origin}: all {len(weights)} weights are 0; at least one item must have weight "
                "(events before the validation day, or a line in the item table)."
            )
        self._origin = origin
        item_weights = weights[self._items].astype(np.float64)
        self._cumulative = np.cumsum(item_weights)
        self._probability = np.zeros(len(weights))
        self._probability[self._items] = item_weights / item_weights.sum()
        smallest = self._probability[self._items].min()
        self._log_q = np.log(np.maximum(self._probability, smallest)).astype(np.float32)

    def draw(
        self, rng: np.random.Generator, *, num: int, excluded: Int[np.ndarray, "_"]
    ) -> Int[np.ndarray, "num"]:
        """Draws `num` items, none of them in `excluded`.

        p(item) = weight(item) / sum of the weights of all items that are not excluded.

        Args:
            rng: the group's own generator.
            num: how many.
            excluded: item indices of the group's positives; may repeat.

        Raises:
            ValueError: every item with weight is excluded.
        """
        excluded = np.unique(excluded)
        excluded_mass = self._probability[excluded]
        num_left = len(self._items) - np.count_nonzero(excluded_mass)
        if num_left == 0:
            raise ValueError(
                f"negative_sampler: all {len(self._items)} items with weight in {self._origin} are "
                "positives of one group; use a smaller data.batch_size or more data.num_groups."
            )
        if 1.0 - excluded_mass.sum() < _MIN_REJECTION_SHARE:
            return self._draw_among_others(rng, num=num, excluded=excluded)
        drawn = _draw(rng, self._items, self._cumulative, num)
        rejected = np.flatnonzero(_is_member(drawn, excluded))
        while len(rejected):
            again = _draw(rng, self._items, self._cumulative, len(rejected))
            drawn[rejected] = again
            rejected = rejected[_is_member(again, excluded)]
        return drawn

    def log_q(self, item_index: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """log(weight / sum(weights)) of items.

        An item without weight (a cold positive) gets the value of the rarest item that has one:
        the limit of the correction, instead of minus infinity. With equal weights all values are
        equal, so that the correction changes nothing.
        """
        return self._log_q[item_index]

    def _draw_among_others(
        self, rng: np.random.Generator, *, num: int, excluded: Int[np.ndarray, "_"]
    ) -> Int[np.ndarray, "num"]:
        """The same distribution by listing what is left: linear in the catalogue, the rare way."""
        left = self._items[~_is_member(self._items, excluded)]
        return _draw(rng, left, np.cumsum(self._probability[left]), num)


def _draw(
    rng: np.random.Generator,
    items: Int[np.ndarray, "_"],
    cumulative: Float[np.ndarray, "_"],
    num: int,
) -> Int[np.ndarray, "num"]:
    position = np.searchsorted(cumulative, rng.random(num) * cumulative[-1], side="right")
    # random() < 1, but its product with the last sum may round up to it.
    return items[np.minimum(position, len(items) - 1)]


def _is_member(values: Int[np.ndarray, "n"], members: Int[np.ndarray, "_"]) -> np.ndarray:
    """Which values are in the ascending `members`."""
    if len(members) == 0:
        return np.zeros(len(values), dtype=bool)
    position = np.minimum(np.searchsorted(members, values), len(members) - 1)
    return members[position] == values
