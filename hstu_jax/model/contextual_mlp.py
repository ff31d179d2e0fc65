"""The MLP that projects action encodings to the model width (FACTS 4.2).

"Contextual" is the reference's name for the family: one member mixes in the user's contextual
features, this one does not. Used by `preprocessor.py`.
"""

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from hstu_jax.model import linear, normalization


class SwishLayerNorm(nn.Module):
    """x * sigmoid(LayerNorm(x)), eps 1e-5."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The gated array."""
        return x * jax.nn.sigmoid(normalization.LayerNorm(name="norm")(x))


class SimpleMlp(nn.Module):
    """Linear, SwishLayerNorm, Linear, LayerNorm (eps 1e-5).

    Attributes:
        hidden_dim: width between the two linear layers.
        output_dim: width of the output.

    Source: TorchEasyRec 1.3.16, simple contextualized MLP; FACTS 4.2.
    """

    hidden_dim: int
    output_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """The projected array."""
        x = linear.Linear(self.hidden_dim, init="xavier", name="linear_in")(x)
        x = SwishLayerNorm(name="swish_norm")(x)
        x = linear.Linear(self.output_dim, init="xavier", name="linear_out")(x)
        return normalization.LayerNorm(name="norm")(x)
