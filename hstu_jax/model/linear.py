"""Linear layers with the reference's initialisers.

`nn.Dense` of Flax starts from other distributions; the ones here are torch's default and Xavier
uniform (docs/model.md).

Precision, here and in all of the model: the dtype of the looked-up embeddings is that of the
computation (`train.mixed_precision`). Parameters are float32; a matrix is cast where it meets its
input, while scales, biases and learned tables are added in float32 and the sum is rounded once, so
that their gradients, sums over thousands of tokens, are summed in float32 as well. Products ask for
`product_precision`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

xavier_uniform = nn.initializers.xavier_uniform()


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default for the weight and bias of a Linear."""
    return symmetric_uniform(fan_in**-0.5)


def symmetric_uniform(bound: float) -> nn.initializers.Initializer:
    """U(-bound, bound)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init


def product_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """The precision that a matrix product of the model asks for.

    float32 in full, as the reference has it: left to itself, JAX rounds the factors to TF32 on GPUs
    and to bfloat16 on TPUs. Where JAX's own setting says otherwise it stands:
    `JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32`, or `jax.default_matmul_precision`.

    Args:
        dtype: of both factors.
    """
    if dtype != jnp.float32:
        return jax.lax.Precision.DEFAULT
    is_set = jax.config.jax_default_matmul_precision is not None
    return None if is_set else jax.lax.Precision.HIGHEST


@jax.custom_vjp
def multiply(x: Float[Array, "*batch I"], kernel: Float[Array, "I O"]) -> Float[Array, "*batch O"]:
    """x @ kernel, with a backward pass that a CPU runs fast.

    JAX's own gradient of the kernel is a transposed product, for which XLA:CPU turns the gradients
    of all tokens around and leaves its fast products: 12.5 ms in place of 5.4 for 13,824 tokens of
    50 times 200. Reverse mode alone: `jax.jvp` raises.
    """
    return jnp.dot(x, kernel, precision=product_precision(x.dtype))


def _multiply_forward(x, kernel):
    return multiply(x, kernel), (x, kernel)


def _multiply_backward(residuals, cotangent):
    x, kernel = residuals
    tokens = tuple(range(x.ndim - 1))
    precision = product_precision(x.dtype)
    return (
        jnp.dot(cotangent, kernel.T, precision=precision),
        jax.lax.dot_general(x, cotangent, ((tokens, tokens), ((), ())), precision=precision),
    )


multiply.defvjp(_multiply_forward, _multiply_backward)


class Linear(nn.Module):
    """x @ kernel + bias over the last axis; kernel is [in, out].

    Attributes:
        features: width of the output.
        init: "fan_in" = torch's default for both; "xavier" = Xavier uniform kernel, zero bias.
        use_bias: have a bias.
    """

    features: int
    init: str = "fan_in"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """The projected array, in the dtype of x."""
        width = x.shape[-1]
        if self.init == "fan_in":
            kernel_init = bias_init = uniform_fan_in(width)
        else:
            kernel_init, bias_init = xavier_uniform, nn.initializers.zeros
        kernel = self.param("kernel", kernel_init, (width, self.features))
        projected = multiply(x, kernel.astype(x.dtype))
        if not self.use_bias:
            return projected
        bias = self.param("bias", bias_init, (self.features,))
        return (projected + bias.reshape(*(1,) * (x.ndim - 1), -1)).astype(x.dtype)
