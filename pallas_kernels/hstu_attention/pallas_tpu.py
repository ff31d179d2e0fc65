"""HSTU attention by Pallas kernels for TPU, forward and backward.

Here arrays are brought into tiles and back, and the gradient rule is tied up. The schedule is
counted in tiles in `pallas_tpu_schedule.py`, sizes are chosen in `pallas_tpu_tiles.py`, and the
kernels are in `pallas_tpu_kernels.py`. The op's signature is in `api.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import devices, dispatch
from pallas_kernels.hstu_attention import (
    last_query,
    pallas_tpu_kernels,
    pallas_tpu_schedule,
    pallas_tpu_tiles,
    self_check,
)
from pallas_kernels.hstu_attention.layout import SequenceLayout, slot_intervals, token_segments
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.pallas_tpu_tiles import Tiles
from pallas_kernels.hstu_attention.poison import at_tokens, finite_or_zero, poisoned_segments


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled in.

    Args:
        alpha: factor of the logits.
        divisor: what scores are divided by.
        tiles: sizes of tiles.
        interpret: as of `hstu_attention`.
    """

    alpha: float
    divisor: float
    tiles: Tiles
    interpret: bool | pltpu.InterpretParams


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
    interpret: bool | pltpu.InterpretParams = False,
    tiles: Tiles | None = None,
) -> Float[Array, "R L H V"]:
    """Returns what `api.hstu_attention` promises, for every rule, by kernels for TPU.

    Only pairs of tiles that the layout's schedule touches are read and computed. Sums are float32;
    with bfloat16 inputs scores are rounded to bfloat16 before they meet the values, as the matrix
    unit wants them. The order of every sum is fixed.

    Args:
        q, k, v, layout, rule, alpha, divisor, num_targets: as of `api.hstu_attention`.
        interpret: run the kernels as ordinary XLA operations, on any platform: slow, for tests.
            `pltpu.InterpretParams` simulates the memories and copies of a TPU, slower still.
        tiles: sizes of tiles; None = `pallas_tpu_tiles.choose_tiles` for the device. They do not
            depend on `layout.block_len`. Compiled code wants block lengths that are multiples
            of 128.

    Raises:
        UnsupportedByKernel: float16, a device that is not a TPU (without `interpret`), tiles that
            do not suit a TPU, heads too wide or pair lists too long for on-chip memory, or the
            self-check found wrong results on this device.
    """
    device = _check_device(interpret)
    if q.dtype == jnp.float16:
        raise dispatch.UnsupportedByKernel(
            "q.dtype=float16: a TPU has no float16; cast to bfloat16, or use 'xla'."
        )
    num_heads, qk_dim = q.shape[2:]
    if tiles is None:
        tiles = pallas_tpu_tiles.choose_tiles(
            device_kind="" if device is None else device.kind,
            dtype=q.dtype,
            qk_dim=qk_dim,
            v_dim=v.shape[3],
            num_heads=num_heads,
            row_len=layout.row_len,
        )
    _check_tiles(tiles, num_heads, interpret)
    if device is not None and device.is_present and not interpret:
        kernel = functools.partial(_run, tiles=tiles, interpret=False)
        self_check.require(
            "pallas_tpu",
            kernel,
            device,
            dtype=q.dtype,
            qk_dim=qk_dim,
            v_dim=v.shape[3],
            tiles=tiles,
            num_heads=2 * tiles.heads_per_step,
        )
    return _run(
        q,
        k,
        v,
        layout=layout,
        rule=rule,
        alpha=alpha,
        divisor=divisor,
        num_targets=num_targets,
        tiles=tiles,
        interpret=interpret,
    )


def _run(q, k, v, *, layout, rule, alpha, divisor, num_targets=None, tiles, interpret):
    intervals = slot_intervals(layout, num_targets, rule=rule, padded_len=layout.row_len)
    bounds = jnp.stack([x for interval in intervals for x in (interval.start, interval.end)], 1)
    return attend(q, k, v, layout, bounds, Program(alpha, divisor, tiles, interpret))


def hstu_attention_last(
    q: Float[Array, "S H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    *,
    layout: SequenceLayout,
    rule: MaskRule,
    alpha: float,
    divisor: float,
    interpret: bool = False,
) -> Float[Array, "S H V"]:
    """Returns what `api.hstu_attention_last` promises, by the same XLA program as "xla".

    There is no kernel for this form and none is needed: every key meets one query, so the work is
    one pass over k and v, bound by memory. The name is here so that a model can ask for one
    implementation in all of its layers; the device is checked as for the full op.

    Raises:
        UnsupportedByKernel: the device is not a TPU.
    """
    _check_device(interpret)
    return last_query.hstu_attention_last(
        q, k, v, layout=layout, rule=rule, alpha=alpha, divisor=divisor
    )


def _check_device(interpret):
    """The TPU that the program is for, None in interpret mode elsewhere; others are refused."""
    device = devices.current_device()
    if device.platform == "tpu":
        return device
    if interpret:
        return None
    raise dispatch.UnsupportedByKernel(
        f"platform={device.platform!r}: pallas_tpu runs on TPUs only; use 'auto' or 'xla', or "
        "'pallas_tpu_interpret' to look for faults. To compile for a TPU that is not here, "
        "describe it with jax.sharding.use_abstract_mesh."
    )


def _check_tiles(tiles, num_heads, interpret):
    if num_heads % tiles.heads_per_step:
        raise dispatch.UnsupportedByKernel(
            f"tiles.heads_per_step={tiles.heads_per_step}: must divide the {num_heads} heads of q; "
            "take 1."
        )
    if not interpret and tiles.block_len % pallas_tpu_tiles.LANES:
        raise dispatch.UnsupportedByKernel(
            f"tiles.block_len={tiles.block_len}: a TPU needs a multiple of "
            f"{pallas_tpu_tiles.LANES}; take {pallas_tpu_tiles.padded_width(tiles.block_len)}. "
            "The block_len of the layout need not be changed."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    layout: SequenceLayout,
    bounds: Int[Array, "R I L"],
    program: Program,
) -> Float[Array, "R L H V"]:
    """The op with its mask as data: one compiled program serves every mask.

    Args:
        q: queries; anything may stand in padding.
        k: keys.
        v: values.
        layout: where the segments lie, with a block schedule that covers the mask.
        bounds: start and end, in slots of the row, of each interval of keys that a query sees
            (start, end, start, end); zeros in padding.
        program: everything static.
    """
    return _attend_forward(q, k, v, layout, bounds, program)[0]


def _attend_forward(q, k, v, layout, bounds, program):
    segment = token_segments(layout)
    schedule, intervals, settings = _prepare(layout, bounds, program)
    q_tiles, k_tiles, v_tiles = (_to_tiles(x, segment, program.tiles) for x in (q, k, v))
    tiles = pallas_tpu_kernels.forward(
        q_tiles, k_tiles, v_tiles, intervals, schedule.by_query, schedule.count, **settings
    )
    is_bad = poisoned_segments(segment, q, k, v, num_segments=layout.starts.shape[0])
    output = _from_tiles(tiles, schedule.has_queries, v, at_tokens(is_bad, segment))
    # Beyond the inputs almost nothing is kept: scores are cheap to rebuild, and quadratic.
    return output, (q, k, v, layout, bounds, is_bad)


def _attend_backward(program, residuals, cotangent):
    q, k, v, layout, bounds, is_bad = residuals
    segment = token_segments(layout)
    schedule, intervals, settings = _prepare(layout, bounds, program)
    arrays = [_to_tiles(x, segment, program.tiles) for x in (q, k, v, cotangent)]
    dq = pallas_tpu_kernels.backward_query(
        *arrays, intervals, schedule.by_query, schedule.count, **settings
    )
    dk, dv = pallas_tpu_kernels.backward_key_value(
        *arrays, intervals, schedule.by_key, schedule.count, **settings
    )
    is_bad |= poisoned_segments(segment, cotangent, num_segments=is_bad.shape[0])
    is_bad_token = at_tokens(is_bad, segment)
    gradients = (
        _from_tiles(tiles, is_written, primal, is_bad_token)
        for tiles, is_written, primal in (
            (dq, schedule.has_queries, q),
            (dk, schedule.has_keys, k),
            (dv, schedule.has_keys, v),
        )
    )
    return *gradients, None, None


attend.defvjp(_attend_forward, _attend_backward)


def _prepare(layout, bounds, program):
    """Schedule, mask intervals by tile, and the keywords of the kernels."""
    block_len = program.tiles.block_len
    schedule = pallas_tpu_schedule.build_tile_schedule(layout, block_len=block_len)
    padded = _pad(bounds, 2, block_len)
    intervals = padded.reshape(*bounds.shape[:2], -1, block_len).swapaxes(1, 2)
    settings = dict(
        tile_bits=schedule.tile_bits,
        tiles=program.tiles,
        alpha=program.alpha,
        divisor=program.divisor,
        interpret=program.interpret,
    )
    return schedule, intervals, settings  # intervals: [R, T, bounds, block_len]


def _pad(array, axis, multiple):
    """Zeros at the end of an axis up to a multiple."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, widths)


@functools.partial(jax.jit, static_argnames="tiles")
def _to_tiles(
    array: Float[Array, "R L H W"], segment: Int[Array, "R L"], tiles: Tiles
) -> Float[Array, "R H P X"]:
    """Whole tiles, zero where there is no finite token value."""
    # Heads outside the tokens: the last two axes are what a TPU cuts into its own tiles.
    array = jnp.swapaxes(finite_or_zero(array, segment >= 0), 1, 2)
    return _pad(_pad(array, 2, tiles.block_len), 3, pallas_tpu_tiles.LANES)


@jax.jit
def _from_tiles(
    array: Float[Array, "R H P X"],
    is_written: Bool[Array, "R T"],
    like: Float[Array, "R L H W"],
    is_bad: Bool[Array, "R L 1 1"],
) -> Float[Array, "R L H W"]:
    """Tokens again: zeros in tiles that the kernel did not write, NaN in poisoned segments."""
    _, row_len, _, width = like.shape
    block_len = array.shape[2] // is_written.shape[1]
    is_written = jnp.repeat(is_written, block_len, axis=1)[:, :row_len, None, None]
    array = jnp.swapaxes(array[:, :, :row_len, :width], 1, 2)
    return jnp.where(is_bad, jnp.nan, jnp.where(is_written, array, 0)).astype(like.dtype)
