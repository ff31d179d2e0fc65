"""Which tiles a kernel visits: for each tile of one side, runs of tiles of the other side.

Computed on the device from the mask's intervals, at the kernel's own tile sizes. A run is a range
[first, end) of neighbouring tiles that hold at least one visible pair; tiles outside all runs are
never touched. `triton_kernels.py` walks the runs.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class TileRuns:
    """Runs of each tile; int32, 8 bytes for each pair of neighbouring tiles.

    At L = 16,384 with tiles of 128 by 64 that is 128 KiB a row. The capacity, half the tiles of
    the other side, cannot overflow: between two runs lies at least one tile.

    Args:
        counts: number of runs, one entry in a last axis of its own.
        bounds: first and end tile of each run, ascending; entries past the count are ignored.
    """

    counts: Int[Array, "R T 1"]
    bounds: Int[Array, "R T C 2"]


def visited_tiles(
    bounds: Int[Array, "R I L"], *, block_q: int, block_k: int
) -> Bool[Array, "R TQ TK"]:
    """True for each pair of tiles that holds a visible pair of tokens, and no other.

    Args:
        bounds: start and end of each interval of keys of each query: start, end, start, end. L is
            a multiple of both blocks.
        block_q: queries of a tile.
        block_k: keys of a tile.
    """
    num_rows, num_lines, row_len = bounds.shape
    num_query_tiles, num_key_tiles = row_len // block_q, row_len // block_k
    first_key = block_k * jnp.arange(num_key_tiles, dtype=jnp.int32)[None, None, None]
    is_visited = jnp.zeros((num_rows, num_query_tiles, num_key_tiles), bool)
    by_tile = bounds.reshape(num_rows, num_lines, num_query_tiles, block_q, 1)
    for line in range(0, num_lines, 2):
        start, end = by_tile[:, line], by_tile[:, line + 1]
        is_seen = (start < end) & (start < first_key + block_k) & (first_key < end)
        # Fused by XLA: the [L, L / block_k] array in front of the reduction is never stored.
        is_visited = is_visited | is_seen.any(axis=2)
    return is_visited


def runs_of(is_visited: Bool[Array, "R T N"]) -> TileRuns:
    """Returns the runs of True along the last axis."""
    num_tiles = is_visited.shape[2]
    capacity = (num_tiles + 1) // 2
    tile = jnp.arange(num_tiles, dtype=jnp.int32)[None, None]
    before = jnp.pad(is_visited[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    after = jnp.pad(is_visited[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    is_first, is_last = is_visited & ~before, is_visited & ~after
    # As many ends as starts, both ascending: sorting each alone pairs them.
    firsts = jnp.sort(jnp.where(is_first, tile, num_tiles), axis=2)[:, :, :capacity]
    ends = jnp.sort(jnp.where(is_last, tile + 1, num_tiles), axis=2)[:, :, :capacity]
    counts = is_first.sum(axis=2, dtype=jnp.int32)
    return TileRuns(counts[:, :, None], jnp.stack([firsts, ends], axis=3))
