"""Rules of the table optimizers: what one step does to the rows of a batch.

A rule sees rows only, `[capacity, dim]` gathered from the table, never the table; `update.py`
gathers and writes back. Rows outside the batch neither move nor decay nor forget (lazy updates),
and the Adams correct their bias by the number of steps of the run, not of the row.
"""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_EPS = 1e-8  # fixed in the reference; added outside the root


@dataclasses.dataclass(frozen=True)
class Slot:
    """An array that a rule keeps beside the weights.

    Attributes:
        per_value: one number for each weight; else one for each row.
        initial: first value.
    """

    per_value: bool = False
    initial: float = 0.0


@dataclasses.dataclass(frozen=True)
class RowStep:
    """What a rule is given.

    Attributes:
        gradients: [capacity, dim], duplicates already summed.
        weights: [capacity, dim], before the step.
        slots: slot name -> [capacity] or [capacity, dim], before the step.
        learning_rate: at least 0.
        iteration: number of this update, from 1.
    """

    gradients: Float[Array, "capacity dim"]
    weights: Float[Array, "capacity dim"]
    slots: dict[str, Float[Array, "capacity ..."]]
    learning_rate: float | Float[Array, ""]
    iteration: int | Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class RowChange:
    """What a rule answers.

    Attributes:
        change: to be added to the weights.
        slots: slot name -> new values.
    """

    change: Float[Array, "capacity dim"]
    slots: dict[str, Float[Array, "capacity ..."]]


@runtime_checkable
class Rule(Protocol):
    """An optimizer of table rows."""

    @property
    def slots(self) -> dict[str, Slot]:
        """What is kept beside the weights."""

    def step(self, rows: RowStep) -> RowChange:
        """One step."""


@dataclasses.dataclass(frozen=True)
class RowwiseAdagrad:
    """s += mean(g^2); w -= learning_rate / (sqrt(s) + 1e-8) * g, with one s for a row.

    "l2" first adds weight_decay * w to g; "decouple" scales w by 1 - learning_rate * weight_decay.

    Source: fbgemm 1.8.0 EXACT_ROWWISE_ADAGRAD, as TorchEasyRec 1.3.16 uses it.
    """

    weight_decay: float = 0.0
    weight_decay_mode: Literal["none", "l2", "decouple"] = "none"

    @property
    def slots(self) -> dict[str, Slot]:
        """The sum of mean squares."""
        return {"accumulator": Slot()}

    def step(self, rows: RowStep) -> RowChange:
        """One step."""
        gradients = rows.gradients
        if self.weight_decay_mode == "l2":
            gradients = gradients + self.weight_decay * rows.weights
        grown = rows.slots["accumulator"] + jnp.mean(jnp.square(gradients), axis=1)
        step_size = rows.learning_rate / (jnp.sqrt(grown) + _EPS)
        change = -step_size[:, None] * gradients
        if self.weight_decay_mode == "decouple":
            change = change - rows.learning_rate * self.weight_decay * rows.weights
        return RowChange(change, {"accumulator": grown})


@dataclasses.dataclass(frozen=True)
class Sgd:
    """w -= learning_rate * g.

    Source: fbgemm 1.8.0 EXACT_SGD.
    """

    @property
    def slots(self) -> dict[str, Slot]:
        """None."""
        return {}

    def step(self, rows: RowStep) -> RowChange:
        """One step."""
        return RowChange(-rows.learning_rate * rows.gradients, {})


@dataclasses.dataclass(frozen=True)
class Adagrad:
    """s += g^2; w -= learning_rate * g / (sqrt(s) + 1e-8), with one s for a weight.

    Source: fbgemm 1.8.0 EXACT_ADAGRAD.
    """

    initial_accumulator_value: float = 0.0

    @property
    def slots(self) -> dict[str, Slot]:
        """The sum of squares."""
        return {"accumulator": Slot(per_value=True, initial=self.initial_accumulator_value)}

    def step(self, rows: RowStep) -> RowChange:
        """One step."""
        grown = rows.slots["accumulator"] + jnp.square(rows.gradients)
        change = -rows.learning_rate * rows.gradients / (jnp.sqrt(grown) + _EPS)
        return RowChange(change, {"accumulator": grown})


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam on the rows of the batch, at the n-th step of the run.

    m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2 (with `is_rowwise`: mean(g^2), one
    v for a row); w -= learning_rate * (m' / (sqrt(v') + 1e-8) + weight_decay * w) where
    m' = m / (1 - beta1^n), v' = v / (1 - beta2^n). The weight decay is decoupled.

    Source: fbgemm 1.8.0 ADAM and PARTIAL_ROWWISE_ADAM (fbgemm_gpu/codegen/genscript/optimizers.py).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    is_rowwise: bool = False

    @property
    def slots(self) -> dict[str, Slot]:
        """Both moments."""
        return {"mean": Slot(per_value=True), "square": Slot(per_value=not self.is_rowwise)}

    def step(self, rows: RowStep) -> RowChange:
        """One step."""
        square = jnp.square(rows.gradients)
        if self.is_rowwise:
            square = jnp.mean(square, axis=1)
        mean = self.beta1 * rows.slots["mean"] + (1 - self.beta1) * rows.gradients
        square = self.beta2 * rows.slots["square"] + (1 - self.beta2) * square
        count = jnp.asarray(rows.iteration, jnp.float32)
        scale = jnp.sqrt(square / (1 - jnp.power(self.beta2, count))) + _EPS
        scale = scale[:, None] if self.is_rowwise else scale
        direction = mean / (1 - jnp.power(self.beta1, count)) / scale
        if self.weight_decay:
            direction = direction + self.weight_decay * rows.weights
        return RowChange(-rows.learning_rate * direction, {"mean": mean, "square": square})
