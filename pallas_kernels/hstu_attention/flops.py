"""Floating point operations of HSTU attention: what the mask asks for, what a kernel computes.

Only matrix products are counted. A product of an [m, W] and a [W, n] matrix is `2 m n W`
operations. Useful operations are those of visible pairs of tokens; executed ones are those of all
tiles that an implementation visits, at its own tile sizes and padded widths. Timing is in
`benchmark.py`.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from pallas_kernels import devices
from pallas_kernels.hstu_attention import (
    pallas_tpu_schedule,
    pallas_tpu_tiles,
    tile_runs,
    tiles,
)
from pallas_kernels.hstu_attention.layout import SequenceLayout, slot_intervals
from pallas_kernels.hstu_attention.mask import MaskRule, key_intervals

Passes = Literal["forward", "backward", "both"]

# Products over the width of queries and keys, and over that of values, in one visit of a tile.
# Forward: q k and s v. Backward in one loop: q k, dq, dk and g v, dv. Kernels that write dq apart
# from dk and dv compute q k and g v in each.
_FORWARD, _BACKWARD = (1, 1), (3, 2)
_DQ, _DKV = (2, 1), (2, 2)
# The dense formula keeps its scores for the backward pass.
_DENSE_BACKWARD = (2, 2)


def visible_pairs(lengths: Int[np.ndarray, "B"], rule: MaskRule) -> int:
    """Counts (query, key) pairs that the mask lets through, without targets, one head.

    Args:
        lengths: tokens of each segment, contextual tokens included.
        rule: the mask.
    """
    total = 0
    for length in lengths.tolist():
        position = np.arange(length)
        for interval in key_intervals(position, np.full(length, length), None, rule=rule, xp=np):
            total += int(np.maximum(interval.end - interval.start, 0).sum())
    return total


def attention_flops(
    num_pairs: int, *, num_heads: int, qk_dim: int, v_dim: int, passes: Passes = "both"
) -> int:
    """Useful operations: forward `2 K + 2 V` per visible pair and head, backward `6 K + 4 V`.

    The backward pass is q.k again, g.v, and the shares of dq, dk and dv: 2.5 times the forward
    pass where K = V.

    Args:
        num_pairs: result of `visible_pairs`.
        num_heads: H.
        qk_dim: K.
        v_dim: V.
        passes: forward, backward, or both together.
    """
    count = functools.partial(_product_flops, num_heads=num_heads, qk_dim=qk_dim, v_dim=v_dim)
    return _of_passes(count(num_pairs, _FORWARD), count(num_pairs, _BACKWARD), passes)


def executed_flops(
    implementation: str,
    layout: SequenceLayout,
    rule: MaskRule,
    *,
    device: devices.Device,
    dtype: np.dtype | type,
    num_heads: int,
    qk_dim: int,
    v_dim: int,
    passes: Passes = "both",
) -> int | None:
    """Operations that an implementation computes, masked and padded pairs of its tiles included.

    Args:
        implementation: a name of `api.Implementation`.
        layout: where the segments lie, without targets; built for `rule`.
        rule: the mask.
        device: what the kernels choose their tiles by.
        dtype: of q, k and v.
        num_heads: H.
        qk_dim: K.
        v_dim: V.
        passes: forward, backward, or both together.

    Returns:
        The count, or None for an implementation whose tiles are not known here.
    """
    count = functools.partial(_product_flops, num_heads=num_heads, qk_dim=qk_dim, v_dim=v_dim)
    if implementation == "reference":
        area = layout.num_rows * layout.row_len**2
        return _of_passes(count(area, _FORWARD), count(area, _DENSE_BACKWARD), passes)
    if implementation == "xla":
        area = int(np.sum(layout.num_block_pairs)) * layout.block_len**2
        return _of_passes(count(area, _FORWARD), count(area, _BACKWARD), passes)
    sizes = dict(device=device, dtype=jnp.dtype(dtype), qk_dim=qk_dim, v_dim=v_dim)
    if implementation == "pallas_triton":
        forward, dq, dkv = _triton_areas(layout, rule, **sizes)
        width = tiles.padded_width
    elif implementation == "pallas_tpu":
        forward = dq = dkv = _tpu_area(layout, num_heads=num_heads, **sizes)
        width = pallas_tpu_tiles.padded_width
    else:
        return None
    count = functools.partial(count, qk_dim=width(qk_dim), v_dim=width(v_dim))
    return _of_passes(count(forward, _FORWARD), count(dq, _DQ) + count(dkv, _DKV), passes)


def _product_flops(area, products, *, num_heads, qk_dim, v_dim):
    num_qk, num_v = products
    return 2 * area * num_heads * (num_qk * qk_dim + num_v * v_dim)


def _of_passes(forward, backward, passes):
    return {"forward": forward, "backward": backward, "both": forward + backward}[passes]


def _triton_areas(layout, rule, *, device, dtype, qk_dim, v_dim):
    """Pairs of tokens in the tiles that each of the three kernels visits, one head."""
    chosen = tiles.choose_tiles(
        device.capability, dtype, qk_dim=qk_dim, v_dim=v_dim, row_len=layout.row_len
    )
    multiple = chosen.row_multiple
    padded_len = -(-layout.row_len // multiple) * multiple
    for tile in (chosen.forward, chosen.dq, chosen.dkv):
        num_tiles = _num_visited(layout, rule, padded_len, tile.block_q, tile.block_k)
        yield int(num_tiles) * tile.block_q * tile.block_k


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _num_visited(layout, rule, padded_len, block_q, block_k):
    intervals = slot_intervals(layout, None, rule=rule, padded_len=padded_len)
    bounds = jnp.stack([x for interval in intervals for x in (interval.start, interval.end)], 1)
    visited = tile_runs.visited_tiles(bounds, block_q=block_q, block_k=block_k)
    return visited.sum(dtype=jnp.int32)


def _tpu_area(layout, *, device, dtype, num_heads, qk_dim, v_dim):
    """Pairs of tokens in the tiles that the TPU kernels visit, one head."""
    chosen = pallas_tpu_tiles.choose_tiles(
        device_kind=device.kind,
        dtype=dtype,
        qk_dim=qk_dim,
        v_dim=v_dim,
        num_heads=num_heads,
        row_len=layout.row_len,
    )
    schedule = pallas_tpu_schedule.build_tile_schedule(layout, block_len=chosen.block_len)
    return int(schedule.count[0]) * chosen.block_len**2
