"""Any segments, mask, targets and widths through the Triton kernels, against the dense formula.

The mask is data of a compiled program, so each of a few programs (widths, heads, tiles) serves all
its examples. Padding is NaN in all of them, and often a whole segment too: nothing else may change.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.hstu_attention import layout, pallas_triton
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.tiles import Tile, Tiles
from pallas_kernels.hstu_attention.triton_kernels import Scale
from tests.pallas_kernels import dense, oracle

ROWS, ROW_LEN, SEGMENTS = 2, 37, 6
ALPHA, DIVISOR = 0.6, 5.0
# (heads, width of q and k, width of v, tiles)
PROGRAMS = (
    (1, 3, 2, Tiles(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2))),
    (2, 17, 5, Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2))),
    (1, 2, 16, Tiles(Tile(16, 32, 4, 2), Tile(64, 16, 4, 2), Tile(16, 64, 4, 2))),
)
# More by HSTU_PROPERTY_EXAMPLES; 3 programs of 100 each by default.
NUM_EXAMPLES = int(os.environ.get("HSTU_PROPERTY_EXAMPLES", 300)) // len(PROGRAMS)


@functools.cache
def _compiled(number):
    _, _, _, tiles = PROGRAMS[number]
    program = pallas_triton.Program(Scale(ALPHA, DIVISOR), tiles, SEGMENTS, interpret=True)

    @jax.jit
    def run(q, k, v, g, segment, bounds):
        output, vjp = jax.vjp(
            lambda q, k, v: pallas_triton.attend(q, k, v, segment, bounds, program), q, k, v
        )
        return output, *vjp(g)

    return run


def _mask_data(starts, lengths, targets, rule):
    built = layout.SequenceLayout(
        starts=starts,
        lengths=lengths,
        block_pairs=np.zeros((1, 1, 3), np.int32),
        num_block_pairs=np.zeros(1, np.int32),
        num_rows=ROWS,
        row_len=ROW_LEN,
        block_len=ROW_LEN,
    )
    intervals = layout.slot_intervals(built, targets, rule=rule, padded_len=ROW_LEN)
    bounds = [x for interval in intervals for x in (interval.start, interval.end)]
    return layout.token_segments(built), jnp.stack(bounds, 1)


@st.composite
def _rules(draw):
    numbers = st.integers(0, 4)
    contextual = draw(numbers)
    if draw(st.booleans()):
        return MaskRule(contextual_len=contextual, sla_k1=draw(numbers), sla_k2=draw(numbers))
    window = draw(st.sampled_from((0, 1, 3, 20)))
    full = draw(numbers) if window else 0
    return MaskRule(contextual_len=contextual, max_attn_len=window, min_full_attn_len=full)


@st.composite
def _examples(draw):
    """Rule; segments with gaps in two rows, with targets; a seed; segment and array to poison."""
    rule = draw(_rules())
    starts, lengths, targets = [], [], []
    for row in range(ROWS):
        slot = draw(st.integers(0, 2))
        while slot < ROW_LEN and len(starts) < (row + 1) * SEGMENTS // ROWS:
            length = draw(st.integers(0, ROW_LEN - slot))
            length = length if length >= rule.contextual_len else 0
            starts.append(row * ROW_LEN + slot)
            lengths.append(length)
            targets.append(draw(st.integers(0, max(length - rule.contextual_len, 0))))
            slot += length + draw(st.integers(0, 20)) * draw(st.booleans()) + (length == 0)
    unused = SEGMENTS - len(starts)
    arrays = (starts + [ROWS * ROW_LEN] * unused, lengths + [0] * unused, targets + [0] * unused)
    poisoned = draw(st.none() | st.tuples(st.integers(0, SEGMENTS - 1), st.integers(0, 3)))
    return rule, *(np.array(a, np.int32) for a in arrays), draw(st.integers(0, 2**31)), poisoned


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
@settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True)
@given(example=_examples())
def test_any_mask_equals_the_dense_formula(number, example):
    rule, starts, lengths, targets, seed, poisoned = example
    heads, qk_dim, v_dim, _ = PROGRAMS[number]
    values = oracle.random_inputs(ROWS, ROW_LEN, heads=heads, qk_dim=qk_dim, v_dim=v_dim, seed=seed)
    values[0] *= 2 / qk_dim**0.5  # logits spread by about 2 at every width
    data = segment, bounds = _mask_data(starts, lengths, targets, rule)
    # One interval or two: the shorter form gets an empty second one, to stay in one program.
    if bounds.shape[1] == 2:
        data = segment, jnp.concatenate([bounds, jnp.zeros_like(bounds)], 1)
    segment = np.asarray(segment)
    mask = oracle.dense_mask(starts, lengths, targets, ROWS, ROW_LEN, rule)
    expected = dense.attention(*values, mask, ALPHA, DIVISOR)
    for x in values:
        x[segment < 0] = np.nan
    is_lost = np.zeros(segment.shape, bool)
    if poisoned is not None:
        is_lost = segment == poisoned[0]
        values[poisoned[1]][is_lost] = np.nan
    results = _compiled(number)(*values, *data)
    for name, result, e in zip("o dq dk dv".split(), results, expected, strict=True):
        result = np.asarray(result)
        # A cotangent that is not finite reaches gradients only.
        lost = is_lost if name != "o" or (poisoned and poisoned[1] < 3) else is_lost & False
        assert np.isnan(result[lost]).all(), name
        # Relative to the largest value: some 16 roundings of a sum of up to 37 terms.
        atol = 2e-6 * max(np.abs(e).max(), 1e-3)
        np.testing.assert_allclose(result[~lost], e[~lost], rtol=0, atol=atol, err_msg=name)
