"""The blockwise op on random masks, segments, targets and widths against the dense formula.

A few programs (rule, widths and block length are compiled in) run on many layouts and values.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.hstu_attention import api, layout
from pallas_kernels.hstu_attention.mask import MaskRule
from tests.pallas_kernels import dense, oracle

ROWS, ROW_LEN, SEGMENTS = 2, 11, 5
ALPHA, DIVISOR = 0.6, 5.0
# (rule, heads, width of q and k, width of v, block length)
PROGRAMS = (
    (MaskRule(contextual_len=2, max_attn_len=3, min_full_attn_len=2), 1, 3, 2, 4),
    (MaskRule(contextual_len=3), 2, 1, 3, 11),
    (MaskRule(contextual_len=1, sla_k1=2, sla_k2=3), 1, 2, 1, 3),
    (MaskRule(max_attn_len=1), 3, 2, 2, 1),
)


@functools.cache
def _compiled(program):
    rule, _, _, _, block_len = PROGRAMS[program]

    @jax.jit
    def run(q, k, v, g, starts, lengths, pairs, count, targets):
        built = layout.SequenceLayout(
            starts=starts,
            lengths=lengths,
            block_pairs=pairs,
            num_block_pairs=count,
            num_rows=ROWS,
            row_len=ROW_LEN,
            block_len=block_len,
        )
        attend = functools.partial(
            api.hstu_attention,
            layout=built,
            rule=rule,
            alpha=ALPHA,
            divisor=DIVISOR,
            num_targets=targets,
        )
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    return run


@st.composite
def _examples(draw, program):
    """Segments with gaps in two rows, targets, and a seed of the values."""
    contextual = PROGRAMS[program][0].contextual_len
    starts, lengths, targets = [], [], []
    for row in range(ROWS):
        slot = draw(st.integers(0, 2))
        while slot < ROW_LEN and len(starts) < SEGMENTS:
            length = draw(st.integers(0, ROW_LEN - slot))
            length = length if length >= contextual else 0
            starts.append(row * ROW_LEN + slot)
            lengths.append(length)
            targets.append(draw(st.integers(0, max(length - contextual, 0))))
            slot += length + draw(st.integers(0, 2)) + (length == 0)
    unused = SEGMENTS - len(starts)
    arrays = (starts + [ROWS * ROW_LEN] * unused, lengths + [0] * unused, targets + [0] * unused)
    return *(np.array(a, np.int32) for a in arrays), draw(st.integers(0, 2**31))


@pytest.mark.parametrize("program", range(len(PROGRAMS)))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_segments_equal_the_dense_formula(program, data):
    starts, lengths, targets, seed = data.draw(_examples(program))
    rule, heads, qk_dim, v_dim, block_len = PROGRAMS[program]
    pairs, count = layout.build_block_pairs(
        starts,
        lengths,
        num_rows=ROWS,
        row_len=ROW_LEN,
        block_len=block_len,
        rule=rule,
        max_pairs=layout.max_block_pairs(ROWS, ROW_LEN, block_len),
        num_targets=targets,
    )
    values = oracle.random_inputs(ROWS, ROW_LEN, heads=heads, qk_dim=qk_dim, v_dim=v_dim, seed=seed)
    schedule = (pairs[None], np.array([count], np.int32), jnp.asarray(targets))
    results = _compiled(program)(*values, starts, lengths, *schedule)
    mask = oracle.dense_mask(starts, lengths, targets, ROWS, ROW_LEN, rule)
    expected = dense.attention(*values, mask, ALPHA, DIVISOR)
    for name, result, e in zip("o dq dk dv".split(), results, expected, strict=True):
        # Relative to the largest value: some 16 roundings of a sum of up to 11 terms.
        scale = max(np.abs(e).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(result), e, rtol=0, atol=2e-6 * scale, err_msg=name)
