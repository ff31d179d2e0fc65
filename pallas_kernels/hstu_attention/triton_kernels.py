"""The three Pallas kernels of HSTU attention for the Triton backend: forward, dq, dk and dv.

Each program owns one tile of its result and walks the tiles of the other side that the mask
touches, so there are no atomics and the result is the same bits each time. Arrays are clean (zeros
in padding, nothing but finite values) and padded to whole tiles and to widths that are powers of
two; `pallas_triton.py` sees to that and to everything else around the kernels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.hstu_attention.tile_runs import TileRuns
from pallas_kernels.hstu_attention.tiles import Tile

_LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Scale:
    """The op's two numbers: scores are silu(alpha q.k) / divisor."""

    alpha: float
    divisor: float


def forward(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    *,
    bounds: Int[Array, "R I L"],
    runs: TileRuns,
    scale: Scale,
    tile: Tile,
    interpret: bool,
) -> Float[Array, "R L H V"]:
    """o_i = sum_j M_ij silu(alpha <q_i, k_j>) v_j / divisor, one program per query tile.

    Args:
        q: queries.
        k: keys.
        v: values.
        bounds: start and end of each mask interval of each query: start, end, start, end.
        runs: key tiles of each query tile.
        scale: alpha and divisor.
        tile: block sizes, both divide L.
        interpret: run by XLA on any device instead of compiling.
    """
    return _call(
        functools.partial(_forward_kernel, scale=scale, tile=tile),
        runs=runs,
        tiled=[bounds, q],
        whole=[k, v],
        outputs=[jax.ShapeDtypeStruct(v.shape, v.dtype)],
        block=tile.block_q,
        tile=tile,
        interpret=interpret,
        name="hstu_attention_forward",
    )[0]


def dq(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    g: Float[Array, "R L H V"],
    *,
    bounds: Int[Array, "R I L"],
    runs: TileRuns,
    scale: Scale,
    tile: Tile,
    interpret: bool,
) -> Float[Array, "R L H K"]:
    """dq_i = alpha / divisor sum_j M_ij silu'(alpha <q_i, k_j>) <g_i, v_j> k_j; as `forward`."""
    return _call(
        functools.partial(_dq_kernel, scale=scale, tile=tile),
        runs=runs,
        tiled=[bounds, q, g],
        whole=[k, v],
        outputs=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        block=tile.block_q,
        tile=tile,
        interpret=interpret,
        name="hstu_attention_dq",
    )[0]


def dkv(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    g: Float[Array, "R L H V"],
    *,
    bounds: Int[Array, "R I L"],
    runs: TileRuns,
    scale: Scale,
    tile: Tile,
    interpret: bool,
) -> tuple[Float[Array, "R L H K"], Float[Array, "R L H V"]]:
    """dk and dv, one program per key tile; `runs` are the query tiles of each key tile.

    dk_j = alpha / divisor sum_i M_ij silu'(alpha <q_i, k_j>) <g_i, v_j> q_i
    dv_j = 1 / divisor sum_i M_ij silu(alpha <q_i, k_j>) g_i
    """
    dk, dv = _call(
        functools.partial(_dkv_kernel, scale=scale, tile=tile),
        runs=runs,
        tiled=[k, v],
        whole=[bounds, q, g],
        outputs=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        block=tile.block_k,
        tile=tile,
        interpret=interpret,
        name="hstu_attention_dkv",
    )
    return dk, dv


def _forward_kernel(counts, runs, bounds_ref, q_ref, k_ref, v_ref, o_ref, *, scale, tile):
    query, bounds = q_ref[...], _load_bounds(bounds_ref, slice(None))

    def add_tile(key_tile, total):
        slots = pl.ds(key_tile * tile.block_k, tile.block_k)
        value = v_ref[slots, :]
        logits = scale.alpha * _dot(query, k_ref[slots, :], trans_b=True)
        mask = _mask(bounds, key_tile * tile.block_k, tile.block_k, query_axis=0)
        scores = jnp.where(mask, logits * _gate(logits, value.dtype), 0.0)
        return total + _dot(scores.astype(value.dtype), value)

    total = _for_each_tile(counts, runs, add_tile, jnp.zeros(o_ref.shape, jnp.float32))
    # Divided once at the end: scores of half precision would lose digits by it.
    o_ref[...] = (total / scale.divisor).astype(o_ref.dtype)


def _dq_kernel(counts, runs, bounds_ref, q_ref, g_ref, k_ref, v_ref, dq_ref, *, scale, tile):
    query, cotangent = q_ref[...], g_ref[...]
    bounds = _load_bounds(bounds_ref, slice(None))

    def add_tile(key_tile, total):
        slots = pl.ds(key_tile * tile.block_k, tile.block_k)
        key = k_ref[slots, :]
        logits = scale.alpha * _dot(query, key, trans_b=True)
        dscores = _dot(cotangent, v_ref[slots, :], trans_b=True)
        mask = _mask(bounds, key_tile * tile.block_k, tile.block_k, query_axis=0)
        gate = _gate(logits, key.dtype)
        dlogits = jnp.where(mask, dscores * _silu_slope(logits, gate), 0.0)
        return total + _dot(dlogits.astype(key.dtype), key)

    total = _for_each_tile(counts, runs, add_tile, jnp.zeros(dq_ref.shape, jnp.float32))
    dq_ref[...] = (total * (scale.alpha / scale.divisor)).astype(dq_ref.dtype)


def _dkv_kernel(
    counts, runs, k_ref, v_ref, bounds_ref, q_ref, g_ref, dk_ref, dv_ref, *, scale, tile
):
    key, value = k_ref[...], v_ref[...]
    first_key = pl.program_id(0) * tile.block_k

    def add_tile(query_tile, totals):
        slots = pl.ds(query_tile * tile.block_q, tile.block_q)
        query, cotangent = q_ref[slots, :], g_ref[slots, :]
        # Keys along the rows: then neither product below needs its left side transposed.
        logits = scale.alpha * _dot(key, query, trans_b=True)
        dscores = _dot(value, cotangent, trans_b=True)
        bounds = _load_bounds(bounds_ref, slots)
        mask = _mask(bounds, first_key, tile.block_k, query_axis=1)
        gate = _gate(logits, key.dtype)
        scores = jnp.where(mask, logits * gate, 0.0)
        dlogits = jnp.where(mask, dscores * _silu_slope(logits, gate), 0.0)
        dk, dv = totals
        dv = dv + _dot(scores.astype(value.dtype), cotangent)
        return dk + _dot(dlogits.astype(key.dtype), query), dv

    zeros = jnp.zeros(dk_ref.shape, jnp.float32), jnp.zeros(dv_ref.shape, jnp.float32)
    dk, dv = _for_each_tile(counts, runs, add_tile, zeros)
    dk_ref[...] = (dk * (scale.alpha / scale.divisor)).astype(dk_ref.dtype)
    dv_ref[...] = (dv / scale.divisor).astype(dv_ref.dtype)


def _for_each_tile(counts_ref, runs_ref, add_tile, totals):
    """Runs `totals = add_tile(tile, totals)` over all tiles of all runs, in ascending order."""

    def one_run(run, totals):
        return lax.fori_loop(runs_ref[run, 0], runs_ref[run, 1], add_tile, totals)

    return lax.fori_loop(jnp.int32(0), counts_ref[0], one_run, totals)


def _load_bounds(bounds_ref, slots):
    """(start, end) of each mask interval for the queries of these slots."""
    lines = [bounds_ref[line, slots] for line in range(bounds_ref.shape[0])]
    return list(zip(lines[::2], lines[1::2], strict=True))


def _mask(bounds, first_key, block_k, *, query_axis):
    """Mask of one tile: queries along `query_axis`, keys along the other."""
    key_slot = jnp.expand_dims(first_key + jnp.arange(block_k, dtype=jnp.int32), query_axis)
    mask = None
    for start, end in bounds:
        start, end = (jnp.expand_dims(bound, 1 - query_axis) for bound in (start, end))
        is_seen = (key_slot >= start) & (key_slot < end)
        mask = is_seen if mask is None else mask | is_seen
    return mask


def _gate(logits, dtype):
    """sigmoid(logits), as exact as the dtype of the inputs deserves."""
    if dtype == jnp.float32:
        return 1.0 / (1.0 + jnp.exp(-logits))
    # One instruction instead of ten; relative error 2e-6 at logits of -20, half types have 5e-4.
    return 1.0 / (1.0 + jnp.exp2(-_LOG2_E * logits))


def _silu_slope(logits, gate):
    """d silu(x) / dx = sigmoid(x) (1 + x (1 - sigmoid(x)))."""
    return gate + logits * gate * (1.0 - gate)


def _dot(left, right, *, trans_b=False):
    """Product with float32 sums; float32 inputs are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        left,
        right,
        (((1,), (1 if trans_b else 0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _call(kernel, *, runs, tiled, whole, outputs, block, tile, interpret, name):
    """One program per (tile, head, row): `tiled` and `outputs` by tile, `whole` for all slots."""
    # Here and not above: it costs a tenth of a second that programs without this kernel save.
    from jax.experimental.pallas import triton as pltriton

    num_rows, row_len, num_heads, _ = outputs[0].shape
    capacity = runs.bounds.shape[2]

    def spec(array, length):
        if len(array.shape) == 3:  # bounds [R, I, L] have no heads
            return pl.BlockSpec(
                (None, array.shape[1], length),
                lambda i, h, r: (r, 0, i if length == block else 0),
            )
        return pl.BlockSpec(
            (None, length, None, array.shape[3]),
            lambda i, h, r: (r, i if length == block else 0, h, 0),
        )

    return pl.pallas_call(
        kernel,
        grid=(row_len // block, num_heads, num_rows),
        in_specs=[
            pl.BlockSpec((None, None, 1), lambda i, h, r: (r, i, 0)),
            pl.BlockSpec((None, None, capacity, 2), lambda i, h, r: (r, i, 0, 0)),
            *(spec(array, block) for array in tiled),
            *(spec(array, row_len) for array in whole),
        ],
        out_specs=[spec(array, block) for array in outputs],
        out_shape=outputs,
        # Without parameters of its own, jax before 0.11 would take another backend than Triton.
        compiler_params=pltriton.CompilerParams(
            num_warps=tile.num_warps, num_stages=tile.num_stages
        ),
        interpret=interpret,
        name=name,
    )(runs.counts, runs.bounds, *tiled, *whole)
