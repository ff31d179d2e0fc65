"""The whole model: shapes, parameters, layouts that do not matter, padding that nothing reads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.config import model_schema
from hstu_jax.model import match
from tests.model import models

LENGTHS = [9, 2, 3, 16, 5]  # with 2 contextual tokens: one user without history, one full row


def make_runner(model, params, *, seed=0):
    """(inputs, key) -> vectors, (parameter gradients, lookup gradients) for random cotangents.

    Inputs of equal shapes share one compilation.
    """

    @jax.jit
    def forward_backward(lookups, batch, key, cotangent):
        def forward(params, lookups):
            return model.apply({"params": params}, lookups, batch, key)

        out, vjp = jax.vjp(forward, params, lookups)
        return out, vjp(cotangent)

    def run(inputs, key):
        lookups, batch = inputs
        rng = np.random.default_rng(seed)
        shapes = ((len(LENGTHS), 16), (lookups.positive.shape[1], 16), (7, 16))
        user, positive, negative = (rng.standard_normal(s, dtype=np.float32) for s in shapes)
        unused = np.zeros((batch.user_mask.shape[1] - len(LENGTHS), 16), np.float32)
        cotangent = match.Towers(
            user=np.concatenate([user, unused])[None],
            positive=positive[None],
            negative=negative[None],
            hard_negative=np.zeros((1, batch.user_mask.shape[1], 0, 16), np.float32),
        )
        return forward_backward(lookups, batch, key, cotangent)

    return run


def assert_close(actual, desired, *, tolerance=1e-6):
    """Leaf by leaf, relative to the norm of the leaf."""
    paths = jax.tree_util.tree_leaves_with_path(desired)
    for (path, want), got in zip(paths, jax.tree.leaves(actual), strict=True):
        error = np.linalg.norm(np.asarray(got, np.float64) - np.asarray(want))
        norm = np.linalg.norm(np.asarray(want, np.float64))
        assert error <= tolerance * norm, f"{jax.tree_util.keystr(path)}: {error} of {norm}"


# Rows, slots and users of the layouts below, so that they share a compilation.
GRID = dict(row_len=21, num_rows=len(LENGTHS), num_users=7)


PAPER = dict(use_silu_qkv=True, use_position_bias=True, use_time_bias=True)


@pytest.mark.parametrize("variant", ["last_position", "all_positions", "mean", "paper", "sasrec"])
def test_neither_packing_nor_poison_in_padding_matters_with_dropout_on(variant):
    config = hstu = models.model_config(
        hstu={"last_layer": variant} if variant.endswith("positions") else {},
        stu=PAPER if variant == "paper" else {},
    )
    if variant in ("mean", "sasrec"):
        config = models.model_config(encoder=variant)
    model, rule = models.build(config), models.rule_of(models.build(hstu))
    params, content = models.random_params(model), models.random_content(LENGTHS)
    run, key = make_runner(model, params), jax.random.key(7)
    padded = models.lay_out(content, rule=rule, packed=False, **GRID)
    packed = models.lay_out(content, rule=rule, packed=True, **GRID)
    assert np.any(padded[1].segment_starts != packed[1].segment_starts)
    out_padded, (grads_padded, lookups_padded) = run(padded, key)
    out_packed, (grads_packed, lookups_packed) = run(packed, key)
    assert_close(out_packed, out_padded)
    np.testing.assert_array_equal(out_packed.user[0, len(LENGTHS) :], 0)
    assert_close(grads_packed, grads_padded)
    assert_close(lookups_packed.contextual, lookups_padded.contextual)
    assert_close(lookups_packed.negative, lookups_padded.negative)
    # Not one bit may depend on what padding holds.
    poisoned = models.lay_out(content, rule=rule, packed=True, fill=np.nan, **GRID)
    clean = out_packed, (grads_packed, lookups_packed)
    jax.tree.map(np.testing.assert_array_equal, run(poisoned, key), clean)
    # And dropout does something.
    other, _ = run(padded, jax.random.key(8))
    assert np.abs(other.user - out_padded.user).max() > 0.01


def test_groups_of_a_shard_do_not_touch_each_other():
    model = models.build(models.model_config())
    params, rule = models.random_params(model), models.rule_of(model)
    inputs = [
        models.lay_out(
            models.random_content(lengths, seed=seed),
            rule=rule,
            row_len=16,
            packed=True,
            num_users=5,
        )
        for seed, lengths in enumerate([[9, 2, 16, 5], [3, 4, 7, 16, 2]])
    ]
    both = jax.tree.map(lambda *leaves: np.concatenate(leaves), *inputs)
    call = jax.jit(model.apply)
    together = call({"params": params}, *both)
    for group, (lookups, batch) in enumerate(inputs):
        alone = call({"params": params}, lookups, batch)
        taken = jax.tree.map(lambda x, g=group: x[g : g + 1], together)
        assert_close(taken, alone)


def test_masked_queries_take_no_gradient_from_poison():
    model = models.build(models.model_config())
    params, content = models.random_params(model), models.random_content(LENGTHS)
    lookups, batch = models.lay_out(content, rule=models.rule_of(model), row_len=16, packed=False)
    lookups.positive[0, 3:] = np.nan
    batch = dataclasses.replace(batch, query_mask=batch.query_mask & (np.arange(5) < 3)[None])

    def loss(params):
        vectors = model.apply({"params": params}, lookups, batch)
        return jnp.sum(jnp.where(batch.query_mask[..., None], vectors.positive, 0.0) ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_users_without_tokens_get_zeros_and_no_gradient():
    config = models.model_config(
        hstu={"output_postprocessor": "layernorm", "input_preprocessor": no_actions()}
    )
    model = models.build(config, contextual_len=0)
    params = models.random_params(model)
    content = models.random_content([0, 3, 0], contextual_len=0)
    lookups, batch = models.lay_out(content, rule=models.rule_of(model), row_len=5, packed=True)

    def empty_users(params):
        vectors = model.apply(
            {"params": params}, lookups.history, lookups.contextual, batch, method="user"
        )
        return vectors[0, ::2]

    out, vjp = jax.vjp(jax.jit(empty_users), params)
    np.testing.assert_array_equal(out, 0)
    for leaf in jax.tree.leaves(vjp(jnp.ones_like(out))):
        np.testing.assert_array_equal(leaf, 0)


def no_actions():
    return model_schema.InputPreprocessorConfig(
        uih_preprocessor=model_schema.UihPreprocessorConfig(action_encoder=None, action_mlp=None)
    )


def test_user_and_item_alone_equal_the_joint_call():
    config = models.model_config(similarity="COSINE", output_dim=9)
    model = models.build(config)
    params, content = models.random_params(model), models.random_content(LENGTHS)
    lookups, batch = models.lay_out(content, rule=models.rule_of(model), row_len=16, packed=False)
    variables = {"params": params}
    joint = jax.jit(model.apply)(variables, lookups, batch)
    user = jax.jit(functools.partial(model.apply, method="user"))(
        variables, lookups.history, lookups.contextual, batch
    )
    item = model.apply(variables, lookups.positive[0], method="item")
    np.testing.assert_allclose(joint.user, user, rtol=1e-5)
    np.testing.assert_allclose(joint.positive[0], item, rtol=1e-6)
    assert joint.user.shape == (1, 5, 9) and joint.negative.shape == (1, 7, 9)
    for vectors in (joint.user, joint.positive, joint.negative):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-5)


def test_parameter_shapes_and_count():
    params = match.init_params(models.build(models.model_config()), jax.random.key(0))
    encoder = params["user_tower"]["encoder"]
    counts = jax.tree.map(np.size, params)
    assert sum(jax.tree.leaves(counts["item_tower"])) == 6 * 16 + 16
    preprocess = 6 * 16 + 16 + 2 * (5 + 1) * 16  # history Linear, two contextual Linears
    preprocess += 8 * 8 + (64 * 64 + 64 + 2 * 64) + (64 * 16 + 16 + 2 * 16)  # actions and MLP
    assert sum(jax.tree.leaves(counts["user_tower"]["encoder"]["preprocess"])) == preprocess
    assert encoder["positions"]["position_embedding"].shape == (12, 16)
    assert encoder["positions"]["time_embedding"].shape == (21, 16)
    assert set(encoder["stack"]) == {"layers_0", "layers_1"}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    # Ranges of the reference's initialisers (docs/model.md).
    assert np.abs(encoder["preprocess"]["input_projection"]["bias"]).max() <= 6**-0.5
    assert np.abs(encoder["positions"]["time_embedding"]).max() <= 20**-0.5
    assert 0.05 < np.std(encoder["preprocess"]["actions"]["embedding"]) < 0.15


def test_mean_encoder_averages_the_encoded_tokens():
    model = models.build(models.model_config(encoder="mean"))
    hstu_model = models.build(models.model_config())
    params, content = models.random_params(model), models.random_content(LENGTHS)
    lookups, batch = models.lay_out(
        content, rule=models.rule_of(hstu_model), row_len=16, packed=False
    )
    variables = {"params": params["user_tower"]["encoder"]}
    lookups, batch = jax.tree.map(jnp.asarray, (lookups, batch))
    mean_encoder = model.user_tower.encoder.clone(parent=None)

    @jax.jit
    def embed(lookups, batch):
        inputs = (lookups.history, lookups.contextual, batch)
        return mean_encoder.apply(variables, *inputs, dropout_key=None, method="embed")[0]

    tokens = embed(lookups, batch)
    out = jax.jit(model.apply)({"params": params}, lookups, batch).user[0]
    for row, length in enumerate(LENGTHS):
        mean = np.asarray(tokens[row, :length], np.float64).mean(axis=0)
        np.testing.assert_allclose(out[row], mean / np.linalg.norm(mean), atol=1e-6)


def test_divisor_and_alpha_come_from_the_configuration():
    stu = dict(scaling_seqlen=-1, attn_alpha=0.0)
    layer = models.build(models.model_config(stu=stu)).user_tower.encoder.stack.layers[0]
    assert (layer.divisor, layer.alpha) == (16.0, 6**-0.5)
    stu = dict(scaling_seqlen=50, attn_alpha=0.25, max_attn_len=3)
    layer = models.build(models.model_config(stu=stu)).user_tower.encoder.stack.layers[0]
    assert (layer.divisor, layer.alpha, layer.rule.max_attn_len) == (50.0, 0.25, 3)
    assert layer.rule.contextual_len == 2


def test_towers_of_unequal_width_are_refused():
    config = models.model_config(embedding_dim=16, item_tower=model_schema.ItemTowerConfig())
    with pytest.raises(ValueError, match="embedding_dim=16: the item tower's vectors are 6 wide"):
        models.build(config)


def test_contextual_features_of_unequal_width_are_refused():
    declared, groups = models.features(contextual_dims=[4, 5])
    message = r"feature_groups.contextual=.*must be the same for all, got \(4, 5\); choose one"
    with pytest.raises(ValueError, match=message):
        match.build_model(models.model_config(), declared, groups)
