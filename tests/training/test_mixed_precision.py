"""bfloat16 training: what is computed in it, what stays float32, and how near the results are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.training import partition, step, traced
from hstu_jax.training import run as run_lib
from tests.training.small_config import small_config, with_two_tables

_HSTU = "model__user_tower__hstu__"
_UIH = f"{_HSTU}input_preprocessor__uih_preprocessor__"
# Every module whose precision could slip: gates, norms of all kinds, maps of a user's own.
OPTIONS = {
    "model__initialization": "reference",
    "model__item_tower__mlp__hidden_units": (12, 16),
    "model__item_tower__mlp__activation": "Dice",
    "model__item_tower__mlp__use_bn": True,
    f"{_HSTU}stu__recompute_uvqk": True,
    f"{_UIH}action_mlp__simple_mlp": None,
    f"{_UIH}action_mlp__parameterized_mlp": dict(hidden_dim=8),
    "model__output_dim": 16,
}


@pytest.fixture(scope="module")
def gradients(small_store, tmp_path_factory):
    """(token grid, float32 gradients, bfloat16 gradients, jaxprs of both) of one batch."""
    config = small_config(small_store, tmp_path_factory.mktemp("run"), **OPTIONS)
    run = run_lib.build_run(with_two_tables(config), small_store, devices=jax.devices()[:1])
    train_state = run_lib.init_state(run)
    batch = run.put(run.pipeline.batch_at(0).batch)

    def of(precision):
        train = dataclasses.replace(run.program.config.train, mixed_precision=precision)
        config = dataclasses.replace(run.program.config, train=train)
        program = dataclasses.replace(run.program, config=config)

        def local(train_state, batch):
            found = step.batch_gradients(
                program, train_state, batch, number=jnp.int32(0), divisor=jnp.float32(100.0)
            )
            rows = {table: values for table, (_, values) in found.rows.items()}
            return found.params, rows, found.metrics.loss_sum, found.batch_stats

        return partition.place_eval(local, run.mesh, out_specs=partition.REPLICATED)

    full, half = of(""), of("BF16")
    jaxprs = [jax.make_jaxpr(each)(train_state, batch) for each in (full, half)]
    grid = batch.action.shape[1:]
    return (
        grid,
        jax.device_get(full(train_state, batch)),
        jax.device_get(half(train_state, batch)),
        jaxprs,
    )


def test_close_to_float32_but_not_equal(gradients):
    _, (params, rows, loss, _), (half_params, half_rows, half_loss, _), _ = gradients
    assert half_loss != loss
    np.testing.assert_allclose(half_loss, loss, rtol=5e-3)
    for full, half in ((params, half_params), (rows, half_rows)):
        full, half = (
            np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
            for tree in (full, half)
        )
        cosine = full @ half / np.linalg.norm(full) / np.linalg.norm(half)
        # bfloat16 keeps 8 bits: relative errors of 2^-9 a value, independent of each other.
        assert cosine > 0.999, cosine


def test_what_is_kept_between_steps_is_float32(gradients):
    _, _, half, _ = gradients
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype("float32")}


def test_products_over_tokens_are_bfloat16(gradients):
    """Left in float32: attention's tiles, the last Linear of the user's vector, and the scores."""
    grid, _, _, (_, jaxpr) = gradients
    dtypes = [
        eqn.invars[0].aval.dtype
        for eqn in _equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general"
        and any(var.aval.shape[:2] == grid for var in (*eqn.invars, *eqn.outvars))
    ]
    assert len(dtypes) > 10 and set(dtypes) == {jnp.dtype("bfloat16")}


def test_products_of_float32_are_computed_in_full(gradients):
    """Left to itself, JAX rounds their factors to TF32 on GPUs and to bfloat16 on TPUs."""
    _, _, _, jaxprs = gradients
    full, half = (traced.read(jaxpr, {"host": 1, "chip": 1}).products for jaxpr in jaxprs)
    assert set(full) == {"float32 exact"}
    assert set(half) == {"float32 exact", "bfloat16"}


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
