"""Row-wise Adagrad against the recorded reference, a dense oracle, and its memory."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.tables import benchmark, lookup, optimizers, spec, update

ADAGRAD = optimizers.RowwiseAdagrad()


def one_step(state, ids, cotangent, *, table, max_gradient=None, rule=ADAGRAD, **options):
    """Lookup of flat ids and one update with the given cotangent of the vectors."""
    rows = spec.rows_of(table, ids, ids < table.num_rows)
    unique = lookup.unique_rows(rows, capacity=ids.shape[0], sentinel=table.padded_rows)
    picked = lookup.gather(state.weights, unique)
    vectors, pull = jax.vjp(
        lambda picked: lookup.expand(picked, unique, max_gradient=max_gradient), picked
    )
    (gradients,) = pull(cotangent)
    return update.apply(state, unique, gradients, rule=rule, **options), vectors


def load_state(table, by_id):
    """A state with the given weights of ids 0.., the rest zero."""
    rows = spec.rows_of(table, jnp.arange(len(by_id)), jnp.ones(len(by_id), bool))
    weights = jnp.zeros((table.padded_rows, table.dim)).at[rows].set(jnp.asarray(by_id))
    return update.TableState(weights, {"accumulator": jnp.zeros(table.padded_rows)}), rows


def dense_adagrad(weights, sums, ids, cotangent, *, lr, clip=np.inf, decay=0.0, mode="none"):
    """The same step on the whole table in float64, row by row."""
    weights, sums = weights.astype(np.float64).copy(), sums.astype(np.float64).copy()
    for row in set(ids.tolist()):
        gradient = np.clip(cotangent[ids == row].astype(np.float64), -clip, clip).sum(axis=0)
        old = weights[row].copy()
        if mode == "l2":
            gradient += decay * old
        sums[row] += np.mean(gradient**2)
        if mode == "decouple":
            weights[row] *= 1 - lr * decay
        weights[row] -= lr / (np.sqrt(sums[row]) + 1e-8) * gradient
    return weights, sums


@pytest.mark.long
def test_golden_family_g(golden_dir):
    """Every recorded sequence of steps of the reference's CPU kernel, by the functions alone.

    `tests/test_golden.py` replays them in every suite.
    """
    files = sorted(golden_dir.glob("G*.npz"))
    assert files
    for file in files:
        recorded = np.load(file)
        meta = json.loads(str(recorded["meta_json"]))
        start = recorded["in.weight0"]
        table = spec.TableSpec("t", *start.shape)
        state, rows = load_state(table, start)
        rates = meta["lr_steps"] or [meta["lr"]] * 100
        run = jax.jit(
            functools.partial(
                one_step,
                table=table,
                max_gradient=meta.get("max_gradient"),
                rule=optimizers.RowwiseAdagrad(
                    meta.get("weight_decay", 0.0), meta["weight_decay_mode"].lower()
                ),
            )
        )
        step = 0
        while f"step{step}.ids" in recorded:
            ids, offsets = recorded[f"step{step}.ids"], recorded[f"step{step}.offsets"]
            cotangent, out = recorded[f"step{step}.cot"], recorded[f"step{step}.out"]
            if meta["pooling"] == "SUM":
                bag = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
                cotangent = cotangent[bag]
            # One padded size, so that a file compiles once.
            padded = np.zeros((16, start.shape[1]), np.float32)
            padded[: ids.size] = cotangent
            padded_ids = np.full(16, table.padded_rows, np.int32)
            padded_ids[: ids.size] = ids
            state, vectors = run(
                state,
                jnp.asarray(padded_ids),
                jnp.asarray(padded),
                learning_rate=jnp.float32(rates[step]),
            )
            vectors = vectors[: ids.size]
            if meta["pooling"] == "NONE":
                np.testing.assert_allclose(vectors, out, atol=1e-6, rtol=0)
            np.testing.assert_allclose(
                state.weights[rows], recorded[f"step{step}.weight"], atol=1e-6, rtol=0
            )
            np.testing.assert_allclose(
                state.slots["accumulator"][rows], recorded[f"step{step}.sum"], atol=1e-6, rtol=0
            )
            step += 1
        assert step == 3, file.name


@pytest.mark.parametrize("mode", ["none", "l2", "decouple"])
def test_steps_equal_the_dense_oracle_and_leave_other_rows_alone(mode):
    rng = np.random.default_rng(5)
    table = spec.TableSpec("t", 9000, 6)
    by_id = rng.normal(size=(9000, 6)).astype(np.float32) * 2
    state, rows = load_state(table, by_id)
    start = np.asarray(state.weights)
    weights, sums = by_id, np.zeros(9000)
    step = jax.jit(
        lambda state, ids, cotangent: one_step(
            state,
            ids,
            cotangent,
            table=table,
            max_gradient=1.5,
            learning_rate=0.3,
            rule=optimizers.RowwiseAdagrad(0.1, mode),
        )[0]
    )
    touched = set()
    for _ in range(3):
        ids = rng.integers(0, 9000, 30)[rng.integers(0, 30, 50)].astype(np.int32)
        cotangent = rng.normal(size=(50, 6)).astype(np.float32) * 2
        touched |= set(ids.tolist())
        state = step(state, jnp.asarray(ids), jnp.asarray(cotangent))
        weights, sums = dense_adagrad(
            weights, sums, ids, cotangent, lr=0.3, clip=1.5, decay=0.1, mode=mode
        )
    np.testing.assert_allclose(state.weights[rows], weights, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.slots["accumulator"][rows], sums, rtol=1e-5, atol=1e-5)
    untouched = np.setdiff1d(np.arange(table.padded_rows), np.asarray(rows)[sorted(touched)])
    np.testing.assert_array_equal(np.asarray(state.weights)[untouched], start[untouched])
    assert not np.asarray(state.slots["accumulator"])[untouched].any()


def test_wrong_variants_are_far_from_the_oracle():
    """Squares summed before the duplicates are, and eps inside the root."""
    ids = np.array([3, 3, 5])
    cotangent = np.array([[2.0, -1.0], [-1.9, 1.1], [1e-5, 0.0]])
    start = np.ones((8, 2))
    right, _ = dense_adagrad(start, np.zeros(8), ids, cotangent, lr=0.1)
    state, rows = load_state(spec.TableSpec("t", 8, 2), start)
    state, _ = jax.jit(functools.partial(one_step, table=spec.TableSpec("t", 8, 2)))(
        state,
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(cotangent, jnp.float32),
        learning_rate=0.1,
    )
    np.testing.assert_allclose(state.weights[rows], right, atol=1e-5)
    squares_first = 1 - 0.1 * cotangent[:2].sum(axis=0) / np.sqrt(np.mean(cotangent[:2] ** 2) * 2)
    assert np.abs(right[3] - squares_first).max() > 0.05
    inside = 1 - 0.1 * cotangent[2] / np.sqrt(np.mean(cotangent[2] ** 2) + 1e-8)
    assert np.abs(right[5] - inside).max() > 0.05


def test_no_ids_change_nothing():
    table = spec.TableSpec("t", 100, 4)
    state = update.init_state(table, jax.random.key(0), rule=ADAGRAD)
    unique = lookup.unique_rows(
        jnp.full((6,), table.padded_rows), capacity=6, sentinel=table.padded_rows
    )
    nan = jnp.full((6, 4), jnp.nan)
    after = update.apply(state, unique, nan, rule=ADAGRAD, learning_rate=0.1)
    np.testing.assert_array_equal(after.weights, state.weights)
    np.testing.assert_array_equal(after.slots["accumulator"], state.slots["accumulator"])


def test_scratch_memory_follows_the_batch_and_the_state_is_updated_in_place():
    table = spec.TableSpec("t", 1_000_000, 64)
    memory = benchmark.compile_step(table, 2560).memory_analysis()
    table_bytes = 4 * table.padded_rows * (table.dim + 1)
    assert memory.temp_size_in_bytes < 0.05 * table_bytes
    assert memory.alias_size_in_bytes >= table_bytes


def test_state_may_hold_specs_in_place_of_arrays():
    state = update.init_state(spec.TableSpec("t", 100, 4), jax.random.key(0), rule=ADAGRAD)
    specs = jax.tree.map(lambda _: jax.sharding.PartitionSpec("chip"), state)
    assert specs.weights == jax.sharding.PartitionSpec("chip")
