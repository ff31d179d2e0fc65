"""HSTU attention by Pallas kernels on the Triton backend, for NVIDIA GPUs from sm80 on.

Here is what surrounds the kernels: whether they can run, cleaning and padding of the inputs, the
schedule of tiles, values that are not finite, the derivative. The kernels themselves are in
`triton_kernels.py`, tile sizes in `tiles.py`. JAX 0.11 calls this backend deprecated, JAX 0.12
still has it: this is the portable baseline of the GPU paths.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import devices, dispatch
from pallas_kernels.hstu_attention import last_query, self_check, tile_runs, triton_kernels
from pallas_kernels.hstu_attention.layout import SequenceLayout, slot_intervals, token_segments
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.poison import at_tokens, finite_or_zero, poisoned_segments
from pallas_kernels.hstu_attention.tiles import MAX_WIDTH, Tiles, choose_tiles, padded_width

MIN_CAPABILITY = (8, 0)
# Tiles of interpret mode, which has no device: those of the usual one, an H100.
INTERPRETED_CAPABILITY = (9, 0)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled in.

    Args:
        scale: alpha and divisor.
        tiles: of the three kernels.
        num_segments: S.
        interpret: run by XLA instead of compiling.
    """

    scale: triton_kernels.Scale
    tiles: Tiles
    num_segments: int
    interpret: bool


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
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "R L H V"]:
    """Returns what `api.hstu_attention` promises, for every rule; targets included.

    Products have float32 sums; float32 inputs are never rounded to TF32. With half types, scores
    and their gradients are rounded to the inputs' dtype before the product that follows: float16
    overflows where a score or a gradient of one is above 65504. The backward pass is
    deterministic. The layout's block schedule is not used: each kernel makes its own, at its own
    tile sizes, from the mask.

    Args:
        q: as for the api, like all that is not listed here.
        k: keys.
        v: values.
        layout: where the segments lie.
        rule: the mask.
        alpha: factor of the logits.
        divisor: what scores are divided by.
        num_targets: targets at the end of each segment.
        interpret: run the kernels' own code by XLA, program after program, on any device: to find
            faults, far too slow for anything else.
        tiles: for experiments; None = `tiles.choose_tiles`.

    Raises:
        UnsupportedByKernel: the device is not an NVIDIA GPU of compute capability 8.0 or newer,
            a width is above 256, or the self-check found wrong results on this device.
    """
    device = _check_device(interpret)
    _check_width(q.shape[3], v.shape[3])
    widths = dict(qk_dim=q.shape[3], v_dim=v.shape[3])
    if tiles is None:
        tiles = choose_tiles(device.capability, q.dtype, row_len=q.shape[1], **widths)
    kernel = functools.partial(_run, interpret=interpret, tiles=tiles)
    if device.is_present and not interpret:
        self_check.require("pallas_triton", kernel, device, dtype=q.dtype, tiles=tiles, **widths)
    return kernel(
        q,
        k,
        v,
        layout=layout,
        rule=rule,
        alpha=alpha,
        divisor=divisor,
        num_targets=num_targets,
    )


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
    """Returns what `api.hstu_attention_last` promises, by the same linear program as "xla".

    There is no kernel for one query per segment: each key meets one query, so the work is reading
    k and v once, which XLA fuses into one pass. The name exists so that a model can ask for
    "pallas_triton" in all layers; the device is checked as for the full op.

    Raises:
        UnsupportedByKernel: the device is not an NVIDIA GPU of compute capability 8.0 or newer.
    """
    _check_device(interpret)
    return last_query.hstu_attention_last(
        q, k, v, layout=layout, rule=rule, alpha=alpha, divisor=divisor
    )


def supports(device: devices.Device) -> bool:
    """Whether the kernels can be compiled for a device."""
    capability = device.capability
    return device.platform == "gpu" and capability is not None and capability >= MIN_CAPABILITY


def _check_device(interpret):
    device = devices.current_device()
    if interpret:
        return dataclasses.replace(device, capability=INTERPRETED_CAPABILITY)
    if not supports(device):
        found = f"compute capability {device.capability}" if device.capability else device.platform
        raise dispatch.UnsupportedByKernel(
            f"device={device.kind!r}: pallas_triton needs an NVIDIA GPU of compute capability 8.0 "
            f"or newer, this is {found}; use 'auto' or 'xla', or 'pallas_triton_interpret' to look "
            "for faults. To compile for a GPU that is not here, name it by "
            "jax.sharding.use_abstract_mesh."
        )
    return device


def _check_width(qk_dim, v_dim):
    if max(qk_dim, v_dim) > MAX_WIDTH:
        raise dispatch.UnsupportedByKernel(
            f"q.shape[3]={qk_dim}, v.shape[3]={v_dim}: pallas_triton takes widths up to "
            f"{MAX_WIDTH}; use more heads, or 'xla'."
        )


def _run(q, k, v, *, layout, rule, alpha, divisor, num_targets=None, interpret, tiles):
    intervals = slot_intervals(layout, num_targets, rule=rule, padded_len=layout.row_len)
    bounds = jnp.stack([x for interval in intervals for x in (interval.start, interval.end)], 1)
    num_segments = len(layout.starts)
    program = Program(triton_kernels.Scale(alpha, divisor), tiles, num_segments, interpret)
    return attend(q, k, v, token_segments(layout), bounds, program)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    segment: Int[Array, "R L"],
    bounds: Int[Array, "R I L"],
    program: Program,
) -> Float[Array, "R L H V"]:
    """The op with its mask as data: one compiled program serves every mask.

    Args:
        q: queries; anything may stand in padding.
        k: keys.
        v: values.
        segment: segment of each slot, -1 in padding.
        bounds: start and end, in slots of the row, of each interval of keys that a query sees
            (start, end, start, end); zeros in padding.
        program: everything static.
    """
    return _attend_forward(q, k, v, segment, bounds, program)[0]


def _attend_forward(q, k, v, segment, bounds, program):
    tile = program.tiles.forward
    padded_bounds, is_visited = _schedule(bounds, program.tiles, tile)
    output = triton_kernels.forward(
        *(_to_tiles(x, segment, program.tiles) for x in (q, k, v)),
        bounds=padded_bounds,
        runs=tile_runs.runs_of(is_visited),
        scale=program.scale,
        tile=tile,
        interpret=program.interpret,
    )
    is_bad = poisoned_segments(segment, q, k, v, num_segments=program.num_segments)
    output = _from_tiles(output, v, is_bad, segment)
    # Nothing quadratic and nothing padded is kept: the backward pass prepares its inputs again.
    return output, (q, k, v, segment, bounds, is_bad)


def _attend_backward(program, residuals, cotangent):
    q, k, v, segment, bounds, is_bad = residuals
    arrays = [_to_tiles(x, segment, program.tiles) for x in (q, k, v, cotangent)]
    shared = dict(scale=program.scale, interpret=program.interpret)
    tile = program.tiles.dq
    padded_bounds, is_visited = _schedule(bounds, program.tiles, tile)
    runs = tile_runs.runs_of(is_visited)
    dq = triton_kernels.dq(*arrays, bounds=padded_bounds, runs=runs, tile=tile, **shared)
    tile = program.tiles.dkv
    padded_bounds, is_visited = _schedule(bounds, program.tiles, tile)
    runs = tile_runs.runs_of(jnp.swapaxes(is_visited, 1, 2))
    dk, dv = triton_kernels.dkv(*arrays, bounds=padded_bounds, runs=runs, tile=tile, **shared)
    is_bad |= poisoned_segments(segment, cotangent, num_segments=program.num_segments)
    gradients = ((dq, q), (dk, k), (dv, v))
    return *(_from_tiles(x, like, is_bad, segment) for x, like in gradients), None, None


attend.defvjp(_attend_forward, _attend_backward)


def _padded_len(row_len, tiles):
    return -(-row_len // tiles.row_multiple) * tiles.row_multiple


def _schedule(bounds, tiles, tile):
    """Bounds for all slots of a padded row, and the pairs of tiles that they touch."""
    row_len = bounds.shape[2]
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, _padded_len(row_len, tiles) - row_len)))
    visited = tile_runs.visited_tiles(bounds, block_q=tile.block_q, block_k=tile.block_k)
    return bounds, visited


def _to_tiles(array, segment, tiles):
    """[R, L, H, W] -> [R, padded L, H, padded W], zero where there is no finite token value.

    The pass that clears padding and values that are not finite pads as well, at no extra read:
    inside the kernels no load or store needs a mask, and every row of a tile is aligned.
    """
    row_len, width = array.shape[1], array.shape[3]
    add_len = _padded_len(row_len, tiles) - row_len
    add_width = padded_width(width) - width
    clean = finite_or_zero(array, segment >= 0)
    return jnp.pad(clean, ((0, 0), (0, add_len), (0, 0), (0, add_width)))


def _from_tiles(tiles, like, is_bad, segment):
    """The kernel's result in the caller's shape, NaN in segments that hold a bad value."""
    result = tiles[:, : like.shape[1], :, : like.shape[3]]
    return jnp.where(at_tokens(is_bad, segment), jnp.nan, result).astype(like.dtype)
