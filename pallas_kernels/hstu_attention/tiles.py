"""Tile sizes of the GPU kernels: a pure function of compute capability, dtype, widths and length.

The table is a first choice by shared memory and registers, read from compiled code
(`compile_check.py`, docs/performance.md); nothing in it was timed on a GPU yet. No JAX device is
asked here; `devices.py` does that.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

MAX_WIDTH = 256
# The smallest side of a tensor core product.
MIN_BLOCK = 16
# Shared memory that one program may use, by compute capability (CUDA programming guide, table of
# technical specifications, less the 1 KiB that the system reserves).
_SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227}
_SMALLEST_KIB = 99


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of one kernel's program.

    Args:
        block_q: queries of a tile.
        block_k: keys of a tile.
        num_warps: groups of 32 threads of a program.
        num_stages: tiles of the loop in flight, the one in use included.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile

    @property
    def row_multiple(self) -> int:
        """What the padded row length must be a multiple of; blocks are powers of two."""
        return max(max(t.block_q, t.block_k) for t in (self.forward, self.dq, self.dkv))


def padded_width(width: int) -> int:
    """Width per head inside the kernels: the next power of two, at least 16."""
    return max(MIN_BLOCK, 1 << (width - 1).bit_length())


def shared_memory_limit(capability: tuple[int, int] | None) -> int:
    """Bytes of shared memory that one program may use; the smallest known for other devices."""
    return 1024 * _SHARED_KIB.get(capability, _SMALLEST_KIB)


# Half types by shared memory in KiB, then by the padded width, at most: forward, dq, dkv. The
# largest tiles whose compiled code keeps its sums in registers (compile_check prints it).
_HALF = {
    227: {
        64: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        256: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
    },
    163: {
        64: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
        128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        256: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    },
    99: {
        64: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
        128: (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 128, 8, 2)),
        256: (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 1)),
    },
}
# Products of float32 run outside the tensor cores, and registers are short before shared memory.
_SINGLE = {
    64: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    128: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    256: (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 16, 4, 2)),
}


def choose_tiles(
    capability: tuple[int, int] | None, dtype: np.dtype, *, qk_dim: int, v_dim: int, row_len: int
) -> Tiles:
    """Returns the tiles of the three kernels.

    Args:
        capability: CUDA compute capability of the device (`devices.Device.capability`).
        dtype: of q, k and v.
        qk_dim: K, as the caller has it.
        v_dim: V.
        row_len: L, not padded; no block is longer than the next power of two.

    Raises:
        ValueError: a width above `MAX_WIDTH`.
    """
    width = max(padded_width(qk_dim), padded_width(v_dim))
    if width > MAX_WIDTH:
        raise ValueError(
            f"qk_dim={qk_dim}, v_dim={v_dim}: at most {MAX_WIDTH} each; use more heads."
        )
    is_single = jnp.dtype(dtype) == jnp.float32
    table = _SINGLE if is_single else _HALF[shared_memory_limit(capability) // 1024]
    chosen = next(table[most] for most in sorted(table) if width <= most)
    longest = padded_width(row_len)
    return Tiles(*(_cut(tile, longest) for tile in chosen))


def _cut(tile, longest):
    return dataclasses.replace(
        tile, block_q=min(tile.block_q, longest), block_k=min(tile.block_k, longest)
    )
