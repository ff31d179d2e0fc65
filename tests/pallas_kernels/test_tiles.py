"""The tile heuristic: a pure function, its table and its limits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hstu_attention import tiles
from pallas_kernels.hstu_attention.tiles import Tile

BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), np.dtype("float32")


def _choose(capability, dtype, width, row_len=4102, v_dim=None):
    return tiles.choose_tiles(
        capability, dtype, qk_dim=width, v_dim=v_dim or width, row_len=row_len
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "forward", "dkv"),
    [
        ((9, 0), BFLOAT16, 64, Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)),
        ((9, 0), BFLOAT16, 128, Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
        ((8, 0), BFLOAT16, 128, Tile(128, 64, 8, 3), Tile(32, 128, 8, 2)),
        ((8, 9), BFLOAT16, 128, Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        ((9, 0), FLOAT32, 128, Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    ],
)
def test_table(capability, dtype, width, forward, dkv):
    chosen = _choose(capability, dtype, width)
    assert (chosen.forward, chosen.dkv) == (forward, dkv)


def test_widths_in_between_take_the_next_entry():
    h100 = (9, 0)
    assert _choose(h100, BFLOAT16, 1) == _choose(h100, BFLOAT16, 64)
    assert _choose(h100, BFLOAT16, 65) == _choose(h100, BFLOAT16, 128)
    assert _choose(h100, BFLOAT16, 16, v_dim=96) == _choose(h100, BFLOAT16, 128)
    assert _choose(h100, jnp.dtype("float16"), 64) == _choose(h100, BFLOAT16, 64)


def test_unknown_devices_get_the_tiles_that_fit_everywhere():
    assert tiles.shared_memory_limit(None) == 99 * 1024
    assert tiles.shared_memory_limit((12, 1)) == 99 * 1024
    assert tiles.shared_memory_limit((9, 0)) == 227 * 1024
    assert tiles.shared_memory_limit((8, 0)) == 163 * 1024
    assert _choose((12, 1), BFLOAT16, 64) == _choose((8, 9), BFLOAT16, 64)


@pytest.mark.parametrize("row_len", [1, 16, 17, 100, 8192])
def test_blocks_are_powers_of_two_between_16_and_the_row(row_len):
    capabilities = ((9, 0), (8, 0), (8, 9))
    for capability, dtype, width in itertools.product(
        capabilities, (BFLOAT16, FLOAT32), (8, 64, 128, 256)
    ):
        chosen = _choose(capability, dtype, width, row_len)
        for tile in (chosen.forward, chosen.dq, chosen.dkv):
            for block in (tile.block_q, tile.block_k):
                assert block & (block - 1) == 0
                assert 16 <= block <= max(16, 2 * row_len)
                assert chosen.row_multiple % block == 0


def test_padded_widths():
    assert [tiles.padded_width(w) for w in (1, 16, 17, 50, 64, 96, 256)] == [
        16, 16, 32, 64, 64, 128, 256
    ]  # fmt: skip


def test_too_wide_is_refused():
    with pytest.raises(ValueError, match="qk_dim=8, v_dim=300: at most 256 each; use more heads"):
        _choose((9, 0), BFLOAT16, 8, v_dim=300)
