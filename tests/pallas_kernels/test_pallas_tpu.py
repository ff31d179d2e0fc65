"""The TPU kernels in interpret mode against the float64 oracle, case by case.

All cases are brought to one shape and run without an outer jit: the kernels are compiled once for
all masks, which keeps this file at seconds. Lowering and transformations are in
`test_pallas_tpu_programs.py`, schedule and tile choice in `test_pallas_tpu_schedule.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hstu_attention import (
    cases,
    layout,
    pallas_tpu,
    pallas_tpu_kernels,
    reference,
    xla_blockwise,
)
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.pallas_tpu_tiles import Tiles
from tests.pallas_kernels import dense, oracle

ALPHA, DIVISOR = 0.5, 7.0
ROWS, SEGMENTS, PAIRS = 5, 9, 45
TILES = Tiles(block_len=8, heads_per_step=2)
NAMES = "o dq dk dv".split()
CASE_IDS = [case.name for case in cases.CASES]


@functools.cache
def _case(name):
    """The case with empty rows and unused segments added, its layout, values and exact results."""
    case = next(case for case in cases.CASES if case.name == name)
    num_segments = sum(map(len, case.rows))
    case = dataclasses.replace(
        case, rows=case.rows + ((),) * (ROWS - len(case.rows)), num_unused=SEGMENTS - num_segments
    )
    built = cases.build_layout(case)
    if built.block_pairs.shape[1] < PAIRS:
        spare = PAIRS - built.block_pairs.shape[1]
        # Entries past the count may hold anything.
        pairs = np.pad(built.block_pairs, ((0, 0), (0, spare), (0, 0)), constant_values=2)
        built = dataclasses.replace(built, block_pairs=pairs)
    arrays = oracle.random_inputs(ROWS, case.row_len)
    return case, built, arrays, oracle.attention(*arrays, oracle.case_mask(case), ALPHA, DIVISOR)


def _run(case, built, arrays, **changes):
    """Output and gradients; `changes` may replace any argument of the op."""
    targets = cases.targets_of(case)
    options = dict(
        layout=built,
        rule=case.rule,
        alpha=ALPHA,
        divisor=DIVISOR,
        num_targets=None if targets is None else jnp.asarray(targets),
        interpret=True,
        tiles=TILES,
    )
    q, k, v, g = (jnp.asarray(x) for x in arrays)
    attend = functools.partial(pallas_tpu.hstu_attention, **options | changes)
    output, vjp = jax.vjp(attend, q, k, v)
    return [np.asarray(x) for x in (output, *vjp(g))]


def _run_case(name, arrays=None, **changes):
    case, built, own, _ = _case(name)
    return _run(case, built, own if arrays is None else arrays, **changes)


def _assert_one_close(name, actual, expected):
    """Relative to the largest value: 2e-6 is some 16 roundings of a sum of up to 21 terms."""
    scale = max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * scale, err_msg=name)


@pytest.mark.parametrize("name", CASE_IDS)
def test_matches_float64_loops(name):
    for result_name, result, expected in zip(NAMES, _run_case(name), _case(name)[3], strict=True):
        _assert_one_close(result_name, result, expected)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "packed_context" else pytest.param(name, marks=pytest.mark.long)
        for name in CASE_IDS
    ],
)
def test_error_is_at_most_twice_that_of_xla(name):
    case, built, (q, k, v, g), expected = _case(name)
    targets = cases.targets_of(case)

    @jax.jit
    def run_xla(q, k, v, g):
        attend = functools.partial(
            xla_blockwise.hstu_attention,
            layout=built,
            rule=case.rule,
            alpha=ALPHA,
            divisor=DIVISOR,
            num_targets=None if targets is None else jnp.asarray(targets),
        )
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    for result, other, e in zip(_run_case(name), run_xla(q, k, v, g), expected, strict=True):
        error, xla_error = (np.abs(np.asarray(x, np.float64) - e).max() for x in (result, other))
        # The second term is two roundings of the largest value: with so few terms either form is
        # sometimes right to the last bit.
        assert error <= 2 * xla_error + 2 * np.finfo(np.float32).eps * np.abs(e).max()


@pytest.mark.parametrize("variant", ["no mask", "linear activation", "unscaled logits"])
def test_wrong_variant_is_caught(variant, monkeypatch):
    case, built, (q, k, v, g), expected = _case("packed_context")
    if variant == "no mask":
        monkeypatch.setattr(
            pallas_tpu_kernels, "tile_mask", lambda ref, key, size: jnp.full((size, size), True)
        )
    elif variant == "linear activation":
        monkeypatch.setattr(jax.nn, "sigmoid", lambda x: jnp.full(x.shape, 0.5, x.dtype))
    else:
        q = q / np.float32(ALPHA)
    # Sizes that no other test has: a wrong kernel is neither taken from a cache nor left in one.
    tiles = TILES if variant == "unscaled logits" else Tiles(9 + len(variant), heads_per_step=1)
    results = _run(case, built, (q, k, v, g), tiles=tiles)
    for name, result, e in zip(NAMES, results, expected, strict=True):
        with pytest.raises(AssertionError):
            _assert_one_close(name, result, e)


def test_another_rule_gives_another_result():
    """So the rule is used and the comparison can fail: context taken for history."""
    wrong = _run_case("packed_context", rule=MaskRule())
    with pytest.raises(AssertionError):
        _assert_one_close("o", wrong[0], _case("packed_context")[3][0])


def test_very_negative_logits_keep_their_digits():
    """All logits near -20: SiLU is about -4e-8 there, lost if the sigmoid has absolute errors."""
    case, built, (q, k, v, g), _ = _case("packed_context")
    arrays = (3 + 0.1 * q, -3.3 - 0.1 * k, v, g)
    expected = oracle.attention(*arrays, oracle.case_mask(case), ALPHA, DIVISOR)
    for result, e in zip(_run(case, built, arrays), expected, strict=True):
        np.testing.assert_allclose(result, e, rtol=0, atol=1e-5 * np.abs(e).max())


def test_bfloat16_rounds_scores_and_results_only():
    case, built, arrays, _ = _case("packed_context")
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in arrays]
    mask = oracle.case_mask(case)
    exact, magnitude = (
        function(*(x.astype(np.float64) for x in rounded), mask, ALPHA, DIVISOR)
        for function in (dense.attention, dense.magnitudes)
    )
    for result, e, m in zip(_run(case, built, rounded), exact, magnitude, strict=True):
        assert result.dtype == jnp.bfloat16
        # bfloat16 has 8 bits: scores and the result are off by half a unit, sums are float32. The
        # result is the rounded one of rounded scores, hence 1.01.
        error = np.abs(result.astype(np.float64) - e)
        assert (error <= 1.01 * 2.0**-8 * (m + np.abs(e)) + 1e-6).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["packed_context", "window_full_tail_targets"])
def test_poison_in_padding_changes_nothing(name, poison):
    case, built, arrays, _ = _case(name)
    is_padding = np.asarray(layout.token_segments(built)) < 0
    poisoned = [np.where(is_padding[..., None, None], np.float32(poison), x) for x in arrays]
    results = _run(case, built, poisoned)
    for clean, result in zip(_run(case, built, arrays), results, strict=True):
        np.testing.assert_array_equal(result, clean)
        assert not result[is_padding].any()


@pytest.mark.parametrize("which", range(4))
def test_poison_stays_inside_its_segment(which):
    case, built, arrays, _ = _case("packed_context")
    poisoned = [x.copy() for x in arrays]
    poisoned[which][0, 10, 1, 2] = np.nan  # the second segment of row 0: slots 9 .. 12
    is_hit = np.zeros(arrays[0].shape[:2], bool)
    is_hit[0, 9:13] = True
    clean, results = _run(case, built, arrays), _run(case, built, poisoned)
    for name, before, after in zip(NAMES, clean, results, strict=True):
        np.testing.assert_array_equal(after[~is_hit], before[~is_hit])
        # A cotangent reaches gradients only.
        assert np.isnan(after[is_hit]).all() == (not (which == 3 and name == "o")), name


def test_overflow_between_segments_changes_nothing():
    """Finite values whose product overflows, but only for a pair that the mask hides."""
    case, built, arrays, _ = _case("packed_context")
    hidden = [x.copy() for x in arrays]
    hidden[0][0, 3] = hidden[1][0, 10] = 1e30  # q of segment 0, k of segment 1
    is_other = np.ones(arrays[0].shape[:2], bool)
    is_other[0, :13] = False
    results = _run(case, built, hidden)
    for before, after in zip(_run(case, built, arrays), results, strict=True):
        assert np.isfinite(after).all()
        np.testing.assert_array_equal(after[is_other], before[is_other])


@pytest.mark.long
def test_tiles_do_not_change_the_result():
    """Head groups and tile lengths are cuts of the work, not of the formula."""
    results = _run_case("packed_context", tiles=Tiles(128, heads_per_step=1))
    for name, result, expected in zip(NAMES, results, _case("packed_context")[3], strict=True):
        _assert_one_close(name, result, expected)


def test_two_runs_are_equal_bit_for_bit():
    for first, second in zip(_run_case("packed"), _run_case("packed"), strict=True):
        np.testing.assert_array_equal(first, second)


def test_computed_tiles_are_the_scheduled_ones(monkeypatch):
    """One visit for each scheduled pair and group of heads, in each kernel; nothing else."""
    _, built, _, _ = _case("packed")
    visits = []
    tile_mask = pallas_tpu_kernels.tile_mask

    def counting(interval_ref, first_key, block_len):
        jax.debug.callback(lambda key: visits.append(int(key)), first_key)
        return tile_mask(interval_ref, first_key, block_len)

    monkeypatch.setattr(pallas_tpu_kernels, "tile_mask", counting)
    # A divisor that no other test has: see test_wrong_variant_is_caught.
    _run_case("packed", tiles=Tiles(8, heads_per_step=1), divisor=11.0)
    jax.effects_barrier()
    count, key_tiles = built.num_block_pairs[0], built.block_pairs[0, : built.num_block_pairs[0], 2]
    num_kernels, num_heads = 3, 2
    assert 0 < count < ROWS * 6  # fewer than the lower triangles
    assert sorted(visits) == sorted((8 * key_tiles).tolist() * num_kernels * num_heads)


def test_a_pair_that_is_not_scheduled_is_not_computed():
    """Row 1 of "packed" holds one segment of 21: without pair (2, 0) its last tile loses 8 keys."""
    case, built, arrays, _ = _case("packed")
    count = built.num_block_pairs[0]
    pairs = built.block_pairs[0, :count]
    kept = pairs[~(pairs == [1, 2, 0]).all(axis=1)]
    assert len(kept) == count - 1
    # Two groups of pairs with idle entries between them.
    groups = np.full((2, PAIRS, 3), 1, np.int32)
    groups[0, :4], groups[1, : count - 5] = kept[:4], kept[4:]
    changed = dataclasses.replace(
        built, block_pairs=groups, num_block_pairs=np.array([4, count - 5], np.int32)
    )
    mask = oracle.case_mask(case)
    mask[1, 16:, :8] = False
    expected = oracle.attention(*arrays, mask, ALPHA, DIVISOR)
    for name, result, e in zip(NAMES, _run(case, changed, arrays), expected, strict=True):
        _assert_one_close(name, result, e)


@pytest.mark.long
def test_tiles_of_a_tpu_with_long_rows():
    """Chosen tiles (128 here), three to a row, two of them cut by segment ends."""
    case = cases.Case("", ((290,), (130, 60, 100)), MaskRule(contextual_len=3), row_len=300)
    built = cases.build_layout(case)
    arrays = oracle.random_inputs(2, 300)
    mask = np.asarray(reference.attention_mask(built, case.rule))
    expected = dense.attention(*arrays, mask, ALPHA, 100.0)
    results = _run(case, built, arrays, tiles=None, divisor=100.0)
    for name, result, e in zip(NAMES, results, expected, strict=True):
        _assert_one_close(name, result, e)
