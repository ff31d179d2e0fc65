"""The MLP of a tower: layers of Linear, norm, activation and dropout.

What differs between training and evaluation (batch statistics, dropout) is decided by `TrainRows`:
with it the rows are a training batch, without it each row is computed alone. Used by `towers.py`.
"""

import dataclasses
from typing import Literal

import jax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from hstu_jax.config import tower_schema
from hstu_jax.model import activations, dropout, linear, normalization


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRows:
    """What a training batch needs to know of its rows.

    Attributes:
        mask: rows in use; the others take no part in batch statistics.
        identity: what a row's dropout bits are made from.
        dropout_key: key of this step and tower.
    """

    mask: Bool[Array, "*batch"]
    identity: dropout.TokenIdentity
    dropout_key: PRNGKeyArray


class Mlp(nn.Module):
    """Every layer: x -> dropout(activation(norm(x @ kernel + bias))), the last one too.

    Attributes:
        hidden_units: width of each layer.
        activation: the reference's name of it, arguments in brackets; "" = none.
        norm: "batch" takes the place of the bias.
        use_bias: add a bias; not read with norm="batch".
        dropout_ratio: of each layer; () = none.
        axis_names: mesh axes over which a training batch is split.

    Source: TorchEasyRec 1.3.16, tzrec/modules/mlp.py; eps of both norms is 1e-5.
    """

    hidden_units: tuple[int, ...]
    activation: str
    norm: Literal["none", "layer", "batch"] = "none"
    use_bias: bool = True
    dropout_ratio: tuple[float, ...] = ()
    axis_names: tuple[str, ...] = ()

    @property
    def needs_whole_batch(self) -> bool:
        """Whether training rows depend on each other, so that they must come in one call."""
        return self.norm == "batch" or self._has_dice

    @property
    def _has_dice(self) -> bool:
        return tower_schema.parse_activation(self.activation)[0] == activations.DICE

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch I"], train: TrainRows | None = None
    ) -> Float[Array, "*batch O"]:
        """The output of the last layer.

        Args:
            x: rows; those not in use hold finite values.
            train: of a training batch; None = evaluation.
        """
        row_mask = None if train is None else train.mask
        for index, width in enumerate(self.hidden_units):
            use_bias = self.use_bias and self.norm != "batch"
            x = linear.Linear(width, use_bias=use_bias, name=f"layers_{index}")(x)
            if self.norm == "layer":
                x = normalization.LayerNorm(name=f"norms_{index}")(x)
            elif self.norm == "batch":
                norm = normalization.BatchNorm(axis_names=self.axis_names, name=f"norms_{index}")
                x = norm(x, row_mask)
            x = self._activate(x, row_mask, index)
            if train is not None and self.dropout_ratio:
                x = dropout.dropout(
                    x,
                    rate=self.dropout_ratio[index],
                    key=jax.random.fold_in(train.dropout_key, index),
                    identity=train.identity,
                )
        return x

    def _activate(self, x, row_mask, index):
        if not self._has_dice:
            return activations.activate(x, self.activation)
        # Two names, because the reference numbers what stands in a layer.
        name = f"activations_{index}" if self.norm == "none" else f"normed_activations_{index}"
        return activations.Dice(axis_names=self.axis_names, name=name)(x, row_mask)
