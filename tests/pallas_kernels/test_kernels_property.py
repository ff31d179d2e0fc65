"""Every kernel on random masks, segments, targets and widths against the dense formula, poisoned.

Padding always holds NaN, and so may one segment: no other token may notice. A few programs (rule,
widths and block length are compiled in) run on many layouts and values. A kernel is put through
this by an entry in `IMPLEMENTATIONS`; `xla` has its own, older test of the same kind.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.hstu_attention import layout, pallas_tpu
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.pallas_tpu_tiles import Tiles
from tests.pallas_kernels import dense, oracle

# Callables with the signature of `xla_blockwise.hstu_attention`.
IMPLEMENTATIONS = {
    "pallas_tpu": functools.partial(
        pallas_tpu.hstu_attention, interpret=True, tiles=Tiles(block_len=8, heads_per_step=1)
    ),
}
ROWS, ROW_LEN, SEGMENTS = 2, 19, 5
ALPHA, DIVISOR = 0.6, 5.0
# (rule, heads, width of q and k, width of v, block length of the layout)
PROGRAMS = (
    (MaskRule(contextual_len=2, max_attn_len=3, min_full_attn_len=2), 1, 3, 2, 8),
    (MaskRule(contextual_len=1, sla_k1=2, sla_k2=3), 2, 2, 5, 3),
    (MaskRule(contextual_len=3), 2, 1, 3, 19),
    (MaskRule(max_attn_len=1), 3, 2, 2, 4),
)
# 300 examples in every run, ten times as many with -m long.
BUDGETS = [
    pytest.param(0, 150),
    pytest.param(1, 150),
    *(pytest.param(program, 750, marks=pytest.mark.long) for program in range(len(PROGRAMS))),
]


@functools.cache
def _compiled(implementation, program):
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
            IMPLEMENTATIONS[implementation],
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
    """Segments with gaps, targets, the segment to poison (or none) and a seed of the values."""
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
    is_used = [index for index, length in enumerate(lengths) if length]
    poisoned = draw(st.sampled_from([None, *is_used]))
    return *(np.array(a, np.int32) for a in arrays), poisoned, draw(st.integers(0, 2**31))


def _poison(values, starts, lengths, poisoned):
    """Copies with NaN in padding and in one value of q, k or v of a segment; True in its slots."""
    owner = np.full(ROWS * ROW_LEN, -1)
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        owner[start : start + length] = index
    owner = owner.reshape(ROWS, ROW_LEN)
    values = [np.where((owner < 0)[..., None, None], np.float32(np.nan), x) for x in values]
    if poisoned is not None:
        row, slot = divmod(int(starts[poisoned]), ROW_LEN)
        values[poisoned % 3][row, slot + lengths[poisoned] // 2, -1, 0] = np.nan
    return values, owner == (-2 if poisoned is None else poisoned)


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize(("program", "budget"), BUDGETS)
def test_any_segments_equal_the_dense_formula(implementation, program, budget):
    rule, heads, qk_dim, v_dim, block_len = PROGRAMS[program]
    run = _compiled(implementation, program)

    @settings(max_examples=budget, deadline=None, derandomize=True, database=None)
    @given(_examples(program))
    def check(example):
        starts, lengths, targets, poisoned, seed = example
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
        shape = dict(heads=heads, qk_dim=qk_dim, v_dim=v_dim)
        clean = oracle.random_inputs(ROWS, ROW_LEN, **shape, seed=seed)
        values, is_hit = _poison(clean, starts, lengths, poisoned)
        schedule = (pairs[None], np.array([count], np.int32), jnp.asarray(targets))
        results = run(*values, starts, lengths, *schedule)
        mask = oracle.dense_mask(starts, lengths, targets, ROWS, ROW_LEN, rule)
        expected = dense.attention(*clean, mask, ALPHA, DIVISOR)
        for name, result, e in zip("o dq dk dv".split(), results, expected, strict=True):
            result = np.asarray(result)
            assert np.isnan(result[is_hit]).all()
            # Relative to the largest value: some 16 roundings of a sum of up to 19 terms.
            atol = 2e-6 * max(np.abs(e).max(), 1e-3)
            np.testing.assert_allclose(result[~is_hit], e[~is_hit], rtol=0, atol=atol, err_msg=name)

    check()
