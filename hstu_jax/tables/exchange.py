"""Rows between devices: fetch the rows of a batch from their owners, send gradients back.

For code inside `jax.shard_map` whose table rows are split in equal consecutive blocks over all
devices of the named mesh axes. This is the simple, exact version: every device sees every device's
ids. Ids and rows move, never a table; on one device nothing moves at all. Next on the path: the
training step.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hstu_jax.tables import lookup, optimizers, update

AxisNames = str | tuple[str, ...]


def fetch(
    weights: Float[Array, "shard_rows dim"], unique: lookup.UniqueRows, *, axis_names: AxisNames
) -> Float[Array, "capacity dim"]:
    """The rows that this device's `unique` names, wherever they live.

    Args:
        weights: this device's block of the table.
        unique: this device's rows, numbered in the whole table.
        axis_names: mesh axes over which the table's rows are split, major first.

    Returns:
        The same as `lookup.gather` on the whole table, bit for bit (but -0.0 may become 0.0).
    """
    num_devices = jax.lax.axis_size(axis_names)
    if num_devices == 1:
        return lookup.gather(weights, unique)
    everyone = jax.lax.all_gather(unique.rows, axis_names)
    local, is_mine = _to_local(everyone, weights.shape[0], axis_names)
    found = weights[jnp.where(is_mine, local, 0)]
    # Exactly one device adds something other than zero to a row.
    found = jnp.where(is_mine[..., None], found, 0)
    return jax.lax.psum_scatter(found, axis_names)


def apply(
    state: update.TableState,
    unique: lookup.UniqueRows,
    row_gradients: Float[Array, "capacity dim"],
    *,
    axis_names: AxisNames,
    rule: optimizers.Rule,
    learning_rate: float | Float[Array, ""],
    iteration: int | Int[Array, ""] = 1,
) -> update.TableState:
    """One optimizer step on this device's rows with every device's gradients.

    Args:
        state: this device's block of the table; donate it.
        unique: this device's rows, numbered in the whole table.
        row_gradients: this device's gradient per slot of `unique`. Gradients of different devices
            are summed: divide the loss by the global count before.
        axis_names: as in `fetch`.
        rule: see `update.apply`, as the rest.
        learning_rate: same.
        iteration: same.

    Returns:
        The new block.
    """
    if jax.lax.axis_size(axis_names) > 1:
        everyone = jax.lax.all_gather(unique.rows, axis_names, tiled=True)
        gradients = jax.lax.all_gather(row_gradients, axis_names, tiled=True)
        shard_rows = state.weights.shape[0]
        local, is_mine = _to_local(everyone, shard_rows, axis_names)
        unique, row_gradients = lookup.merge_rows(
            jnp.where(is_mine, local, shard_rows),
            gradients,
            capacity=min(everyone.shape[0], shard_rows),
            sentinel=shard_rows,
        )
    return update.apply(
        state,
        unique,
        row_gradients,
        rule=rule,
        learning_rate=learning_rate,
        iteration=iteration,
    )


def _to_local(rows, shard_rows, axis_names):
    """Rows counted from the start of this device's block, and whether they lie in it."""
    local = rows - jax.lax.axis_index(axis_names) * shard_rows
    return local, (local >= 0) & (local < shard_rows)
