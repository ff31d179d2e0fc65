"""A linear map per user: against a float64 loop over tokens, packed rows, dropout, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.model import contextual_mlp, dropout, user_maps
from tests.model import batches, models


@pytest.mark.parametrize(("block_tokens", "skip"), [(2, 0), (3, 2), (64, 2)])
def test_every_token_meets_the_matrix_of_its_user(block_tokens, skip, monkeypatch):
    monkeypatch.setattr(user_maps, "_BLOCK_TOKENS", block_tokens)
    lengths = [skip + n for n in (5, 0, 1, 7, 2)] + ([0] if skip else [])
    placement = batches.place(lengths, row_len=10, packed=True, num_users=len(lengths) + 2)
    num_users = len(placement.starts)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((placement.num_rows, 10, 3)).astype(np.float32)
    kernels = rng.standard_normal((num_users, 3, 4)).astype(np.float32)
    biases = rng.standard_normal((num_users, 4)).astype(np.float32)

    def fn(x, kernels, biases):
        return user_maps.apply_user_maps(
            x, kernels, biases, layout=placement.layout(), skip=skip
        ).reshape(-1, 4)

    expected, slots = {}, []
    for user in range(num_users):
        for position in range(skip, placement.lengths[user]):
            slot = placement.starts[user] + position
            slots.append(slot)
            token = x.reshape(-1, 3)[slot].astype(np.float64)
            expected[slot] = token @ kernels[user] + biases[user]
    slots = np.array(slots)
    out, vjp = jax.vjp(jax.jit(fn), x, kernels, biases)
    np.testing.assert_allclose(out[slots], [expected[s] for s in slots], rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(out))
    # Gradients of a random cotangent; what has no result takes part in nothing.
    cotangent = np.zeros(out.shape, np.float32)
    cotangent[slots] = rng.standard_normal((len(slots), 4))
    grad_x, grad_kernels, grad_biases = vjp(jnp.asarray(cotangent))
    want_x = np.zeros((x.shape[0] * 10, 3))
    want_kernels, want_biases = np.zeros(kernels.shape), np.zeros(biases.shape)
    for user in range(num_users):
        for position in range(skip, placement.lengths[user]):
            slot = placement.starts[user] + position
            want_x[slot] = kernels[user].astype(np.float64) @ cotangent[slot]
            want_kernels[user] += np.outer(x.reshape(-1, 3)[slot], cotangent[slot])
            want_biases[user] += cotangent[slot]
    np.testing.assert_allclose(grad_x.reshape(-1, 3), want_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad_kernels, want_kernels, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad_biases, want_biases, rtol=1e-4, atol=1e-5)


def test_memory_grows_with_tokens_and_users_not_with_their_product():
    """A matrix per token would be 4096 * 64 * 128 floats = 134 MB here."""
    placement = batches.place([64] * 64, row_len=1024, packed=True, block_len=64)
    layout = placement.layout()

    def loss(x, kernels, biases):
        return jnp.sum(user_maps.apply_user_maps(x, kernels, biases, layout=layout, skip=0) ** 2)

    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 1024, 64), (64, 64, 128), (64, 128))
    ]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 40e6


def parameterized(**fields):
    fields = {"hidden_dim": 4, "output_dim": 3, "contextual_dropout_ratio": 0.5, **fields}
    return contextual_mlp.ParameterizedMlp(**fields)


def test_dropout_of_contextual_features_follows_the_user():
    placement = batches.place([4, 3, 5], row_len=6, packed=True)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((placement.num_rows, 6, 5)), jnp.float32)
    contextual = jnp.asarray(rng.standard_normal((3, 16)), jnp.float32)
    keywords = dict(layout=placement.layout(), skip=0)
    module = parameterized()
    init = functools.partial(module.init, **keywords)
    params = models.random_tree(jax.eval_shape(init, jax.random.key(0), x, contextual)["params"])

    @functools.partial(jax.jit, static_argnums=0)
    def run(module, user_index, key):
        users = dropout.TokenIdentity(user_index=user_index, position=jnp.zeros(3, jnp.int32))
        out = module.apply(
            {"params": params}, x, contextual, **keywords, users=users, dropout_key=key
        )
        return out.reshape(-1, 3)[placement.slots]

    still = run(module, jnp.array([0, 1, 2]), None)
    np.testing.assert_array_equal(
        run(parameterized(contextual_dropout_ratio=0.0), jnp.array([0, 1, 2]), jax.random.key(1)),
        still,
    )
    first = run(module, jnp.array([0, 1, 2]), jax.random.key(1))
    assert np.all(np.abs(first - still).max(axis=-1) > 1e-3)
    assert np.abs(run(module, jnp.array([0, 1, 2]), jax.random.key(2)) - first).max() > 1e-3
    # Another number for user 1 changes the tokens of user 1 alone.
    second = run(module, jnp.array([0, 7, 2]), jax.random.key(1))
    is_changed = np.any(second != first, axis=-1)
    np.testing.assert_array_equal(is_changed, np.repeat([False, True, False], [4, 3, 5]))
