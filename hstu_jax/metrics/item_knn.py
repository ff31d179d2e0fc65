"""Item-kNN: items are like each other if the same users had them; the order is not looked at.

    sim(i, j) = (users of both) / (sqrt(users of i) sqrt(users of j) + shrinkage),   j among i's K

The cosine of the items' user vectors, shrunk where few users stand behind it, cut to each item's K
nearest. A query's score of j is the sum of sim(i, j) over its history. Users are those of the
training windows. Memory follows the neighbours that are kept and the pairs of a block of items.
Source: Sarwar et al., Item-based Collaborative Filtering Recommendation Algorithms (WWW 2001),
section 3; the shrinkage as in Ferrari Dacrema et al. (RecSys 2019), who tune it with K.
"""

import dataclasses
import itertools

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int

from hstu_jax.metrics import catalogue, histories

_PAIRS_PER_BLOCK = 8_000_000
# A user's pairs grow with the square of its items: of the few with more the newest are counted.
MAX_ITEMS_PER_USER = 1_000


@dataclasses.dataclass(frozen=True)
class ItemKnnOptions:
    """One variant of item-kNN.

    Attributes:
        num_neighbours: K, at least 1.
        shrinkage: at least 0.
        last_items: how many of the latest history items speak; 0 = all.
        positives_only: only positive history items speak.
    """

    num_neighbours: int = 100
    shrinkage: float = 0.0
    last_items: int = 0
    positives_only: bool = True

    def __post_init__(self):
        if self.num_neighbours < 1:
            raise ValueError(f"num_neighbours={self.num_neighbours}: must be at least 1.")
        for name in ("shrinkage", "last_items"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more.")


GRID = tuple(
    ItemKnnOptions(*values)
    for values in itertools.product((20, 50, 100, 200, 400), (0.0, 10.0, 100.0), (0, 5, 20))
)


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The nearest items of every item, for one shrinkage, the nearest first.

    Attributes:
        offsets: neighbours of item i are offsets[i]:offsets[i + 1].
        items: their item indices; of equal similarities the smaller index first.
        similarity: above 0.
    """

    offsets: Int[np.ndarray, "N_and_one"]
    items: Int[np.ndarray, "entries"]
    similarity: Float[np.ndarray, "entries"]

    def cut(self, num_neighbours: int) -> histories.PairCounts:
        """The nearest K of every item as weights from item to item."""
        start = self.offsets[:-1]
        end = np.minimum(self.offsets[1:], start + num_neighbours)
        slot, _ = histories.expand_slices(start, end)
        offsets = np.concatenate([[0], np.cumsum(end - start)])
        return histories.PairCounts(offsets, self.items[slot], self.similarity[slot])


def user_items(
    user: Int[np.ndarray, "events"], item: Int[np.ndarray, "events"]
) -> tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"]]:
    """Each (user, item) once, at most the newest `MAX_ITEMS_PER_USER` of a user.

    Args:
        user: of training positives, ascending, oldest first within a user.
        item: same.
    """
    newest_first = np.arange(user.size)[::-1]
    key = user[newest_first] * (int(item.max(initial=0)) + 1) + item[newest_first]
    _, first = np.unique(key, return_index=True)
    once = newest_first[np.sort(first)]
    user, item = user[once], item[once]  # users descending, newest first
    rank = np.arange(user.size) - np.searchsorted(-user, -user, side="left")
    kept = rank < MAX_ITEMS_PER_USER
    return user[kept], item[kept]


def find_neighbours(
    user: Int[np.ndarray, "pairs"],
    item: Int[np.ndarray, "pairs"],
    *,
    num_items: int,
    shrinkages: tuple[float, ...],
    num_neighbours: int,
) -> list[Neighbours]:
    """The nearest items of every item, for each shrinkage; common users are counted once for all.

    Args:
        user: of each different (user, item).
        item: same.
        num_items: N.
        shrinkages: each at least 0.
        num_neighbours: K, of the largest variant.
    """
    _, user = np.unique(user, return_inverse=True)
    num_users = int(user.max(initial=-1)) + 1
    ones = np.ones(user.size, np.float32)
    by_user = scipy.sparse.csr_array((ones, (user, item)), shape=(num_users, num_items))
    by_item = by_user.T.tocsr()
    users_of = np.diff(by_item.indptr)
    norm = np.sqrt(users_of)
    # Pairs of an item: the items of all of its users.
    pairs = np.add.reduceat(
        np.append(np.diff(by_user.indptr)[by_item.indices], 0), by_item.indptr[:-1]
    )
    pairs[users_of == 0] = 0
    cuts = np.flatnonzero(np.diff(np.cumsum(pairs) // _PAIRS_PER_BLOCK, prepend=-1))
    found = [([], [], []) for _ in shrinkages]
    for start, stop in itertools.pairwise([*cuts.tolist(), num_items]):
        common = (by_item[start:stop] @ by_user).tocsr()
        for place in range(stop - start):
            row = slice(common.indptr[place], common.indptr[place + 1])
            other, count = common.indices[row], common.data[row]
            count = count[other != start + place]
            other = other[other != start + place]
            for shrinkage, (sizes, items, values) in zip(shrinkages, found, strict=True):
                similarity = count / (norm[start + place] * norm[other] + shrinkage)
                nearest = _nearest(similarity, other, num_neighbours)
                sizes.append(nearest.size)
                items.append(other[nearest])
                values.append(similarity[nearest])
    return [
        Neighbours(
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            np.concatenate([np.zeros(0, np.int64), *items]),
            np.concatenate([np.zeros(0), *values]),
        )
        for sizes, items, values in found
    ]


def _nearest(similarity: np.ndarray, item: np.ndarray, most: int) -> np.ndarray:
    """Places of the largest similarities, descending; ties by ascending item, at the cut too."""
    chosen = np.arange(similarity.size)
    if similarity.size > most:
        least = np.partition(similarity, -most)[-most]
        chosen = np.flatnonzero(similarity >= least)
    return chosen[np.lexsort((item[chosen], -similarity[chosen]))][:most]


def tune(
    user: Int[np.ndarray, "events"],
    item: Int[np.ndarray, "events"],
    validation: histories.Windows,
    *,
    popularity: Float[np.ndarray, "N"],
    excluded_offsets: Int[np.ndarray, "W_and_one"],
    excluded_items: Int[np.ndarray, "excluded"],
    catalogue_mask: Bool[np.ndarray, "N"] | None = None,
    grid: tuple[ItemKnnOptions, ...] = GRID,
    max_windows: int = 1000,
) -> tuple[histories.TuneResult, histories.PairCounts]:
    """The variant with the best recall@10 on validation windows, and its similarities.

    Args:
        user: of training positives, ascending, oldest first within a user.
        item: same.
        validation: windows to rank.
        popularity: from `baselines.global_popularity`.
        excluded_offsets: as for `baselines.tune`, and the rest.
        excluded_items: same.
        catalogue_mask: same.
        grid: variants to try.
        max_windows: same.
    """
    shrinkages = tuple(sorted({options.shrinkage for options in grid}))
    neighbours = find_neighbours(
        *user_items(user, item),
        num_items=popularity.size,
        shrinkages=shrinkages,
        num_neighbours=max(options.num_neighbours for options in grid),
    )
    by_shrinkage = dict(zip(shrinkages, neighbours, strict=True))

    def weights(options: ItemKnnOptions) -> histories.PairCounts:
        return by_shrinkage[options.shrinkage].cut(options.num_neighbours)

    def variants():
        for options in grid:
            yield (
                options,
                lambda queries, options=options: scores(
                    weights(options), queries, options, popularity=popularity
                ),
            )

    result = histories.best_variant(
        variants(),
        validation,
        num_items=popularity.size,
        excluded_offsets=excluded_offsets,
        excluded_items=excluded_items,
        catalogue_mask=catalogue_mask,
        max_windows=max_windows,
    )
    return result, weights(result.options)


def scores(
    similarities: histories.PairCounts,
    queries: histories.Windows,
    options: ItemKnnOptions,
    *,
    popularity: Float[np.ndarray, "N"],
) -> catalogue.ScoreBlock:
    """A block function: the sum of the similarities to the history's items."""
    return histories.history_scores(
        similarities,
        queries,
        last_items=options.last_items,
        positives_only=options.positives_only,
        popularity=popularity,
    )
