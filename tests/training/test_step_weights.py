"""The step with hard negatives and sample weights: oracle by users, devices, and a zero total."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.data import event_store, hard_edges
from hstu_jax.model import feature_lookup
from hstu_jax.tables import spec as table_spec
from hstu_jax.training import run as run_lib
from tests.training.small_config import small_config, with_two_tables


@pytest.fixture(scope="module")
def weighted_store(small_store, tmp_path_factory):
    """The small sample with a weight per user, a few of them 0, and a hard-edge table."""
    weight = np.random.default_rng(0).integers(0, 4, small_store.num_users) / 2
    store = event_store.write_store(
        tmp_path_factory.mktemp("data") / "weighted",
        events=small_store.events,
        windows=small_store.windows,
        users=small_store.users | {"heft": weight},
        items=small_store.items,
        vocabularies=small_store.vocabularies,
        stats=small_store.stats,
    )
    hard_edges.write_hard_edges(store, options=hard_edges.HardEdgeOptions(kind="not_clicked"))
    return store


@pytest.fixture(scope="module")
def config(weighted_store, tmp_path_factory):
    edges = weighted_store.path / hard_edges.FOLDER / hard_edges.EDGES_FILE
    sampler = {
        "kind": "HardNegativeSampler",
        "num_hard_sample": 5,
        "hard_neg_edge_input_path": str(edges),
        "weight_exponent": 1.0,
    }
    config = small_config(
        weighted_store,
        tmp_path_factory.mktemp("run"),
        data__num_groups=2,
        data__sample_weight_fields=("heft",),
        **{f"data__negative_sampler__{name}": value for name, value in sampler.items()},
        model__user_tower__encoder="mean",  # compiles in a moment; what is tested comes after it
        model__user_tower__hstu__input_dropout_ratio=0.0,
    )
    return with_two_tables(config)


@pytest.fixture(scope="module")
def run(config, weighted_store):
    """Two groups on two devices, so that every sum crosses them."""
    return run_lib.build_run(config, weighted_store, devices=jax.devices()[:2])


def _towers(run, state, batch):
    """Vectors by looking ids up in whole tables."""

    @jax.jit
    def vectors_of(params, weights, batch):
        vectors = {}
        for name, occurrences in feature_lookup.batch_ids(run.program.plan, batch).items():
            rows = table_spec.rows_of(run.program.spec(name), occurrences.ids, occurrences.valid)
            vectors[name] = weights[name].at[rows].get(mode="fill", fill_value=0)
        inputs = feature_lookup.to_lookups(run.program.plan, batch, vectors)
        return run.program.model.apply({"params": params}, inputs, batch)

    weights = {name: table.weights for name, table in state.tables.items()}
    return vectors_of(state.params, weights, jax.tree.map(jnp.asarray, batch))


def _loss_and_hits(run, towers, batch, *, cutoff):
    """Weighted mean of the losses of all groups, and unweighted hits, query by query in float64."""
    user, positive, negative, hard = (
        np.asarray(getattr(towers, name), np.float64)
        for name in ("user", "positive", "negative", "hard_negative")
    )
    losses, weights, hits = [], [], 0
    for g, q in zip(*np.nonzero(batch.query_mask), strict=True):
        u = batch.positive_user[g, q]
        own = batch.hard_negative_mask[g, u]
        items = np.concatenate([positive[g, q][None], negative[g], hard[g, u][own]])
        scores = items @ user[g, u] / run.config.model.temperature
        log_q = (
            [batch.positive_log_q[g, q]],
            batch.negative_log_q[g],
            batch.hard_negative_log_q[g, u],
        )
        logits = scores - np.concatenate([*log_q[:2], log_q[2][own]])
        losses.append(np.log(np.exp(logits - logits[0]).sum()))
        weights.append(batch.sample_weight[g, u])
        hits += (scores[1:] >= scores[0]).sum() < cutoff
    return np.average(losses, weights=weights), np.mean(losses), hits


def test_loss_and_metrics_equal_a_loop_over_queries(run):
    batch = run.pipeline.batch_at(0).batch
    assert batch.hard_negative_mask.any() and len(np.unique(batch.sample_weight)) > 2
    num_queries = int(batch.query_mask.sum())
    state = run_lib.init_state(run)
    weighted, plain, hits = _loss_and_hits(run, _towers(run, state, batch), batch, cutoff=5)
    assert abs(weighted - plain) > 1e-3
    _, metrics = run.train_step(state, run.put(batch))
    assert float(metrics.num_queries) == num_queries
    np.testing.assert_allclose(metrics.loss_sum / num_queries, weighted, rtol=1e-5)
    assert run.config.metrics.recall_at_k == (1, 5)
    assert float(metrics.recall_hits[1]) == hits


def test_hard_negatives_learn(run):
    """Rows that only hard negatives name move, and those of masked slots do not."""
    state = run_lib.init_state(run)
    name, table = run.program.plan.candidate[0].feature, run.program.plan.candidate[0].table
    before = np.asarray(state.tables[table].weights)
    batch = run.pipeline.batch_at(0).batch
    after, _ = run.train_step(state, run.put(batch))
    changed = np.flatnonzero((np.asarray(after.tables[table].weights) != before).any(axis=1))
    used = [batch.history[use.feature] for use in run.program.plan.history]
    used += [batch.positive[name], batch.negative[name]]
    others = np.unique(np.concatenate([ids.reshape(-1) for ids in used]))
    has_weight = batch.hard_negative_mask & (batch.sample_weight > 0)[..., None]
    has_query = np.zeros(batch.user_mask.shape, bool)
    for g, q in zip(*np.nonzero(batch.query_mask), strict=True):
        has_query[g, batch.positive_user[g, q]] = True
    hard = batch.hard_negative[name][has_weight & has_query[..., None]]
    only_hard = np.setdiff1d(hard, others)
    assert len(only_hard) > 3
    spec = run.program.spec(table)
    rows = np.asarray(table_spec.rows_of(spec, jnp.asarray(only_hard), jnp.asarray(only_hard >= 0)))
    assert np.isin(rows, changed).all()


def test_a_batch_of_weight_zero_has_loss_zero_and_changes_no_table(run):
    state = run_lib.init_state(run)
    before = jax.device_get(state.tables)
    batch = run.pipeline.batch_at(0).batch
    batch = dataclasses.replace(batch, sample_weight=np.zeros_like(batch.sample_weight))
    after, metrics = run.train_step(state, run.put(batch))
    assert float(metrics.loss_sum) == 0 and float(metrics.num_not_finite) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.tables), before)


def test_weights_that_are_equal_change_nothing(run):
    """The step divides by the sum of the weights: a common factor cancels."""
    batch = run.pipeline.batch_at(0).batch
    losses = []
    for factor in (1.0, 0.01):
        weight = np.full_like(batch.sample_weight, factor)
        weighted = dataclasses.replace(batch, sample_weight=weight)
        _, metrics = run.train_step(run_lib.init_state(run), run.put(weighted))
        losses.append(float(metrics.loss_sum))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert "hard edges" in run_lib.describe(run, run_lib.init_state(run))
