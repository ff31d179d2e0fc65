"""Row-wise Adagrad on the rows of a batch, in the table's own buffers.

Only the rows that `UniqueRows` names are read or written: the cost follows the batch, provided that
the caller donates the state (without donation each step copies the whole table) and that the
gradients depend on the rows looked up, as those of every real loss do (else XLA may put the reading
after the writing, on a copy). With rows split over devices the caller is `exchange.apply`.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hstu_jax.tables import lookup, spec

_EPS = 1e-8  # fixed in the reference; added outside the root


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableState:
    """An embedding table and its optimizer state.

    Fields are `Any` because trees of this shape also hold shardings and partition specs.

    Attributes:
        weights: float32 [rows, dim], rows = `TableSpec.padded_rows`.
        accumulator: float32 [rows], sum over steps of the row's mean squared gradient.
    """

    weights: Any
    accumulator: Any


def init_state(
    table: spec.TableSpec,
    key: Array,
    *,
    weights_sharding: jax.sharding.Sharding | None = None,
    accumulator_sharding: jax.sharding.Sharding | None = None,
) -> TableState:
    """A fresh table with a zero accumulator, made on the devices that keep it.

    Args:
        table: the table.
        key: random key of the weights.
        weights_sharding: where weights live; None is the default device.
        accumulator_sharding: the same for the accumulator.

    Returns:
        The state; see `spec.init_weights` for the values.
    """
    zeros = jax.jit(lambda: jnp.zeros((table.padded_rows,)), out_shardings=accumulator_sharding)
    return TableState(spec.init_weights(table, key, sharding=weights_sharding), zeros())


def rowwise_adagrad(
    state: TableState,
    unique: lookup.UniqueRows,
    row_gradients: Float[Array, "capacity dim"],
    *,
    learning_rate: float | Float[Array, ""],
    weight_decay: float = 0.0,
    weight_decay_mode: Literal["none", "l2", "decoupled"] = "none",
) -> TableState:
    """The state after one step of row-wise Adagrad on the rows of `unique`.

    With g the row's gradient: s += mean(g^2); w -= learning_rate / (sqrt(s) + 1e-8) * g.
    "l2" first adds weight_decay * w to g; "decoupled" scales w by 1 - learning_rate * weight_decay.

    Args:
        state: the table; donate it to the enclosing jit.
        unique: the rows; its empty slots change nothing.
        row_gradients: gradient per slot of `unique`, duplicates already summed.
        learning_rate: at least 0.
        weight_decay: at least 0; ignored by mode "none".
        weight_decay_mode: see above. Rows outside `unique` never decay.

    Returns:
        The new state; rows outside `unique` are the same bits.

    Source: fbgemm 1.8.0 EXACT_ROWWISE_ADAGRAD, as TorchEasyRec 1.3.16 uses it.
    """
    where = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}
    if weight_decay_mode != "none":
        old = lookup.gather(state.weights, unique)
    if weight_decay_mode == "l2":
        row_gradients = row_gradients + weight_decay * old
    grown = state.accumulator.at[unique.rows].get(
        mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True
    ) + jnp.mean(jnp.square(row_gradients), axis=1)
    step_size = learning_rate / (jnp.sqrt(grown) + _EPS)
    change = -step_size[:, None] * row_gradients
    if weight_decay_mode == "decoupled":
        change = change - learning_rate * weight_decay * old
    return TableState(
        weights=state.weights.at[unique.rows].add(change, **where),
        accumulator=state.accumulator.at[unique.rows].set(grown, **where),
    )
