"""Clipping against torch, the average, and the step with them; several batches in a step.

Steps are checked against gradients of whole tables by plain autodiff. Pooling replaces the STU
layers here: it compiles in a fraction of the time, and what is checked comes after them.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.config import resolve, train_schema
from hstu_jax.model import feature_lookup
from hstu_jax.tables import lookup, optimizers, update
from hstu_jax.tables import spec as table_spec
from hstu_jax.training import checkpoint, gradients, step
from hstu_jax.training import run as run_lib
from hstu_jax.training import state as state_lib
from tests.training.small_config import small_config, with_two_tables

RECORD = json.loads((pathlib.Path(__file__).parent / "torch_optimizers.json").read_text())
LR, TABLE_LR = 0.5, 2.0
# These programs run a few times only: compiling them is what costs.
QUICK = {"xla_backend_optimization_level": 0}
SGD = dict(
    model__user_tower__encoder="mean",
    train__dense_optimizer__kind="sgd",
    train__dense_optimizer__momentum=0.0,
    train__dense_optimizer__lr=LR,
    train__dense_optimizer__beta2=0.999,  # the sample's 0.98 is of Adam
    train__dense_optimizer__learning_rate__schedule="constant",
    train__sparse_optimizer__kind="sgd",
    train__sparse_optimizer__lr=TABLE_LR,
    train__sparse_optimizer__learning_rate__schedule="constant",
    train__gradient_accumulation_steps=2,
)


def arrays(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), tree, is_leaf=lambda x: isinstance(x, list)
    )


@pytest.mark.parametrize("name", RECORD["clipped"])
def test_clipping_equals_torch(name):
    case = RECORD["clipped"][name]
    options = {**case["options"], "norm_type": float(case["options"]["norm_type"])}
    first = arrays(RECORD["gradients"][0])
    got = gradients.clip(first, train_schema.GradClippingConfig(**options))
    for key, want in case["gradients"].items():
        np.testing.assert_allclose(got[key], want, rtol=1e-5, atol=1e-7)
        is_same = np.allclose(got[key], first[key], rtol=1e-6)
        assert is_same == (name == "norm_not_reached")


@pytest.mark.parametrize(
    ("power", "values", "norm"),
    [(2.0, (3e19, -4e19), 5e19), (32.0, (0.03, 0.03), 0.03 * 2 ** (1 / 32)), (8.0, (0.0, 0.0), 0)],
)
def test_powers_beyond_float32_do_not_change_a_norm_within_it(power, values, norm):
    got = gradients.global_norm([jnp.float32(value) for value in values], power=power)
    np.testing.assert_allclose(got, norm, rtol=1e-6)


def test_without_clipping_gradients_are_left_alone():
    first = arrays(RECORD["gradients"][0])
    assert gradients.clip(first, train_schema.GradClippingConfig()) is first


def test_the_average_equals_torch():
    ema = RECORD["ema"]
    params = arrays(RECORD["start"])
    averaged = params
    for number, gradient in enumerate(RECORD["gradients"]):
        params = jax.tree.map(lambda p, g: p - ema["lr"] * g, params, arrays(gradient))
        config = train_schema.EmaConfig(decay=ema["decay"])
        averaged = gradients.average(averaged, params, config, step=jnp.int32(number))
        for key, want in ema["snapshots"].get(str(number + 1), {}).items():
            np.testing.assert_allclose(averaged[key], want, rtol=1e-5, atol=1e-5)
    assert gradients.average(None, params, config, step=jnp.int32(0)) is None


@pytest.fixture(scope="module")
def sgd(small_store, tmp_path_factory):
    """Options -> (run, states before and after steps of two batches by SGD, last metrics)."""

    def train(*, num_steps=1, **options):
        config = small_config(small_store, tmp_path_factory.mktemp("sgd"), **SGD, **options)
        config = with_two_tables(config)
        run = run_lib.build_run(config, small_store, devices=jax.devices()[:1])
        state = run_lib.init_state(run)
        states = [jax.device_get(state)]
        per_step = config.train.gradient_accumulation_steps
        for number in range(num_steps):
            batches = [
                run.put(run.pipeline.batch_at(number * per_step + i).batch) for i in range(per_step)
            ]
            batch = batches[0] if per_step == 1 else tuple(batches)
            state, metrics = run.train_step(state, batch)
            states.append(jax.device_get(state))
        return run, states, jax.device_get(metrics)

    return train


@pytest.fixture(scope="module")
def autodiff():
    """(run, params, tables, number of the batch) -> queries, gradients of the sum of losses."""
    compiled = {}

    def sums(program, params, weights, batch, key):
        def loss_sum(params, weights):
            vectors = {}
            for name, ids in feature_lookup.batch_ids(program.plan, batch).items():
                rows = table_spec.rows_of(program.spec(name), ids.ids, ids.valid)
                vectors[name] = weights[name].at[rows].get(mode="fill", fill_value=0)
            inputs = feature_lookup.to_lookups(program.plan, batch, vectors)
            towers = program.model.apply({"params": params}, inputs, batch, key)
            scores = step.score(program, towers, batch)
            return scores.loss_sum, scores.count

        (_, count), found = jax.value_and_grad(loss_sum, argnums=(0, 1), has_aux=True)(
            params, weights
        )
        return count, *found

    def call(run, params, weights, number):
        # The model is the same for all runs here, and so is the compiled function.
        function = compiled.setdefault(
            "fn", jax.jit(functools.partial(sums, run.program), compiler_options=QUICK)
        )
        key = jax.random.fold_in(jax.random.key(run.config.seed), number)
        batch = jax.tree.map(jnp.asarray, run.pipeline.batch_at(number).batch)
        # On the host: every operation on arrays of another shape would compile.
        return jax.device_get(function(params, weights, batch, key))

    return call


def weights_of(state):
    return {name: table.weights for name, table in state.tables.items()}


def assert_moved(before, after, gradient, *, rate):
    """after = before - rate * gradient, leaf by leaf."""
    triples = zip(*map(jax.tree.leaves, (before, after, gradient)), strict=True)
    for old, new, g in triples:
        moved, want = np.asarray(new) - np.asarray(old), -rate * np.asarray(g)
        # Differences of float32 weights: they are near 1, and steps near 1e-3.
        np.testing.assert_allclose(moved, want, rtol=1e-3, atol=1e-6)


def test_a_step_of_two_batches_with_clipping_parts_and_average(sgd, autodiff):
    part = train_schema.PartOptimizerConfig(
        regex_pattern=r"item_tower\..*", kind="sgd", momentum=0.0, lr=3 * LR
    )
    run, (before, after, last), metrics = sgd(
        num_steps=2,
        train__grad_clipping__clipping_type="norm",
        train__grad_clipping__max_gradient=0.01,
        train__dense_optimizer__part_optimizers=(resolve.section(part),),
        train__dense_optimizer__ema__decay=0.75,
    )
    # The mean over the queries of both batches.
    weights = weights_of(before)
    parts = [autodiff(run, before.params, weights, number) for number in range(2)]
    count = sum(float(part[0]) for part in parts)
    assert float(parts[0][0]) != float(parts[1][0])
    dense, tables = (
        jax.tree.map(lambda a, b: (a + b) / count, parts[0][i], parts[1][i]) for i in (1, 2)
    )
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(dense)))
    assert norm > 0.02
    for tower, rate in (("user_tower", LR), ("item_tower", 3 * LR)):
        assert_moved(
            before.params[tower], after.params[tower], dense[tower], rate=rate * 0.01 / norm
        )
    # Tables are not clipped by the dense gradients' norm.
    assert_moved(weights, weights_of(after), tables, rate=TABLE_LR)
    assert int(last.step) == 2
    second = [run.pipeline.batch_at(number).num_queries for number in (2, 3)]
    assert float(metrics.num_queries) == sum(second)
    # The average: a copy at first, then a blend; what is evaluated unless told otherwise.
    for got, want in zip(jax.tree.leaves(after.ema), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(got, want)
    blend = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, after.params, last.params)
    for got, want in zip(jax.tree.leaves(last.ema), jax.tree.leaves(blend), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
    assert state_lib.for_evaluation(last, use_ema=True).params is last.ema
    assert state_lib.for_evaluation(last, use_ema=False) is last
    # Parts and average have names of their own in a checkpoint.
    again = checkpoint.from_named(checkpoint.to_named(last), last)
    for got, want in zip(*map(jax.tree.leaves, (again, last)), strict=True):
        assert got is want


def test_the_references_accumulation_adds_losses_and_updates_tables_at_every_batch(sgd, autodiff):
    run, (before, after), _ = sgd(
        train__gradient_accumulation_mode="sum", train__table_updates="batch"
    )
    weights = weights_of(before)
    dense = jax.tree.map(np.zeros_like, before.params)
    for number in range(2):
        count, found, tables = autodiff(run, before.params, weights, number)
        dense = jax.tree.map(lambda total, g, c=count: total + g / c, dense, found)
        weights = jax.tree.map(lambda w, g, c=count: w - TABLE_LR * g / c, weights, tables)
    assert_moved(before.params, after.params, dense, rate=LR)
    for name, want in weights.items():
        np.testing.assert_allclose(after.tables[name].weights, want, rtol=1e-4, atol=1e-5)
    assert after.ema is None


@pytest.mark.parametrize("is_at_once", [False, True])
def test_accumulated_rows_never_become_a_table(is_at_once):
    """Memory of four batches of 64 ids and a table of a million rows."""
    table = table_spec.TableSpec("t", 1_000_000, 16)
    rule = optimizers.Adam()

    def apply(tables, rows, number):
        found = {
            name: update.apply(
                tables[name], *rows[name], rule=rule, learning_rate=0.1, iteration=number + 1
            )
            for name in rows
        }
        return {**tables, **found}

    def gradients_of(tables, batch_stats, ids, number):
        unique = lookup.unique_rows(ids, capacity=64, sentinel=table.padded_rows)
        picked = lookup.gather(tables["t"].weights, unique)
        found = jax.grad(lambda p: jnp.sum(jnp.sin(lookup.expand(p, unique))))(picked)
        return gradients.BatchGradients(
            jnp.sum(found), {"t": (unique, found)}, ids.sum(), batch_stats
        )

    def one_step(tables, batches):
        found, tables = gradients.accumulate(
            gradients_of, batches, tables, {}, update_tables=apply if is_at_once else None
        )
        return apply(tables, found.rows, jnp.int32(0)), found.params

    init = functools.partial(update.init_state, table, rule=rule)
    tables = {"t": jax.eval_shape(init, jax.random.key(0))}
    batches = (jax.ShapeDtypeStruct((64,), jnp.int32),) * 4
    compiled = jax.jit(one_step, donate_argnums=0).lower(tables, batches).compile()
    memory, table_bytes = compiled.memory_analysis(), 3 * 4 * table.padded_rows * table.dim
    assert memory.alias_size_in_bytes >= table_bytes
    assert memory.temp_size_in_bytes < 0.01 * table_bytes


def test_batches_of_one_step_must_have_one_shape(small_store, tmp_path):
    config = small_config(
        small_store,
        tmp_path,
        data__layout="padded",
        data__row_lens=(16, 48),
        train__gradient_accumulation_steps=2,
    )
    with pytest.raises(ValueError, match=r"accumulation_steps=2: .* one shape, .* has 2; give dat"):
        run_lib.build_run(config, small_store, devices=jax.devices()[:1])


def test_an_epoch_must_fill_a_step(small_store, tmp_path):
    config = small_config(
        small_store,
        tmp_path,
        train__num_steps=0,
        train__num_epochs=1,
        train__gradient_accumulation_steps=10_000,
    )
    with pytest.raises(ValueError, match=r"steps=10000: must not be more than the \d+ batches"):
        run_lib.build_run(config, small_store, devices=jax.devices()[:1])
