"""Every table optimizer against a loop over rows in float64, and what it leaves alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.config import train_schema
from hstu_jax.tables import benchmark, lookup, optimizers, spec, update
from hstu_jax.training import step as step_lib

TABLE = spec.TableSpec("t", 60, 5)
# Fields of train.sparse_optimizer; the rate is not part of a rule.
OPTIONS = {
    "rowwise_adagrad": {},
    "rowwise_adagrad, l2": dict(weight_decay=0.2, weight_decay_mode="l2"),
    "rowwise_adagrad, decouple": dict(weight_decay=0.2, weight_decay_mode="decouple"),
    "sgd": dict(kind="sgd"),
    "adagrad": dict(kind="adagrad"),
    "adagrad, start": dict(kind="adagrad", initial_accumulator_value=0.5),
    "adam": dict(kind="adam"),
    "adam, decay": dict(kind="adam", beta1=0.7, beta2=0.9, weight_decay=0.3),
    "partial_rowwise_adam": dict(kind="partial_rowwise_adam"),
    "partial_rowwise_adam, decay": dict(
        kind="partial_rowwise_adam", beta1=0.7, beta2=0.9, weight_decay=0.3
    ),
}


def oracle(config, weights, steps, *, rate):
    """Weights after the steps, row by row; sums of squares and moments start anew for every row."""
    weights = weights.astype(np.float64)
    first = np.full(weights.shape, config.initial_accumulator_value)
    second = np.zeros(weights.shape)
    by_row = np.zeros(len(weights))
    for number, (ids, cotangent) in enumerate(steps, start=1):
        for row in set(ids.tolist()):
            g = cotangent[ids == row].astype(np.float64).sum(axis=0)
            w = weights[row].copy()
            if config.kind == "sgd":
                weights[row] = w - rate * g
            elif config.kind == "adagrad":
                first[row] += g * g
                weights[row] = w - rate * g / (np.sqrt(first[row]) + 1e-8)
            elif config.kind == "rowwise_adagrad":
                mode, decay = config.weight_decay_mode, config.weight_decay
                g = g + decay * w if mode == "l2" else g
                by_row[row] += np.mean(g * g)
                w = w * (1 - rate * decay) if mode == "decouple" else w
                weights[row] = w - rate / (math.sqrt(by_row[row]) + 1e-8) * g
            else:
                b1, b2 = config.beta1, config.beta2
                first[row] = b1 * first[row] + (1 - b1) * g
                if config.kind == "adam":
                    second[row] = b2 * second[row] + (1 - b2) * g * g
                else:
                    second[row] = b2 * second[row] + (1 - b2) * np.mean(g * g)
                mean, square = first[row] / (1 - b1**number), second[row] / (1 - b2**number)
                direction = mean / (np.sqrt(square) + 1e-8) + config.weight_decay * w
                weights[row] = w - rate * direction
    return weights


def draw_steps():
    """20 steps of 12 ids with duplicates; some rows come back after a while, some never come."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        ids = rng.choice(40, 12).astype(np.int32)
        ids[:3] = ids[3]
        scale = 10.0 ** rng.integers(-2, 2)
        yield ids, (rng.normal(size=(12, 5)) * scale).astype(np.float32)


@functools.cache
def start():
    return np.random.default_rng(4).normal(size=(TABLE.padded_rows, 5)).astype(np.float32)


def fresh(rule):
    """A table and its slots without `init_state`, whose random numbers compile for a second."""
    slots = {}
    for name, slot in rule.slots.items():
        shape = start().shape if slot.per_value else start().shape[:1]
        slots[name] = jnp.full(shape, slot.initial, jnp.float32)
    return update.TableState(jnp.asarray(start()), slots)


@functools.cache
def looked_up():
    """Unique rows and their gradients of every step, stacked; the same for all rules."""

    @jax.jit
    @jax.vmap
    def look_up(ids, cotangent):
        return lookup.merge_rows(ids, cotangent, capacity=12, sentinel=TABLE.padded_rows)

    ids, cotangents = (jnp.stack(each) for each in zip(*draw_steps(), strict=True))
    return look_up(ids, cotangents)


def final_state(rule):
    def step(state, item):
        number, (unique, gradients) = item
        new = update.apply(state, unique, gradients, rule=rule, learning_rate=0.1, iteration=number)
        return new, None

    numbers = jnp.arange(1, 21, dtype=jnp.int32)
    run = jax.jit(lambda state, items: jax.lax.scan(step, state, items)[0])
    return jax.device_get(run(fresh(rule), (numbers, looked_up())))


@pytest.mark.parametrize("name", OPTIONS)
def test_twenty_steps_equal_the_loop(name):
    config = train_schema.SparseOptimizerConfig(**OPTIONS[name])
    rule = step_lib.table_rule(config)
    state = final_state(rule)
    want = oracle(config, start(), draw_steps(), rate=0.1)
    np.testing.assert_allclose(state.weights, want, rtol=2e-5, atol=2e-5)
    # Rows that never came keep every bit, of the slots too.
    touched = np.unique(np.concatenate([ids for ids, _ in draw_steps()]))
    untouched = np.setdiff1d(np.arange(TABLE.padded_rows), touched)
    assert len(untouched) > 20
    np.testing.assert_array_equal(state.weights[untouched], start()[untouched])
    for slot, first in fresh(rule).slots.items():
        values = state.slots[slot]
        np.testing.assert_array_equal(values[untouched], np.asarray(first)[untouched])
        assert not np.array_equal(values, first)


def test_the_options_end_apart():
    """No two optimizers or options agree, so none is ignored."""
    ends = [
        oracle(train_schema.SparseOptimizerConfig(**options), start(), draw_steps(), rate=0.1)
        for options in OPTIONS.values()
    ]
    for number, end in enumerate(ends):
        assert all(np.abs(end - other).max() > 1e-3 for other in ends[:number])


def test_bias_is_corrected_by_the_runs_steps_not_the_rows():
    """A row that comes first at step 100 takes a step of the size that step 100 has."""
    ids, cotangent = jnp.full(12, 7, jnp.int32), jnp.ones((12, 5))
    unique, gradients = lookup.merge_rows(ids, cotangent, capacity=12, sentinel=1024)
    rule = optimizers.Adam()
    state = update.apply(
        fresh(rule), unique, gradients, rule=rule, learning_rate=0.1, iteration=100
    )
    mean = 0.1 * 12 / (1 - 0.9**100)
    square = 0.001 * 144 / (1 - 0.999**100)
    want = start()[7] - 0.1 * mean / math.sqrt(square)
    np.testing.assert_allclose(state.weights[7], want, rtol=1e-4)


def test_slots_start_at_their_value_and_shape():
    rules = (optimizers.Adagrad(0.5), optimizers.Adam(is_rowwise=True))
    for rule in rules:
        made = update.init_state(TABLE, jax.random.key(0), rule=rule).slots
        for name, want in fresh(rule).slots.items():
            np.testing.assert_array_equal(made[name], want)


@pytest.mark.parametrize("is_rowwise", [False, True])
def test_adam_updates_its_table_and_moments_in_place(is_rowwise):
    table = spec.TableSpec("t", 200_000, 64)
    rule = optimizers.Adam(weight_decay=0.1, is_rowwise=is_rowwise)
    memory = benchmark.compile_step(table, 512, rule=rule).memory_analysis()
    state_bytes = 4 * table.padded_rows * (2 * table.dim + (1 if is_rowwise else table.dim))
    assert memory.alias_size_in_bytes >= state_bytes
    assert memory.temp_size_in_bytes < 0.05 * state_bytes
