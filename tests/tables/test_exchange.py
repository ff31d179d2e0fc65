"""Two devices give what one gives, bit for bit where sums do not round; no id is ever dropped.

More devices, and the memory and traffic of compiled steps, are in `test_exchange_many.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hstu_jax.tables import lookup, optimizers, rounds, spec, update
from tests.tables import exchange_steps as steps

TABLE = spec.TableSpec("video", 9000, 6)
BLOCK = TABLE.padded_rows // 2
RULES = {
    "rowwise_adagrad": optimizers.RowwiseAdagrad(0.1, "l2"),
    "adagrad": optimizers.Adagrad(0.5),
    "adam": optimizers.Adam(weight_decay=0.1),
    "partial_rowwise_adam": optimizers.Adam(is_rowwise=True),
}


def num_waiting(rows):
    """Ids of each device behind the third of any device for any owner, in the places of a block."""
    owned = [[np.unique(row % BLOCK) for row in _by_owner(rows_of_one)] for rows_of_one in rows]
    high = min(places[2] for of_device in owned for places in of_device if len(places) > 2)
    return [sum(int(np.sum(places >= high)) for places in of_device) for of_device in owned]


def _by_owner(rows):
    rows = rows[rows < TABLE.padded_rows]
    return [rows[rows // BLOCK == owner] for owner in (0, 1)]


@pytest.mark.parametrize("slack", [steps.WIDE, steps.TIGHT])
@pytest.mark.parametrize("mesh_shape", [(1, 2), (2, 1)])
def test_two_devices_equal_the_dense_step(mesh_shape, slack):
    rows, cotangent = steps.draw(2, table=TABLE)
    waiting = steps.check_against_dense(mesh_shape, TABLE, rows, cotangent, slack=slack)
    assert waiting.tolist() == (num_waiting(rows) if slack == steps.TIGHT else [0, 0])


def test_the_step_passes_shard_maps_check_of_varying_axes():
    step = steps.compile_step((1, 2), check_vma=True)
    step.lower(steps.start(TABLE), *map(jnp.asarray, steps.draw(2, table=TABLE)))


@pytest.mark.parametrize("name", RULES)
def test_every_optimizer_updates_a_row_once_though_ids_wait(name):
    rule = RULES[name]
    rows, cotangent = (jnp.asarray(part) for part in steps.draw(2, table=TABLE))
    ends = []
    for mesh_shape, slack in (((1, 1), steps.WIDE), ((1, 2), steps.TIGHT)):
        step = steps.compile_step(mesh_shape, slack=slack, rule=rule)
        state = steps.start(TABLE, rule)
        for _ in range(2):
            state, vectors, waiting = step(state, rows, cotangent)
        ends.append((state, vectors))
    assert np.all(np.asarray(waiting) > 0)
    for one, two in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-6, atol=1e-7)


def contiguous_rows():
    """Every device asks for the same 24 neighbouring rows of one owner."""
    rows = np.tile(np.arange(100, 124, dtype=np.int32), (2, 1))
    return rows, steps.draw(2, table=TABLE)[1]


def test_skewed_ids_wait_and_are_exact():
    rows, cotangent = contiguous_rows()
    waiting = steps.check_against_dense((1, 2), TABLE, rows, cotangent, slack=steps.TIGHT)
    assert waiting.tolist() == [22, 22]


def test_dropping_what_does_not_fit_is_caught(monkeypatch):
    """A planted wrong variant: one round that ends where the bucket does."""

    def only_round(keys, level, low):
        now = next_round(keys, level, low)
        end = jnp.full_like(now.high, level.width)
        return dataclasses.replace(now, high=end, count=jnp.minimum(now.count, level.bucket_size))

    next_round = rounds.next_round
    monkeypatch.setattr(rounds, "next_round", only_round)
    steps.compile_step.cache_clear()
    with pytest.raises(AssertionError, match="not equal"):
        steps.check_against_dense((1, 2), TABLE, *contiguous_rows(), slack=steps.TIGHT)
    steps.compile_step.cache_clear()


@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_devices_without_ids_change_nothing_and_do_not_hang(empty):
    rows, cotangent = steps.draw(2, table=TABLE)
    rows[list(empty)] = TABLE.padded_rows
    cotangent[list(empty)] = np.nan  # of padding, whatever it is
    state = steps.start(TABLE)
    known = np.where(np.isnan(cotangent), 0, cotangent)
    vectors, after = steps.dense_sgd(state.weights, rows, known)
    step = steps.compile_step((1, 2), slack=steps.TIGHT)
    new, got, waiting = step(state, jnp.asarray(rows), jnp.asarray(cotangent))
    np.testing.assert_array_equal(np.asarray(got), vectors.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(new.weights), after.astype(np.float32))
    assert not np.asarray(waiting)[list(empty)].any()


def test_negative_zeros_cross_the_network():
    rows, cotangent = steps.draw(2, table=TABLE)
    table = jnp.full((TABLE.padded_rows, TABLE.dim), -0.0)
    step = steps.compile_step((1, 2))
    new, vectors, _ = step(
        update.TableState(table, {}), jnp.asarray(rows), jnp.zeros_like(cotangent)
    )
    is_row = rows < TABLE.padded_rows
    assert np.all(np.signbit(vectors)[is_row]) and not np.any(np.signbit(vectors)[~is_row])
    untouched = np.setdiff1d(np.arange(TABLE.padded_rows), rows)
    assert np.all(np.signbit(new.weights)[untouched])


def test_one_device_equals_the_plain_path_and_moves_nothing():
    rows, cotangent = (jnp.asarray(part) for part in steps.draw(1, table=TABLE))
    rule = RULES["rowwise_adagrad"]

    @jax.jit
    def plain_step(state):
        unique = lookup.unique_rows(rows[0], capacity=24, sentinel=TABLE.padded_rows)
        _, pull = jax.vjp(lambda p: lookup.expand(p, unique), lookup.gather(state.weights, unique))
        (gradients,) = pull(cotangent[0])
        return update.apply(state, unique, gradients, rule=rule, learning_rate=0.5)

    plain = plain_step(steps.start(TABLE, rule))
    step = steps.compile_step((1, 1), rule=rule)
    program = str(jax.make_jaxpr(step)(plain, rows, cotangent))
    assert not any(name in program for name in ("all_to_all", "pmin", "while", "all_gather"))
    state, _, waiting = step(steps.start(TABLE, rule), rows, cotangent)
    assert int(waiting[0]) == 0
    for got, want in zip(*map(jax.tree.leaves, (state, plain)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("lost", [0, 1])
def test_losing_one_devices_gradients_is_caught(lost):
    """A planted wrong variant: without either device's gradients the result is another one."""
    rows, cotangent = steps.draw(2, table=TABLE)
    weights = steps.start(TABLE).weights
    right = steps.dense_sgd(weights, rows, cotangent)[1]
    cotangent[lost] = 0
    assert np.abs(steps.dense_sgd(weights, rows, cotangent)[1] - right).max() > 1


def test_rounds_by_hand():
    """Two buckets of 10 places and room for two keys; 20 is no key."""
    keys = jnp.array([1, 4, 5, 6, 12, 20, 20], jnp.int32)
    level = rounds.Level(("chip",), ("chip",), num_buckets=2, width=10, bucket_size=2)
    ends, counts, low = [], [], jnp.int32(0)
    mapped = jax.shard_map(
        lambda low: rounds.next_round(keys, level, low),
        mesh=jax.make_mesh((1,), ("chip",), devices=jax.devices()[:1]),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
    )
    mapped = jax.jit(mapped)
    while low < level.width:
        now = mapped(low)
        low = now.high
        ends.append(int(low))
        counts.append(np.asarray(now.count).tolist())
    assert ends == [5, 10]
    assert counts == [[2, 1], [2, 0]]


@pytest.mark.parametrize(
    ("num_keys", "num_buckets", "width", "slack", "want"),
    [
        (8000, 8, 10_000, 1.25, 1250),  # a quarter of room over an even share
        (100, 8, 10_000, 1.25, 100),  # few keys: room for all of them in one bucket
        (400, 8, 10_000, 1.25, 160),  # an eighth of 1,024 keys, and a quarter more
        (8000, 8, 128, 1.25, 128),  # no more than there are rows
        (8000, 8, 10_000, 1e-9, 1),
    ],
)
def test_bucket_sizes_by_hand(num_keys, num_buckets, width, slack, want):
    sizes = dict(num_buckets=num_buckets, width=width, slack=slack)
    assert rounds.bucket_size(num_keys=num_keys, capacity=num_keys, **sizes) == want


def test_unspread_small_tables_never_wait():
    """Tables of up to 1,024 rows: neighbouring ids, one owner, and buckets that hold them all."""
    table = spec.TableSpec("small", 1000, 6)
    rows = np.tile(np.arange(300, dtype=np.int32), (2, 1))
    cotangent = np.ones((2, 300, 6), np.float32)
    waiting = steps.check_against_dense((1, 2), table, rows, cotangent, slack=steps.WIDE)
    assert waiting.tolist() == [0, 0]


def test_a_table_that_is_whole_on_every_device_is_exact_and_sends_no_ids():
    rows, cotangent = steps.draw(2, table=TABLE)
    options = dict(slack=steps.WIDE, is_whole=True)
    waiting = steps.check_against_dense((1, 2), TABLE, rows, cotangent, **options)
    assert waiting.tolist() == [0, 0]
    step = steps.compile_step((1, 2), **options)
    program = str(jax.make_jaxpr(step)(steps.start(TABLE), rows, cotangent))
    assert "psum" in program and "all_to_all" not in program


def test_rows_of_no_device_keep_their_moments_in_a_whole_table():
    """Adam moves every row that it is given, also with a gradient of zero."""
    rule, rows_and_cotangent = RULES["adam"], steps.draw(2, table=TABLE)
    step = steps.compile_step((1, 2), rule=rule, is_whole=True)
    rows, cotangent = (jnp.asarray(part) for part in rows_and_cotangent)
    state = steps.start(TABLE, rule)
    for number in range(2):  # the second step leaves out the rows of the first device
        rows = rows.at[0].set(TABLE.padded_rows) if number else rows
        before = jax.device_get(state)
        state, _, _ = step(state, rows, cotangent)
    untouched = np.setdiff1d(np.arange(TABLE.padded_rows), rows)
    for old, new in zip(*map(jax.tree.leaves, (before, state)), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[untouched], old[untouched])
        touched = np.unique(rows[rows < TABLE.padded_rows])
        assert np.any(np.asarray(new)[touched] != old[touched])
