"""The blockwise op on random segments, targets and values against the dense formula.

A few programs (rule, widths and block length are compiled in) run on many layouts and values.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.hstu_attention import api
from pallas_kernels.hstu_attention.mask import MaskRule
from tests.pallas_kernels import drawn

ROWS, ROW_LEN, SEGMENTS = 2, 11, 5
# (rule, heads, width of q and k, width of v, block length)
PROGRAMS = (
    (MaskRule(contextual_len=2, max_attn_len=3, min_full_attn_len=2), 1, 3, 2, 4),
    (MaskRule(contextual_len=3), 2, 1, 3, 11),
    (MaskRule(contextual_len=1, sla_k1=2, sla_k2=3), 1, 2, 1, 3),
    (MaskRule(max_attn_len=1), 3, 2, 2, 1),
)


@functools.cache
def _compiled(number):
    @jax.jit
    def run(q, k, v, g, built, targets):
        attend = functools.partial(
            api.hstu_attention,
            layout=built,
            rule=PROGRAMS[number][0],
            alpha=drawn.ALPHA,
            divisor=drawn.DIVISOR,
            num_targets=targets,
        )
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    return run


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_segments_equal_the_dense_formula(number, data):
    rule, heads, qk_dim, v_dim, block_len = PROGRAMS[number]
    sizes = dict(num_rows=ROWS, row_len=ROW_LEN, num_segments=SEGMENTS)
    example = data.draw(drawn.examples(**sizes, rule=rule))
    built, targets = example.layout(block_len), jnp.asarray(example.targets)
    run = lambda *arrays: _compiled(number)(*arrays, built, targets)  # noqa: E731
    drawn.assert_as_dense(example, run, heads=heads, qk_dim=qk_dim, v_dim=v_dim)
