"""The op against the oracles: reference against float64 loops, blockwise against both.

Both implementations run the same named cases; padding and foreign segments are poisoned, gradients
take random cotangents, and planted wrong variants must fail the same comparison.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hstu_attention import api, cases, reference
from tests.pallas_kernels import oracle

ALPHA, DIVISOR = 0.5, 7.0
CASE_IDS = [case.name for case in cases.CASES]
BY_NAME = {case.name: case for case in cases.CASES}


@functools.cache
def _oracle(name):
    case = BY_NAME[name]
    arrays = oracle.random_inputs(len(case.rows), case.row_len)
    return arrays, oracle.attention(*arrays, oracle.case_mask(case), ALPHA, DIVISOR)


@functools.cache
def _compiled(name, implementation):
    """Jitted (q, k, v, g) -> (o, dq, dk, dv) of a case."""
    case = BY_NAME[name]
    targets = cases.targets_of(case)
    attend = functools.partial(
        api.hstu_attention,
        layout=cases.build_layout(case),
        rule=case.rule,
        alpha=ALPHA,
        divisor=DIVISOR,
        implementation=implementation,
        num_targets=None if targets is None else jnp.asarray(targets),
    )

    @jax.jit
    def run(q, k, v, g):
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    return run


def _token_mask(case):
    return oracle.case_mask(case).any(axis=2)


def _errors(actual, expected):
    pairs = zip(actual, expected, strict=True)
    return [float(np.abs(np.asarray(a, np.float64) - e).max()) for a, e in pairs]


def _assert_close(actual, expected):
    """Relative to the largest value: 2e-6 is some 16 roundings of a sum of up to 21 terms."""
    for name, a, e in zip("o dq dk dv".split(), actual, expected, strict=True):
        _assert_one_close(name, a, e)


def _assert_one_close(name, actual, expected):
    scale = max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(
        np.asarray(actual), expected, rtol=0, atol=2e-6 * scale, err_msg=name
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", CASE_IDS)
def test_matches_float64_loops(name, implementation):
    arrays, expected = _oracle(name)
    _assert_close(_compiled(name, implementation)(*arrays), expected)


def _assert_as_exact_as_dense(name, arrays):
    expected = oracle.attention(*arrays, oracle.case_mask(BY_NAME[name]), ALPHA, DIVISOR)
    dense = _errors(_compiled(name, "reference")(*arrays), expected)
    blockwise = _errors(_compiled(name, "xla")(*arrays), expected)
    for error, dense_error, e in zip(blockwise, dense, expected, strict=True):
        # The second term is two roundings of the largest value: with so few terms the dense form
        # is sometimes right to the last bit.
        assert error <= 2 * dense_error + 2 * np.finfo(np.float32).eps * np.abs(e).max()


@pytest.mark.parametrize("name", ["packed_context", "semi_local_targets"])
def test_blockwise_error_is_at_most_twice_that_of_the_dense_form(name):
    _assert_as_exact_as_dense(name, _oracle(name)[0])


def test_very_negative_logits_keep_their_digits():
    """All logits near -20: SiLU is about -4e-8 there, lost if the sigmoid has absolute errors."""
    (q, k, v, g), _ = _oracle("packed_context")
    _assert_as_exact_as_dense("packed_context", (3 + 0.1 * q, -3.3 - 0.1 * k, v, g))


def test_bfloat16_sums_in_float32():
    arrays, _ = _oracle("packed_context")
    case = BY_NAME["packed_context"]
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    exact = oracle.attention(*rounded, oracle.case_mask(case), ALPHA, DIVISOR)
    results = _compiled(case.name, "xla")(*rounded)
    for result, e in zip(results, exact, strict=True):
        assert result.dtype == jnp.bfloat16
        # Only the rounding of the result itself is left: half a unit in 8 bits.
        error = np.abs(np.asarray(result, np.float64) - e)
        assert (error <= 2.0**-8 * np.abs(e) + 1e-6).all()


@pytest.mark.parametrize("name", CASE_IDS)
def test_reference_mask_is_the_rule(name):
    case = BY_NAME[name]
    targets = cases.targets_of(case)
    targets = None if targets is None else jnp.asarray(targets)
    layout = cases.build_layout(case)
    mask = jax.jit(lambda: reference.attention_mask(layout, case.rule, targets))()
    np.testing.assert_array_equal(np.asarray(mask), oracle.case_mask(case))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["packed_context", "window_full_tail_targets"])
def test_poison_in_padding_changes_nothing(name, implementation, poison):
    arrays, _ = _oracle(name)
    run, is_padding = _compiled(name, implementation), ~_token_mask(BY_NAME[name])
    poisoned = [np.where(is_padding[..., None, None], np.float32(poison), x) for x in arrays]
    for clean, result in zip(run(*arrays), run(*poisoned), strict=True):
        np.testing.assert_array_equal(np.asarray(result), np.asarray(clean))
        assert not np.asarray(result)[is_padding].any()


@pytest.mark.parametrize("which", range(4))
def test_poison_stays_inside_its_segment(which):
    arrays, _ = _oracle("packed_context")
    run = _compiled("packed_context", "xla")
    poisoned = [x.copy() for x in arrays]
    poisoned[which][0, 10, 1, 2] = np.nan  # the second segment of row 0: slots 9 .. 12
    is_hit = np.zeros(arrays[0].shape[:2], bool)
    is_hit[0, 9:13] = True
    clean, results = run(*arrays), run(*poisoned)
    for name, before, after in zip("o dq dk dv".split(), clean, results, strict=True):
        np.testing.assert_array_equal(np.asarray(after)[~is_hit], np.asarray(before)[~is_hit])
        # A cotangent reaches gradients only.
        is_expected = not (which == 3 and name == "o")
        assert np.isnan(np.asarray(after)[is_hit]).all() == is_expected, name


def test_overflow_between_segments_changes_nothing():
    """Finite values whose product overflows, but only for a pair that the mask hides."""
    arrays, _ = _oracle("packed_context")
    run = _compiled("packed_context", "xla")
    hidden = [x.copy() for x in arrays]
    hidden[0][0, 3] = hidden[1][0, 10] = 1e30  # q of segment 0, k of segment 1
    results = run(*hidden)
    for array in results:
        assert np.isfinite(np.asarray(array)).all()
    clean = run(*arrays)
    is_other = np.ones(arrays[0].shape[:2], bool)
    is_other[0, :13] = False
    for before, after in zip(clean, results, strict=True):
        np.testing.assert_array_equal(np.asarray(after)[is_other], np.asarray(before)[is_other])


def test_query_gives_nothing_to_later_keys():
    """Without contextual tokens d o(i) / d k(j) and d v(j) are zero for every j > i."""
    (q, k, v, g), _ = _oracle("packed")
    run = _compiled("packed", "xla")
    for slot in (0, 7, 8, 15, 19):
        one_row = np.zeros_like(g)
        one_row[:, slot] = g[:, slot]
        _, dq, dk, dv = run(q, k, v, one_row)
        for gradient in (dq, dk, dv):
            assert not np.asarray(gradient)[:, slot + 1 :].any()
        assert np.asarray(dv)[1, : slot + 1].any()


def _wrong_variants(q, k, v, layout, rule, variant):
    mask = reference.attention_mask(layout, rule)
    logits = ALPHA * jnp.einsum("rihk,rjhk->rhij", q, k)
    divisor, activation = DIVISOR, jax.nn.silu
    if variant == "no mask":
        mask = jnp.ones_like(mask)
    elif variant == "linear activation":
        activation = lambda x: x / 2  # noqa: E731
    elif variant == "sigmoid only":
        activation = jax.nn.sigmoid
    elif variant == "unscaled logits":
        logits = logits / ALPHA
    elif variant == "divided by L":
        divisor = layout.row_len
    elif variant == "itself not seen":
        mask = mask & ~jnp.eye(layout.row_len, dtype=bool)[None]
    elif variant == "context does not look ahead":
        mask = mask & jnp.tril(jnp.ones(mask.shape[1:], bool))[None]
    elif variant == "keys and values swapped in time":
        v = v[:, ::-1]
    scores = jnp.where(mask[:, None], activation(logits) / divisor, 0)
    return jnp.einsum("rhij,rjhv->rihv", scores, v)


@pytest.mark.parametrize(
    "variant",
    [
        "none",
        "no mask",
        "linear activation",
        "sigmoid only",
        "unscaled logits",
        "divided by L",
        "itself not seen",
        "context does not look ahead",
        "keys and values swapped in time",
    ],
)
def test_wrong_variant_is_caught(variant):
    case = BY_NAME["packed_context"]
    (q, k, v, g), expected = _oracle(case.name)
    layout = cases.build_layout(case)

    @jax.jit
    def run(q, k, v, g):
        attend = functools.partial(_wrong_variants, layout=layout, rule=case.rule, variant=variant)
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    results = run(q, k, v, g)
    if variant == "none":
        _assert_close(results, expected)
        return
    for name, result, e in zip("o dq dk dv".split(), results, expected, strict=True):
        with pytest.raises(AssertionError):
            _assert_one_close(name, result, e)
