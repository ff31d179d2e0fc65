"""One optimizer step on the rows of a batch, in the table's own buffers.

Only the rows that `UniqueRows` names are read or written: the cost follows the batch, provided that
the caller donates the state (without donation each step copies the whole table) and that the
gradients depend on the rows looked up, as those of every real loss do (else XLA may put the reading
after the writing, on a copy). The arithmetic is in `optimizers.py`; with rows split over devices
the caller is `exchange.apply`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hstu_jax.tables import lookup, optimizers, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableState:
    """An embedding table and its optimizer state.

    Fields are `Any` because trees of this shape also hold shardings and partition specs.

    Attributes:
        weights: float32 [rows, dim], rows = `TableSpec.padded_rows`.
        slots: slot name -> float32 [rows] or [rows, dim], as the optimizer's rule names them.
    """

    weights: Any
    slots: Any


def init_state(
    table: spec.TableSpec,
    key: Array,
    *,
    rule: optimizers.Rule,
    sharding: jax.sharding.Sharding | None = None,
) -> TableState:
    """A fresh table and its slots, made on the devices that keep them.

    Args:
        table: the table.
        key: random key of the weights.
        rule: the optimizer.
        sharding: where the rows live; None is the default device.

    Returns:
        The state; see `spec.init_weights` for the weights.
    """

    def fill(slot):
        shape = (table.padded_rows, table.dim) if slot.per_value else (table.padded_rows,)
        return jax.jit(lambda: jnp.full(shape, slot.initial, jnp.float32), out_shardings=sharding)()

    weights = spec.init_weights(table, key, sharding=sharding)
    return TableState(weights, {name: fill(slot) for name, slot in rule.slots.items()})


def apply(
    state: TableState,
    unique: lookup.UniqueRows,
    row_gradients: Float[Array, "capacity dim"],
    *,
    rule: optimizers.Rule,
    learning_rate: float | Float[Array, ""],
    iteration: int | Int[Array, ""] = 1,
) -> TableState:
    """The state after one step of a rule on the rows of `unique`.

    Args:
        state: the table; donate it to the enclosing jit.
        unique: the rows; its empty slots change nothing.
        row_gradients: gradient per slot of `unique`, duplicates already summed.
        rule: the optimizer.
        learning_rate: at least 0.
        iteration: number of this update of the run, from 1; read by the Adams.

    Returns:
        The new state; rows outside `unique` are the same bits.
    """
    where = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}

    def read(values):
        return values.at[unique.rows].get(
            mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
        )

    new = rule.step(
        optimizers.RowStep(
            gradients=row_gradients,
            weights=lookup.gather(state.weights, unique),
            slots={name: read(values) for name, values in state.slots.items()},
            learning_rate=learning_rate,
            iteration=iteration,
        )
    )
    return TableState(
        weights=state.weights.at[unique.rows].add(new.change, **where),
        slots={
            name: values.at[unique.rows].set(new.slots[name], **where)
            for name, values in state.slots.items()
        },
    )
