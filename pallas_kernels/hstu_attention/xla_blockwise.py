"""HSTU attention in plain XLA with memory linear in the length, forward and backward.

One loop walks the layout's block schedule and adds each tile's share in place: only blocks that
the mask touches cost anything and no [L, L] array exists. The op's signature is in `api.py`, the
mask in `mask.py`; the form with one query per segment is in `last_query.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.hstu_attention import bias as bias_lib
from pallas_kernels.hstu_attention.layout import SequenceLayout, slot_intervals, token_segments
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.poison import at_tokens, finite_or_zero, poisoned_segments


def hstu_attention(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    *,
    layout: SequenceLayout,
    rule: MaskRule,
    alpha: float,
    divisor: float,
    num_targets: Int[Array, "S"] | None = None,
    bias: bias_lib.AttentionBias | None = None,
) -> Float[Array, "R L H V"]:
    """Returns what `api.hstu_attention` promises, for every rule and bias, tile by tile.

    Tiles and sums are float32 whatever the inputs are. A segment that holds a value that is not
    finite gets NaN everywhere, output and gradients; all others are as if it were not there. The
    gradients of the bias's tables, which all segments share, are then NaN.
    """
    tiles = None
    if bias is not None:
        tiles = bias_lib.prepare_tiles(bias, layout, padded_len=_padded_len(layout))
    return _attend(q, k, v, layout, num_targets, tiles, rule, alpha, divisor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attend(q, k, v, layout, num_targets, tiles, rule, alpha, divisor):
    return _attend_forward(q, k, v, layout, num_targets, tiles, rule, alpha, divisor)[0]


def _attend_forward(q, k, v, layout, num_targets, tiles, rule, alpha, divisor):
    segment = token_segments(layout)
    intervals = slot_intervals(layout, num_targets, rule=rule, padded_len=_padded_len(layout))
    q_tiles, k_tiles, v_tiles = (_to_tiles(x, segment, layout) for x in (q, k, v))

    def add_tile(row, query_block, key_block, total):
        load = functools.partial(_load, row=row, block_len=layout.block_len)
        logits = _dot(load(q_tiles, query_block) * alpha, load(k_tiles, key_block), 2, 2)
        if tiles is not None:
            place = (row, query_block, key_block)
            logits = logits + bias_lib.tile_bias(tiles, *place, layout.block_len)
        # Not by tanh: it saves 2 % on a CPU and has no correct digit left for logits below -16.
        scores = logits * jax.nn.sigmoid(logits)
        mask = _tile_mask(intervals, row, query_block, key_block, layout.block_len)
        scores = jnp.where(mask, scores, 0)
        return _add(total, row, query_block, _dot(scores, load(v_tiles, key_block), 2, 1))

    total = _for_each_pair(layout, add_tile, jnp.zeros(v_tiles.shape, jnp.float32))
    is_bad = poisoned_segments(segment, q, k, v, num_segments=layout.starts.shape[0])
    output = _from_tiles(total, layout) / divisor
    output = jnp.where(at_tokens(is_bad, segment), jnp.nan, output).astype(v.dtype)
    # Beyond the inputs almost nothing is kept: tiles are cheap to rebuild, scores are quadratic.
    return output, (q, k, v, layout, num_targets, tiles, is_bad)


def _attend_backward(rule, alpha, divisor, residuals, cotangent):
    q, k, v, layout, num_targets, tiles, is_bad = residuals
    segment = token_segments(layout)
    intervals = slot_intervals(layout, num_targets, rule=rule, padded_len=_padded_len(layout))
    q_tiles, k_tiles, v_tiles, g_tiles = (
        _to_tiles(x, segment, layout) for x in (q, k, v, cotangent)
    )
    # Sums over queries are products of rows with rows if queries and gradients also lie the other
    # way round: the other product, of columns, takes a CPU two to four times as long. Measured on a
    # CPU alone, for which this implementation is; the copies are linear in the length.
    q_columns, g_columns = (jnp.swapaxes(x, 2, 3) for x in (q_tiles, g_tiles))

    def add_tile(row, query_block, key_block, totals):
        load = functools.partial(_load, row=row, block_len=layout.block_len)
        load_columns = functools.partial(_load_columns, row=row, block_len=layout.block_len)
        q_tile, g_tile = load(q_tiles, query_block) * alpha, load(g_tiles, query_block) / divisor
        k_tile, v_tile = load(k_tiles, key_block), load(v_tiles, key_block)
        logits = _dot(q_tile, k_tile, 2, 2)
        place = (row, query_block, key_block)
        if tiles is not None:
            logits = logits + bias_lib.tile_bias(tiles, *place, layout.block_len)
        mask = _tile_mask(intervals, row, query_block, key_block, layout.block_len)
        gate = jax.nn.sigmoid(logits)
        scores = logits * gate
        # d silu(x) / dx = sigmoid(x) + silu(x) (1 - sigmoid(x))
        dlogits = _dot(g_tile, v_tile, 2, 2) * (gate + scores * (1 - gate))
        # Selected, not multiplied: a product of two users' values may overflow.
        scores, dlogits = jnp.where(mask, scores, 0), jnp.where(mask, dlogits, 0)
        dq, dk, dv, dbias = totals
        if tiles is not None:
            dbias = bias_lib.add_gradients(dbias, tiles, dlogits, *place)
        dq = _add(dq, row, query_block, _dot(dlogits, k_tile, 2, 1))
        q_column, g_column = (load_columns(x, query_block) for x in (q_columns, g_columns))
        dk = _add_columns(dk, row, key_block, _dot(q_column * alpha, dlogits, 2, 1))
        dv = _add_columns(dv, row, key_block, _dot(g_column / divisor, scores, 2, 1))
        return dq, dk, dv, dbias

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_tiles, q_columns, g_columns))
    no_bias = None if tiles is None else bias_lib.zero_gradients(tiles)
    dq, dk, dv, dbias = _for_each_pair(layout, add_tile, (*zeros, no_bias))
    dk, dv = (jnp.swapaxes(x, 2, 3) for x in (dk, dv))
    is_bad |= poisoned_segments(segment, cotangent, num_segments=is_bad.shape[0])
    is_bad_token = at_tokens(is_bad, segment)
    gradients = (
        jnp.where(is_bad_token, jnp.nan, _from_tiles(total, layout)).astype(primal.dtype)
        for total, primal in ((dq * alpha, q), (dk, k), (dv, v))
    )
    dbias = jax.tree.map(lambda table: jnp.where(is_bad.any(), jnp.nan, table), dbias)
    return *gradients, None, None, dbias


_attend.defvjp(_attend_forward, _attend_backward)


def _for_each_pair(layout, add_tile, totals):
    """Runs `totals = add_tile(row, query_block, key_block, totals)` over all scheduled pairs."""
    pairs, counts = jnp.asarray(layout.block_pairs), jnp.asarray(layout.num_block_pairs)

    def one_pair(group, index, totals):
        pair = lax.dynamic_slice(pairs, (group, index, 0), (1, 1, 3), allow_negative_indices=False)
        return add_tile(pair[0, 0, 0], pair[0, 0, 1], pair[0, 0, 2], totals)

    def one_group(group, totals):
        one = functools.partial(one_pair, group)
        return lax.fori_loop(jnp.int32(0), counts[group].astype(jnp.int32), one, totals)

    # The trip count is data: a batch of short histories takes fewer steps of the same program.
    return lax.fori_loop(jnp.int32(0), jnp.int32(pairs.shape[0]), one_group, totals)


def _tile_mask(intervals, row, query_block, key_block, block_len):
    """Mask of one tile, [1, query, key]."""
    key = key_block * block_len + lax.broadcasted_iota(jnp.int32, (1, block_len, block_len), 2)
    mask = jnp.zeros((1, block_len, block_len), bool)
    for interval in intervals:
        start, end = (
            lax.dynamic_slice(
                bound, (row, query_block * block_len), (1, block_len), allow_negative_indices=False
            )[:, :, None]
            for bound in (interval.start, interval.end)
        )
        mask = mask | ((key >= start) & (key < end))
    return mask


def _padded_len(layout):
    return -(-layout.row_len // layout.block_len) * layout.block_len


def _to_tiles(array, segment, layout):
    """[R, L, H, W] -> [R, H, padded L, W], zero where there is no finite token value."""
    # Heads outside the tokens: a tile is then one contiguous piece per head.
    tiles = jnp.swapaxes(finite_or_zero(array, segment >= 0), 1, 2)
    return jnp.pad(tiles, ((0, 0), (0, 0), (0, _padded_len(layout) - layout.row_len), (0, 0)))


def _from_tiles(tiles, layout):
    """[R, H, padded L, W] -> [R, L, H, W]."""
    return jnp.swapaxes(tiles[:, :, : layout.row_len], 1, 2)


def _load(tiles, block, *, row, block_len):
    """One block as float32, [H, block_len, W]."""
    _, num_heads, _, width = tiles.shape
    start = (row, jnp.int32(0), block * block_len, jnp.int32(0))
    size = (1, num_heads, block_len, width)
    tile = lax.dynamic_slice(tiles, start, size, allow_negative_indices=False)
    return tile[0].astype(jnp.float32)


def _load_columns(columns, block, *, row, block_len):
    """One block of [R, H, W, padded L] as float32, [H, W, block_len]."""
    _, num_heads, width, _ = columns.shape
    start = (row, jnp.int32(0), jnp.int32(0), block * block_len)
    size = (1, num_heads, width, block_len)
    tile = lax.dynamic_slice(columns, start, size, allow_negative_indices=False)
    return tile[0].astype(jnp.float32)


def _add_columns(total, row, block, tile):
    """Adds a tile [H, W, block_len] in place."""
    start = (row, jnp.int32(0), jnp.int32(0), block * tile.shape[2])
    old = lax.dynamic_slice(total, start, (1, *tile.shape), allow_negative_indices=False)
    return lax.dynamic_update_slice(total, old + tile[None], start, allow_negative_indices=False)


def _add(total, row, block, tile):
    """Adds a tile [H, block_len, W] in place."""
    start = (row, jnp.int32(0), block * tile.shape[1], jnp.int32(0))
    old = lax.dynamic_slice(total, start, (1, *tile.shape), allow_negative_indices=False)
    return lax.dynamic_update_slice(total, old + tile[None], start, allow_negative_indices=False)


def _dot(left, right, left_axis, right_axis):
    """Contracts one axis of two tiles, batched over heads, in full float32."""
    dimensions = (((left_axis,), (right_axis,)), ((0,), (0,)))
    return lax.dot_general(left, right, dimensions, precision=lax.Precision.HIGHEST)
