"""One step of the exchange on a mesh, and the same step on the whole table in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from hstu_jax.tables import exchange, lookup, optimizers, spec, update
from tests.tables import ragged

AXES = ("host", "chip")
SGD = optimizers.Sgd()
# Buckets of one to three keys in the tests' small tables: most ids wait.
TIGHT, WIDE = 0.002, 1.25


def make_mesh(shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices)


def local_step(
    state, rows, cotangent, *, slack, host_slack, rule, is_whole, is_ragged, iteration=1
):
    """A device's part of a step: its block, its vectors before the step, its ids that waited."""
    num_rows = state.weights.shape[0] * (1 if is_whole else jax.lax.axis_size(AXES))
    shape = cotangent.shape
    rows = rows.reshape(-1)
    unique = lookup.unique_rows(rows, capacity=rows.size, sentinel=num_rows)
    sending = dict(axis_names=AXES, slack=slack, host_slack=host_slack, is_ragged=is_ragged)
    picked, waiting = exchange.fetch(state.weights, unique, **sending)

    def loss(picked):
        vectors = lookup.expand(picked, unique)
        # The zero ties gradients to rows, as every real loss does; without it XLA copies the table.
        return jnp.vdot(vectors + 0 * jnp.tanh(vectors), cotangent.reshape(vectors.shape)), vectors

    gradients, vectors = jax.grad(loss, has_aux=True)(picked)
    state = exchange.apply(
        state,
        unique,
        gradients,
        **sending,
        rule=rule,
        learning_rate=0.5,
        iteration=iteration,
    )
    return state, vectors.reshape(shape), waiting[None]


@functools.cache
def compile_step(
    mesh_shape,
    *,
    slack=WIDE,
    host_slack=None,
    rule=SGD,
    check_vma=False,
    is_whole=False,
    is_ragged=False,
):
    """The step of a mesh shape, jitted: (state, rows by device, cotangents) -> local_step's.

    With `is_whole` every device has the whole table; `host_slack` is `slack` unless given.
    """
    host_slack = slack if host_slack is None else host_slack
    split = PartitionSpec(AXES)
    block = PartitionSpec() if is_whole else split
    step = functools.partial(
        local_step,
        slack=slack,
        host_slack=host_slack,
        rule=rule,
        is_whole=is_whole,
        is_ragged=is_ragged,
    )
    mapped = jax.shard_map(
        step,
        mesh=make_mesh(mesh_shape),
        in_specs=(block, split, split),
        out_specs=(block, split, split),
        check_vma=check_vma,
    )
    return jax.jit(mapped, donate_argnums=0)


def draw(num_devices, *, table, seed=1, num_ids=24, num_distinct=20):
    """Rows of every device's ids: many shared, the first shard with padding, the edge ids too."""
    rng = np.random.default_rng(seed)
    distinct = rng.integers(0, table.num_rows, num_distinct)
    ids = distinct[rng.integers(0, num_distinct, (num_devices, num_ids))].astype(np.int32)
    ids[0, :2] = [0, table.num_rows - 1]
    valid = np.ones(ids.shape, bool)
    valid[0, 2:] = rng.random(num_ids - 2) < 0.6
    cotangent = rng.integers(-8, 9, (*ids.shape, table.dim)).astype(np.float32)
    rows = np.array(spec.rows_of(table, jnp.asarray(ids), jnp.asarray(valid)))
    return rows, cotangent


def start(table, rule=SGD):
    """A table of small multiples of 1/8, in which SGD with whole cotangents does not round."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-64, 65, (table.padded_rows, table.dim)).astype(np.float32) / 8
    slots = {
        name: np.full(weights.shape if slot.per_value else weights.shape[:1], slot.initial)
        for name, slot in rule.slots.items()
    }
    return update.TableState(
        jnp.asarray(weights), {name: jnp.asarray(v, jnp.float32) for name, v in slots.items()}
    )


def dense_sgd(weights, rows, cotangent):
    """Vectors and the table after a step of the whole table in float64, id by id."""
    weights = np.asarray(weights, np.float64)
    vectors, after = np.zeros(cotangent.shape), weights.copy()
    for place in np.ndindex(rows.shape):
        if rows[place] < len(weights):
            vectors[place] = weights[rows[place]]
            after[rows[place]] -= 0.5 * cotangent[place]
    return vectors, after


def check_against_dense(
    mesh_shape, table, rows, cotangent, *, slack, host_slack=None, is_whole=False
):
    """Asserts that a step equals the dense one in every bit; returns the ids that waited."""
    state = start(table)
    vectors, after = dense_sgd(state.weights, rows, cotangent)
    step = compile_step(mesh_shape, slack=slack, host_slack=host_slack, is_whole=is_whole)
    state, got, waiting = step(state, jnp.asarray(rows), jnp.asarray(cotangent))
    np.testing.assert_array_equal(np.asarray(got), vectors.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(state.weights), after.astype(np.float32))
    return np.asarray(waiting)


def check_ragged(mesh_shape, table, rows, *, slack, rule=SGD):
    """Asserts that sending filled places only changes no bit; returns the ids that waited.

    Values are such that every sum rounds; every part of the state is compared, after two steps.
    """
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(table.padded_rows, table.dim)).astype(np.float32)
    cotangent = jnp.asarray(rng.normal(size=(*rows.shape, table.dim)).astype(np.float32))
    ends = []
    for is_ragged in (False, True):
        step = compile_step(mesh_shape, slack=slack, rule=rule, is_ragged=is_ragged)
        state = dataclasses.replace(start(table, rule), weights=jnp.asarray(weights))
        with ragged.emulated():
            for _ in range(2):
                state, vectors, waiting = step(state, jnp.asarray(rows), cotangent)
        ends.append(jax.device_get((state, vectors, waiting)))
    padded, filled = (jax.tree.leaves(end) for end in ends)
    for want, got in zip(padded, filled, strict=True):
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))
    assert np.any(ends[0][0].weights != weights)
    return np.asarray(ends[1][2])
