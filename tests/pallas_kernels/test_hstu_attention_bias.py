"""Biases by distance and by time against a float64 formula: values, gradients, memory, refusals."""

import functools
import logging
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch
from pallas_kernels.hstu_attention import api, cases, layout
from pallas_kernels.hstu_attention import bias as bias_lib
from pallas_kernels.hstu_attention.mask import MaskRule
from tests.pallas_kernels import dense, oracle

ALPHA, DIVISOR = 0.5, 7.0
NUM_DISTANCES, NUM_BUCKETS = 12, 30  # the longest segment has 21 tokens: far ones share a value
CASE = next(case for case in cases.CASES if case.name == "packed_context")
LAYOUT = cases.build_layout(CASE)
NAMES = "o dq dk dv d_distance d_interval".split()


def random_bias(shape, seed=0):
    """(by_distance, by_interval, query_time, key_time): steps of seconds to years, some untimed."""
    rng = np.random.default_rng(seed)
    by_distance = rng.standard_normal(NUM_DISTANCES)
    by_interval = rng.standard_normal(NUM_BUCKETS + 1)
    steps = np.floor(np.exp(rng.uniform(-1, 9, shape)))
    key_time = np.cumsum(steps, axis=1) - 50_000
    query_time = np.concatenate([key_time[:, 1:], key_time[:, -1:] + 5], axis=1)
    is_untimed = rng.random(shape) < 0.15
    query_time[is_untimed] = key_time[is_untimed] = bias_lib.NO_TIME
    tables = [x.astype(np.float32) for x in (by_distance, by_interval)]
    return [*tables, *(x.astype(np.int32) for x in (query_time, key_time))]


def pair_terms(by_distance, by_interval, query_time, key_time):
    """Distance index and bucket of every pair [R, L, L], and whether the bucket counts."""
    slot = np.arange(query_time.shape[1])
    distance = np.minimum(np.abs(slot[:, None] - slot[None]), len(by_distance) - 1)
    query, key = (x.astype(np.int64) for x in (query_time, key_time))
    is_timed = (query != bias_lib.NO_TIME)[:, :, None] & (key != bias_lib.NO_TIME)[:, None, :]
    interval = np.where(is_timed, query[:, :, None] - key[:, None], 0)
    bucket = np.floor(np.log(np.maximum(np.abs(interval), 1)) / 0.301).astype(int)
    return distance, np.minimum(bucket, len(by_interval) - 1), is_timed


def expected(arrays, tables, mask, *, use=(True, True)):
    """Output and all gradients in float64."""
    by_distance, by_interval = (x.astype(np.float64) for x in tables[:2])
    distance, bucket, is_timed = pair_terms(*tables)
    rab = use[0] * by_distance[distance] + use[1] * np.where(is_timed, by_interval[bucket], 0)
    results = dense.attention(*arrays, mask, ALPHA, DIVISOR, rab)
    dbias = dense.bias_gradient(*arrays, mask, ALPHA, DIVISOR, rab)
    distance = np.broadcast_to(distance, dbias.shape)
    d_distance = np.bincount(distance.ravel(), dbias.ravel(), len(by_distance))
    d_interval = np.bincount(bucket[is_timed], dbias[is_timed], len(by_interval))
    return (*results, use[0] * d_distance, use[1] * d_interval)


def results_of(attend, q, k, v, g, tables):
    """Output and gradients; `attend(q, k, v, bias)`."""
    by_distance, by_interval, query_time, key_time = (
        None if x is None else jnp.asarray(x) for x in tables
    )

    def call(q, k, v, by_distance, by_interval):
        bias = bias_lib.AttentionBias(
            by_distance=by_distance,
            by_interval=by_interval,
            query_time_s=query_time,
            key_time_s=key_time,
        )
        return attend(q, k, v, bias=bias)

    output, vjp = jax.vjp(call, q, k, v, by_distance, by_interval)
    return output, *vjp(g)


@functools.cache
def compiled(implementation):
    attend = functools.partial(
        api.hstu_attention,
        layout=LAYOUT,
        rule=CASE.rule,
        alpha=ALPHA,
        divisor=DIVISOR,
        implementation=implementation,
    )
    return jax.jit(functools.partial(results_of, attend))


@functools.cache
def inputs():
    arrays = oracle.random_inputs(LAYOUT.num_rows, LAYOUT.row_len)
    return arrays, random_bias((LAYOUT.num_rows, LAYOUT.row_len)), oracle.case_mask(CASE)


def assert_close(actual, right, names=NAMES):
    """Relative to the largest value, as in `test_hstu_attention.py`; tables sum over all pairs."""
    for name, a, e in zip(names, actual, right, strict=True):
        scale = max(np.abs(e).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(a), e, rtol=0, atol=4e-6 * scale, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_output_and_gradients_equal_the_float64_formula(implementation):
    arrays, tables, mask = inputs()
    assert_close(compiled(implementation)(*arrays, tables), expected(arrays, tables, mask))


def test_buckets_are_the_rule_at_every_edge():
    near = [math.exp(0.301 * b) for b in range(1, 60)]
    whole = {0, 1, 2, 3} | {int(x) + d for x in near for d in (-1, 0, 1, 2) if x < 2**24}
    seconds = np.array(sorted(whole), np.float32)
    right = [min(math.floor(math.log(max(s, 1)) / 0.301), 50) for s in map(float, seconds)]
    buckets = jax.jit(functools.partial(bias_lib.interval_buckets, num_buckets=50))
    np.testing.assert_array_equal(buckets(seconds), right)
    np.testing.assert_array_equal(buckets(-seconds), right)
    assert right[-1] == 50 and len(set(right)) > 45
    ends = np.array([np.inf, -np.inf, 3e38], np.float32)
    np.testing.assert_array_equal(buckets(ends), [51, 51, 50])


def test_intervals_are_exact_whatever_the_origin():
    """A query and its keys years before the origin; the ends of int32; slots without a time."""
    years = 40 * 365 * 86_400
    query = jnp.array([0, -years, 2**24, bias_lib.NO_TIME, 5], jnp.int32)
    key = jnp.array([-3, -years - 7, -(2**31 - 1 - 2**24), 4, bias_lib.NO_TIME], jnp.int32)
    expected = [3, 7, 2**31, np.inf, np.inf]
    np.testing.assert_array_equal(bias_lib.intervals(query, key), expected)


ROWS, ROW_LEN, SEGMENTS = 2, 11, 5
# (rule, by distance, by time, block length)
PROGRAMS = (
    (MaskRule(contextual_len=2, max_attn_len=5, min_full_attn_len=2), True, True, 4),
    (MaskRule(contextual_len=1, sla_k1=3, sla_k2=3), False, True, 11),
    (MaskRule(), True, False, 3),
)


@functools.cache
def property_program(number):
    rule, *use, block_len = PROGRAMS[number]

    @jax.jit
    def run(arrays, tables, starts, lengths, pairs, count, targets):
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
        kept = [tables[0] if use[0] else None, *(tables[1:] if use[1] else [None] * 3)]
        return results_of(attend, *arrays, kept)

    return run


@st.composite
def segments(draw, rule):
    """Segments with gaps in two rows, their targets, and a seed of the values."""
    starts, lengths, targets = [], [], []
    for row in range(ROWS):
        slot = draw(st.integers(0, 2))
        while slot < ROW_LEN and len(starts) < SEGMENTS:
            length = draw(st.integers(0, ROW_LEN - slot))
            length = length if length >= rule.contextual_len else 0
            starts.append(row * ROW_LEN + slot)
            lengths.append(length)
            targets.append(draw(st.integers(0, max(length - rule.contextual_len, 0))))
            slot += length + draw(st.integers(0, 2)) + (length == 0)
    unused = SEGMENTS - len(starts)
    arrays = (starts + [ROWS * ROW_LEN] * unused, lengths + [0] * unused, targets + [0] * unused)
    return *(np.array(a, np.int32) for a in arrays), draw(st.integers(0, 2**31))


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_segments_equal_the_dense_formula_with_poison_in_padding(number, data):
    rule, *use, block_len = PROGRAMS[number]
    starts, lengths, targets, seed = data.draw(segments(rule))
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
    arrays = oracle.random_inputs(ROWS, ROW_LEN, heads=1, qk_dim=3, v_dim=2, seed=seed)
    tables = random_bias((ROWS, ROW_LEN), seed)
    mask = oracle.dense_mask(starts, lengths, targets, ROWS, ROW_LEN, rule)
    right = expected(arrays, tables, mask, use=use)
    is_padding = np.ones(ROWS * ROW_LEN, bool)
    for start, length in zip(starts, lengths, strict=True):
        is_padding[start : start + length] = False
    is_padding = is_padding.reshape(ROWS, ROW_LEN)
    arrays = [np.where(is_padding[..., None, None], np.float32(np.nan), x) for x in arrays]
    tables[2:] = [np.where(is_padding, np.int32(-777), x) for x in tables[2:]]
    schedule = (starts, lengths, pairs[None], np.array([count], np.int32), targets)
    results = property_program(number)(arrays, tables, *schedule)
    kept = [True] * 4 + use
    assert [x is not None for x in results] == kept
    names, right = (
        [x for x, is_kept in zip(all_of, kept, strict=True) if is_kept] for all_of in (NAMES, right)
    )
    assert_close([x for x in results if x is not None], right, names)


WRONG = {
    "no distance": lambda d, i, q, k: (0 * d, i, q, k),
    "no time": lambda d, i, q, k: (d, 0 * i, q, k),
    "distance off by one": lambda d, i, q, k: (np.roll(d, 1), i, q, k),
    "bucket off by one": lambda d, i, q, k: (d, np.roll(i, 1), q, k),
    "own time of the query": lambda d, i, q, k: (d, i, k, k),
    "next time of the key": lambda d, i, q, k: (d, i, q, q),
    "everything timed": lambda d, i, q, k: (d, i, *(np.maximum(x, -(2**24)) for x in (q, k))),
}


@pytest.mark.parametrize("variant", WRONG)
def test_wrong_variant_is_caught(variant):
    arrays, tables, mask = inputs()
    results = compiled("xla")(*arrays, tables)
    wrong = expected(arrays, WRONG[variant](*tables), mask)
    for name, result, e in zip(NAMES, results, wrong, strict=True):
        with pytest.raises(AssertionError):
            assert_close([result], [e], [name])


def test_poison_stays_inside_its_segment_and_shows_in_the_tables():
    arrays, tables, _ = inputs()
    poisoned = [x.copy() for x in arrays]
    poisoned[1][0, 10, 1, 2] = np.nan  # the second segment of row 0: slots 9 .. 12
    is_hit = np.zeros(arrays[0].shape[:2], bool)
    is_hit[0, 9:13] = True
    clean, results = compiled("xla")(*arrays, tables), compiled("xla")(*poisoned, tables)
    for before, after in zip(clean[:4], results[:4], strict=True):
        np.testing.assert_array_equal(np.asarray(after)[~is_hit], np.asarray(before)[~is_hit])
        assert np.isnan(np.asarray(after)[is_hit]).all()
    assert np.isnan(results[4]).all() and np.isnan(results[5]).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_last_query_is_the_last_row_of_the_full_op(implementation):
    arrays, tables, mask = inputs()
    q, k, v, _ = arrays
    has_tokens = LAYOUT.lengths > 0
    last = np.where(has_tokens, LAYOUT.starts + LAYOUT.lengths - 1, 0)
    g = np.random.default_rng(1).standard_normal((len(last), *v.shape[2:])).astype(np.float32)
    full_g = np.zeros((LAYOUT.num_rows * LAYOUT.row_len, *v.shape[2:]), np.float32)
    full_g[last[has_tokens]] = g[has_tokens]
    full = expected((q, k, v, full_g.reshape(v.shape)), tables, mask)

    def per_segment(array, nothing=0.0):
        flat = array.reshape(-1, *array.shape[2:])[last]
        return np.where(has_tokens[:, None, None], flat, nothing).astype(np.float32)

    attend = functools.partial(
        api.hstu_attention_last,
        layout=LAYOUT,
        rule=CASE.rule,
        alpha=ALPHA,
        divisor=DIVISOR,
        implementation=implementation,
    )
    run = jax.jit(functools.partial(results_of, attend))
    # In padding and for an empty user anything may stand.
    is_padding = np.asarray(layout.token_segments(LAYOUT)) < 0
    times = [np.where(is_padding, np.int32(-777), x) for x in tables[2:]]
    empty = np.nan if implementation == "xla" else 0.0
    results = run(per_segment(q, empty), k, v, g, [*tables[:2], *times])
    assert_close(results, (per_segment(full[0]), per_segment(full[1]), *full[2:]))


@pytest.mark.parametrize("form", ["all", "last"])
def test_memory_is_linear_in_the_length(form):
    op = api.hstu_attention_last if form == "last" else api.hstu_attention

    def temp_bytes(length):
        built = layout.from_lengths(np.array([length, length // 2], np.int32), row_len=length)
        token = jax.ShapeDtypeStruct((2, length, 1, 8), jnp.float32)
        query = jax.ShapeDtypeStruct((2, 1, 8), jnp.float32) if form == "last" else token
        tables = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (length, 129)]
        tables += [jax.ShapeDtypeStruct((2, length), jnp.int32)] * 2
        attend = functools.partial(op, layout=built, rule=MaskRule(), alpha=0.3, divisor=9.0)
        run = jax.jit(functools.partial(results_of, attend))
        compiled = run.lower(query, token, token, query, tables).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temp_bytes(2048), temp_bytes(4096)
    assert long < 3 * short
    assert long < 4096 * 4096  # a quarter of one [L, L] array of float32


def test_sums_by_index_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 130):
        values = jnp.asarray(rng.standard_normal(300), jnp.float32)
        index = jnp.asarray(rng.integers(0, size, 300), jnp.int32)
        right = np.bincount(index, np.asarray(values, np.float64), size)
        for sums in (bias_lib.sum_by_index, bias_lib.sum_by_product):
            np.testing.assert_allclose(sums(values, index, size=size), right, atol=1e-5)


def test_on_a_gpu_tables_are_summed_without_scatter():
    """A scatter that adds has no fixed order there."""
    arrays, tables, _ = inputs()
    traced = compiled("xla").trace(*arrays, tables)
    for platform, is_expected in (("cuda", False), ("tpu", False), ("cpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        scatters = re.findall(r"stablehlo.scatter.*?stablehlo.return", text, re.DOTALL)
        assert len(scatters) > 0, "poison is marked by a maximum"
        assert any("stablehlo.add" in each for each in scatters) == is_expected, platform


NO_KERNEL = ("pallas_triton", "pallas_triton_interpret", "pallas_tpu", "pallas_tpu_interpret")


@pytest.mark.parametrize("name", NO_KERNEL)
def test_kernels_refuse_a_bias(name):
    arrays, tables, _ = inputs()
    message = f"bias=AttentionBias: implementation='{name}' adds no bias .*; use 'auto' or 'xla'"
    with pytest.raises(dispatch.UnsupportedByKernel, match=message):
        compiled(name)(*arrays, tables)


def test_auto_falls_back_from_the_kernel_and_says_so(monkeypatch, caplog):
    arrays, tables, _ = inputs()
    monkeypatch.setattr(api, "_auto_order", lambda: ("pallas_triton", "xla"))
    monkeypatch.setattr(dispatch, "_logged_fallbacks", set())
    attend = functools.partial(
        api.hstu_attention, layout=LAYOUT, rule=CASE.rule, alpha=ALPHA, divisor=DIVISOR
    )
    with caplog.at_level(logging.WARNING):
        jax.eval_shape(functools.partial(results_of, attend), *arrays, tables)
    assert "pallas_triton is not used: bias=AttentionBias" in caplog.text
    assert api.auto_implementation() == "pallas_triton"
    assert api.auto_implementation(has_bias=True) == "xla"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(by_distance=np.ones((2, 2), np.float32)), r"bias.by_distance.shape=\(2, 2\): must"),
        (dict(by_distance=np.ones(0, np.float32)), r"shape=\(0,\): an empty table; use None"),
        (dict(by_distance=np.ones(2, np.int32)), "bias.by_distance.dtype=int32: must be one of"),
        (dict(by_interval=np.ones(2, np.float32)), "bias.query_time_s=None: times and .* together"),
        (
            dict(
                by_interval=np.ones(2, np.float32),
                query_time_s=np.ones((LAYOUT.num_rows, LAYOUT.row_len), np.float32),
            ),
            "bias.query_time_s.dtype=float32: must be int32, whole seconds from an origin of your",
        ),
    ],
)
def test_bad_input_is_refused(fields, message):
    q, k, v, _ = map(jnp.asarray, oracle.random_inputs(LAYOUT.num_rows, LAYOUT.row_len))
    # Without annotation checks, which the tests alone have.
    bias = object.__new__(bias_lib.AttentionBias)
    for name in ("by_distance", "by_interval", "query_time_s", "key_time_s"):
        object.__setattr__(bias, name, fields.get(name))
    options = dict(layout=LAYOUT, rule=CASE.rule, alpha=ALPHA, divisor=DIVISOR)
    with pytest.raises((ValueError, TypeError), match=message):
        api.hstu_attention(q, k, v, bias=bias, **options)
