"""The three TPU kernels of HSTU attention: output, gradient of q, gradients of k and v.

Each walks a list of tile pairs that is prefetched into scalar memory, so the tiles of the next step
are under way while one is computed and no other tile is ever read. Scores stand transposed, keys
down and queries across: the mask bounds of the queries are then one row that spreads over all keys,
and k and v get their gradients without a transpose. Arrays come from `pallas_tpu.py`.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.hstu_attention.pallas_tpu_tiles import Tiles

# Compiled by themselves, so that layers and masks of one shape share a trace.
_jit = functools.partial(
    jax.jit, static_argnames=("tile_bits", "tiles", "alpha", "divisor", "interpret")
)


@_jit
def forward(
    q: Float[Array, "R H P K"],
    k: Float[Array, "R H P K"],
    v: Float[Array, "R H P V"],
    intervals: Int[Array, "R T I B"],
    pairs: Int[Array, "N"],
    count: Int[Array, "1"],
    *,
    tile_bits: int,
    tiles: Tiles,
    alpha: float,
    divisor: float,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "R H P V"]:
    """Returns `o_i = sum_j M_ij silu(alpha <q_i, k_j>) / divisor v_j` of the scheduled tiles.

    Args:
        q: finite everywhere; P slots are T whole tiles and widths are whole lanes, here and below.
        k: keys.
        v: values.
        intervals: start, end, start, end, ... of the keys of each slot's query.
        pairs: the pairs of tiles to visit (`TileSchedule`), here in the order of `by_query`.
        count: how many of them.
        tile_bits: of the pairs.
        tiles: sizes of tiles.
        alpha: factor of the logits.
        divisor: what scores are divided by.
        interpret: run the kernel as ordinary operations, on any platform, or by the simulator of
            a TPU's memories that `pltpu.InterpretParams` sets up.

    Returns:
        Outputs; query tiles that occur in no pair are not written and may hold anything.
    """

    def add(head, mask, queries, keys, totals):
        (q_ref,), (k_ref, v_ref), (total_ref,) = queries, keys, totals
        logits = alpha * _dot(k_ref[head], q_ref[head], 1, 1)
        scores = jnp.where(mask, logits * jax.nn.sigmoid(logits), 0)
        value = v_ref[head]
        total_ref[head] += _dot(scores.astype(value.dtype), value, 0, 0)

    (output,) = _visit(
        add,
        queries=(q,),
        keys=(k, v),
        intervals=intervals,
        outputs=(v,),
        scales=(1 / divisor,),
        outer="query",
        pairs=pairs,
        count=count,
        tile_bits=tile_bits,
        tiles=tiles,
        interpret=interpret,
        name="hstu_attention_forward",
    )
    return output


@_jit
def backward_query(
    q: Float[Array, "R H P K"],
    k: Float[Array, "R H P K"],
    v: Float[Array, "R H P V"],
    cotangent: Float[Array, "R H P V"],
    intervals: Int[Array, "R T I B"],
    pairs: Int[Array, "N"],
    count: Int[Array, "1"],
    *,
    tile_bits: int,
    tiles: Tiles,
    alpha: float,
    divisor: float,
    interpret: bool | pltpu.InterpretParams,
) -> Float[Array, "R H P K"]:
    """Returns the gradient of q; `dq_i = alpha / divisor sum_j M_ij <g_i, v_j> silu'(x_ij) k_j`.

    Arguments as of `forward`, pairs `by_query`; query tiles that occur in no pair are not written.
    """

    def add(head, mask, queries, keys, totals):
        (q_ref, g_ref), (k_ref, v_ref), (dq_ref,) = queries, keys, totals
        key = k_ref[head]
        _, dlogits = _scores(q_ref[head], key, v_ref[head], g_ref[head], mask, alpha)
        dq_ref[head] += _dot(dlogits.astype(key.dtype), key, 0, 0)

    (dq,) = _visit(
        add,
        queries=(q, cotangent),
        keys=(k, v),
        intervals=intervals,
        outputs=(q,),
        scales=(alpha / divisor,),
        outer="query",
        pairs=pairs,
        count=count,
        tile_bits=tile_bits,
        tiles=tiles,
        interpret=interpret,
        name="hstu_attention_backward_query",
    )
    return dq


@_jit
def backward_key_value(
    q: Float[Array, "R H P K"],
    k: Float[Array, "R H P K"],
    v: Float[Array, "R H P V"],
    cotangent: Float[Array, "R H P V"],
    intervals: Int[Array, "R T I B"],
    pairs: Int[Array, "N"],
    count: Int[Array, "1"],
    *,
    tile_bits: int,
    tiles: Tiles,
    alpha: float,
    divisor: float,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[Float[Array, "R H P K"], Float[Array, "R H P V"]]:
    """Returns the gradients of k and v.

    `dk_j = alpha / divisor sum_i M_ij <g_i, v_j> silu'(x_ij) q_i` and
    `dv_j = 1 / divisor sum_i M_ij silu(x_ij) g_i`, with `x_ij = alpha <q_i, k_j>`. Arguments as of
    `forward`, but pairs `by_key`; key tiles that occur in no pair are not written.
    """

    def add(head, mask, queries, keys, totals):
        (q_ref, g_ref), (k_ref, v_ref), (dk_ref, dv_ref) = queries, keys, totals
        query, cotangent = q_ref[head], g_ref[head]
        scores, dlogits = _scores(query, k_ref[head], v_ref[head], cotangent, mask, alpha)
        dk_ref[head] += _dot(dlogits.astype(query.dtype), query, 1, 0)
        dv_ref[head] += _dot(scores.astype(query.dtype), cotangent, 1, 0)

    dk, dv = _visit(
        add,
        queries=(q, cotangent),
        keys=(k, v),
        intervals=intervals,
        outputs=(k, v),
        scales=(alpha / divisor, 1 / divisor),
        outer="key",
        pairs=pairs,
        count=count,
        tile_bits=tile_bits,
        tiles=tiles,
        interpret=interpret,
        name="hstu_attention_backward_key_value",
    )
    return dk, dv


def _scores(query, key, value, cotangent, mask, alpha):
    """Scores and gradients of the logits, [key, query], both without 1 / divisor."""
    logits = alpha * _dot(key, query, 1, 1)
    gate = jax.nn.sigmoid(logits)
    scores = logits * gate
    # d silu(x) / dx = sigmoid(x) + silu(x) (1 - sigmoid(x))
    dlogits = _dot(value, cotangent, 1, 1) * (gate + scores * (1 - gate))
    # Selected, not multiplied: a product of two users' values may overflow.
    return jnp.where(mask, scores, 0), jnp.where(mask, dlogits, 0)


def _dot(left, right, left_axis, right_axis):
    """Product of two tiles over one axis of each, in float32."""
    # One pass of the matrix unit rounds float32 to bfloat16; bfloat16 is exact in one, and Mosaic
    # refuses more for it (which jax.default_matmul_precision may ask for).
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _visit(
    add: Callable,
    *,
    queries: Sequence,
    keys: Sequence,
    intervals: Array,
    outputs: Sequence,
    scales: Sequence[float],
    outer: str,
    pairs: Array,
    count: Array,
    tile_bits: int,
    tiles: Tiles,
    interpret: bool | pltpu.InterpretParams,
    name: str,
):
    """Runs `add(head, mask, queries, keys, totals)` for all scheduled pairs and heads.

    Pairs with one outer tile follow each other; their totals stay on the chip and are written once,
    times `scales`. So sums have one order, whatever runs them.
    """
    heads, block_len = tiles.heads_per_step, tiles.block_len
    is_outer_query = outer == "query"

    def token_spec(array, *, is_outer):
        def index(group, step, pairs_ref, count_ref):
            row, tile = _row_and_tile(pairs_ref[step], tile_bits, is_outer=is_outer)
            return row, group, tile, 0

        return pl.BlockSpec((None, heads, block_len, array.shape[3]), index)

    def interval_index(group, step, pairs_ref, count_ref):
        return *_row_and_tile(pairs_ref[step], tile_bits, is_outer=is_outer_query), 0, 0

    kernel = functools.partial(
        _kernel,
        add=add,
        sizes=(len(queries), len(keys), 1, len(outputs), len(outputs)),
        scales=scales,
        tile_bits=tile_bits,
        is_outer_query=is_outer_query,
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            # As many steps as pairs: a batch of short histories runs fewer steps of one program.
            # Without any pair there is one step, which does nothing.
            grid=(queries[0].shape[1] // heads, jnp.maximum(count[0], 1)),
            in_specs=[
                *(token_spec(array, is_outer=is_outer_query) for array in queries),
                *(token_spec(array, is_outer=not is_outer_query) for array in keys),
                pl.BlockSpec((None, None, *intervals.shape[2:]), interval_index),
            ],
            out_specs=[token_spec(array, is_outer=True) for array in outputs],
            scratch_shapes=[
                pltpu.VMEM((heads, block_len, array.shape[3]), jnp.float32) for array in outputs
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(pairs, count, *queries, *keys, intervals)


def _row_and_tile(pair, tile_bits, *, is_outer):
    """Row of a pair, and its outer or its inner tile."""
    tile = pair >> tile_bits if is_outer else pair
    return pair >> (2 * tile_bits), tile & ((1 << tile_bits) - 1)


def _kernel(pairs_ref, count_ref, *refs, add, sizes, scales, tile_bits, is_outer_query):
    """One grid step: the tiles of one pair, for a group of heads."""
    step, count = pl.program_id(1), count_ref[0]
    refs = iter(refs)
    query_refs, key_refs, (interval_ref,), output_refs, total_refs = (
        tuple(itertools.islice(refs, size)) for size in sizes
    )

    @pl.when(step < count)
    def _():
        pair = pairs_ref[step]
        before, after = jnp.maximum(step - 1, 0), jnp.minimum(step + 1, count - 1)
        is_first = (step == 0) | (pairs_ref[before] >> tile_bits != pair >> tile_bits)
        is_last = (step == count - 1) | (pairs_ref[after] >> tile_bits != pair >> tile_bits)

        @pl.when(is_first)
        def _():
            for total_ref in total_refs:
                total_ref[...] = jnp.zeros_like(total_ref)

        num_heads, block_len, _ = query_refs[0].shape
        _, key_tile = _row_and_tile(pair, tile_bits, is_outer=not is_outer_query)
        mask = tile_mask(interval_ref, key_tile * block_len, block_len)
        for head in range(num_heads):
            add(head, mask, query_refs, key_refs, total_refs)

        @pl.when(is_last)
        def _():
            for output_ref, total_ref, scale in zip(output_refs, total_refs, scales, strict=True):
                output_ref[...] = (total_ref[...] * scale).astype(output_ref.dtype)


def tile_mask(interval_ref, first_key: Int[Array, ""], block_len: int) -> Bool[Array, "B B"]:
    """Mask of one tile, [key, query], inside a kernel.

    Args:
        interval_ref: start, end, start, end, ... of the keys of each query of the tile, in slots of
            its row.
        first_key: slot of the tile's first key.
        block_len: keys and queries of a tile.
    """
    key = first_key + lax.broadcasted_iota(jnp.int32, (block_len, block_len), 0)
    mask = None
    for index in range(0, interval_ref.shape[0], 2):
        start, end = interval_ref[index : index + 1, :], interval_ref[index + 1 : index + 2, :]
        is_inside = (key >= start) & (key < end)
        mask = is_inside if mask is None else mask | is_inside
    return mask
