"""The MLPs that project action encodings to the model width.

"Contextual" is the reference's name for the family: `ParameterizedMlp` makes a linear map of each
user's own from the user's contextual features, `SimpleMlp` does not look at them. Used by
`preprocessor.py`.
"""

import jax
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from hstu_jax.model import dropout, linear, normalization, user_maps
from pallas_kernels.hstu_attention import layout as attention_layout


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

    Source: TorchEasyRec 1.3.16, simple contextualized MLP; docs/model.md.
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


class MatrixNorm(nn.Module):
    """A matrix standardised over all its entries, then a scale and a bias per entry; eps 1e-5."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I O"]) -> Float[Array, "*batch I O"]:
        """The normalised matrices."""
        shape, ones = x.shape[-2:], (1,) * (x.ndim - 2)
        scale = self.param("scale", nn.initializers.ones, shape).reshape(*ones, *shape)
        bias = self.param("bias", nn.initializers.zeros, shape).reshape(*ones, *shape)
        flat = normalization.standardize(x.reshape(*x.shape[:-2], -1), eps=1e-5)
        return (flat.reshape(x.shape) * scale + bias).astype(x.dtype)


class ParameterizedMlp(nn.Module):
    """y = x @ W(c) + b(c): a linear map made from the contextual features c of the token's user.

        s = Linear(dropout(c))                              width hidden_dim
        W = MatrixNorm(reshape(Linear(s), [I, output_dim]))
        b = Linear(SwishLayerNorm(Linear(s)))

    W is [users, I, output_dim]; tokens are multiplied by `user_maps.py`, in linear memory.

    Attributes:
        hidden_dim: width of s.
        output_dim: width of the output.
        contextual_dropout_ratio: of c, in training.

    Source: TorchEasyRec 1.3.16, parameterized contextualized MLP.
    """

    hidden_dim: int
    output_dim: int
    contextual_dropout_ratio: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L I"],
        contextual: Float[Array, "S Fc"],
        *,
        layout: attention_layout.SequenceLayout,
        skip: int,
        users: dropout.TokenIdentity | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R L O"]:
        """The projected tokens.

        Args:
            x: tokens; finite everywhere.
            contextual: c of every user slot; finite everywhere.
            layout: where the users' tokens lie.
            skip: contextual tokens at the start of every segment, which get no result.
            users: identity of every user slot; read with a key only.
            dropout_key: key of this training step; None = evaluation.

        Returns:
            Finite values that mean nothing in skipped slots and padding.
        """
        c = contextual
        if dropout_key is not None:
            c = dropout.dropout(
                c, rate=self.contextual_dropout_ratio, key=dropout_key, identity=users
            )
        s = linear.Linear(self.hidden_dim, init="xavier", name="compress")(c)
        width = x.shape[-1]
        kernels = linear.Linear(width * self.output_dim, init="xavier", name="weights")(s)
        kernels = kernels.reshape(-1, width, self.output_dim)
        kernels = MatrixNorm(name="weights_norm")(kernels)
        hidden = linear.Linear(self.hidden_dim, init="xavier", name="bias_in")(s)
        hidden = SwishLayerNorm(name="bias_swish_norm")(hidden)
        biases = linear.Linear(self.output_dim, init="xavier", name="bias_out")(hidden)
        return user_maps.apply_user_maps(x, kernels, biases, layout=layout, skip=skip)
