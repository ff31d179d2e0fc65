"""Which ids are looked up, and what the vectors become: against loops over a table in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.model import feature_lookup
from tests.model import batches

DIM = 3
Use = feature_lookup.Use
PLAN = feature_lookup.LookupPlan(
    history=(Use("h", "shared"), Use("h_price", None)),
    contextual=(Use("user", "users"), Use("tags", "users", "sum"), Use("raw", None)),
    candidate=(Use("c", "shared"), Use("c_price", None), Use("c_kind", "kinds")),
)


@pytest.fixture
def batch():
    """Two users of 4 and 3 slots, 3 of them contextual; ids of -1 among all features."""
    rng = np.random.default_rng(0)
    placement = batches.place([4, 3], row_len=5, packed=False, num_users=3)
    tokens = 7
    made = batches.make_batch(
        placement,
        action=np.zeros(tokens),
        watch_time_s=np.zeros(tokens),
        time_gap_s=np.zeros(tokens),
        num_users=2,
        num_queries=4,
        num_negatives=2,
    )
    rows = made.time_gap_s.shape
    made = dataclasses.replace(
        made,
        history={
            "h": rng.integers(-1, 6, rows, dtype=np.int32),
            "h_price": rng.random(rows, dtype=np.float32),
        },
        contextual={
            "user": np.array([[2, -1, 0]], np.int32),
            "tags": np.array([[[0, 3, -1], [-1, -1, -1], [1, 1, 1]]], np.int32),
            "raw": rng.random((1, 3, DIM), dtype=np.float32),
        },
        positive={
            "c": np.array([[0, 5, -1, 5]], np.int32),
            "c_price": rng.random((1, 4), dtype=np.float32),
            "c_kind": np.array([[1, 0, 1, -1]], np.int32),
        },
        negative={
            "c": np.array([[3, -1]], np.int32),
            "c_price": rng.random((1, 2), dtype=np.float32),
            "c_kind": np.array([[0, 0]], np.int32),
        },
        hard_negative={
            "c": np.array([[[4], [2], [0]]], np.int32),
            "c_price": rng.random((1, 3, 1), dtype=np.float32),
            "c_kind": np.array([[[1], [-1], [0]]], np.int32),
        },
        hard_negative_mask=np.array([[[True], [True], [False]]]),
        hard_negative_log_q=np.zeros((1, 3, 1), np.float32),
        query_mask=np.array([[True, True, True, False]]),
    )
    return jax.tree.map(jnp.asarray, made)


@pytest.fixture
def tables():
    rng = np.random.default_rng(1)
    sizes = {"shared": 6, "users": 4, "kinds": 2}
    return {name: rng.standard_normal((size, DIM)) for name, size in sizes.items()}


def look_up(tables, found):
    """Vectors of all occurrences; zeros where there is none."""
    return {
        name: jnp.asarray(
            np.where(np.asarray(ids.valid)[:, None], tables[name][np.maximum(ids.ids, 0)], 0.0),
            jnp.float32,
        )
        for name, ids in found.items()
    }


def vector(table, value):
    return table[value] if value >= 0 else np.zeros(DIM)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_lookups_are_the_tables_rows(batch, tables, pooling):
    uses = (Use("user", "users"), Use("tags", "users", pooling), Use("raw", None))
    plan = dataclasses.replace(PLAN, contextual=uses)
    found = feature_lookup.batch_ids(plan, batch)
    assert {name: int(ids.valid.sum()) for name, ids in found.items()} == {
        # one history slot that has an id or not; queries 0 and 1; one negative; two hard ones
        "shared": int(batch.history["h"][0, 0, 3] >= 0) + 2 + 1 + 2,
        "users": 1 + 2,
        "kinds": 3 + 2 + 1,
    }
    lookups = feature_lookup.to_lookups(plan, batch, look_up(tables, found))
    b = jax.tree.map(np.asarray, batch)

    slot = (0, 0, 3)  # the one history slot
    expected = [*vector(tables["shared"], b.history["h"][slot]), b.history["h_price"][slot]]
    np.testing.assert_allclose(lookups.history[slot], expected, rtol=1e-6)
    assert lookups.history.shape == (1, 2, 5, DIM + 1)

    for user in range(2):
        tags = [t for t in b.contextual["tags"][0, user].tolist() if t >= 0]
        pooled = sum((tables["users"][t] for t in tags), np.zeros(DIM))
        pooled = pooled / max(len(tags), 1) if pooling == "mean" else pooled
        expected = [
            vector(tables["users"], b.contextual["user"][0, user]),
            pooled,
            b.contextual["raw"][0, user],
        ]
        np.testing.assert_allclose(lookups.contextual[0, user], expected, rtol=1e-6)

    for kind, number in (("positive", 3), ("negative", 2)):
        values = getattr(b, kind)
        for at in range(number):
            expected = [
                *vector(tables["shared"], values["c"][0, at]),
                values["c_price"][0, at],
                *vector(tables["kinds"], values["c_kind"][0, at]),
            ]
            np.testing.assert_allclose(getattr(lookups, kind)[0, at], expected, rtol=1e-6)
    for user in range(2):
        values = {name: column[0, user, 0] for name, column in b.hard_negative.items()}
        expected = [
            *vector(tables["shared"], values["c"]),
            values["c_price"],
            *vector(tables["kinds"], values["c_kind"]),
        ]
        np.testing.assert_allclose(lookups.hard_negative[0, user, 0], expected, rtol=1e-6)


def test_item_inputs_are_those_of_candidates(batch, tables):
    items = {name: values[0] for name, values in batch.negative.items()}
    found = feature_lookup.item_ids(PLAN, items, jnp.ones(2, bool))
    inputs = feature_lookup.to_item_inputs(PLAN, look_up(tables, found), items)
    all_ids = feature_lookup.batch_ids(PLAN, batch)
    lookups = feature_lookup.to_lookups(PLAN, batch, look_up(tables, all_ids))
    np.testing.assert_array_equal(inputs, lookups.negative[0])


def test_mean_of_nothing_passes_a_finite_gradient(batch, tables):
    uses = (Use("tags", "users", "mean"),)
    plan = dataclasses.replace(PLAN, contextual=uses)
    vectors = look_up(tables, feature_lookup.batch_ids(plan, batch))

    def total(vectors):
        return jnp.sum(feature_lookup.to_lookups(plan, batch, vectors).contextual[:, :2])

    gradient = jax.grad(total)(vectors)["users"].reshape(3, 3, DIM)
    np.testing.assert_allclose(gradient[0, :, 0], [0.5, 0.5, 0.0])
    np.testing.assert_allclose(gradient[1], 0.0)
