"""Decoding: the last T rows of the full op against float64 loops, short segments, poison."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hstu_attention import api, cases
from pallas_kernels.hstu_attention.mask import MaskRule
from tests.pallas_kernels import oracle

NUM_NEW = 4  # as long as the shortest segment that is not empty
NAMES = ("packed_context", "window_full_tail_targets")
BY_NAME = {case.name: case for case in cases.CASES}


def _positions(built):
    """[S, T] flat slots of the new tokens, and which segments have them."""
    has_tokens = built.lengths > 0
    slots = (built.starts + built.lengths)[:, None] - NUM_NEW + np.arange(NUM_NEW)
    return np.where(has_tokens[:, None], slots, 0), has_tokens


@functools.cache
def _compiled(name, implementation):
    """Jitted (q, k, v, g, layout) -> (o, dq, dk, dv) of a case."""
    case = BY_NAME[name]
    targets = cases.targets_of(case)

    @jax.jit
    def run(q, k, v, g, built):
        attend = functools.partial(
            api.hstu_attention_delta,
            layout=built,
            rule=case.rule,
            alpha=0.5,
            divisor=7.0,
            implementation=implementation,
            num_targets=targets,
        )
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    return run


def _inputs(name):
    """New queries, keys, values, cotangent, and the float64 results."""
    case = BY_NAME[name]
    built = cases.build_layout(case)
    q, k, v, g = oracle.random_inputs(built.num_rows, built.row_len)
    slots, has_tokens = _positions(built)
    full_g = np.zeros_like(g).reshape(-1, *g.shape[2:])
    full_g[slots[has_tokens]] = g.reshape(full_g.shape)[slots[has_tokens]]
    full_g = full_g.reshape(g.shape)
    full = oracle.attention(q, k, v, full_g, oracle.case_mask(case), alpha=0.5, divisor=7.0)

    def new(array):
        taken = array.reshape(-1, *array.shape[2:])[slots]
        return np.where(has_tokens[:, None, None, None], taken, 0)

    # Queries and cotangents of empty segments may hold anything.
    query, cotangent = (
        np.where(has_tokens[:, None, None, None], new(array), other).astype(np.float32)
        for array, other in ((q, np.nan), (g, 1.0))
    )
    return built, (query, k, v, cotangent), (new(full[0]), new(full[1]), full[2], full[3])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_new_rows_equal_those_of_float64_loops(name, implementation):
    built, arrays, expected = _inputs(name)
    results = _compiled(name, implementation)(*arrays, built)
    for label, result, e in zip("o dq dk dv".split(), results, expected, strict=True):
        scale = np.abs(e).max()
        np.testing.assert_allclose(np.asarray(result), e, rtol=0, atol=2e-6 * scale, err_msg=label)


def test_poison_stays_inside_its_segment():
    built, (q, k, v, g), _ = _inputs(NAMES[0])
    run = _compiled(NAMES[0], "xla")
    clean = run(q, k, v, g, built)
    padding = ~oracle.case_mask(BY_NAME[NAMES[0]]).any(axis=2)
    k, v, q = k.copy(), v.copy(), q.copy()
    k[padding] = v[padding] = np.inf
    for before, after in zip(clean, run(q, k, v, g, built), strict=True):
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
    q[1, 2, 0, 0] = np.nan  # segment 1: slots 9 .. 12 of row 0
    for before, after in zip(clean, run(q, k, v, g, built), strict=True):
        before, after = np.asarray(before), np.asarray(after)
        is_hit = np.zeros(after.shape[:2], bool)
        is_hit[(0, slice(9, 13)) if after.shape[:2] == k.shape[:2] else 1] = True
        np.testing.assert_array_equal(after[~is_hit], before[~is_hit])
        assert np.isnan(after[is_hit]).any()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_positions_that_a_segment_does_not_have_give_zeros(implementation):
    built, (q, k, v, g), _ = _inputs(NAMES[0])
    # Traced lengths cannot be refused.
    output, dq, *_ = _compiled(NAMES[0], implementation)(q, k, v, g, _with_a_short_segment(built))
    np.testing.assert_array_equal(np.asarray(output)[1, :2], 0)
    np.testing.assert_array_equal(np.asarray(dq)[1, :2], 0)
    assert np.abs(np.asarray(output)[1, 2:]).max() > 0


def test_bad_arguments_are_refused():
    built, (q, k, v, _), _ = _inputs(NAMES[0])
    # The annotation checks of the test session would answer first.
    attend = functools.partial(inspect.unwrap(api.hstu_attention_delta), alpha=0.5, divisor=7.0)
    message = "rule.sla_k1=2, rule.sla_k2=0: decoding knows the standard mask only; run hstu_att"
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, rule=MaskRule(sla_k1=2), layout=built)
    for query, message in (
        (q[:, 0], r"must have 4 axes \[S T H K\]"),
        (q[:-1], r"axis 0 \(S\) must be 8 as in layout"),
        (q[:, :, :1], r"axis 2 \(H\) must be 2 as in k"),
        (q[..., :1], r"axis 3 \(K\) must be 4 as in k"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(query, k, v, rule=MaskRule(), layout=built)
    message = r"lengths\[1\]=2: the segment is shorter than the 4 new .* \(1 in all\); count"
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, rule=MaskRule(), layout=_with_a_short_segment(built))


def _with_a_short_segment(built):
    lengths = built.lengths.copy()
    lengths[1] = 2
    return dataclasses.replace(built, lengths=lengths)


def test_memory_does_not_grow_with_the_number_of_new_tokens():
    def temp_bytes(num_new):
        built = cases.build_layout(cases.Case("", ((1024,),), row_len=1024, block_len=64))
        token = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32)
        query = jax.ShapeDtypeStruct((1, num_new, 1, 8), jnp.float32)

        def loss(q, k, v):
            options = dict(layout=built, rule=MaskRule(), alpha=0.3, divisor=9.0)
            return (api.hstu_attention_delta(q, k, v, **options) ** 2).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, token, token).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp_bytes(64) < 1.5 * temp_bytes(4)
