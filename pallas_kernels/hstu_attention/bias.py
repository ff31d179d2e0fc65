"""Learned biases of the logits: a value per distance of two tokens, one per bucket of elapsed time.

What a caller gives (`AttentionBias`), the rule of buckets, and lookups that never make an [L, L]
array: tile by tile for `xla_blockwise.py`, and one query per segment for `last_query.py`. Gradients
of the tables are sums in a fixed order on every device. `reference.py` writes the biases densely.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.hstu_attention.layout import SequenceLayout, token_positions, token_segments

NO_TIME = int(np.iinfo(np.int32).min)  # what a slot without a time holds
LOG_STEP = 0.301  # natural logarithm of the ratio of neighbouring buckets' first intervals


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AttentionBias:
    """What is added to the scaled logits of every head, before SiLU.

    `rab_ij = by_distance[min(|i - j|, P - 1)] + by_interval[bucket(query_time_i - key_time_j)]`,
    with positions i and j inside the segment and
    `bucket(t) = min(floor(log(max(|t|, 1)) / 0.301), T)`, the natural logarithm. A pair of which
    one time is `NO_TIME` has no second term.

    Times are whole seconds from any origin, subtracted as int32: as float32 they would round, by
    the distance of the origin. Two of a segment must differ by less than 2**31; an interval above
    2**24 then counts as its nearest float32.

    Args:
        by_distance: [P] values by distance in tokens; None = no such term.
        by_interval: [T + 1] values by bucket; None = no such term, and then no times either.
        query_time_s: when each slot asks; anything may stand in padding slots.
        key_time_s: when what each slot holds happened.

    Source: Zhai et al. 2024, "Actions Speak Louder than Words", section 3 and their public code
    (bucketed relative bias, shared by the heads). There |i - j| is i - j, since nothing looks
    ahead; and the bucket is rounded as float32 falls, here an interval is compared with edges
    that are computed once, so that every device agrees.
    """

    by_distance: Float[Array, "P"] | None = None
    by_interval: Float[Array, "T1"] | None = None
    query_time_s: Int[Array, "R L"] | None = None
    key_time_s: Int[Array, "R L"] | None = None


@functools.lru_cache(maxsize=16)
def interval_edges(num_buckets: int) -> Float[np.ndarray, "T1"]:
    """Smallest float32 interval of each bucket 0..T: 0, then exp(0.301 b) rounded up.

    Infinite where no finite interval reaches the bucket.
    """
    largest = np.finfo(np.float32).max
    edges = np.full(num_buckets + 1, np.inf, np.float32)
    edges[0] = 0
    for bucket in range(1, num_buckets + 1):
        exact = math.exp(min(LOG_STEP * bucket, 700.0))
        if exact > largest:
            break
        edge = np.float32(exact)
        edges[bucket] = edge if float(edge) >= exact else np.nextafter(edge, np.float32(np.inf))
    return edges


# The exponent and the first three bits of the mantissa of a float32: a step of at most 1/8, so that
# no two edges share a bin.
_BIN_SHIFT = 20
_FIRST_BIN, _INFINITE_BIN = (
    int(np.float32(value).view(np.int32)) >> _BIN_SHIFT for value in (1.0, np.inf)
)


@functools.lru_cache(maxsize=16)
def _bins(num_buckets):
    """(bucket in which each bin begins, the edge that may lie in it) for bins from 1 s on."""
    first = np.arange(_FIRST_BIN, _INFINITE_BIN + 1, dtype=np.int32) << _BIN_SHIFT
    edges = interval_edges(num_buckets)
    bucket = np.searchsorted(edges, first.view(np.float32), side="right") - 1
    bucket = np.minimum(bucket, num_buckets)
    next_edge = np.append(edges, np.float32(np.inf))[bucket + 1]
    return bucket.astype(np.int32), next_edge


def interval_buckets(interval_s: Float[Array, "*pairs"], num_buckets: int) -> Int[Array, "*pairs"]:
    """Bucket 0..T of every interval, T + 1 where the interval is infinite; NaN means nothing.

    By the bits of the number and one comparison with an edge: a logarithm is not the same on every
    device, and took four times as long as the whole of this on a CPU.
    """
    magnitude = jnp.maximum(jnp.abs(interval_s), 1)
    bits = lax.bitcast_convert_type(magnitude, jnp.int32)
    number = lax.shift_right_logical(bits, jnp.int32(_BIN_SHIFT)) - _FIRST_BIN
    bucket, next_edge = (_read(jnp.asarray(x), number) for x in _bins(num_buckets))
    # Nothing finite reaches the edge at infinity; an infinite interval does, from bucket T.
    return bucket + (magnitude >= next_edge)


def _read(table, index):
    return table.at[index].get(mode="promise_in_bounds")


class TileBias(NamedTuple):
    """The tables as the loop over tiles reads them; entries that are not used are None.

    Attributes:
        distance: [2 n - 1, block_len, block_len] for n blocks of a row: the tile of a query block
            and a key block depends on their difference only.
        interval: [T + 2], the last entry 0: of pairs without a time.
        query_time: [R, padded L], `NO_TIME` for none.
        key_time: same.
    """

    distance: Any
    interval: Any
    query_time: Any
    key_time: Any


def prepare_tiles(bias: AttentionBias, layout: SequenceLayout, *, padded_len: int) -> TileBias:
    """What the loop over tiles reads, in memory linear in the row's length.

    Args:
        bias: tables and times.
        layout: where the segments lie.
        padded_len: slots of a row in whole tiles.
    """
    distance = interval = query_time = key_time = None
    if bias.by_distance is not None:
        distance = _distance_tiles(
            bias.by_distance.astype(jnp.float32), padded_len=padded_len, block_len=layout.block_len
        )
    if bias.by_interval is not None:
        interval = jnp.pad(bias.by_interval.astype(jnp.float32), (0, 1))
        width = ((0, 0), (0, padded_len - layout.row_len))
        is_token = token_segments(layout) >= 0
        query_time, key_time = (
            jnp.pad(jnp.where(is_token, time, NO_TIME), width)
            for time in (bias.query_time_s, bias.key_time_s)
        )
    return TileBias(distance, interval, query_time, key_time)


def intervals(
    query_time_s: Int[Array, "*#pairs"], key_time_s: Int[Array, "*#pairs"]
) -> Float[Array, "*#pairs"]:
    """Seconds between the times of pairs, infinite where one of them has none."""
    is_untimed = (query_time_s == NO_TIME) | (key_time_s == NO_TIME)
    interval = jnp.abs(query_time_s - key_time_s).astype(jnp.float32)
    return jnp.where(is_untimed, jnp.inf, interval)


def _distance_tiles(table, *, padded_len, block_len):
    """[2 n - 1, B, B]: entry (d, a, b) for distance |(d - n + 1) B + a - b|.

    Made by padding, cutting and reshaping alone, whose derivatives are sums in a fixed order.
    """
    size = min(table.shape[0], padded_len)
    beyond = jnp.broadcast_to(table[size - 1 :][:1], (padded_len - size,))
    values = jnp.concatenate([table[:size], beyond])  # by distance, 0 .. padded_len - 1
    both_ways = jnp.pad(jnp.concatenate([values[:0:-1], values]), (0, 1))
    blocks = both_ways.reshape(-1, block_len)
    windows = jnp.concatenate([blocks[:-1], blocks[1:]], axis=1)  # [2 n - 1, 2 B]
    # Row a of a tile is its window from entry a on: rows of 2 B + 1 entries cut from copies of a
    # window of 2 B begin one entry later each.
    count, width = windows.shape
    copies = jnp.broadcast_to(windows[:, None], (count, block_len + 1, width))
    shifted = copies.reshape(count, -1)[:, : block_len * (width + 1)]
    shifted = shifted.reshape(count, block_len, width + 1)[:, :, :block_len]
    return shifted[:, :, ::-1]


def tile_bias(
    tiles: TileBias,
    row: Int[Array, ""],
    query_block: Int[Array, ""],
    key_block: Int[Array, ""],
    block_len: int,
) -> Float[Array, "1 query key"]:
    """What is added to the logits of one tile."""
    total = jnp.zeros((1, block_len, block_len), jnp.float32)
    if tiles.distance is not None:
        entry = _distance_entry(tiles.distance, query_block, key_block)
        total = total + lax.dynamic_slice(
            tiles.distance, entry, total.shape, allow_negative_indices=False
        )
    if tiles.interval is not None:
        index = _interval_index(tiles, row, query_block, key_block, block_len)
        total = total + _read(tiles.interval, index)
    return total


def zero_gradients(tiles: TileBias) -> TileBias:
    """Gradients of nothing: where `add_gradients` begins."""
    zeros = (None if table is None else jnp.zeros_like(table) for table in tiles[:2])
    return TileBias(*zeros, None, None)


def add_gradients(
    total: TileBias,
    tiles: TileBias,
    dlogits: Float[Array, "H query key"],
    row: Int[Array, ""],
    query_block: Int[Array, ""],
    key_block: Int[Array, ""],
) -> TileBias:
    """Adds one tile's share to the gradients of the tables.

    Args:
        total: so far.
        tiles: the tables.
        dlogits: gradient of the tile's logits, 0 where the mask hides a pair.
        row: of the tile, like the two below.
        query_block: see there.
        key_block: see there.
    """
    distance, interval = total.distance, total.interval
    dbias = dlogits.sum(axis=0, keepdims=True)
    if distance is not None:
        entry = _distance_entry(distance, query_block, key_block)
        old = lax.dynamic_slice(distance, entry, dbias.shape, allow_negative_indices=False)
        distance = lax.dynamic_update_slice(
            distance, old + dbias, entry, allow_negative_indices=False
        )
    if interval is not None:
        index = _interval_index(tiles, row, query_block, key_block, dbias.shape[1])
        interval = interval + sum_by_index(
            dbias.reshape(-1), index.reshape(-1), size=interval.shape[0]
        )
    return TileBias(distance, interval, None, None)


def _distance_entry(distance, query_block, key_block):
    num_blocks = (distance.shape[0] + 1) // 2
    return query_block - key_block + (num_blocks - 1), jnp.int32(0), jnp.int32(0)


def _interval_index(tiles, row, query_block, key_block, block_len):
    query, key = (
        lax.dynamic_slice(
            times, (row, block * block_len), (1, block_len), allow_negative_indices=False
        )
        for times, block in ((tiles.query_time, query_block), (tiles.key_time, key_block))
    )
    interval = intervals(query[:, :, None], key[:, None, :])
    return interval_buckets(interval, tiles.interval.shape[0] - 2)


def sum_by_index(
    values: Float[Array, "N"], index: Int[Array, "N"], *, size: int
) -> Float[Array, "size"]:
    """Sum of the values of each index, in an order that is the same on every run.

    A scatter has such an order on a CPU, where it is 20 times as fast as anything else, and has
    none on a GPU.
    """
    return lax.platform_dependent(
        values,
        index,
        cpu=functools.partial(_sum_by_scatter, size=size),
        default=functools.partial(sum_by_product, size=size),
    )


def _sum_by_scatter(values, index, *, size):
    return jnp.zeros(size, values.dtype).at[index].add(values, mode="promise_in_bounds")


def sum_by_product(
    values: Float[Array, "N"], index: Int[Array, "N"], *, size: int
) -> Float[Array, "size"]:
    """`sum_by_index` without a scatter.

    The index is written as two digits of a base near sqrt(size); the product of the digits' one-hot
    matrices, one of them weighted, is the table of sums. Memory is about 2 N sqrt(size).
    """
    shift = (size - 1).bit_length() // 2
    base, num_high = 1 << shift, -(-size >> shift)
    high, low = (
        digit[None] == jnp.arange(count, dtype=index.dtype)[:, None]
        for digit, count in ((index >> shift, num_high), (index & (base - 1), base))
    )
    sums = lax.dot_general(
        jnp.where(high, values[None], 0),
        low.astype(values.dtype),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
    return sums.reshape(-1)[:size]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take(table, index, size):
    del size
    return _read(table, index)


def _take_forward(table, index, size):
    return _take(table, index, size), index


def _take_backward(size, index, cotangent):
    def one_row(total, row):
        return total + sum_by_index(*row, size=size), None

    total, _ = lax.scan(one_row, jnp.zeros(size, cotangent.dtype), (cotangent, index))
    return total, None


_take.defvjp(_take_forward, _take_backward)


def query_bias(
    bias: AttentionBias, position: Int[Array, "S"], layout: SequenceLayout
) -> Float[Array, "R L"]:
    """The bias of every token as a key of the query at `position` of its segment."""
    segment, slot_position = token_segments(layout), token_positions(layout)
    owner = jnp.maximum(segment, 0)
    total = jnp.zeros(segment.shape, jnp.float32)
    if bias.by_distance is not None:
        table = bias.by_distance.astype(jnp.float32)
        distance = jnp.minimum(jnp.abs(position[owner] - slot_position), table.shape[0] - 1)
        total = total + _take(table, distance, table.shape[0])
    if bias.by_interval is not None:
        table = jnp.pad(bias.by_interval.astype(jnp.float32), (0, 1))
        asked = bias.query_time_s.reshape(-1)
        place = jnp.asarray(layout.starts) + position
        asked = asked.at[place].get(mode="fill", fill_value=NO_TIME)
        key = jnp.where(segment >= 0, bias.key_time_s, NO_TIME)
        index = interval_buckets(intervals(asked[owner], key), table.shape[0] - 2)
        total = total + _take(table, index, table.shape[0])
    return total
