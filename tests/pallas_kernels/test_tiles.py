"""The tile heuristic: a pure function, its table and its limits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hstu_attention import tiles
from pallas_kernels.hstu_attention.tiles import Tile

BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), np.dtype("float32")


def _choose(kind, dtype, width, row_len=4102, v_dim=None):
    return tiles.choose_tiles(kind, dtype, qk_dim=width, v_dim=v_dim or width, row_len=row_len)


@pytest.mark.parametrize(
    ("kind", "dtype", "width", "forward", "dkv"),
    [
        ("NVIDIA H100 80GB HBM3", BFLOAT16, 64, Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)),
        ("NVIDIA H200", BFLOAT16, 128, Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
        ("NVIDIA A100-SXM4-80GB", BFLOAT16, 128, Tile(128, 64, 8, 3), Tile(32, 128, 8, 2)),
        ("NVIDIA L4", BFLOAT16, 128, Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
        ("NVIDIA H100 80GB HBM3", FLOAT32, 128, Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    ],
)
def test_table(kind, dtype, width, forward, dkv):
    chosen = _choose(kind, dtype, width)
    assert (chosen.forward, chosen.dkv) == (forward, dkv)


def test_widths_in_between_take_the_next_entry():
    h100 = "NVIDIA H100"
    assert _choose(h100, BFLOAT16, 1) == _choose(h100, BFLOAT16, 64)
    assert _choose(h100, BFLOAT16, 65) == _choose(h100, BFLOAT16, 128)
    assert _choose(h100, BFLOAT16, 16, v_dim=96) == _choose(h100, BFLOAT16, 128)
    assert _choose(h100, jnp.dtype("float16"), 64) == _choose(h100, BFLOAT16, 64)


def test_unknown_devices_get_the_tiles_that_fit_everywhere():
    assert tiles.shared_memory_limit("NVIDIA Something New") == 99 * 1024
    assert tiles.shared_memory_limit("NVIDIA GH200 480GB") == 227 * 1024
    assert tiles.shared_memory_limit("NVIDIA A100-SXM4-40GB") == 163 * 1024
    assert _choose("Something New", BFLOAT16, 64) == _choose("NVIDIA L4", BFLOAT16, 64)


@pytest.mark.parametrize("row_len", [1, 16, 17, 100, 8192])
def test_blocks_are_powers_of_two_between_16_and_the_row(row_len):
    kinds = ("NVIDIA H100", "NVIDIA A100", "NVIDIA L4")
    for kind, dtype, width in itertools.product(kinds, (BFLOAT16, FLOAT32), (8, 64, 128, 256)):
        chosen = _choose(kind, dtype, width, row_len)
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
        _choose("NVIDIA H100", BFLOAT16, 8, v_dim=300)
