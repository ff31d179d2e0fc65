"""The training step: against plain autodiff, and on rows left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.model import feature_lookup
from hstu_jax.tables import spec as table_spec
from hstu_jax.training import run as run_lib
from hstu_jax.training import step
from tests.training.small_config import small_config


def dense_gradients(run, state, batch, dropout_key):
    """Loss and gradients by differentiating whole tables: no unique rows, no own gradient."""
    program = run.program
    table_ids = feature_lookup.batch_ids(program.plan, batch)
    weights = {name: table.weights for name, table in state.tables.items()}

    def loss(params, weights):
        vectors = {}
        for name, occurrences in table_ids.items():
            spec = program.spec(name)
            rows = table_spec.rows_of(spec, occurrences.ids, occurrences.valid)
            vectors[name] = weights[name].at[rows].get(mode="fill", fill_value=0)
        inputs = feature_lookup.to_lookups(program.plan, batch, vectors)
        towers = program.model.apply({"params": params}, inputs, batch, dropout_key)
        scores = step.score(program, towers, batch)
        return scores.loss_sum / scores.count

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state.params, weights)


def test_one_step_is_adam_and_rowwise_adagrad_of_the_dense_gradients(run):
    state = run_lib.init_state(run)
    before = jax.device_get(state)
    batch = run.pipeline.batch_at(0).batch
    dropout_key = jax.random.fold_in(jax.random.key(run.config.seed), 0)
    on_device = jax.tree.map(jnp.asarray, batch)
    loss, (param_grads, table_grads) = dense_gradients(run, state, on_device, dropout_key)
    after, metrics = run.train_step(state, run.put(batch))

    np.testing.assert_allclose(metrics.loss_sum / metrics.num_queries, loss, rtol=1e-5)
    # Adam's first step is lr * g / (|g| + eps); the schedule starts at the base rate.
    lr = run.config.train.dense_optimizer.lr
    moved = jax.tree.map(lambda new, old: np.asarray(new) - old, after.params, before.params)
    expected = jax.tree.map(lambda g: -lr * g / (jnp.abs(g) + 1e-8), param_grads)
    large = jax.tree.map(
        lambda g: np.abs(g) > 1e-5, param_grads
    )  # below, rounding decides the sign
    for got, want, keep in zip(*map(jax.tree.leaves, (moved, expected, large)), strict=True):
        np.testing.assert_allclose(got[keep], np.asarray(want)[keep], rtol=2e-3, atol=1e-7)
    sparse_lr = run.config.train.sparse_optimizer.lr
    for name, gradient in table_grads.items():
        gradient = np.asarray(gradient, np.float64)
        sums = np.mean(gradient**2, axis=1)
        want = before.tables[name].weights - sparse_lr * gradient / (np.sqrt(sums) + 1e-8)[:, None]
        touched = np.abs(gradient).max(axis=1) > 1e-6
        assert touched.any()
        got = np.asarray(after.tables[name].weights)
        np.testing.assert_allclose(got[touched], want[touched], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            after.tables[name].slots["accumulator"], sums, rtol=1e-3, atol=1e-12
        )


def test_rows_that_are_not_in_the_batch_keep_every_bit(run):
    state = run_lib.init_state(run)
    before = jax.device_get(state.tables)
    batch = run.pipeline.batch_at(0).batch
    table_ids = feature_lookup.batch_ids(run.program.plan, jax.tree.map(jnp.asarray, batch))
    after, _ = run.train_step(state, run.put(batch))
    for name, occurrences in table_ids.items():
        rows = np.asarray(
            table_spec.rows_of(run.program.spec(name), occurrences.ids, occurrences.valid)
        )
        untouched = np.setdiff1d(np.arange(before[name].weights.shape[0]), rows)
        assert 0 < len(untouched)
        for old, new in zip(*map(jax.tree.leaves, (before[name], after.tables[name])), strict=True):
            np.testing.assert_array_equal(np.asarray(new)[untouched], old[untouched])


def test_every_parameter_group_learns(run):
    state = run_lib.init_state(run)
    before = jax.device_get(state)
    for number in range(2):
        state, _ = run.train_step(state, run.put(run.pipeline.batch_at(number).batch))
    changed = jax.tree.map(lambda new, old: not np.array_equal(new, old), state, before)
    still = [
        jax.tree_util.keystr(path)
        for path, is_changed in jax.tree_util.tree_leaves_with_path(changed)
        if not is_changed
    ]
    # The keys' bias shifts every logit of a query alike only in a softmax; SiLU learns it too.
    assert still == []


def test_one_shape_compiles_once(run):
    assert len(run.pipeline.shapes) == 1
    state = run_lib.init_state(run)
    for number in range(3):
        state, _ = run.train_step(state, run.put(run.pipeline.batch_at(number).batch))
    assert run.train_step._cache_size() == 1


def test_groups_must_divide_over_the_devices(small_store, tmp_path):
    config = small_config(small_store, tmp_path)
    with pytest.raises(
        ValueError, match=r"data\.num_groups=1: must be a multiple of the 2 devices"
    ):
        run_lib.build_run(config, small_store, devices=jax.devices()[:2])
