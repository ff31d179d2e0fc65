"""The layout's block schedule in tiles of the TPU kernel, in the two orders that its kernels walk.

Runs on the device, from the traced pair list. The tiles of the kernel need not be the blocks of the
layout: the host cuts blocks before it knows the chip, so pairs are counted again in tiles here.
Tile sizes are chosen in `pallas_tpu_tiles.py`, the kernels are in `pallas_tpu_kernels.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import dispatch
from pallas_kernels.hstu_attention.layout import SequenceLayout

# A list of this many pairs takes half of the scalar memory of a core (1 MiB from v4 on).
MAX_PAIRS = 1 << 17


@dataclasses.dataclass(frozen=True)
class TileSchedule:
    """Pairs of tiles that attention visits.

    A pair is one number, `(row << 2 * tile_bits) + (outer << tile_bits) + inner`: scalar memory is
    small, and neighbours of one run differ in the lowest bits only.

    Args:
        by_query: pairs in the order (row, query tile, key tile), outer = query. Entries past the
            count repeat the last pair.
        by_key: the same pairs in the order (row, key tile, query tile), outer = key.
        count: number of valid pairs.
        has_queries: True for the query tiles that occur in a pair.
        has_keys: True for the key tiles that occur in a pair.
        tile_bits: width of a tile index.
    """

    by_query: Int[Array, "P"]
    by_key: Int[Array, "P"]
    count: Int[Array, "1"]
    has_queries: Bool[Array, "R T"]
    has_keys: Bool[Array, "R T"]
    tile_bits: int


def build_tile_schedule(layout: SequenceLayout, *, block_len: int) -> TileSchedule:
    """Returns the pairs of tiles that hold all pairs of blocks of the layout.

    Pairs of all row groups are drawn into one map [R, tiles, tiles] and read back from it, once as
    it is and once transposed: that compacts groups, drops doubles and sorts in both orders, in time
    linear in the map, which has one entry for `block_len ** 2` scores.

    Args:
        layout: only its schedule is used; `layout.block_len` may be any size.
        block_len: tokens of a tile.

    Raises:
        UnsupportedByKernel: the list may not fit in scalar memory.
    """
    num_tiles = -(-layout.row_len // block_len)
    reach = _tiles_per_block(layout.block_len, block_len)
    num_groups, group_pairs, _ = layout.block_pairs.shape
    capacity = max(1, min(layout.num_rows * num_tiles**2, num_groups * group_pairs * reach**2))
    tile_bits = (num_tiles - 1).bit_length()
    if capacity > MAX_PAIRS or layout.num_rows << (2 * tile_bits) >= 1 << 31:
        raise dispatch.UnsupportedByKernel(
            f"layout: {layout.num_rows} rows of {layout.row_len} slots may visit {capacity} pairs "
            f"of tiles of {block_len}, more than the {MAX_PAIRS} that fit in scalar memory; give "
            "fewer rows at a time, or use 'xla'."
        )
    return TileSchedule(**_list_tiles(layout, block_len, capacity, tile_bits), tile_bits=tile_bits)


def _tiles_per_block(layout_block_len, block_len):
    """Most tiles that one block of the layout lies in, along one axis."""
    if block_len % layout_block_len == 0:
        return 1
    if layout_block_len % block_len == 0:
        return layout_block_len // block_len
    return (layout_block_len + block_len - 2) // block_len + 1


@functools.partial(jax.jit, static_argnames=("block_len", "capacity", "tile_bits"))
def _list_tiles(layout, block_len, capacity, tile_bits):
    """Arrays of the schedule; all layers of a model share this computation."""
    is_visited = _visited_tiles(layout, block_len)
    count = is_visited.sum(dtype=jnp.int32)
    return dict(
        by_query=_list_pairs(is_visited, count, capacity, tile_bits),
        by_key=_list_pairs(jnp.swapaxes(is_visited, 1, 2), count, capacity, tile_bits),
        count=count[None],
        has_queries=is_visited.any(axis=2),
        has_keys=is_visited.any(axis=1),
    )


def _visited_tiles(layout, block_len):
    """True for (row, query tile, key tile) that hold a part of a scheduled pair of blocks."""
    num_tiles = -(-layout.row_len // block_len)
    reach = _tiles_per_block(layout.block_len, block_len)
    pairs, counts = layout.block_pairs, layout.num_block_pairs
    is_valid = jnp.arange(pairs.shape[1])[None] < counts[:, None]
    row, *blocks = (pairs[..., axis].reshape(1, 1, -1) for axis in range(3))
    # All tiles that a block may lie in, [query, key, pair]; the last block of a row may reach
    # beyond the row. What is not hit goes to a row that the scatter drops.
    offset = jnp.arange(reach)
    query, key = (
        block * layout.block_len // block_len + step
        for block, step in zip(blocks, (offset[:, None, None], offset[None, :, None]), strict=True)
    )
    last_query, last_key = (((b + 1) * layout.block_len - 1) // block_len for b in blocks)
    is_hit = is_valid.reshape(1, 1, -1) & (query <= last_query) & (key <= last_key)
    target = (jnp.where(is_hit, row, layout.num_rows), *jnp.broadcast_arrays(query, key))
    is_visited = jnp.zeros((layout.num_rows, num_tiles, num_tiles), bool)
    return is_visited.at[target].set(True, mode="drop")


def _list_pairs(is_visited, count, capacity, tile_bits):
    row, outer, inner = jnp.nonzero(is_visited, size=capacity, fill_value=0)
    pairs = (row.astype(jnp.int32) << (2 * tile_bits)) + (outer << tile_bits) + inner
    pairs = pairs.astype(jnp.int32)
    # A step that asks for the tiles of the step before moves nothing.
    return jnp.where(jnp.arange(capacity) < count, pairs, pairs[jnp.maximum(count - 1, 0)])
