"""Tile size and heads per step of the TPU kernel: pure functions, no device is asked.

The choice weighs what a tile costs against what starting a grid step costs, within on-chip memory.
The rates are those that the chips are sold with; nothing here was timed on a TPU. What runs the
tiles is `pallas_tpu_kernels.py`.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch

# The vector unit holds 128 lanes and the matrix unit is at least 128 wide: narrower tiles cost as
# much as full ones.
LANES = 128
CANDIDATES = (128, 256, 512)
# Of the 16 MiB that a kernel may use by default; the rest is left to the compiler's own copies.
VMEM_BUDGET = 13 << 20
# Peak bfloat16 rate of a core and its memory bandwidth, FLOP/s and byte/s.
_RATES = {
    "TPU v4": (1.37e14, 6.1e11),
    "TPU v5 lite": (1.97e14, 8.2e11),
    "TPU v5e": (1.97e14, 8.2e11),
    "TPU v5": (2.3e14, 1.38e12),
    "TPU v5p": (2.3e14, 1.38e12),
    "TPU v6 lite": (9.2e14, 1.64e12),
    "TPU v6e": (9.2e14, 1.64e12),
    "TPU7x": (1.15e15, 3.7e12),
}
_DEFAULT_KIND = "TPU v5e"
# What starting a grid step costs is an assumption, a few hundred cycles.
_STEP_S = 0.35e-6
# About 12 vector operations per score and kernel, 4 units of 8 x 128 lanes at some 1 GHz.
_VECTOR_S = 12 / (4 * 8 * 128 * 1e9)
# Products of float32 at full precision are made of six bfloat16 products.
_FLOAT32_PASSES = 6


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How attention is cut.

    Args:
        block_len: tokens of a query tile and of a key tile.
        heads_per_step: heads that one grid step computes; they share the mask.

    Raises:
        ValueError: a size below 1.
    """

    block_len: int
    heads_per_step: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name}={value}: must be at least 1; leave tiles out.")


def padded_width(width: int) -> int:
    """Width of a head in memory.

    Rows of tiles are whole lanes in the memory of a TPU whether or not they are used, so zeros up
    to the next multiple of 128 cost nothing there, and products over whole lanes need no masks.
    """
    return -(-width // LANES) * LANES


def vmem_bytes(tiles: Tiles, *, qk_dim: int, v_dim: int, dtype: jnp.dtype | np.dtype | type) -> int:
    """Estimates the on-chip memory of the backward kernel of keys and values, the largest one.

    Args:
        tiles: sizes of tiles.
        qk_dim: width of queries and keys per head.
        v_dim: width of values per head.
        dtype: of the arrays.
    """
    item = jnp.dtype(dtype).itemsize
    width = padded_width(qk_dim) + padded_width(v_dim)
    tile = tiles.heads_per_step * tiles.block_len * width
    # Inputs (of queries and of keys) and outputs are double buffered; sums are float32.
    buffers = 2 * 3 * tile * item + 4 * tile
    # Logits, gate, scores and both of their gradients, and copies in the dtype of the products.
    scores = tiles.block_len**2 * (5 * 4 + 2 * item)
    return buffers + scores


def choose_tiles(
    *,
    device_kind: str,
    dtype: jnp.dtype | np.dtype | type,
    qk_dim: int,
    v_dim: int,
    num_heads: int,
    row_len: int,
) -> Tiles:
    """Returns the tiles with the least estimated time of forward and backward over a causal row.

    Large tiles waste work on the diagonal, `tiles (tiles + 1) / 2` of them for a row; small ones
    spend their time on starting steps. A host schedule gains nothing from blocks that are smaller
    than a tile.

    Args:
        device_kind: as `jax.Device.device_kind` gives it; an unknown kind counts as a v5e.
        dtype: of the arrays.
        qk_dim: width of queries and keys per head.
        v_dim: width of values per head.
        num_heads: heads.
        row_len: slots of a row.

    Raises:
        UnsupportedByKernel: heads are so wide that no tile fits.
    """
    best, best_s = None, float("inf")
    for block_len in CANDIDATES:
        if block_len >= 2 * row_len and best is not None:
            break
        for heads in _heads_per_step(num_heads):
            tiles = Tiles(block_len, heads)
            if vmem_bytes(tiles, qk_dim=qk_dim, v_dim=v_dim, dtype=dtype) > VMEM_BUDGET:
                continue
            seconds = _row_seconds(tiles, device_kind, dtype, qk_dim, v_dim, num_heads, row_len)
            if seconds < best_s:
                best, best_s = tiles, seconds
    if best is None:
        raise dispatch.UnsupportedByKernel(
            f"q.shape[3]={qk_dim}, v.shape[3]={v_dim}: tiles of {CANDIDATES[0]} tokens of so wide "
            "heads do not fit in on-chip memory; use more heads, or 'xla'."
        )
    return best


def _heads_per_step(num_heads):
    """Divisors that leave two groups of heads, because some chips split them over two cores."""
    return [n for n in range(1, max(num_heads // 2, 1) + 1) if num_heads % n == 0 and n <= 4]


def _row_seconds(tiles, device_kind, dtype, qk_dim, v_dim, num_heads, row_len):
    """Estimated time of the three kernels over one causal row."""
    flop_rate, byte_rate = _RATES.get(device_kind, _RATES[_DEFAULT_KIND])
    item, block = jnp.dtype(dtype).itemsize, tiles.block_len
    qk, value = padded_width(qk_dim), padded_width(v_dim)
    passes = _FLOAT32_PASSES if item == 4 else 1
    # Products of the three kernels: q k and p v; q k, g v and d k; q k, g v, d q and p g.
    matrix_s = 2 * block**2 * (5 * qk + 4 * value) * passes / flop_rate
    vector_s = 3 * block**2 * _VECTOR_S
    # Each step reads its inner tiles: two of them, three times.
    memory_s = 3 * block * (qk + value) * item / byte_rate
    num_tiles = -(-row_len // block)
    steps = num_heads // tiles.heads_per_step * num_tiles * (num_tiles + 1) / 2
    return steps * (3 * _STEP_S + tiles.heads_per_step * max(matrix_s, vector_s, memory_s))
