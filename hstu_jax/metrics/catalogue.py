"""Ranks of positives among the whole catalogue, one block of users at a time.

Scores come as blocks from a function, so vectors, baselines and an oracle are ranked by the same
code; a `[W, N]` matrix of all users is never held. Exact: nothing is sampled or approximated. What
the ranks mean for quality is in `ranking.py`, the baselines' scores in `baselines.py`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

# Scores of the users start:stop against all N items, in item order. NumPy scores are compared on
# the host as they are, jax arrays on their device; rows behind the first stop - start, and items
# behind the last one, are not looked at.
ScoreBlock = Callable[[int, int], Float[np.ndarray | Array, "users N"]]

_BLOCK_SCORES = 2**23  # scores held at a time, 32 MiB of float32
_BLOCK_ROWS = 2**18  # scores compared at a time on the device


@dataclasses.dataclass(frozen=True)
class CatalogueRanks:
    """Ranks of positives, and what became of those without one.

    Attributes:
        ranks: int64, 1 is best, 0 for dropped positives; in the order of the positives.
        num_ranked: positives with a rank.
        num_seen: positives dropped because the query-user's exclusions name them.
        num_cold: positives dropped because they are not in the catalogue (and not seen).
        ranks_with_seen: ranks if nothing were excluded: 0 for those outside the catalogue only.
    """

    ranks: Int[np.ndarray, "positives"]
    num_ranked: int
    num_seen: int
    num_cold: int
    ranks_with_seen: Int[np.ndarray, "positives"]


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
        item_vectors: one vector per item; may be split over a mesh along the items, with any
            vectors behind the last item, and then the scores are.
        user_block: most query-users a call may ask for; shorter blocks are padded to it.

    Returns:
        A function of (start, stop) that gives scores [user_block, N] on the device.
    """
    user_block = user_block or default_user_block(item_vectors.shape[0])
    users = np.asarray(user_vectors, np.float32)
    items = jnp.asarray(item_vectors, jnp.float32)
    split = _split_of(items, axis=0)

    def score_block(start: int, stop: int):
        block = np.zeros((user_block, users.shape[1]), np.float32)
        block[: stop - start] = users[start:stop]
        return _inner_products(block, items, split=split)

    return score_block


@dataclasses.dataclass(frozen=True)
class _Split:
    """The mesh and its axes over which items are split."""

    mesh: jax.sharding.Mesh
    axes: tuple[str, ...]


def _split_of(array: Array, *, axis: int) -> _Split | None:
    """How an axis is split over a mesh; None if it is not."""
    sharding = array.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding) or len(sharding.spec) <= axis:
        return None
    axes = sharding.spec[axis]
    axes = (axes,) if isinstance(axes, str) else axes
    return _Split(sharding.mesh, axes) if axes else None


def _on_shards(function, split: _Split | None, *, in_specs, out_specs):
    """A function of each device's items; specs name the axis of items "items"."""
    if split is None:
        return function

    def place(spec):
        return P(*(split.axes if name == "items" else None for name in spec))

    return jax.shard_map(
        function,
        mesh=split.mesh,
        in_specs=tuple(map(place, in_specs)),
        out_specs=jax.tree.map(place, out_specs, is_leaf=lambda spec: isinstance(spec, P)),
        check_vma=False,
    )


@functools.partial(jax.jit, static_argnames="split")
def _inner_products(users, items, *, split):
    def products(users, items):
        return jnp.einsum("be,ne->bn", users, items, precision=jax.lax.Precision.HIGHEST)

    specs = dict(in_specs=(P(), P("items")), out_specs=P(None, "items"))
    return _on_shards(products, split, **specs)(users, items)


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
    positives of the same query-user are among the others. Counted, not sorted: a pass over the row
    for each positive.

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
    ranks_with_seen = np.zeros(positive_items.size, np.int64)
    num_seen = num_cold = 0
    # One shape is compiled: lists of a block are padded to the longest.
    starts = np.arange(0, num_users, user_block)
    stops = np.minimum(starts + user_block, num_users)
    longest = [
        int(np.max(offsets[stops] - offsets[starts], initial=1))
        for offsets in (positive_offsets, excluded_offsets)
    ]
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        scores = score_block(start, stop)
        own = slice(positive_offsets[start], positive_offsets[stop])
        row, item = _list_rows(positive_offsets, start, stop), positive_items[own]
        hidden = slice(excluded_offsets[start], excluded_offsets[stop])
        hidden_row = _list_rows(excluded_offsets, start, stop)
        lists = (row, item, hidden_row, excluded_items[hidden])
        if isinstance(scores, jax.Array):
            counts = _count_on_device(scores, catalogue_mask, *lists, longest=longest)
        else:
            counts = _count_on_host(np.asarray(scores)[: stop - start], catalogue_mask, *lists)
        if counts.is_nan_row[: stop - start].any():
            bad = start + int(np.argmax(counts.is_nan_row))
            raise ValueError(f"scores[{bad}]=nan: a query-user's scores must be numbers; check it.")
        is_cold = ~catalogue_mask[item]
        num_seen += int(np.sum(counts.is_seen))
        num_cold += int(np.sum(is_cold & ~counts.is_seen))
        # Counting "not below" counts the positive itself, which is the 1 of its rank.
        ranks[own] = np.where(is_cold | counts.is_seen, 0, counts.shown)
        ranks_with_seen[own] = np.where(is_cold, 0, counts.catalogue)
    return CatalogueRanks(ranks, int(np.sum(ranks > 0)), num_seen, num_cold, ranks_with_seen)


@dataclasses.dataclass(frozen=True)
class _Counts:
    """For each positive, items with a score not below its own; and rows with a score of NaN."""

    catalogue: Int[np.ndarray, "positives"]
    shown: Int[np.ndarray, "positives"]
    is_seen: Bool[np.ndarray, "positives"]
    is_nan_row: Bool[np.ndarray, "users"]


def _count_on_host(scores, catalogue_mask, row, item, hidden_row, hidden_item) -> _Counts:
    """Counts in the scores' own precision: a baseline's float64 may tell apart what float32 ties.

    Rows are ascending.
    """
    in_catalogue = np.empty(row.size, np.int64)
    shown = np.empty(row.size, np.int64)
    is_hidden = np.zeros(scores.shape, bool)
    is_hidden[hidden_row, hidden_item] = True
    bounds = np.searchsorted(row, np.arange(scores.shape[0] + 1))
    for position in range(scores.shape[0]):
        own = slice(bounds[position], bounds[position + 1])
        if own.start == own.stop:
            continue
        not_below = scores[position] >= scores[position, item[own]][:, None]
        not_below &= catalogue_mask
        in_catalogue[own] = np.count_nonzero(not_below, axis=1)
        # What may not be shown must lose even against -inf, so it is counted apart.
        shown[own] = np.count_nonzero(not_below & ~is_hidden[position], axis=1)
    return _Counts(in_catalogue, shown, is_hidden[row, item], np.isnan(scores).any(axis=1))


def _count_on_device(scores, catalogue_mask, row, item, hidden_row, hidden_item, *, longest):
    """The same on the scores' device or devices; only the counts come back."""
    num_positives, num_hidden = longest
    padded = [_pad(row, num_positives, 0), _pad(item, num_positives, 0)]
    # A row behind the last one hides nothing.
    padded += [_pad(hidden_row, num_hidden, scores.shape[0]), _pad(hidden_item, num_hidden, 0)]
    mask = np.zeros(scores.shape[1], bool)  # no item behind the last one
    mask[: catalogue_mask.size] = catalogue_mask
    split = _split_of(scores, axis=1)
    counted = jax.device_get(_count_not_below(scores, mask, *padded, split=split))
    *per_positive, is_nan_row = counted
    return _Counts(*(values[: row.size] for values in per_positive), is_nan_row)


@functools.partial(jax.jit, static_argnames="split")
def _count_not_below(scores, catalogue_mask, row, item, hidden_row, hidden_item, *, split):
    def count_all(scores, catalogue_mask, row, item, hidden_row, hidden_item):
        width = scores.shape[1]
        first = 0 if split is None else jax.lax.axis_index(split.axes) * width
        own, hidden = (_within(index - first, width) for index in (item, hidden_item))
        is_hidden = jnp.zeros(scores.shape, bool).at[hidden_row, hidden].set(True, mode="drop")
        # One device has the positive's score; -inf and NaN survive the sum.
        positive = scores.at[row, own].get(mode="fill", fill_value=0)

        def count(positive):
            row, score = positive
            not_below = (scores[row] >= score) & catalogue_mask
            return (
                jnp.sum(not_below, dtype=jnp.int32),
                jnp.sum(not_below & ~is_hidden[row], dtype=jnp.int32),
            )

        # In blocks of positives: all their rows at once would be as large as the scores and more.
        block = max(1, min(_BLOCK_ROWS // width, row.shape[0]))
        counts = jax.lax.map(count, (row, total(positive)), batch_size=block)
        is_seen = is_hidden.at[row, own].get(mode="fill", fill_value=False)
        flags = total((is_seen.astype(jnp.int32), jnp.isnan(scores).any(axis=1).astype(jnp.int32)))
        return *total(counts), *(flag > 0 for flag in flags)

    def total(tree):
        return tree if split is None else jax.lax.psum(tree, split.axes)

    specs = dict(in_specs=(P(None, "items"), P("items"), *(P(),) * 4), out_specs=(P(),) * 4)
    arrays = (scores, catalogue_mask, row, item, hidden_row, hidden_item)
    return _on_shards(count_all, split, **specs)(*arrays)


def _within(index, size):
    """Indices of a device's own items; `size`, which is none, for those of others."""
    return jnp.where((index >= 0) & (index < size), index, size)


def _pad(values: np.ndarray, length: int, filler: int) -> np.ndarray:
    padded = np.full(length, filler, np.int32)
    padded[: values.size] = values
    return padded


def _list_rows(offsets, start, stop):
    """Row within the block of every list entry of query-users start:stop."""
    return np.repeat(np.arange(stop - start), np.diff(offsets[start : stop + 1]))


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
