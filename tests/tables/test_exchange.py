"""Two devices give what one gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hstu_jax.tables import exchange, lookup, optimizers, spec, update

AXES = ("host", "chip")
TABLE = spec.TableSpec("video", 9000, 6)
RULE = optimizers.RowwiseAdagrad()
ADAM = optimizers.Adam(weight_decay=0.1)


def draw():
    """Ids of two shards of users: many shared, one shard with padding, the edge rows included."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 9000, 20)[rng.integers(0, 20, (2, 24))].astype(np.int32)
    ids[0, :2] = [0, 8999]
    valid = np.stack([rng.random(24) < 0.6, np.ones(24, bool)])
    cotangent = rng.normal(size=(2, 24, 6)).astype(np.float32) * 2
    cotangent[~valid] = np.nan
    return jnp.asarray(ids), jnp.asarray(valid), jnp.asarray(cotangent)


def local_step(state, ids, valid, cotangent, *, rule=RULE):
    """A device's part of a step: returns its block of the table and its users' vectors."""
    shape = ids.shape
    rows = spec.rows_of(TABLE, ids, valid).reshape(-1)
    unique = lookup.unique_rows(rows, capacity=rows.size, sentinel=TABLE.padded_rows)
    picked = exchange.fetch(state.weights, unique, axis_names=AXES)
    vectors, pull = jax.vjp(lambda picked: lookup.expand(picked, unique), picked)
    (gradients,) = pull(cotangent.reshape(-1, TABLE.dim))
    state = exchange.apply(state, unique, gradients, axis_names=AXES, rule=rule, learning_rate=0.3)
    return state, vectors.reshape(*shape, TABLE.dim)


def run(mesh_shape, *, check_vma=True, rule=RULE):
    mesh = jax.make_mesh(
        mesh_shape,
        AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: int(np.prod(mesh_shape))],
    )
    split = PartitionSpec(AXES)
    step = jax.jit(
        jax.shard_map(
            functools.partial(local_step, rule=rule),
            mesh=mesh,
            in_specs=split,
            out_specs=split,
            check_vma=check_vma,
        )
    )
    state = update.init_state(TABLE, jax.random.key(0), rule=rule)
    for _ in range(2):
        state, vectors = step(state, *draw())
    slots = [np.asarray(state.slots[name]) for name in sorted(state.slots)]
    return np.asarray(state.weights), *slots, np.asarray(vectors)


@functools.cache
def one_device():
    return run((1, 1))


@pytest.mark.parametrize("mesh_shape, check_vma", [((1, 2), True), ((2, 1), False)])
def test_two_devices_equal_one(mesh_shape, check_vma):
    for single, several in zip(one_device(), run(mesh_shape, check_vma=check_vma), strict=True):
        np.testing.assert_allclose(several, single, rtol=1e-6, atol=1e-7)


def test_two_devices_equal_one_with_several_slots():
    single = run((1, 1), rule=ADAM)
    assert [part.ndim for part in single] == [2, 2, 2, 3]
    for one, several in zip(single, run((1, 2), check_vma=False, rule=ADAM), strict=True):
        np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-6)


def test_one_device_equals_the_plain_path_and_moves_nothing():
    ids, valid, cotangent = draw()

    @jax.jit
    def plain_step(state):
        rows = spec.rows_of(TABLE, ids, valid).reshape(-1)
        unique = lookup.unique_rows(rows, capacity=rows.size, sentinel=TABLE.padded_rows)
        _, pull = jax.vjp(lambda p: lookup.expand(p, unique), lookup.gather(state.weights, unique))
        (gradients,) = pull(cotangent.reshape(-1, TABLE.dim))
        return update.apply(state, unique, gradients, rule=RULE, learning_rate=0.3)

    state = update.init_state(TABLE, jax.random.key(0), rule=RULE)
    plain = plain_step(plain_step(state))
    weights, accumulator, _ = one_device()
    np.testing.assert_allclose(weights, plain.weights, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(accumulator, plain.slots["accumulator"], rtol=1e-6)

    mesh = jax.make_mesh(
        (1, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1]
    )
    split = PartitionSpec(AXES)
    step = jax.shard_map(local_step, mesh=mesh, in_specs=split, out_specs=split)
    program = str(jax.make_jaxpr(step)(state, ids, valid, cotangent))
    assert not any(name in program for name in ("all_gather", "psum", "reduce_scatter"))


@pytest.mark.parametrize("lost", [0, 1])
def test_losing_one_devices_gradients_is_caught(lost):
    """A planted wrong variant: without either device's gradients the result is another one."""
    ids, valid, cotangent = draw()
    cotangent = np.where(np.asarray(valid)[..., None], cotangent, 0).copy()
    cotangent[lost] = 0
    rows = np.asarray(spec.rows_of(TABLE, ids, valid))
    gradient = np.zeros((TABLE.padded_rows + 1, TABLE.dim))
    np.add.at(gradient, rows.reshape(-1), cotangent.reshape(-1, TABLE.dim))
    sums = 2 * np.mean(gradient[:-1] ** 2, axis=1)
    assert np.abs(sums - one_device()[1]).max() > 0.1
