"""Counts of operations against masks written out pair by pair."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import devices
from pallas_kernels.hstu_attention import (
    cases,
    flops,
    pallas_tpu_tiles,
    tiles,
)
from pallas_kernels.hstu_attention.layout import from_lengths
from pallas_kernels.hstu_attention.mask import MaskRule
from tests.pallas_kernels import oracle

H100 = devices.Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), is_present=False)
V5E = devices.Device("tpu", "TPU v5e", None, is_present=False)
BFLOAT16 = jnp.dtype(jnp.bfloat16)
# Rows long enough for several tiles of the kernels, with a part of a tile at the end.
CASES = {
    "packed": cases.Case("", ((200, 40), (3, 277), ()), row_len=280, block_len=64),
    "window": cases.Case(
        "", ((270,), (150, 9)), MaskRule(contextual_len=2, max_attn_len=20), row_len=280
    ),
    "semi-local": cases.Case("", ((280,), ()), MaskRule(sla_k1=30, sla_k2=5), row_len=280),
}


def test_visible_pairs_by_hand():
    # 3 and 1 tokens, causal: 6 + 1 pairs; two contextual tokens of 3 also see 2, 2, and all 3.
    assert flops.visible_pairs(np.array([3, 1]), MaskRule()) == 7
    assert flops.visible_pairs(np.array([3]), MaskRule(contextual_len=2)) == 9
    assert flops.visible_pairs(np.array([4]), MaskRule(max_attn_len=1)) == 7


@pytest.mark.parametrize("name", list(CASES))
def test_visible_pairs_are_those_of_the_mask(name):
    lengths = np.array([length for row in CASES[name].rows for length in row])
    assert flops.visible_pairs(lengths, CASES[name].rule) == _mask(name).sum()


def test_useful_flops_by_hand():
    # Forward 2 K + 2 V, backward 2 K + 2 V for scores and dscores, 2 K + 2 K + 2 V for dq, dk, dv.
    count = functools.partial(flops.attention_flops, 7, num_heads=2, qk_dim=3, v_dim=5)
    assert count(passes="forward") == 7 * 2 * (6 + 10)
    assert count(passes="backward") == 7 * 2 * (6 + 10 + 6 + 6 + 10)
    assert count() == 7 * 2 * (6 + 10 + 6 + 10 + 6 + 6 + 10)
    equal = functools.partial(flops.attention_flops, 7, num_heads=2, qk_dim=4, v_dim=4)
    assert equal(passes="backward") == 2.5 * equal(passes="forward")


def test_executed_flops_by_hand():
    # One full causal row of 256, one head: tiles of 128 x 64 and 64 x 128 visit 2 + 4 of 8, blocks
    # of 64 visit 1 + 2 + 3 + 4 of 16.
    layout = from_lengths(np.array([256], np.int32), row_len=256, block_len=64)
    count = functools.partial(_executed, layout=layout, rule=MaskRule(), qk_dim=128, v_dim=128)
    chosen = tiles.choose_tiles(H100.capability, BFLOAT16, qk_dim=128, v_dim=128, row_len=256)
    sizes = [(t.block_q, t.block_k) for t in (chosen.forward, chosen.dq, chosen.dkv)]
    assert sizes == [(128, 64), (128, 64), (64, 128)]
    product = 2 * 6 * 128 * 64 * 128
    assert count("pallas_triton", passes="forward") == 2 * product
    assert count("pallas_triton", passes="backward") == (3 + 4) * product
    product = 2 * 10 * 64 * 64 * 128
    assert count("xla", passes="forward") == 2 * product
    assert count("xla", passes="backward") == 5 * product
    product = 2 * 256 * 256 * 128
    assert count("reference", passes="forward") == 2 * product
    assert count("reference") == (2 + 4) * product
    assert count("softmax") is None


@pytest.mark.parametrize("name", list(CASES))
def test_executed_flops_are_those_of_tiles_with_a_visible_pair(name):
    layout, mask = cases.build_layout(CASES[name]), _mask(name)
    # Widths that the kernels pad: to 32 and 64 on GPUs, to 128 on TPUs.
    count = functools.partial(
        _executed, layout=layout, rule=CASES[name].rule, qk_dim=24, v_dim=48, num_heads=3
    )
    chosen = tiles.choose_tiles(H100.capability, BFLOAT16, qk_dim=24, v_dim=48, row_len=280)
    forward, dq, dkv = (
        _visited_area(mask, t.block_q, t.block_k) for t in (chosen.forward, chosen.dq, chosen.dkv)
    )
    assert count("pallas_triton", passes="forward") == 2 * 3 * forward * (32 + 64)
    backward = dq * (2 * 32 + 64) + dkv * (2 * 32 + 2 * 64)
    assert count("pallas_triton", passes="backward") == 2 * 3 * backward
    blocks = _visited_area(mask, layout.block_len, layout.block_len)
    assert count("xla") == 2 * 3 * blocks * (4 * 24 + 3 * 48)
    chosen = pallas_tpu_tiles.choose_tiles(
        device_kind=V5E.kind, dtype=BFLOAT16, qk_dim=24, v_dim=48, num_heads=3, row_len=280
    )
    # Tiles of the TPU kernel hold blocks of the layout, not single pairs: none is smaller here.
    scheduled = _by_blocks(mask, layout.block_len)
    area = _visited_area(scheduled, chosen.block_len, chosen.block_len)
    assert count("pallas_tpu", device=V5E) == 2 * 3 * area * (5 + 4) * 128


def _executed(implementation, *, device=H100, num_heads=1, passes="both", **sizes):
    return flops.executed_flops(
        implementation,
        device=device,
        dtype=BFLOAT16,
        num_heads=num_heads,
        passes=passes,
        **sizes,
    )


@functools.cache
def _mask(name):
    return oracle.case_mask(CASES[name])


def _visited_area(mask, block_q, block_k):
    """Pairs of tokens in tiles with a visible pair, one tile after the other."""
    num_rows, row_len, _ = mask.shape
    area = 0
    for row in range(num_rows):
        for query in range(0, row_len, block_q):
            for key in range(0, row_len, block_k):
                if mask[row, query : query + block_q, key : key + block_k].any():
                    area += block_q * block_k
    return area


def _by_blocks(mask, block_len):
    """The mask with all pairs of a block visible if one is."""
    result = np.zeros_like(mask)
    for row, query, key in np.argwhere(mask):
        query, key = query // block_len * block_len, key // block_len * block_len
        result[row, query : query + block_len, key : key + block_len] = True
    return result
