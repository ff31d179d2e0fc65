"""Any segments, mask, targets and widths through the Triton kernels, against the dense formula.

The mask is data of a compiled program, so each of a few programs (widths, heads, tiles) serves all
its examples. Padding is NaN in all of them, and often a whole segment too: nothing else may change.
"""

import functools

import jax
import pytest
from hypothesis import given, settings

from pallas_kernels.hstu_attention import pallas_triton
from pallas_kernels.hstu_attention.tiles import Tile, Tiles
from pallas_kernels.hstu_attention.triton_kernels import Scale
from tests.pallas_kernels import drawn

ROWS, ROW_LEN, SEGMENTS = 2, 37, 6
# (heads, width of q and k, width of v, tiles)
PROGRAMS = (
    (1, 3, 2, Tiles(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2))),
    (2, 17, 5, Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2))),
    (1, 2, 16, Tiles(Tile(16, 32, 4, 2), Tile(64, 16, 4, 2), Tile(16, 64, 4, 2))),
)
EXAMPLES = drawn.examples(num_rows=ROWS, row_len=ROW_LEN, num_segments=SEGMENTS)


@functools.cache
def _compiled(number):
    _, _, _, tiles = PROGRAMS[number]
    scale = Scale(drawn.ALPHA, drawn.DIVISOR)
    program = pallas_triton.Program(scale, tiles, SEGMENTS, interpret=True)

    @jax.jit
    def run(q, k, v, g, segment, bounds):
        attend = lambda q, k, v: pallas_triton.attend(q, k, v, segment, bounds, program)  # noqa: E731
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    return run


@pytest.mark.parametrize(("number", "budget"), drawn.budgets(len(PROGRAMS)))
def test_any_mask_equals_the_dense_formula(number, budget):
    heads, qk_dim, v_dim, _ = PROGRAMS[number]

    @settings(max_examples=budget, deadline=None, derandomize=True, database=None)
    @given(EXAMPLES)
    def check(example):
        data = example.owners(), example.bounds()
        run = lambda *arrays: _compiled(number)(*arrays, *data)  # noqa: E731
        drawn.assert_as_dense(example, run, heads=heads, qk_dim=qk_dim, v_dim=v_dim)

    check()
