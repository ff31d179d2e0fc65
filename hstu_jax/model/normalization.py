"""Normalisations of the last axis: layer norm, per-head norm and l2.

All compute in float32 and return the input's dtype. Activations that contain a norm live with their
MLP (`contextual_mlp.py`); which norm a tower uses is decided in `match.py`.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

L2_EPS = 1e-6  # FACTS 4.7 and 5: the same in the postprocessor and in cosine similarity


def standardize(x: Float[Array, "*batch D"], *, eps: float) -> Float[Array, "*batch D"]:
    """Zero mean and unit variance over the last axis.

    (x - mean) / sqrt(var + eps), with the biased variance of the centred values (the shortcut
    E[x^2] - E[x]^2 loses digits when the mean is large).
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(lax.square(centred), axis=-1, keepdims=True)
    return (centred * lax.rsqrt(variance + eps)).astype(x.dtype)


def l2_normalize(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """x / max(|x|, 1e-6) over the last axis; a zero vector stays zero, with a finite gradient."""
    squared = jnp.sum(lax.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    # The maximum comes before the root: the root's slope at 0 is infinite.
    return (x / jnp.sqrt(jnp.maximum(squared, L2_EPS**2))).astype(x.dtype)


class LayerNorm(nn.Module):
    """Standardised last axis, then a learned scale and bias per element.

    Attributes:
        eps: added to the variance.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The normalised array."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        ones = (1,) * (x.ndim - 1)
        return standardize(x, eps=self.eps) * scale.reshape(*ones, -1) + bias.reshape(*ones, -1)


class NormWeights(nn.Module):
    """Scale and bias of a layer norm that the caller computes.

    Inside `jax.checkpoint` a module may not look up its parameters; arrays may be used.
    """

    @nn.compact
    def __call__(self, width: int) -> tuple[Float[Array, "D"], Float[Array, "D"]]:
        """(scale, bias) of that width."""
        scale = self.param("scale", nn.initializers.ones, (width,))
        return scale, self.param("bias", nn.initializers.zeros, (width,))
