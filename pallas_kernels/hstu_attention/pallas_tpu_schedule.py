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
# Larger than every pair, so that it is sorted behind them.
_NONE = (1 << 31) - 1


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

    Pairs of all row groups become numbers and are sorted, which drops doubles and what stands past
    a group's count; the other order is one more sort. Sorts, because a TPU scatters one element
    after the other.

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
    by_query = jnp.sort(_tile_pairs(layout, block_len, tile_bits))
    is_double = jnp.pad(by_query[1:] == by_query[:-1], (1, 0))
    by_query = jnp.sort(jnp.where(is_double, _NONE, by_query))[:capacity]
    count = (by_query < _NONE).sum(dtype=jnp.int32)
    mask = (1 << tile_bits) - 1
    row, query, key = by_query >> 2 * tile_bits, by_query >> tile_bits & mask, by_query & mask
    transposed = (row << 2 * tile_bits) + (key << tile_bits) + query
    by_key = jnp.sort(jnp.where(by_query < _NONE, transposed, _NONE))
    size = dict(num_rows=layout.num_rows, num_tiles=-(-layout.row_len // block_len))
    return dict(
        by_query=_repeat_last(by_query, count),
        by_key=_repeat_last(by_key, count),
        count=count[None],
        has_queries=_occurring(by_query, tile_bits, **size),
        has_keys=_occurring(by_key, tile_bits, **size),
    )


def _tile_pairs(layout, block_len, tile_bits):
    """Pairs of tiles that hold a part of a scheduled pair of blocks, unsorted, with doubles."""
    reach = _tiles_per_block(layout.block_len, block_len)
    pairs, counts = layout.block_pairs, layout.num_block_pairs
    is_valid = jnp.arange(pairs.shape[1])[None] < counts[:, None]
    row, *blocks = (pairs[..., axis].reshape(1, 1, -1) for axis in range(3))
    # All tiles that a block may lie in, [query, key, pair]; the last block of a row is cut.
    offset = jnp.arange(reach, dtype=jnp.int32)
    query, key = (
        block * layout.block_len // block_len + step
        for block, step in zip(blocks, (offset[:, None, None], offset[None, :, None]), strict=True)
    )
    last_query, last_key = (
        (jnp.minimum((block + 1) * layout.block_len, layout.row_len) - 1) // block_len
        for block in blocks
    )
    is_hit = is_valid.reshape(1, 1, -1) & (query <= last_query) & (key <= last_key)
    numbers = (row << 2 * tile_bits) + (query << tile_bits) + key
    listed = jnp.where(is_hit, numbers, _NONE).astype(jnp.int32).reshape(-1)
    # One entry more, so that there is one if the layout has none.
    return jnp.pad(listed, (0, 1), constant_values=_NONE)


def _repeat_last(pairs, count):
    # A step that asks for the tiles of the step before moves nothing.
    last = jnp.where(count > 0, pairs[jnp.maximum(count - 1, 0)], 0)
    return jnp.where(pairs < _NONE, pairs, last)


def _occurring(pairs, tile_bits, *, num_rows, num_tiles):
    """True for the outer tiles of a sorted list, [row, tile]."""
    outer = pairs >> tile_bits
    row, tile = jnp.arange(num_rows, dtype=jnp.int32), jnp.arange(num_tiles, dtype=jnp.int32)
    wanted = (row[:, None] << tile_bits) + tile[None]
    at = jnp.searchsorted(outer, wanted)
    return outer[jnp.minimum(at, outer.shape[0] - 1)] == wanted
