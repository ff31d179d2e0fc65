"""Unique rows, gather and expand against NumPy loops and dense autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.tables import lookup

NUM_ROWS, DIM, NUM = 40, 5, 64


def draw(seed=0):
    """A table, occurrences with many duplicates and about a fifth padding, a cotangent."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(NUM_ROWS, DIM)).astype(np.float32) * 2
    rows = rng.integers(0, NUM_ROWS // 2, NUM).astype(np.int32) * 2
    rows[rng.random(NUM) < 0.2] = NUM_ROWS
    cotangent = rng.normal(size=(NUM, DIM)).astype(np.float32) * 2
    return weights, rows, cotangent


@functools.partial(jax.jit, static_argnames="max_gradient")
def sparse_gradient(weights, rows, cotangent, max_gradient=None):
    """Vectors and the gradient per unique row, put back into the shape of the table."""
    unique = lookup.unique_rows(jnp.asarray(rows), capacity=NUM, sentinel=NUM_ROWS)
    picked = lookup.gather(jnp.asarray(weights), unique)
    vectors, pull = jax.vjp(
        lambda picked: lookup.expand(picked, unique, max_gradient=max_gradient), picked
    )
    (gradient,) = pull(jnp.asarray(cotangent))
    return vectors, jnp.zeros((NUM_ROWS, DIM)).at[unique.rows].add(gradient, mode="drop")


def loop_gradient(rows, cotangent, max_gradient=np.inf):
    """Oracle in float64: clip each occurrence, then add."""
    gradient = np.zeros((NUM_ROWS, DIM))
    for row, value in zip(rows, cotangent.astype(np.float64), strict=True):
        if row < NUM_ROWS:
            gradient[row] += np.clip(value, -max_gradient, max_gradient)
    return gradient


def test_unique_rows_by_hand():
    rows = jnp.array([7, 2, 9, 7, 2, 7], jnp.int32)
    unique = lookup.unique_rows(rows, capacity=4, sentinel=9)
    np.testing.assert_array_equal(unique.rows, [2, 7, 9, 9])
    np.testing.assert_array_equal(unique.order, [1, 4, 0, 3, 5, 2])
    np.testing.assert_array_equal(unique.segment, [0, 0, 1, 1, 1, 5])
    np.testing.assert_array_equal(unique.inverse, [1, 0, 5, 1, 0, 1])
    assert int(unique.num_rows) == 2


@pytest.mark.parametrize("kind", ["all padding", "all the same", "all distinct"])
def test_unique_rows_edges(kind):
    rows = {
        "all padding": np.full(NUM_ROWS, NUM_ROWS),
        "all the same": np.full(NUM_ROWS, 3),
        "all distinct": np.random.default_rng(0).permutation(NUM_ROWS),
    }[kind].astype(np.int32)
    unique = lookup.unique_rows(jnp.asarray(rows), capacity=NUM_ROWS, sentinel=NUM_ROWS)
    expected = np.unique(rows[rows < NUM_ROWS])
    assert int(unique.num_rows) == expected.size
    np.testing.assert_array_equal(unique.rows[: expected.size], expected)
    np.testing.assert_array_equal(unique.rows[expected.size :], NUM_ROWS)


def test_vectors_and_gradient_equal_the_dense_ones():
    weights, rows, cotangent = draw()
    vectors, gradient = sparse_gradient(weights, rows, cotangent)

    def dense(weights):
        padded = jnp.concatenate([weights, jnp.zeros((1, DIM))])
        return jnp.vdot(padded[rows], cotangent)

    padded = np.concatenate([weights, np.zeros((1, DIM), np.float32)])
    np.testing.assert_array_equal(vectors, padded[rows])
    np.testing.assert_allclose(gradient, jax.grad(dense)(weights), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, loop_gradient(rows, cotangent), rtol=1e-6, atol=1e-6)


def test_clip_comes_before_the_sum():
    weights, rows, cotangent = draw()
    _, gradient = sparse_gradient(weights, rows, cotangent, max_gradient=0.5)
    oracle = loop_gradient(rows, cotangent, 0.5)
    np.testing.assert_allclose(gradient, oracle, rtol=1e-6, atol=1e-6)
    # The planted wrong variant, clipping the sum, is another number.
    wrong = np.clip(loop_gradient(rows, cotangent), -0.5, 0.5)
    assert np.abs(oracle - wrong).max() > 0.1


def test_not_summing_duplicates_is_caught():
    weights, rows, cotangent = draw()
    last_wins = np.zeros((NUM_ROWS, DIM))
    last_wins[rows[rows < NUM_ROWS]] = cotangent[rows < NUM_ROWS]
    assert np.abs(last_wins - loop_gradient(rows, cotangent)).max() > 0.1


def test_padding_slots_are_zero_and_their_nan_cotangent_goes_nowhere():
    weights, rows, cotangent = draw()
    poisoned = np.where((rows == NUM_ROWS)[:, None], np.nan, cotangent)
    for options in ({}, {"max_gradient": 0.5}):
        clean = sparse_gradient(weights, rows, cotangent, **options)
        dirty = sparse_gradient(weights, rows, poisoned, **options)
        np.testing.assert_array_equal(dirty[0][rows == NUM_ROWS], 0)
        np.testing.assert_array_equal(dirty[1], clean[1])


def test_rows_beyond_the_capacity_are_nan_and_take_no_gradient():
    weights, rows, cotangent = draw()
    unique = lookup.unique_rows(jnp.asarray(rows), capacity=8, sentinel=NUM_ROWS)
    picked = lookup.gather(jnp.asarray(weights), unique)
    vectors, pull = jax.vjp(lambda picked: lookup.expand(picked, unique), picked)
    (gradient,) = pull(jnp.asarray(cotangent))
    kept = np.unique(rows)[:8]
    assert int(unique.num_rows) > 8
    np.testing.assert_array_equal(
        np.isnan(vectors).all(axis=1), ~np.isin(rows, kept) & (rows < NUM_ROWS)
    )
    np.testing.assert_allclose(gradient, loop_gradient(rows, cotangent)[kept], rtol=1e-5, atol=1e-6)


def test_nan_rows_reach_only_their_own_occurrences():
    weights, rows, _ = draw()
    weights[4], weights[6] = np.nan, np.inf
    unique = lookup.unique_rows(jnp.asarray(rows), capacity=NUM, sentinel=NUM_ROWS)
    vectors = jax.jit(lambda w, u: lookup.expand(lookup.gather(w, u), u))(weights, unique)
    is_row = rows < NUM_ROWS
    np.testing.assert_array_equal(vectors[is_row], weights[rows[is_row]])


@pytest.mark.parametrize("num", [0, 1, 63])
def test_scan_for_accelerators_equals_the_scatter(num):
    """Accelerators take the scan; it must give the sums of the CPU path."""
    rng = np.random.default_rng(num)
    segment = np.sort(rng.integers(0, 12, num)).astype(np.int32)
    values = rng.normal(size=(num, 3)).astype(np.float32)
    oracle = np.zeros((10, 3))
    np.add.at(oracle, segment[segment < 10], values[segment < 10].astype(np.float64))
    for function in (lookup.sum_by_scan, lookup.sum_sorted_segments):
        function = jax.jit(functools.partial(function, num_segments=10))
        sums = function(jnp.asarray(values), jnp.asarray(segment))
        np.testing.assert_allclose(sums, oracle, rtol=1e-5, atol=1e-6)


def test_capacity_must_be_positive():
    with pytest.raises(ValueError, match="capacity=0: must be at least 1"):
        lookup.unique_rows(jnp.zeros((3,), jnp.int32), capacity=0, sentinel=5)
