"""The block schedule counted in tiles, and the choice of tiles; no kernel runs here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch
from pallas_kernels.hstu_attention import layout, pallas_tpu_schedule
from pallas_kernels.hstu_attention.layout import SequenceLayout
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.pallas_tpu_tiles import (
    CANDIDATES,
    VMEM_BUDGET,
    Tiles,
    choose_tiles,
    padded_width,
    vmem_bytes,
)

ROWS, ROW_LEN, PAIRS = 3, 20, 12
# (length of the layout's blocks, length of the tiles): equal, either divides, neither divides.
LENGTHS = (
    (4, 8),
    (7, 4),
    (20, 3),
    *(pytest.param(*pair, marks=pytest.mark.long) for pair in ((4, 4), (10, 5), (6, 9), (3, 128))),
)


def _layout(groups, block_len):
    """A layout of which only the schedule is used; entries past the count are garbage."""
    pairs = np.full((len(groups), PAIRS, 3), 1, np.int32)
    for group, listed in enumerate(groups):
        pairs[group, : len(listed)] = np.reshape(listed, (-1, 3))
    return SequenceLayout(
        starts=np.zeros(1, np.int32),
        lengths=np.zeros(1, np.int32),
        block_pairs=pairs,
        num_block_pairs=np.array([len(listed) for listed in groups], np.int32),
        num_rows=ROWS,
        row_len=ROW_LEN,
        block_len=block_len,
    )


def _decode(pairs, count, tile_bits):
    pairs, mask = np.asarray(pairs), (1 << tile_bits) - 1
    triples = [(p >> 2 * tile_bits, (p >> tile_bits) & mask, p & mask) for p in pairs.tolist()]
    assert len(set(triples[max(count - 1, 0) :])) == 1  # the last one is repeated
    return triples[:count]


@pytest.mark.parametrize(("block_len", "tile_len"), LENGTHS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_tiles_are_those_that_scheduled_blocks_touch(block_len, tile_len, data):
    block = st.integers(0, -(-ROW_LEN // block_len) - 1)
    pair = st.tuples(st.integers(0, ROWS - 1), block, block)
    groups = [data.draw(st.lists(pair, max_size=PAIRS)) for _ in range(2)]
    schedule = pallas_tpu_schedule.build_tile_schedule(
        _layout(groups, block_len), block_len=tile_len
    )

    def tiles_of(index):
        slots = range(index * block_len, min((index + 1) * block_len, ROW_LEN))
        return {slot // tile_len for slot in slots}

    expected = {
        (row, query_tile, key_tile)
        for row, query, key in groups[0] + groups[1]
        for query_tile in tiles_of(query)
        for key_tile in tiles_of(key)
    }
    count = int(schedule.count[0])
    assert count == len(expected)
    assert _decode(schedule.by_query, count, schedule.tile_bits) == sorted(expected)
    transposed = sorted((row, key, query) for row, query, key in expected)
    assert _decode(schedule.by_key, count, schedule.tile_bits) == transposed
    for is_used, axis in ((schedule.has_queries, 1), (schedule.has_keys, 2)):
        used = {(int(row), int(tile)) for row, tile in np.argwhere(np.asarray(is_used))}
        assert used == {(pair[0], pair[axis]) for pair in expected}


def test_cost_follows_the_mask_and_the_lengths():
    """A window and short histories visit fewer tiles of one capacity."""

    def count(lengths, rule):
        built = layout.from_lengths(np.array(lengths, np.int32), row_len=1024, rule=rule)
        return int(pallas_tpu_schedule.build_tile_schedule(built, block_len=128).count[0])

    assert count([1024, 1024], MaskRule()) == 2 * 8 * 9 // 2
    assert count([1024, 100], MaskRule()) == 8 * 9 // 2 + 1
    assert count([1024, 0], MaskRule(max_attn_len=128)) == 8 + 7
    assert count([0, 0], MaskRule()) == 0


def test_refuses_lists_that_do_not_fit():
    pairs = jax.ShapeDtypeStruct((1, 4_000_000, 3), jnp.int32)
    built = dataclasses.replace(_layout([[]], 4), num_rows=20_000, row_len=1024, block_len=128)
    built = jax.tree.map(lambda x: jnp.asarray(x), built)

    def build(pairs):
        return pallas_tpu_schedule.build_tile_schedule(
            dataclasses.replace(built, block_pairs=pairs), block_len=128
        ).count

    with pytest.raises(
        dispatch.UnsupportedByKernel,
        match="20000 rows of 1024 slots may visit 1280000 pairs of tiles of 128, more than the "
        "131072 that fit in scalar memory; give fewer rows",
    ):
        jax.eval_shape(build, pairs)


KINDS = ("TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x", "TPU of the future")


def _choose(kind="TPU v5e", dtype=jnp.bfloat16, width=128, heads=4, row_len=4096):
    return choose_tiles(
        device_kind=kind, dtype=dtype, qk_dim=width, v_dim=width, num_heads=heads, row_len=row_len
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("width", [1, 32, 100, 128, 256, 512, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_chosen_tiles_fit(kind, width, dtype):
    for heads in (1, 2, 3, 4, 8, 16):
        for row_len in (1, 21, 200, 1024, 4102, 16384):
            tiles = _choose(kind, dtype, width, heads, row_len)
            assert tiles.block_len in CANDIDATES
            assert heads % tiles.heads_per_step == 0
            assert vmem_bytes(tiles, qk_dim=width, v_dim=width, dtype=dtype) <= VMEM_BUDGET
            # Two cores of one chip may share the heads.
            assert heads == 1 or heads // tiles.heads_per_step >= 2


def test_tiles_follow_what_they_are_chosen_by():
    lengths = [_choose(dtype=jnp.float32, row_len=n).block_len for n in (100, 300, 1024, 16384)]
    assert lengths == sorted(lengths) and lengths[0] == 128
    assert _choose(dtype=jnp.float32).block_len < _choose().block_len
    # A faster chip spends relatively more on starting steps.
    slow, fast = (_choose(kind, jnp.float32).block_len for kind in ("TPU v4", "TPU v6e"))
    assert slow < fast
    assert _choose(width=1024).block_len < _choose(width=128).block_len
    assert _choose(heads=4).heads_per_step > _choose(heads=1).heads_per_step
    assert _choose("TPU of the future") == _choose("TPU v5e")


def test_widths_are_whole_lanes():
    assert [padded_width(width) for width in (1, 127, 128, 129, 300)] == [128, 128, 128, 256, 384]


def test_refuses_tiles_that_are_none():
    with pytest.raises(ValueError, match="block_len=0: must be at least 1; leave tiles out"):
        Tiles(block_len=0, heads_per_step=1)
