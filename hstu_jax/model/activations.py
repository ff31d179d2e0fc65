"""Activation functions by the reference's names.

Which names and arguments exist is decided in `hstu_jax/config/tower_schema.py`; here is what each
computes. Activations with parameters or statistics of their own are modules (`Dice`). Used by
`tower_mlp.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from hstu_jax.config import tower_schema
from hstu_jax.model import normalization

DICE = "Dice"


def _softplus(x, *, beta, threshold):
    # Above the threshold torch returns x itself; the inner `where` keeps the gradient finite.
    scaled = x * beta
    is_linear = scaled > threshold
    return jnp.where(is_linear, x, jax.nn.softplus(jnp.where(is_linear, 0.0, scaled)) / beta)


_FUNCTIONS: dict[str, Callable[..., jax.Array]] = {
    "": lambda x: x,
    "nn.ReLU": jax.nn.relu,
    "nn.ReLU6": jax.nn.relu6,
    "nn.LeakyReLU": jax.nn.leaky_relu,
    "nn.ELU": jax.nn.elu,
    "nn.SELU": jax.nn.selu,
    "nn.GELU": lambda x, approximate: jax.nn.gelu(x, approximate=approximate == "tanh"),
    "nn.SiLU": jax.nn.silu,
    "nn.Mish": jax.nn.mish,
    "nn.Softplus": _softplus,
    "nn.Sigmoid": jax.nn.sigmoid,
    "nn.Tanh": jnp.tanh,
}


def activate(x: Float[Array, "*batch D"], activation: str) -> Float[Array, "*batch D"]:
    """The activation, element by element.

    Args:
        x: any array.
        activation: as `tower_schema.parse_activation` reads it; any but "Dice".

    >>> activate(jnp.array([[-1.0, 2.0]]), "nn.LeakyReLU(negative_slope=0.5)").tolist()
    [[-0.5, 2.0]]
    """
    name, arguments = tower_schema.parse_activation(activation)
    return _FUNCTIONS[name](x, **arguments)


class Dice(nn.Module):
    """x * p + alpha * x * (1 - p) with p = sigmoid(BatchNorm(x)), a norm without scale and bias.

    alpha is learned per element and starts at 0.

    Attributes:
        axis_names: mesh axes over which a training batch is split.

    Source: Zhou et al. 2018, Deep Interest Network, section 5.3; the norm's eps is that of the
    towers' other norms, 1e-5.
    """

    axis_names: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch D"], row_mask: Bool[Array, "*batch"] | None = None
    ) -> Float[Array, "*batch D"]:
        """The activated array; `row_mask` as for `normalization.BatchNorm`."""
        norm = normalization.BatchNorm(use_affine=False, axis_names=self.axis_names, name="norm")
        share = jax.nn.sigmoid(norm(x, row_mask))
        alpha = self.param("alpha", nn.initializers.zeros, (x.shape[-1],))
        alpha = alpha.reshape(*(1,) * (x.ndim - 1), -1)
        return (x * share + alpha * x * (1.0 - share)).astype(x.dtype)
