"""From rows of a batch to vectors: unique rows, gather, and expand with its own gradient.

    unique = unique_rows(rows, capacity=n, sentinel=spec.padded_rows)   # sort on the device
    picked = gather(weights, unique)                                    # [capacity, dim]
    vectors = expand(picked, unique)                                    # [n, dim], differentiable

The loss is differentiated with respect to `picked`, never to the table, so memory and time follow
the ids of the batch. `update.py` writes the result back; `exchange.py` does both across devices.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_CACHE_LINE_FLOATS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UniqueRows:
    """The distinct rows of n occurrences. All int32.

    Fields are `Any` because trees of this shape also hold shardings and partition specs.

    Attributes:
        rows: [capacity] distinct rows, ascending; `sentinel` behind the last one.
        order: [n] the occurrences sorted by row (stable): position -> occurrence.
        segment: [n] index into `rows` of the occurrence `order[i]`; ascending. `capacity` for
            occurrences that did not fit, `capacity` + 1 for those of no row.
        inverse: [n] the same by occurrence: `segment` before sorting.
        num_rows: [] number of distinct rows, also where that is more than `capacity`.
        sentinel: the row number that means "no row" (static).
    """

    rows: Any
    order: Any
    segment: Any
    inverse: Any
    num_rows: Any
    sentinel: int = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Most distinct rows this can hold."""
        return self.rows.shape[0]


def unique_rows(rows: Int[Array, "n"], *, capacity: int, sentinel: int) -> UniqueRows:
    """The distinct rows among `rows`, by one stable sort on the device.

    Args:
        rows: 0..sentinel-1; `sentinel` or more in padding slots.
        capacity: most distinct rows to keep. min(n, sentinel) always suffices; with less, rows that
            do not fit come out of `expand` as NaN, so that the loss cannot hide it.
        sentinel: number of rows of the table (`TableSpec.padded_rows`).

    Returns:
        `UniqueRows`.

    Raises:
        ValueError: capacity below 1.
    """
    if capacity < 1:
        raise ValueError(
            f"capacity={capacity}: must be at least 1; min(number of ids, rows) always suffices."
        )
    num_occurrences = rows.shape[0]
    rows = jnp.minimum(rows.astype(jnp.int32), sentinel)
    occurrence = jnp.arange(num_occurrences, dtype=jnp.int32)
    # Rows are below 2**31 and so are occurrences: two operands, since int64 is off in JAX.
    sorted_rows, order = jax.lax.sort((rows, occurrence), num_keys=1, is_stable=True)
    is_row = sorted_rows < sentinel
    before = jnp.concatenate([jnp.full((1,), -1, jnp.int32), sorted_rows[:-1]])
    is_first = is_row & (sorted_rows != before)
    segment = jnp.cumsum(is_first.astype(jnp.int32)) - 1
    num_rows = jnp.sum(is_first, dtype=jnp.int32)
    segment = jnp.where(is_row, jnp.minimum(segment, capacity), capacity + 1)
    # Every kept slot is written once: by the first occurrence of its row.
    slot = jnp.where(is_first, segment, capacity + 1)
    distinct = jnp.full((capacity,), sentinel, jnp.int32).at[slot].set(sorted_rows, mode="drop")
    inverse = jnp.zeros((num_occurrences,), jnp.int32).at[order].set(segment, unique_indices=True)
    return UniqueRows(distinct, order, segment, inverse, num_rows, sentinel)


def gather(weights: Float[Array, "rows dim"], unique: UniqueRows) -> Float[Array, "capacity dim"]:
    """The table's rows that `unique` names; zeros in its empty slots."""
    zero = jax.lax.platform_dependent(
        weights, unique.rows, cpu=_touch, default=lambda weights, rows: 0 * rows[0]
    )
    picked = weights.at[unique.rows + zero].get(
        mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
    )
    # Without the barrier XLA may fuse this into `expand` and read the big table once per
    # occurrence, in random order, in place of once per row, ascending.
    return jax.lax.optimization_barrier(picked)


def _touch(weights, rows):
    """Reads one value of every cache line of the rows; returns 0, on which the gather must wait.

    XLA's CPU gather spends hundreds of instructions on a row, so that only one cache and page miss
    is under way at a time. This loop has many. Measured with 25,600 rows out of 10,000,000 x 64:
    one value a line takes 0.25 ms, all of them 2.4 ms.
    """
    columns = jnp.arange(0, weights.shape[1], _CACHE_LINE_FLOATS)
    total = jnp.sum(weights.at[rows[:, None], columns[None, :]].get(mode="clip"))
    # Neither XLA nor LLVM may fold 0 * total, which could be NaN; compared with 1 it is False.
    return (0.0 * total == 1.0).astype(jnp.int32)


def expand(
    picked: Float[Array, "capacity dim"], unique: UniqueRows, *, max_gradient: float | None = None
) -> Float[Array, "n dim"]:
    """A vector for every occurrence, with a gradient that sums duplicates in a fixed order.

    vectors[i] = picked[unique.inverse[i]]; gradient of picked[r] = sum of clip(cotangent[i]) over
    the occurrences i of r, in the order of i: deterministic, and without contended scatters.

    Args:
        picked: rows from `gather` (or `exchange.fetch`).
        unique: the rows they belong to.
        max_gradient: clip every element of every occurrence's cotangent to +- this before
            duplicates are summed; None does not clip.

    Returns:
        Vectors in the order of the rows given to `unique_rows`. Padding slots hold zeros and pass
        no gradient, even if their cotangent is NaN. Occurrences of rows beyond the capacity of
        `unique` hold NaN.

    Source: order of clipping and summing as in fbgemm 1.8.0 EXACT_ROWWISE_ADAGRAD.
    """
    return _expand(picked, unique, max_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _expand(picked, unique, max_gradient):
    vectors = picked.at[unique.inverse].get(mode="fill", fill_value=0)
    does_not_fit = unique.inverse == unique.capacity
    return jnp.where(does_not_fit[:, None], jnp.nan, vectors)


def _expand_forward(picked, unique, max_gradient):
    return _expand(picked, unique, max_gradient), unique


def _expand_backward(max_gradient, unique, cotangent):
    ordered = cotangent[unique.order]
    ordered = jnp.where((unique.segment < unique.capacity)[:, None], ordered, 0)
    if max_gradient is not None:
        ordered = jnp.clip(ordered, -max_gradient, max_gradient)
    return sum_sorted_segments(ordered, unique.segment, num_segments=unique.capacity), None


_expand.defvjp(_expand_forward, _expand_backward)


def sum_sorted_segments(
    values: Float[Array, "n dim"], segment: Int[Array, "n"], *, num_segments: int
) -> Float[Array, "segments dim"]:
    """Sums of consecutive runs of `values`, bit for bit the same every time.

    Args:
        values: summands; must be finite where `segment` is `num_segments` or more.
        segment: ascending; entries of `num_segments` or more are dropped.
        num_segments: number of sums.

    Returns:
        sums[s] = sum of values[i] with segment[i] = s; 0 for an empty s.
    """
    return jax.lax.platform_dependent(
        values,
        segment,
        cpu=functools.partial(_sum_by_scatter, num_segments=num_segments),
        default=functools.partial(sum_by_scan, num_segments=num_segments),
    )


def _sum_by_scatter(values, segment, *, num_segments):
    """One pass; on CPU a scatter runs in order, so the sums are reproducible."""
    sums = jnp.zeros((num_segments, values.shape[1]), values.dtype)
    return sums.at[segment].add(values, mode="drop", indices_are_sorted=True)


def merge_rows(
    rows: Int[Array, "n"], gradients: Float[Array, "n dim"], *, capacity: int, sentinel: int
) -> tuple[UniqueRows, Float[Array, "capacity dim"]]:
    """Distinct rows of several lists of rows, and their summed gradients.

    Args:
        rows: lists one after the other; `sentinel` or more where there is no row.
        gradients: of `rows`; anything finite where there is no row.
        capacity: see `unique_rows`.
        sentinel: same.
    """
    unique = unique_rows(rows, capacity=capacity, sentinel=sentinel)
    ordered = jnp.where((unique.segment < capacity)[:, None], gradients[unique.order], 0)
    return unique, sum_sorted_segments(ordered, unique.segment, num_segments=capacity)


def sum_by_scan(
    values: Float[Array, "n dim"], segment: Int[Array, "n"], *, num_segments: int
) -> Float[Array, "segments dim"]:
    """`sum_sorted_segments` for accelerators, whose scatters add in any order (atomics).

    A segmented prefix sum of log2(n) steps; the last entry of a run is its sum, and is written to
    its slot by exactly one thread.
    """
    if values.shape[0] == 0:
        return jnp.zeros((num_segments, values.shape[1]), values.dtype)
    starts = jnp.concatenate([jnp.ones((1,), bool), segment[1:] != segment[:-1]])

    def join(left, right):
        left_start, left_sum = left
        right_start, right_sum = right
        joined = jnp.where(right_start, right_sum, left_sum + right_sum)
        return left_start | right_start, joined

    _, prefix = jax.lax.associative_scan(join, (starts[:, None], values))
    ends = jnp.concatenate([starts[1:], jnp.ones((1,), bool)])
    slot = jnp.where(ends, segment, num_segments)
    sums = jnp.zeros((num_segments, values.shape[1]), values.dtype)
    return sums.at[slot].set(prefix, mode="drop")
