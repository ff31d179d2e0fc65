"""Any segments, mask, targets and widths through the TPU kernels, against the dense formula.

The mask is data of a compiled program, so each of a few programs (heads, widths, tiles) serves all
its examples. Padding is NaN in all of them, and often a whole segment too: nothing else may change.
"""

import functools

import jax
import pytest
from hypothesis import given, settings

from pallas_kernels.hstu_attention import pallas_tpu
from pallas_kernels.hstu_attention.pallas_tpu_tiles import Tiles
from tests.pallas_kernels import drawn

ROWS, ROW_LEN, SEGMENTS = 2, 19, 5
# (heads, width of q and k, width of v, tiles, block length of the layout): one head a step and two;
# blocks that are whole rows, that lie across tiles, and that are tiles.
PROGRAMS = (
    (1, 130, 2, Tiles(block_len=8, heads_per_step=1), 19),
    (2, 3, 5, Tiles(block_len=8, heads_per_step=2), 3),
    (2, 2, 1, Tiles(block_len=16, heads_per_step=1), 16),
)
EXAMPLES = drawn.examples(num_rows=ROWS, row_len=ROW_LEN, num_segments=SEGMENTS)


@functools.cache
def _compiled(number):
    *_, tiles, _ = PROGRAMS[number]
    program = pallas_tpu.Program(drawn.ALPHA, drawn.DIVISOR, tiles, interpret=True)

    @jax.jit
    def run(q, k, v, g, built, bounds):
        attend = lambda q, k, v: pallas_tpu.attend(q, k, v, built, bounds, program)  # noqa: E731
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    return run


@pytest.mark.parametrize(("number", "budget"), drawn.budgets(len(PROGRAMS), num_short=2))
def test_any_mask_equals_the_dense_formula(number, budget):
    heads, qk_dim, v_dim, _, block_len = PROGRAMS[number]

    @settings(max_examples=budget, deadline=None, derandomize=True, database=None)
    @given(EXAMPLES)
    def check(example):
        data = example.layout(block_len), example.bounds()
        run = lambda *arrays: _compiled(number)(*arrays, *data)  # noqa: E731
        drawn.assert_as_dense(example, run, heads=heads, qk_dim=qk_dim, v_dim=v_dim)

    check()
