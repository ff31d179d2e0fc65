"""Normalisations: layer norm, per-head norm and l2 of the last axis; batch norm over the rows.

All compute in float32 and return the input's dtype. Activations that contain a norm live with their
MLP (`contextual_mlp.py`); which norm a tower uses is decided in `match.py`.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

L2_EPS = 1e-6  # the same in the postprocessor and in cosine similarity
_BATCH_SHARE = 0.1  # share of the newest batch in batch norm's running statistics


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
        y = standardize(x, eps=self.eps) * scale.reshape(*ones, -1) + bias.reshape(*ones, -1)
        return y.astype(x.dtype)


class NormWeights(nn.Module):
    """Scale and bias of a layer norm that the caller computes.

    Inside `jax.checkpoint` a module may not look up its parameters; arrays may be used.
    """

    @nn.compact
    def __call__(self, width: int) -> tuple[Float[Array, "D"], Float[Array, "D"]]:
        """(scale, bias) of that width."""
        scale = self.param("scale", nn.initializers.ones, (width,))
        return scale, self.param("bias", nn.initializers.zeros, (width,))


class BatchNorm(nn.Module):
    """Each element standardised over the rows of a training batch, then a learned scale and bias.

    y = (x - mean) / sqrt(var + eps) * scale + bias. In training, mean and biased variance are those
    of the rows in use of the whole global batch, on however many devices it lies. In evaluation
    they are running ones, in the collection `batch_stats`: running <- 0.9 * running + 0.1 * batch
    after every training batch, with the unbiased variance, from 0 and 1.

    Attributes:
        use_affine: have scale and bias.
        axis_names: mesh axes over which a training batch is split; () = the batch is whole.
        eps: added to the variance.

    Source: Ioffe and Szegedy 2015, algorithm 1; momentum and eps are torch.nn.BatchNorm1d's.
    """

    use_affine: bool = True
    axis_names: tuple[str, ...] = ()
    eps: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch D"], row_mask: Bool[Array, "*batch"] | None = None
    ) -> Float[Array, "*batch D"]:
        """The normalised array.

        Args:
            x: rows; those not in use hold finite values.
            row_mask: rows in use of a training batch; None = evaluation. The running values are
                updated where the caller makes `batch_stats` mutable.
        """
        width, ones = x.shape[-1], (1,) * (x.ndim - 1)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,))
        mean, var = running_mean.value, running_var.value
        if row_mask is not None:
            mean, var, count = self._batch_statistics(x, row_mask)
            if self.is_mutable_collection("batch_stats"):
                unbiased = var * count / jnp.maximum(count - 1.0, 1.0)
                # A batch without rows leaves everything as it was.
                share = jnp.where(count > 0, _BATCH_SHARE, 0.0)
                running_mean.value += share * (lax.stop_gradient(mean) - running_mean.value)
                running_var.value += share * (lax.stop_gradient(unbiased) - running_var.value)
        centred = x.astype(jnp.float32) - mean.reshape(*ones, -1)
        y = centred * lax.rsqrt(var + self.eps).reshape(*ones, -1)
        if self.use_affine:
            scale = self.param("scale", nn.initializers.ones, (width,))
            bias = self.param("bias", nn.initializers.zeros, (width,))
            y = y * scale.reshape(*ones, -1) + bias.reshape(*ones, -1)
        return y.astype(x.dtype)

    def _batch_statistics(self, x, row_mask):
        """Mean, biased variance and number of the rows in use, over all devices."""
        x32, keep = x.astype(jnp.float32), row_mask[..., None]
        axes = tuple(range(x.ndim - 1))

        def total(values):
            summed = jnp.sum(values, axis=axes)
            return lax.psum(summed, self.axis_names) if self.axis_names else summed

        count = total(keep.astype(jnp.float32))[0]
        divisor = jnp.maximum(count, 1.0)
        mean = total(jnp.where(keep, x32, 0.0)) / divisor
        centred = jnp.where(keep, x32 - mean.reshape(*(1,) * len(axes), -1), 0.0)
        return mean, total(lax.square(centred)) / divisor, count
