"""Tokens by hand: action blocks, projections, contextual slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.model import action_encoder, preprocessor, tower_mlp
from tests.model import batches, models


def test_action_blocks_by_hand():
    module = action_encoder.SimpleActionEncoder(
        action_embedding_dim=1,
        action_weights=(1, 6),
        watchtime_to_action_thresholds=(10.0,),
        watchtime_to_action_weights=(8,),
    )
    table = {"params": {"embedding": jnp.array([[1.0], [2.0], [3.0]])}}
    action = jnp.array([[0, 1, 2, 4, 7, 8]])
    watch_time_s = jnp.array([[9.9, 10.0, jnp.nan, 0.0, 11.0, 0.0]])
    expected = [[0, 0, 0], [1, 0, 3], [0, 2, 0], [0, 2, 0], [1, 2, 3], [0, 0, 3]]
    np.testing.assert_array_equal(module.apply(table, action, watch_time_s)[0], expected)


def test_contextual_tokens_stand_in_front_of_every_used_segment():
    placement = batches.place([3, 0, 2, 4], row_len=6, packed=True, num_users=5)
    module = preprocessor.UihPreprocessor(
        output_dim=2, contextual_len=2, actions=None, action_mlp=None
    )
    rng = np.random.default_rng(0)
    grid = (placement.num_rows, placement.row_len)
    history = rng.standard_normal((*grid, 3), dtype=np.float32)
    contextual = rng.standard_normal((5, 2, 4), dtype=np.float32)
    position = np.concatenate([np.arange(n) for n in placement.lengths])
    keywords = dict(
        action=jnp.zeros(grid, jnp.int32),
        watch_time_s=jnp.zeros(grid),
        layout=placement.layout(),
        history_mask=jnp.asarray(placement.to_grid(position >= 2)),
    )
    arrays = jnp.asarray(history), jnp.asarray(contextual)
    init = functools.partial(module.init, **keywords)
    params = models.random_tree(jax.eval_shape(init, jax.random.key(0), *arrays)["params"])

    @jax.jit
    def tokens(history, contextual):
        return module.apply({"params": params}, history, contextual, **keywords)

    out, vjp = jax.vjp(tokens, *arrays)
    params = jax.tree.map(np.asarray, params)
    expected = history @ params["input_projection"]["kernel"] + params["input_projection"]["bias"]
    expected = expected.reshape(-1, 2)
    for user in np.flatnonzero(placement.lengths):
        for c in range(2):
            token = contextual[user, c] @ params["contextual_kernel"][c]
            expected[placement.starts[user] + c] = token + params["contextual_bias"][c]
    used = placement.slots
    np.testing.assert_allclose(np.asarray(out).reshape(-1, 2)[used], expected[used], atol=1e-6)
    grad_history, grad_contextual = vjp(jnp.ones_like(out))
    np.testing.assert_array_equal(grad_contextual[jnp.array([1, 4])], 0)
    assert np.all(np.abs(grad_contextual[jnp.array([0, 2, 3])]) > 0)
    is_history = np.asarray(keywords["history_mask"])
    np.testing.assert_array_equal(np.abs(grad_history).sum(-1) > 0, is_history)


def test_mlp_activation_follows_the_last_layer_too():
    x = jnp.array([[-1.0, 2.0]])
    params = {"layers_0": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
    for activation, expected in [
        ("", [-1.0, 2.0]),
        ("nn.ReLU", [0.0, 2.0]),
        ("nn.GELU", [-0.15865525, 1.9544997]),
    ]:
        out = tower_mlp.Mlp((2,), activation).apply({"params": params}, x)
        np.testing.assert_allclose(out[0], expected, rtol=1e-6)
