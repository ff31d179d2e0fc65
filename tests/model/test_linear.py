"""The product with a kernel: gradients as JAX's own, by a program that a CPU runs fast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.model import linear
from hstu_jax.training import traced


def _gradients(multiply, x, kernel, cotangent):
    out, pull = jax.vjp(multiply, x, kernel)
    return out, *pull(cotangent)


def _params(kernel):
    return {"params": {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}}


@pytest.mark.parametrize("batch", [(5,), (3, 4), ()])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_plain_product(batch, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((*batch, 6), (6, 7), (*batch, 7))
    arrays = [jax.random.normal(*pair, dtype) for pair in zip(keys, shapes, strict=True)]
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    found = _gradients(linear.multiply, *arrays)
    for ours, plain in zip(found, _gradients(jnp.dot, *arrays), strict=True):
        assert ours.dtype == plain.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(ours, np.float64),
            np.asarray(plain, np.float64),
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize(
    ("multiply", "is_turned"),
    [
        (linear.multiply, False),
        (lambda x, kernel: linear.Linear(200).apply(_params(kernel), x), False),
        (jnp.dot, True),
    ],
    ids=["multiply", "Linear", "dot"],
)
def test_gradients_of_all_tokens_are_not_turned_around(multiply, is_turned):
    def kernel_gradient(x, kernel, cotangent):
        return jax.vjp(lambda kernel: multiply(x, kernel), kernel)[1](cotangent)[0]

    x, kernel, cotangent = jnp.ones((3, 256, 50)), jnp.ones((50, 200)), jnp.ones((3, 256, 200))
    compiled = jax.jit(kernel_gradient).lower(x, kernel, cotangent).compile().as_text()
    assert ("f32[200,768]" in compiled) == is_turned


@pytest.mark.parametrize(
    ("setting", "kind"),
    [(None, "float32 exact"), ("highest", "float32 exact"), ("tensorfloat32", "float32")],
)
def test_float32_is_multiplied_in_full_unless_jax_is_told_otherwise(setting, kind):
    def gradients(x, kernel):
        return jax.grad(lambda *pair: linear.multiply(*pair).sum(), argnums=(0, 1))(x, kernel)

    with jax.default_matmul_precision(setting):
        jaxpr = jax.make_jaxpr(gradients)(jnp.ones((3, 5)), jnp.ones((5, 7)))
    assert traced.read(jaxpr, {}).products == {kind: 3 * 2 * 3 * 5 * 7}
