"""Time buckets equal the float32 rule everywhere, above all next to the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.model import time_buckets

CASES = [
    (2048, 60.0, "sqrt"),
    (41, 1.0, "sqrt"),
    (100, 1.0, "sqrt"),
    (16, 60.0, "log"),
    (200, 0.7, "log"),
]


def on_device(gaps, num_time_buckets, increments, fn):
    call = jax.jit(
        lambda gaps: time_buckets.time_buckets(
            gaps, num_time_buckets=num_time_buckets, increments=increments, fn=fn
        )
    )
    return np.asarray(call(jnp.asarray(gaps)))


def rule(gaps, num_time_buckets, increments, fn):
    return time_buckets.bucket_rule(
        gaps, num_time_buckets=num_time_buckets, increments=increments, fn=fn
    )


@pytest.mark.parametrize("case", CASES)
def test_a_million_random_gaps(case):
    rng = np.random.default_rng(0)
    spread = np.exp(rng.uniform(np.log(1e-7), np.log(3e9), 700_000))
    gaps = np.concatenate([spread, rng.integers(-5, 2_000_000, 300_000)]).astype(np.float32)
    np.testing.assert_array_equal(on_device(gaps, *case), rule(gaps, *case))


@pytest.mark.parametrize("case", CASES)
def test_every_neighbour_of_every_edge(case):
    edges = time_buckets.bucket_edges(*case)
    assert np.all(np.diff(edges[np.isfinite(edges)]) >= 0)
    edges = edges[np.isfinite(edges)]
    steps = np.arange(-3, 4, dtype=np.int32)
    gaps = (edges.view(np.int32)[:, None] + steps).view(np.float32).reshape(-1)
    np.testing.assert_array_equal(on_device(gaps, *case), rule(gaps, *case))


def test_multiplying_by_the_reciprocal_is_wrong():
    # What a compiler makes of the rule: buckets of perfect squares move, with T = 41.
    squares = np.square(np.arange(1, 60, dtype=np.float32))
    share = np.sqrt(squares) * np.float32(1 / 41)
    wrong = (np.clip(share, 0, 1) * np.float32(41)).astype(np.int32)
    assert np.any(wrong != on_device(squares, 41, 1.0, "sqrt"))


def test_extremes():
    gaps = np.array([-5, 0, 1e-7, 59.9, 60, 240, 1.7e9, np.inf], np.float32)
    expected = [0, 0, 0, 0, 1, 2, 2048, 2048]
    np.testing.assert_array_equal(on_device(gaps, 2048, 60.0, "sqrt"), expected)
    np.testing.assert_array_equal(on_device(gaps[:4], 16, 60.0, "log"), 0)


def test_log_buckets_that_no_finite_gap_reaches_stay_empty():
    edges = time_buckets.bucket_edges(200, 60.0, "log")
    assert np.isinf(edges[-1]) and np.isfinite(edges[50])
