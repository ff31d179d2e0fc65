"""Rows between devices: fetch the rows of a batch from their owners, send gradients back.

For code inside `jax.shard_map` whose table rows are split in equal consecutive blocks over all
devices of the named mesh axes. Ids go to the owners of their rows by an all-to-all, rows and
gradients by another; a table never moves, and on one device nothing does. Every device sends
buckets of a fixed size, so that memory and traffic follow a device's own ids, whatever the number
of devices; ids that do not fit wait for another round (`rounds.py`). A block of all rows tells that
a small table is whole on every device: then only gradients move, in a dense sum.

On a mesh of two axes ids go to the right device along the second axis first (within a host), are
made unique there, and then along the first (between hosts): a row that all devices of a host want
crosses the network once. Next on the path: the training step.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hstu_jax.tables import lookup, optimizers, rounds, update

AxisNames = str | tuple[str, ...]


def fetch(
    weights: Float[Array, "shard_rows dim"],
    unique: lookup.UniqueRows,
    *,
    axis_names: AxisNames,
    slack: float,
    host_slack: float,
    is_ragged: bool = False,
) -> tuple[Float[Array, "capacity dim"], Int[Array, ""]]:
    """The rows that this device's `unique` names, wherever they live.

    Args:
        weights: this device's block of the table, or all of it.
        unique: this device's rows, numbered in the whole table.
        axis_names: mesh axes over which the table's rows are split, major first.
        slack: size of the buckets, see `rounds.bucket_size`; changes time and memory, no result.
        host_slack: in two levels, the same of the buckets between hosts; one level has `slack`,
            between hosts too.
        is_ragged: send filled places of buckets only (`rounds.py`); changes no result.

    Returns:
        The same as `lookup.gather` on the whole table, bit for bit; and the number of ids that this
        device could not send in the first round, its own and those that it passed on.
    """
    if weights.shape[0] == unique.sentinel:
        return lookup.gather(weights, unique), jnp.int32(0)
    levels = _levels(unique, axis_names, (slack, host_slack), is_ragged)
    keys, order = _first_keys(unique, levels)
    values, num_waiting = _fetch(weights, keys, levels)
    if order is not None:
        values = jnp.zeros_like(values).at[order].set(values, unique_indices=True)
    return values, num_waiting


def _fetch(weights, keys, levels):
    """Rows of ascending keys of the first level, and how many keys had to wait."""
    level, *below = levels

    def answer(places):
        if not below:
            found = weights.at[places].get(mode="fill", fill_value=0)
            return jax.lax.optimization_barrier(found), 0
        unique = _next_unique(places, level, below[0])
        values, num_waiting = _fetch(weights, unique.rows, below)
        return values.at[unique.inverse].get(mode="fill", fill_value=0), num_waiting

    def one_round(carry):
        low, values, num_waiting = carry
        now = rounds.next_round(keys, level, low)
        places = rounds.send_keys(keys, level, now)
        answers, num_waiting_below = answer(places.reshape(-1))
        answers = answers.reshape(*places.shape, -1)
        values = rounds.return_values(answers, keys, level, now, values=values)
        num_left = jnp.where(low == 0, _num_real(keys, level) - jnp.sum(now.count), 0)
        return now.high, values, num_waiting + num_left + num_waiting_below

    varying = 0 * keys[0]  # shard_map asks that a carry differ over the devices from the start on
    values = jnp.zeros((keys.shape[0], weights.shape[1]), weights.dtype) + varying
    start = (jnp.int32(0), values, varying)
    _, values, num_waiting = jax.lax.while_loop(
        lambda carry: carry[0] < level.width, one_round, start
    )
    return values, num_waiting


def apply(
    state: update.TableState,
    unique: lookup.UniqueRows,
    row_gradients: Float[Array, "capacity dim"],
    *,
    axis_names: AxisNames,
    slack: float,
    host_slack: float,
    is_ragged: bool = False,
    rule: optimizers.Rule,
    learning_rate: float | Float[Array, ""],
    iteration: int | Int[Array, ""] = 1,
) -> update.TableState:
    """One optimizer step on this device's rows with every device's gradients.

    All gradients of a row arrive in one round and are summed before its one update: in the order of
    the devices, or, in two levels, first over the devices of a host and then over hosts.

    Args:
        state: this device's block of the table, or all of it; donate it.
        unique: this device's rows, numbered in the whole table.
        row_gradients: this device's gradient per slot of `unique`. Gradients of different devices
            are summed: divide the loss by the global count before.
        axis_names: as in `fetch`.
        slack: same.
        host_slack: same.
        is_ragged: same.
        rule: see `update.apply`, as the rest.
        learning_rate: same.
        iteration: same.

    Returns:
        The new block.
    """

    def update_rows(state, unique, gradients):
        return update.apply(
            state,
            unique,
            gradients,
            rule=rule,
            learning_rate=learning_rate,
            iteration=iteration,
        )

    if state.weights.shape[0] == unique.sentinel:
        if jax.lax.axis_size(axis_names) > 1:
            unique, row_gradients = _sum_whole(unique, row_gradients, axis_names)
        return update_rows(state, unique, row_gradients)
    levels = _levels(unique, axis_names, (slack, host_slack), is_ragged)
    keys, order = _first_keys(unique, levels)
    gradients = row_gradients if order is None else row_gradients[order]
    return _apply(state, keys, gradients, levels, update_rows)


def _apply(state, keys, gradients, levels, update_rows):
    """The state after the update of the rows of ascending keys of the first level."""
    level, *below = levels

    def one_round(carry):
        low, state = carry
        now = rounds.next_round(keys, level, low)
        places = rounds.send_keys(keys, level, now).reshape(-1)
        received = rounds.send_values(gradients, level, now).reshape(-1, gradients.shape[1])
        to = below[0].num_keys if below else level.width
        merged, summed = lookup.merge_rows(
            _next_keys(places, level, below[0]) if below else places,
            received,
            capacity=min(places.shape[0], to),
            sentinel=to,
        )
        if below:
            return now.high, _apply(state, merged.rows, summed, below, update_rows)
        return now.high, update_rows(state, merged, summed)

    _, state = jax.lax.while_loop(
        lambda carry: carry[0] < level.width, one_round, (jnp.int32(0), state)
    )
    return state


def _sum_whole(unique, gradients, axis_names):
    """Rows that any device has gradients of, and their sums: what all devices of a mesh agree on.

    Dense over the table's rows; for small tables that are whole on every device.
    """
    num_rows = unique.sentinel
    with_count = jnp.concatenate([gradients, jnp.ones((unique.capacity, 1))], axis=1)
    dense = jnp.zeros((num_rows, with_count.shape[1]))
    dense = dense.at[unique.rows].set(
        with_count, mode="drop", unique_indices=True, indices_are_sorted=True
    )
    dense = jax.lax.psum(dense, axis_names)
    rows = jnp.where(dense[:, -1] > 0, jnp.arange(num_rows, dtype=jnp.int32), num_rows)
    merged = lookup.unique_rows(rows, capacity=num_rows, sentinel=num_rows)
    return merged, dense.at[merged.rows].get(mode="fill", fill_value=0)[:, :-1]


def _levels(
    unique: lookup.UniqueRows, axis_names: AxisNames, slacks: tuple[float, float], is_ragged: bool
) -> list[rounds.Level]:
    """The all-to-alls on the way to an owner: along the last axis first, if two have any length."""
    names = (axis_names,) if isinstance(axis_names, str) else axis_names
    used = [name for name in names if jax.lax.axis_size(name) > 1]
    steps = [(name,) for name in reversed(used)] if len(used) == 2 else [names]
    levels, num_keys, capacity = [], unique.sentinel, unique.capacity
    for step, slack in zip(steps, slacks, strict=False):
        num_buckets = jax.lax.axis_size(step)
        width = num_keys // num_buckets
        size = rounds.bucket_size(
            num_keys=unique.capacity,
            capacity=capacity,
            num_buckets=num_buckets,
            width=width,
            slack=slack,
        )
        levels.append(
            rounds.Level(
                axis_names=step,
                all_axis_names=names,
                num_buckets=num_buckets,
                width=width,
                bucket_size=size,
                is_ragged=is_ragged,
            )
        )
        num_keys, capacity = width, min(num_buckets * size, width)
    return levels


def _first_keys(unique: lookup.UniqueRows, levels: list[rounds.Level]):
    """Ascending keys of the first level, and the slot of `unique` that each belongs to.

    In one level a key is the row, and the order None. In two, the row of device c of host h at
    place p of its block has the key c * width + p * hosts + h.

    8 rows on 2 hosts of 2 chips: a device's block has 2 rows, so row 5 is at place 1 of device 2,
    chip 0 of host 1. `width` is 4, the rows of a column of 2 hosts, and its key 0 * 4 + 1 * 2 + 1 =
    3. The rows 0 .. 7 have the keys 0, 2, 4, 6, 1, 3, 5, 7: a device that asks for the rows 1, 4, 5
    and 6 has the keys 1, 2, 3 (to its host's chip 0) and 5 (to chip 1), in the order 4, 1, 5, 6.
    """
    if len(levels) == 1:
        return unique.rows, None
    chips, hosts = levels
    owner, place = unique.rows // hosts.width, unique.rows % hosts.width
    host, chip = owner // chips.num_buckets, owner % chips.num_buckets
    keys = chip * chips.width + place * hosts.num_buckets + host
    keys = jnp.where(unique.rows < unique.sentinel, keys, chips.num_keys)
    slots = jnp.arange(unique.capacity, dtype=jnp.int32)
    return jax.lax.sort((keys, slots), num_keys=1, is_stable=True)


def _next_keys(places, chips: rounds.Level, hosts: rounds.Level):
    """Places of a device's column of owners -> keys of the level between hosts."""
    keys = (places % hosts.num_buckets) * hosts.width + places // hosts.num_buckets
    return jnp.where(places < chips.width, keys, hosts.num_keys)


def _next_unique(places, chips: rounds.Level, hosts: rounds.Level) -> lookup.UniqueRows:
    """Distinct keys of the level between hosts among those that a host's devices ask for."""
    return lookup.unique_rows(
        _next_keys(places, chips, hosts),
        capacity=min(places.shape[0], hosts.num_keys),
        sentinel=hosts.num_keys,
    )


def _num_real(keys, level: rounds.Level):
    """How many keys are not "no row"."""
    return jnp.sum(keys < level.num_keys, dtype=jnp.int32)
