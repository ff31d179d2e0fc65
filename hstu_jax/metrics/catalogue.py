"""Ranks of positives among the whole catalogue, one block of users at a time.

Scores come as blocks from a function, so vectors, baselines and an oracle are ranked by the same
code; a `[W, N]` matrix of all users is never held. Exact: nothing is sampled or approximated. What
the ranks mean for quality is in `ranking.py`, the baselines' scores in `baselines.py`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Scores of the users start:stop against all N items, in item order.
ScoreBlock = Callable[[int, int], Float[np.ndarray, "users N"]]

_BLOCK_SCORES = 2**23  # scores held at a time, 32 MiB of float32


@dataclasses.dataclass(frozen=True)
class CatalogueRanks:
    """Ranks of positives, and what became of those without one.

    Attributes:
        ranks: int64, 1 is best, 0 for dropped positives; in the order of the positives.
        num_ranked: positives with a rank.
        num_seen: positives dropped because the query-user's exclusions name them.
        num_cold: positives dropped because they are not in the catalogue (and not seen).
    """

    ranks: Int[np.ndarray, "positives"]
    num_ranked: int
    num_seen: int
    num_cold: int


def positive_ranks(
    user_vectors: Float[Array | np.ndarray, "W E"],
    item_vectors: Float[Array | np.ndarray, "N E"],
    *,
    positive_offsets: Int[np.ndarray, "W_and_one"],
    positive_items: Int[np.ndarray, "positives"],
    excluded_offsets: Int[np.ndarray, "excluded_W_and_one"],
    excluded_items: Int[np.ndarray, "excluded"],
    catalogue_mask: Bool[np.ndarray, "N"] | None = None,
    user_block: int | None = None,
) -> CatalogueRanks:
    """Rank of every positive by inner product with its query-user; see `ranks_from_scores`.

    Args:
        user_vectors: one vector per query-user (normalised already if the similarity is cosine).
        item_vectors: one vector per item, in item order; must fit the device.
        positive_offsets: see `ranks_from_scores`, as the rest.
        positive_items: same.
        excluded_offsets: same.
        excluded_items: same.
        catalogue_mask: same.
        user_block: query-users scored at a time; None fits it to N. One shape is compiled.

    Returns:
        `CatalogueRanks`.
    """
    return ranks_from_scores(
        vector_scores(user_vectors, item_vectors, user_block=user_block),
        num_items=item_vectors.shape[0],
        positive_offsets=positive_offsets,
        positive_items=positive_items,
        excluded_offsets=excluded_offsets,
        excluded_items=excluded_items,
        catalogue_mask=catalogue_mask,
        user_block=user_block,
    )


def vector_scores(
    user_vectors: Float[Array | np.ndarray, "W E"],
    item_vectors: Float[Array | np.ndarray, "N E"],
    *,
    user_block: int | None = None,
) -> ScoreBlock:
    """Inner products as a block function, in full float32 on the device.

    Args:
        user_vectors: one vector per query-user.
        item_vectors: one vector per item.
        user_block: most query-users a call may ask for; shorter blocks are padded to it.

    Returns:
        A function of (start, stop) that gives scores [stop - start, N].
    """
    user_block = user_block or default_user_block(item_vectors.shape[0])
    users = np.asarray(user_vectors, np.float32)
    items = jnp.asarray(item_vectors, jnp.float32)

    def score_block(start: int, stop: int):
        block = np.zeros((user_block, users.shape[1]), np.float32)
        block[: stop - start] = users[start:stop]
        return np.asarray(_inner_products(block, items))[: stop - start]

    return score_block


@jax.jit
def _inner_products(users, items):
    return jnp.einsum("be,ne->bn", users, items, precision=jax.lax.Precision.HIGHEST)


def default_user_block(num_items: int) -> int:
    """Query-users per block such that a block of scores stays small."""
    return int(np.clip(_BLOCK_SCORES // max(num_items, 1), 1, 1024))


def ranks_from_scores(
    score_block: ScoreBlock,
    *,
    num_items: int,
    positive_offsets: Int[np.ndarray, "W_and_one"],
    positive_items: Int[np.ndarray, "positives"],
    excluded_offsets: Int[np.ndarray, "excluded_W_and_one"],
    excluded_items: Int[np.ndarray, "excluded"],
    catalogue_mask: Bool[np.ndarray, "N"] | None = None,
    user_block: int | None = None,
) -> CatalogueRanks:
    """Rank of every positive among the catalogue items that its query-user may be shown.

    rank = 1 + number of other items with a score >= the positive's; ties count against it. Other
    positives of the same query-user are among the others.

    Args:
        score_block: scores of query-users start:stop against all N items; not changed.
        num_items: N.
        positive_offsets: positives of query-user w are at `positive_offsets[w]:[w + 1]`.
        positive_items: item indices, 0..N-1.
        excluded_offsets: as `positive_offsets`, for items not to be shown, for example those in the
            history; repeats are allowed.
        excluded_items: item indices, 0..N-1.
        catalogue_mask: items that compete and can be ranked; None is all. Evaluation uses the items
            with a training event: a positive outside it is cold.
        user_block: query-users scored at a time; None fits it to N.

    Returns:
        `CatalogueRanks`; positives that are excluded or not in the catalogue have rank 0.

    Raises:
        ValueError: offsets do not match the items, an item is out of range, or a score is NaN.
    """
    _check_lists("positive", positive_offsets, positive_items, num_items)
    _check_lists("excluded", excluded_offsets, excluded_items, num_items)
    num_users = positive_offsets.size - 1
    if excluded_offsets.size - 1 != num_users:
        raise ValueError(
            f"excluded_offsets={excluded_offsets.size - 1} query-users: must be the same as the "
            f"{num_users} of positive_offsets; give an empty list to those without exclusions."
        )
    if catalogue_mask is None:
        catalogue_mask = np.ones(num_items, bool)
    user_block = user_block or default_user_block(num_items)
    ranks = np.zeros(positive_items.size, np.int64)
    num_seen = num_cold = 0
    for start in range(0, num_users, user_block):
        stop = min(start + user_block, num_users)
        scores = np.asarray(score_block(start, stop))
        if np.isnan(scores).any():
            row = start + int(np.argmax(np.isnan(scores).any(axis=1)))
            raise ValueError(f"scores[{row}]=nan: a query-user's scores must be numbers; check it.")
        # Own copy: what may not be shown must lose even against -inf, so it is counted apart.
        shown = np.broadcast_to(catalogue_mask, scores.shape).copy()
        hidden = slice(excluded_offsets[start], excluded_offsets[stop])
        shown[_list_rows(excluded_offsets, start, stop), excluded_items[hidden]] = False
        own = slice(positive_offsets[start], positive_offsets[stop])
        row, item = _list_rows(positive_offsets, start, stop), positive_items[own]
        is_ranked = shown[row, item]
        is_cold = ~catalogue_mask[item]
        is_seen = _contains(excluded_offsets, excluded_items, start, stop, num_items, row, item)
        num_seen += int(np.sum(is_seen))
        num_cold += int(np.sum(is_cold & ~is_seen))
        ranks[own][is_ranked] = _ranks_of_block(scores, shown, row[is_ranked], item[is_ranked])
    return CatalogueRanks(ranks, int(np.sum(ranks > 0)), num_seen, num_cold)


def _ranks_of_block(scores, shown, row, item):
    """Ranks of the given (row, item) pairs, rows ascending, all of them shown."""
    ranks = np.empty(row.size, np.int64)
    bounds = np.searchsorted(row, np.arange(scores.shape[0] + 1))
    for position in range(scores.shape[0]):
        own = slice(bounds[position], bounds[position + 1])
        if own.start == own.stop:
            continue
        # Counting "not below" counts the positive itself, which is the 1 of its rank.
        others = np.sort(scores[position][shown[position]])
        below = np.searchsorted(others, scores[position, item[own]], side="left")
        ranks[own] = others.size - below
    return ranks


def _list_rows(offsets, start, stop):
    """Row within the block of every list entry of query-users start:stop."""
    return np.repeat(np.arange(stop - start), np.diff(offsets[start : stop + 1]))


def _contains(offsets, items, start, stop, num_items, row, item):
    """Whether each (row, item) is in the row's list."""
    entries = slice(offsets[start], offsets[stop])
    listed = _list_rows(offsets, start, stop).astype(np.int64) * num_items + items[entries]
    return np.isin(row.astype(np.int64) * num_items + item, listed)


def _check_lists(name, offsets, items, num_items):
    """Raises on offsets or items that cannot be."""
    if offsets.size == 0 or offsets[0] != 0 or offsets[-1] != items.size:
        ends = (int(offsets[0]), int(offsets[-1])) if offsets.size else "empty"
        raise ValueError(
            f"{name}_offsets={ends}: must run from 0 to the {items.size} entries of {name}_items; "
            "give offsets of these very items."
        )
    if np.any(np.diff(offsets) < 0):
        first = int(np.argmax(np.diff(offsets) < 0))
        raise ValueError(f"{name}_offsets[{first + 1}]: must not be below the one before; sort it.")
    if items.size and (items.min() < 0 or items.max() >= num_items):
        bad = items[(items < 0) | (items >= num_items)]
        raise ValueError(
            f"{name}_items={int(bad[0])}: must be 0..{num_items - 1} ({bad.size} in all are not); "
            "pass item indices, not ids."
        )
