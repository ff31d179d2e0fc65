"""Both towers of HSTU Match: user history -> vector, item embedding -> vector.

A tower ends with an optional Linear to the common width and, for cosine similarity, l2
normalisation. How the vectors are compared is the loss's business; `match.py` joins the towers.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from hstu_jax.features import batch as features_batch
from hstu_jax.model import encoder, linear, normalization

_ACTIVATIONS = {
    "": lambda x: x,
    "nn.ReLU": jax.nn.relu,
    "nn.GELU": lambda x: jax.nn.gelu(x, approximate=False),
}


class Mlp(nn.Module):
    """Linear layers, each followed by the activation, the last one too.

    Attributes:
        hidden_units: width of each layer.
        activation: the reference's name of it; "" = none.

    Source: TorchEasyRec 1.3.16, tzrec/modules/mlp.py; FACTS 4.4.
    """

    hidden_units: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """The output of the last layer."""
        for index, width in enumerate(self.hidden_units):
            x = linear.Linear(width, name=f"layers_{index}")(x)
            x = _ACTIVATIONS[self.activation](x)
        return x


class UserTower(nn.Module):
    """Encoder, optional Linear, optional l2 normalisation.

    Attributes:
        encoder: makes one vector per user.
        output_dim: width of an extra Linear; 0 = none.
        normalize: l2-normalise the output (cosine similarity).
    """

    encoder: encoder.HstuEncoder | encoder.MeanEncoder
    output_dim: int
    normalize: bool

    def setup(self):
        if self.output_dim:
            self.output = linear.Linear(self.output_dim)

    def __call__(
        self,
        history: Float[Array, "G R L F"],
        contextual: Float[Array, "G U C Cf"],
        batch: features_batch.Batch,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "G U E"]:
        """One vector per user slot; zeros in unused slots."""
        x = self.encoder(history, contextual, batch, dropout_key=dropout_key)
        if self.output_dim:
            x = self.output(x)
        if self.normalize:
            x = normalization.l2_normalize(x)
        x = x.reshape(*batch.user_mask.shape, -1)
        return jnp.where(batch.user_mask[..., None], x, 0.0)


class ItemTower(nn.Module):
    """Optional MLP, optional Linear, optional l2 normalisation of an item's embedding.

    Attributes:
        mlp: or None for the embedding itself.
        output_dim: width of an extra Linear; 0 = none.
        normalize: l2-normalise the output (cosine similarity).
    """

    mlp: Mlp | None
    output_dim: int
    normalize: bool

    def setup(self):
        if self.output_dim:
            self.output = linear.Linear(self.output_dim)

    def __call__(self, embedding: Float[Array, "*batch Fc"]) -> Float[Array, "*batch E"]:
        """One vector per item."""
        x = embedding if self.mlp is None else self.mlp(embedding)
        if self.output_dim:
            x = self.output(x)
        return normalization.l2_normalize(x) if self.normalize else x
