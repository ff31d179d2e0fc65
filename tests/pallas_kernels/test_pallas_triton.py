"""The Triton kernels in interpret mode against float64 loops, at tiles far smaller than a row.

The mask is data of one compiled program, so all cases share a few programs. Lowering and compiling
for real GPUs is in `test_compile_check.py`, running on one in `test_pallas_triton_gpu.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.hstu_attention import api, cases, layout, pallas_triton, triton_kernels
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.tiles import Tile, Tiles
from pallas_kernels.hstu_attention.triton_kernels import Scale
from tests.pallas_kernels import oracle

ALPHA, DIVISOR = 0.5, 7.0
NAMES = "o dq dk dv".split()
BY_NAME = {case.name: case for case in cases.CASES}
NUM_ROWS, NUM_SEGMENTS = 5, 10
# Three rows of tiles for 21 slots, blocks that are equal and that are not.
TILES = Tiles(Tile(16, 32, 4, 2), Tile(32, 16, 4, 2), Tile(16, 16, 4, 2))


def _in_common_shape(case):
    """Layout arrays of a case with as many rows and segments as the largest has."""
    built = cases.build_layout(case)
    capacity = NUM_ROWS * case.row_len
    add = NUM_SEGMENTS - len(built.starts)
    starts = np.where(built.lengths > 0, built.starts, np.minimum(built.starts, capacity))
    starts = np.concatenate([starts, np.full(add, capacity, np.int32)])
    lengths = np.concatenate([built.lengths, np.zeros(add, np.int32)])
    targets = cases.targets_of(case)
    if targets is not None:
        targets = np.concatenate([targets, np.zeros(add, np.int32)])
    return starts, lengths, targets


def _mask_data(case):
    """Segments and bounds of a case: what `pallas_triton.attend` takes of a mask."""
    starts, lengths, targets = _in_common_shape(case)
    built = layout.SequenceLayout(
        starts=starts,
        lengths=lengths,
        block_pairs=np.zeros((1, 1, 3), np.int32),
        num_block_pairs=np.zeros(1, np.int32),
        num_rows=NUM_ROWS,
        row_len=case.row_len,
        block_len=case.row_len,
    )
    intervals = layout.slot_intervals(built, targets, rule=case.rule, padded_len=case.row_len)
    bounds = [x for interval in intervals for x in (interval.start, interval.end)]
    bounds += [jnp.zeros_like(bounds[0])] * (4 - len(bounds))
    return layout.token_segments(built), jnp.stack(bounds, 1)


def _program(dtype="float32"):
    """Jitted (q, k, v, g, segment, bounds) -> (o, dq, dk, dv)."""
    return _compiled(dtype)


@functools.cache
def _compiled(dtype):
    program = pallas_triton.Program(Scale(ALPHA, DIVISOR), TILES, NUM_SEGMENTS, interpret=True)

    @jax.jit
    def run(q, k, v, g, segment, bounds):
        q, k, v, g = (x.astype(dtype) for x in (q, k, v, g))
        attend = lambda q, k, v: pallas_triton.attend(q, k, v, segment, bounds, program)  # noqa: E731
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    return run


@functools.cache
def _inputs(case):
    return oracle.random_inputs(NUM_ROWS, case.row_len)


@functools.cache
def _oracle(case):
    starts, lengths, targets = _in_common_shape(case)
    mask = oracle.dense_mask(starts, lengths, targets, NUM_ROWS, case.row_len, case.rule)
    return mask, oracle.attention(*_inputs(case), mask, ALPHA, DIVISOR)


@functools.cache
def _dense_program():
    """The dense formula in float32, mask as data: the honest error of this dtype."""

    def dense(q, k, v, mask):
        logits = ALPHA * jnp.einsum("rihk,rjhk->rhij", q, k, precision="highest")
        scores = jnp.where(mask[:, None], jax.nn.silu(logits) / DIVISOR, 0)
        return jnp.einsum("rhij,rjhv->rihv", scores, v, precision="highest")

    @jax.jit
    def run(q, k, v, g, mask):
        output, vjp = jax.vjp(lambda q, k, v: dense(q, k, v, mask), q, k, v)
        return output, *vjp(g)

    return run


def _errors(actual, expected):
    pairs = zip(actual, expected, strict=True)
    return [float(np.abs(np.asarray(a, np.float64) - e).max()) for a, e in pairs]


def _assert_close(name, actual, expected):
    """Relative to the largest value: 2e-6 is some 16 roundings of a sum of up to 21 terms."""
    scale = max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(
        np.asarray(actual), expected, rtol=0, atol=2e-6 * scale, err_msg=name
    )


@pytest.mark.parametrize("name", list(BY_NAME))
def test_every_case_is_as_exact_as_the_dense_form(name):
    case = BY_NAME[name]
    mask, expected = _oracle(case)
    results = _program()(*_inputs(case), *_mask_data(case))
    honest = _errors(_dense_program()(*_inputs(case), mask), expected)
    for which, result, error, e in zip(NAMES, results, honest, expected, strict=True):
        _assert_close(which, result, e)
        # The second term is two roundings of the largest value: with so few terms the dense form
        # is sometimes right to the last bit.
        limit = 2 * error + 2 * np.finfo(np.float32).eps * np.abs(e).max()
        assert np.abs(np.asarray(result, np.float64) - e).max() <= limit, which
        is_padding = ~mask.any(axis=2)
        assert not np.asarray(result)[is_padding].any(), which


def test_very_negative_logits_keep_their_digits():
    """All logits near -20: SiLU is about -4e-8 there, lost if the sigmoid has absolute errors."""
    case = BY_NAME["packed_context"]
    q, k, v, g = _inputs(case)
    arrays = (3 + 0.1 * q, -3.3 - 0.1 * k, v, g)
    mask = _oracle(case)[0]
    expected = oracle.attention(*arrays, mask, ALPHA, DIVISOR)
    results = _program()(*arrays, *_mask_data(case))
    honest = _errors(_dense_program()(*arrays, mask), expected)
    for error, dense_error, e in zip(_errors(results, expected), honest, expected, strict=True):
        assert error <= 2 * dense_error + 2 * np.finfo(np.float32).eps * np.abs(e).max()


@pytest.mark.parametrize(("dtype", "digits"), [("bfloat16", 8), ("float16", 11)])
def test_half_types_sum_in_float32(dtype, digits):
    """Scores are rounded once before the second product, results once at the end."""
    case = BY_NAME["packed_context"]
    arrays = [np.asarray(jnp.asarray(x, dtype), np.float32) for x in _inputs(case)]
    mask = _oracle(case)[0]
    q, k, v, g = (np.abs(x) for x in arrays)
    expected = oracle.attention(*arrays, mask, ALPHA, DIVISOR)
    results = _program(dtype)(*arrays, *_mask_data(case))
    # Bound of one rounding of every term of the sum; sums in the half type would have many.
    logits = ALPHA * np.einsum("rihk,rjhk->rhij", arrays[0], arrays[1])
    gate = 1 / (1 + np.exp(-logits))
    m = mask[:, None]
    scores = np.abs(logits * gate) * m / DIVISOR
    slopes = np.abs(gate * (1 + logits * (1 - gate))) * m * ALPHA / DIVISOR
    dlogits = np.abs(np.einsum("rihv,rjhv->rhij", arrays[3], arrays[2])) * slopes
    terms = (
        np.einsum("rhij,rjhv->rihv", scores, v),
        np.einsum("rhij,rjhk->rihk", dlogits, k),
        np.einsum("rhij,rihk->rjhk", dlogits, q),
        np.einsum("rhij,rihv->rjhv", scores, g),
    )
    for which, result, e, term in zip(NAMES, results, expected, terms, strict=True):
        assert result.dtype == jnp.dtype(dtype)
        error = np.abs(np.asarray(result, np.float64) - e)
        assert (error <= 2.0**-digits * (np.abs(e) + term) * 1.01 + 1e-6).all(), which


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["packed_context", "window_full_tail_targets"])
def test_poison_in_padding_changes_nothing(name, poison):
    case = BY_NAME[name]
    is_padding = ~_oracle(case)[0].any(axis=2)
    data = _mask_data(case)
    poisoned = [np.where(is_padding[..., None, None], np.float32(poison), x) for x in _inputs(case)]
    clean = _program()(*_inputs(case), *data)
    for before, after in zip(clean, _program()(*poisoned, *data), strict=True):
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before))


@pytest.mark.parametrize("which", range(4))
def test_poison_stays_inside_its_segment(which):
    case = BY_NAME["packed_context"]
    data, arrays = _mask_data(case), _inputs(case)
    poisoned = [x.copy() for x in arrays]
    poisoned[which][0, 10, 1, 2] = np.nan  # the second segment of row 0: slots 9 .. 12
    is_hit = np.zeros(arrays[0].shape[:2], bool)
    is_hit[0, 9:13] = True
    clean, results = _program()(*arrays, *data), _program()(*poisoned, *data)
    for name, before, after in zip(NAMES, clean, results, strict=True):
        np.testing.assert_array_equal(np.asarray(after)[~is_hit], np.asarray(before)[~is_hit])
        # A cotangent reaches gradients only.
        is_expected = not (which == 3 and name == "o")
        assert np.isnan(np.asarray(after)[is_hit]).all() == is_expected, name


def test_overflow_between_segments_changes_nothing():
    """Finite values whose product overflows, but only for a pair that the mask hides."""
    case = BY_NAME["packed_context"]
    data, arrays = _mask_data(case), _inputs(case)
    hidden = [x.copy() for x in arrays]
    hidden[0][0, 3] = hidden[1][0, 10] = 1e30  # q of segment 0, k of segment 1
    is_other = np.ones(arrays[0].shape[:2], bool)
    is_other[0, :13] = False
    clean, results = _program()(*arrays, *data), _program()(*hidden, *data)
    for before, after in zip(clean, results, strict=True):
        assert np.isfinite(np.asarray(after)).all()
        np.testing.assert_array_equal(np.asarray(after)[is_other], np.asarray(before)[is_other])


def _wrong_program(monkeypatch, variant):
    """A program with a fault planted in the kernels."""
    if variant == "no mask":
        right = triton_kernels._mask
        monkeypatch.setattr(triton_kernels, "_mask", lambda *a, **k: jnp.ones_like(right(*a, **k)))
    elif variant == "linear activation":
        monkeypatch.setattr(triton_kernels, "_gate", lambda x, _: jnp.full_like(x, 0.5))
    elif variant == "one tile short":
        right_runs = pallas_triton.tile_runs.runs_of

        def short(is_visited):
            return right_runs(is_visited.at[:, :, 0].set(False))

        monkeypatch.setattr(pallas_triton.tile_runs, "runs_of", short)
    alpha = 1.0 if variant == "unscaled logits" else ALPHA
    program = pallas_triton.Program(Scale(alpha, DIVISOR), TILES, NUM_SEGMENTS, interpret=True)

    @jax.jit
    def run(q, k, v, g, segment, bounds):
        attend = lambda q, k, v: pallas_triton.attend(q, k, v, segment, bounds, program)  # noqa: E731
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    return run


@pytest.mark.parametrize(
    "variant",
    [
        "no mask",
        "linear activation",
        "one tile short",
        "unscaled logits",
    ],
)
def test_wrong_variant_is_caught(variant, monkeypatch):
    case = BY_NAME["packed_context"]
    _, expected = _oracle(case)
    results = _wrong_program(monkeypatch, variant)(*_inputs(case), *_mask_data(case))
    for name, result, e in zip(NAMES, results, expected, strict=True):
        with pytest.raises(AssertionError):
            _assert_close(name, result, e)


def test_it_refuses_a_cpu_by_name():
    built = layout.from_lengths(np.array([4], np.int32), row_len=4)
    token = jnp.ones((1, 4, 1, 8))
    options = dict(layout=built, rule=MaskRule(), alpha=1.0, divisor=1.0)
    for op, q in ((api.hstu_attention, token), (api.hstu_attention_last, token[:, 0])):
        with pytest.raises(
            dispatch.UnsupportedByKernel,
            match="device='cpu': pallas_triton needs an NVIDIA GPU of compute capability 8.0 or "
            "newer, this is cpu; use 'auto' or 'xla'",
        ):
            op(q, token, token, implementation="pallas_triton", **options)


def test_it_refuses_wide_heads():
    built = layout.from_lengths(np.array([4], np.int32), row_len=4)
    wide, narrow = jnp.ones((1, 4, 1, 257)), jnp.ones((1, 4, 1, 8))
    options = dict(layout=built, rule=MaskRule(), alpha=1.0, divisor=1.0)
    with pytest.raises(
        dispatch.UnsupportedByKernel,
        match=r"q.shape\[3\]=8, v.shape\[3\]=257: pallas_triton takes widths up to 256",
    ):
        api.hstu_attention(
            narrow, narrow, wide, implementation="pallas_triton_interpret", **options
        )


def test_last_query_by_name_is_the_linear_program():
    case = BY_NAME["packed_context"]
    built = cases.build_layout(case)
    q, k, v, _ = oracle.random_inputs(built.num_rows, built.row_len)
    query, k, v = jnp.ones((len(built.starts), *q.shape[2:])), jnp.asarray(k), jnp.asarray(v)
    options = dict(layout=built, rule=case.rule, alpha=ALPHA, divisor=DIVISOR)
    one, other = (
        jax.jit(functools.partial(api.hstu_attention_last, implementation=name, **options))(
            query, k, v
        )
        for name in ("xla", "pallas_triton_interpret")
    )
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
