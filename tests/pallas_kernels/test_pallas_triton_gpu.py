"""The Triton kernels compiled on a GPU, with the tiles of real runs: every mask in all dtypes.

    pytest -m gpu

The same function runs on a CPU in interpret mode, on a few cases, so that what a GPU will meet for
the first time is the kernels and not their test.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import devices
from pallas_kernels.hstu_attention import api, cases, pallas_triton, tiles
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.triton_kernels import Scale
from tests.pallas_kernels import dense, drawn, oracle

NUM_ROWS, NUM_SEGMENTS, NUM_HEADS = 5, 10, 2
DIVISOR = 7.0
NAMES = "o dq dk dv".split()
BY_NAME = {case.name: case for case in cases.CASES}
# Binary digits of a dtype: its rounding is off by half of 2^-digits.
DIGITS = {"float32": 24, "bfloat16": 8, "float16": 11}
# Of the largest value: sums of float32 in two orders; a few roundings of half types.
TOLERANCE = {"float32": 2e-6, "bfloat16": 3e-2, "float16": 4e-3}
# Rows of 21 slots, and of 315: more than two of the largest tiles, and no whole number of any.
SHORT, LONG = 1, 15


def _stretched(name, factor):
    """A case with every length of its mask multiplied, in the common number of rows."""
    case = BY_NAME[name]

    def times(numbers):
        return tuple(factor * number for number in numbers)

    fields = {f.name: factor * getattr(case.rule, f.name) for f in dataclasses.fields(MaskRule)}
    return dataclasses.replace(
        case,
        rows=tuple(map(times, case.rows)) + ((),) * (NUM_ROWS - len(case.rows)),
        rule=MaskRule(**fields),
        num_targets=None if case.num_targets is None else times(case.num_targets),
        row_len=factor * case.row_len,
        num_unused=NUM_SEGMENTS - sum(map(len, case.rows)),
    )


@functools.cache
def _mask(name, factor):
    return oracle.case_mask(_stretched(name, factor))


def _example(case):
    """A case as the property tests have it: its mask is data there."""
    built, targets = cases.build_layout(case), cases.targets_of(case)
    return drawn.Example(
        case.rule,
        built.starts,
        built.lengths,
        np.zeros_like(built.lengths) if targets is None else targets,
        seed=0,
        poisoned=None,
        num_rows=NUM_ROWS,
        row_len=case.row_len,
    )


def _tiles(dtype, qk_dim, v_dim, row_len, *, interpret):
    """Those that the op takes here, or in interpret mode."""
    found = devices.current_device().capability
    capability = pallas_triton.INTERPRETED_CAPABILITY if interpret else found
    sizes = dict(qk_dim=qk_dim, v_dim=v_dim, row_len=row_len)
    return tiles.choose_tiles(capability, jnp.dtype(dtype), **sizes)


def _with_gradients(attend):
    """Jitted (q, k, v, g, *data) -> (o, dq, dk, dv)."""

    @jax.jit
    def run(q, k, v, g, *data):
        output, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, *data), q, k, v)
        return output, *vjp(g)

    return run


@functools.cache
def _kernels(dtype, qk_dim, v_dim, row_len, interpret):
    """The kernels with the mask as data: one program for all cases."""
    chosen = _tiles(dtype, qk_dim, v_dim, row_len, interpret=interpret)
    scale = Scale(qk_dim**-0.5, DIVISOR)
    program = pallas_triton.Program(scale, chosen, NUM_SEGMENTS, interpret)
    return _with_gradients(functools.partial(pallas_triton.attend, program=program))


@functools.cache
def _dense_float32(alpha):
    """The formula in float32 without a kernel: the honest error of this dtype, on this device."""

    def attend(q, k, v, mask):
        logits = alpha * jnp.einsum("rihk,rjhk->rhij", q, k, precision="highest")
        scores = jnp.where(mask[:, None], jax.nn.silu(logits) / DIVISOR, 0)
        return jnp.einsum("rhij,rjhv->rihv", scores, v, precision="highest")

    return _with_gradients(attend)


def _assert_right(name, dtype, *, factor, qk_dim, v_dim, interpret):
    """A case against float64, padding full of NaN.

    float32: at most twice the error of the formula in float32, without a kernel, and two roundings
    of the largest value. Half types: scores and results rounded once, sums in float32.
    """
    case = _stretched(name, factor)
    example = _example(case)
    owner, alpha = example.owners(), qk_dim**-0.5
    shape = dict(heads=NUM_HEADS, qk_dim=qk_dim, v_dim=v_dim)
    values = oracle.random_inputs(NUM_ROWS, case.row_len, **shape)
    arrays = [jnp.asarray(x, dtype) for x in values]
    rounded = [np.asarray(x, np.float64) for x in arrays]
    mask = _mask(name, factor)
    expected = dense.attention(*rounded, mask, alpha, DIVISOR)
    terms = dense.magnitudes(*rounded, mask, alpha, DIVISOR)
    is_padding = jnp.asarray(owner < 0)[..., None, None]
    run = _kernels(dtype, qk_dim, v_dim, case.row_len, interpret)
    poisoned = [jnp.where(is_padding, jnp.nan, x).astype(dtype) for x in arrays]
    results = run(*poisoned, owner, example.bounds())
    honest = _dense_float32(alpha)(*values, mask) if dtype == "float32" else (None,) * 4
    for which, result, h, e, term in zip(NAMES, results, honest, expected, terms, strict=True):
        assert result.dtype == jnp.dtype(dtype)
        result = np.asarray(result, np.float64)
        error, largest = np.abs(result - e), np.abs(e).max()
        if dtype == "float32":
            honest_error = np.abs(np.asarray(h, np.float64) - e).max()
            limit = 2 * honest_error + 2 * np.finfo(np.float32).eps * largest
        else:
            # The last term: scores below 2^-14 have fewer digits in float16.
            tiny = 2.0**-24 * case.row_len * max(np.abs(x).max() for x in rounded) / DIVISOR
            limit = 2.0 ** -DIGITS[dtype] * (np.abs(e) + term) * 1.01 + tiny
        assert (error <= limit).all(), f"{which}: {error.max()} at largest value {largest}"
        assert not result[owner < 0].any(), which


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DIGITS))
@pytest.mark.parametrize("name", list(BY_NAME))
def test_every_case_on_the_gpu(name, dtype):
    _assert_right(name, dtype, factor=SHORT, qk_dim=4, v_dim=6, interpret=False)
    _assert_right(name, dtype, factor=LONG, qk_dim=50, v_dim=64, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DIGITS))
@pytest.mark.parametrize("width", [16, 32, 128, 256])
def test_every_width_of_the_table_on_the_gpu(width, dtype):
    sizes = dict(factor=LONG, qk_dim=width, v_dim=width)
    _assert_right("window_full_tail_targets", dtype, **sizes, interpret=False)


@pytest.mark.parametrize(
    ("name", "dtype", "factor"),
    [
        ("window_full_tail_targets", "float32", LONG),
        ("semi_local_targets", "bfloat16", SHORT),
        ("packed_context", "float16", SHORT),
    ],
)
def test_the_same_function_in_interpret_mode(name, dtype, factor):
    _assert_right(name, dtype, factor=factor, qk_dim=17, v_dim=16, interpret=True)


def test_a_wrong_kernel_does_not_pass(monkeypatch):
    """Scores of another scale: the comparison can fail."""
    right = _kernels("float16", 17, 16, 21, True)
    monkeypatch.setitem(globals(), "_kernels", lambda *_: lambda q, *rest: right(1.02 * q, *rest))
    with pytest.raises(AssertionError, match="o: "):
        test_the_same_function_in_interpret_mode("packed_context", "float16", SHORT)


def _through_the_api(implementation, dtype):
    """Output and gradients of a long case, by name: layout, rule and targets to bounds.

    On a GPU this includes the self-check.
    """
    case = _stretched("window_full_tail_targets", LONG)
    arrays = oracle.random_inputs(NUM_ROWS, case.row_len, heads=NUM_HEADS, qk_dim=17, v_dim=16)
    attend = functools.partial(
        api.hstu_attention,
        layout=cases.build_layout(case),
        rule=case.rule,
        alpha=17**-0.5,
        divisor=DIVISOR,
        implementation=implementation,
        num_targets=jnp.asarray(cases.targets_of(case)),
    )
    results = _with_gradients(attend)(*(jnp.asarray(x, dtype) for x in arrays))
    return [np.asarray(x, np.float32) for x in results]


def _assert_api_is_right(kernel, dtype):
    results, again, expected = (_through_the_api(name, dtype) for name in (kernel, kernel, "xla"))
    for which, result, twice, e in zip(NAMES, results, again, expected, strict=True):
        np.testing.assert_array_equal(result, twice, err_msg=which)
        atol = TOLERANCE[dtype] * np.abs(e).max()
        np.testing.assert_allclose(result, e, rtol=0, atol=atol, err_msg=which)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DIGITS))
def test_auto_on_the_gpu_is_the_checked_kernel_and_the_same_bits_twice(dtype):
    assert api.auto_implementation() == "pallas_triton"
    _assert_api_is_right("pallas_triton", dtype)


def test_the_api_in_interpret_mode():
    _assert_api_is_right("pallas_triton_interpret", "float32")
