"""Both towers: options that reach the model, statistics of a whole batch, identities of items."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.config import model_schema, tower_schema
from hstu_jax.features import time_phases
from hstu_jax.model import match, towers
from tests.model import batches, models


def item_mlp(**fields):
    """A model configuration with this item MLP."""
    fields = {"hidden_units": (16,), "activation": "", **fields}
    mlp = tower_schema.MlpConfig(**fields)
    return models.model_config(encoder="mean", item_tower=model_schema.ItemTowerConfig(mlp=mlp))


def variables_of(model):
    """Random parameters, and the statistics before the first step."""
    shapes = jax.eval_shape(lambda: match.init_variables(model, jax.random.key(0)))
    stats = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, float("var" in jax.tree_util.keystr(path))),
        shapes["batch_stats"],
    )
    return {"params": models.random_tree(shapes["params"]), "batch_stats": stats}


LENGTHS = [9, 2, 3, 12, 5]


def laid_out(seed=0):
    """Packed inputs; nothing here has attention, so any schedule will do."""
    content = models.random_content(LENGTHS, seed=seed)
    return models.lay_out(content, rule=batches.ANY_RULE, row_len=16, packed=True)


def test_statistics_are_those_of_all_items_in_use():
    model = models.build(item_mlp(use_bn=True))
    variables = variables_of(model)
    lookups, batch = laid_out()
    mask = np.array([[True, True, True, False, False]])
    batch = dataclasses.replace(batch, query_mask=mask)
    lookups = dataclasses.replace(
        lookups, positive=np.where(mask[..., None], lookups.positive, np.nan)
    )

    @jax.jit
    def train(variables, lookups, batch):
        return model.apply(variables, lookups, batch, jax.random.key(1), mutable=["batch_stats"])

    vectors, changed = train(variables, lookups, batch)
    used = np.concatenate([lookups.positive[0, :3], lookups.negative[0]]).astype(np.float64)
    layers = jax.tree.map(np.float64, variables["params"]["item_tower"]["mlp"])
    hidden = used @ layers["layers_0"]["kernel"]
    found = changed["batch_stats"]["item_tower"]["mlp"]["norms_0"]
    np.testing.assert_allclose(found["mean"], 0.1 * hidden.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * hidden.var(0, ddof=1), rtol=1e-4)
    normed = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    expected = normed * layers["norms_0"]["scale"] + layers["norms_0"]["bias"]
    np.testing.assert_allclose(vectors.positive[0, :3], expected[:3], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(vectors.negative[0], expected[3:], rtol=1e-3, atol=1e-4)
    # Alone, as in evaluation, an item is normalised by the running values.
    alone = model.apply(variables, lookups.negative, method="item")
    assert np.abs(alone - vectors.negative).max() > 0.1


def test_items_do_not_depend_on_the_number_of_devices():
    """Vectors, statistics and gradients of two groups on one device and on two."""
    config = item_mlp(hidden_units=(8, 16), activation="Dice", use_bn=True, dropout_ratio=(0.3,))
    groups = [laid_out(seed) for seed in range(2)]
    lookups, batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *groups)
    user_index = batch.user_index + np.array([[0], [5]], np.int32)
    mask = np.array([[True] * 5, [True, True, False, False, False]])
    batch = dataclasses.replace(batch, user_index=user_index, query_mask=mask)
    variables = variables_of(models.build(config))
    cotangent = np.random.default_rng(5).standard_normal((2, 12, 16)).astype(np.float32)
    cotangent[:, :5] *= mask[..., None]

    def run(axis_names):
        model = match.build_model(config, *models.features(), axis_names=axis_names)

        def items(module, positive, negative, train):
            return module.item_tower.parts([positive, negative], train)

        def step(variables, lookups, batch, cotangent):
            train = towers.item_train_rows(batch, jax.random.key(2))[:2]

            def loss(params):
                vectors, changed = model.apply(
                    {**variables, "params": params},
                    lookups.positive,
                    lookups.negative,
                    train,
                    method=items,
                    mutable=["batch_stats"],
                )
                vectors = jnp.concatenate(vectors, axis=1)
                return jnp.sum(vectors * cotangent), (vectors, changed)

            grads, (vectors, changed) = jax.grad(loss, has_aux=True)(variables["params"])
            return jax.lax.psum(grads, axis_names) if axis_names else grads, changed, vectors

        if not axis_names:
            return jax.jit(step)
        mesh = jax.make_mesh((2,), axis_names, axis_types=(jax.sharding.AxisType.Auto,))
        whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(*axis_names)
        specs = dict(in_specs=(whole, split, split, split), out_specs=(whole, whole, split))
        return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))

    arguments = variables, lookups, batch, cotangent
    on_one, on_two = run(())(*arguments), run(("chip",))(*arguments)
    np.testing.assert_allclose(on_two[2][:, 5:], on_one[2][:, 5:], rtol=1e-4, atol=1e-5)
    for got, want in zip(*map(jax.tree.leaves, (on_two[:2], on_one[:2])), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_items_keep_their_identity_in_any_packing():
    _, batch = laid_out()
    batch = dataclasses.replace(
        batch,
        positive_user=np.array([[0, 0, 1, 3, 3]], np.int32),
        user_index=np.array([[10, 11, 12, 13, 14]], np.int32),
        hard_negative_mask=np.array([[[True, True]] + [[True, False]] * 4]),
        hard_negative_log_q=np.zeros((1, 5, 2), np.float32),
    )
    order = np.array([3, 1, 0, 2, 4])  # old slot of each new user slot
    moved = dataclasses.replace(
        batch,
        user_index=batch.user_index[:, order],
        positive_user=np.array([[0, 0, 1, 2, 2]], np.int32),
    )

    def identities(batch):
        return [
            np.stack([rows.identity.user_index[0], rows.identity.position[0]], axis=1).tolist()
            for rows in towers.item_train_rows(batch, jax.random.key(0))
        ]

    positives, negatives, hard = identities(batch)
    assert positives == [[10, 0], [10, 1], [11, 0], [13, 0], [13, 1]]
    assert negatives == [[-11, slot] for slot in range(7)]
    # Behind the five positives that a group may have: no user's hard negative shares their bits.
    assert hard == [[10 + user, 5 + slot] for user in range(5) for slot in range(2)]
    moved_positives, moved_negatives, moved_hard = identities(moved)
    assert sorted(moved_positives) == sorted(positives) and moved_negatives == negatives
    assert sorted(moved_hard) == sorted(hard)


def test_negatives_of_an_unused_group_are_not_in_use():
    _, batch = laid_out()
    unused = dataclasses.replace(batch, query_mask=np.zeros((1, 5), bool))
    for each, expected in ((batch, True), (unused, False)):
        _, negatives, _ = towers.item_train_rows(each, jax.random.key(0))
        assert np.all(negatives.mask == expected) and negatives.mask.shape == (1, 7)


@pytest.mark.parametrize("option", [dict(dropout_ratio=(0.4,)), dict(use_bn=True)])
def test_items_of_training_and_evaluation_differ(option):
    model = models.build(item_mlp(**option))
    lookups, batch = laid_out()
    variables = variables_of(model)

    @jax.jit
    def both(key):
        train = towers.item_train_rows(batch, key)[:2]
        items = [jnp.asarray(lookups.positive), jnp.asarray(lookups.negative)]

        def call(module, train):
            return module.item_tower.parts(items, train)

        return (
            model.apply(variables, train, method=call),
            model.apply(variables, None, method=call),
        )

    trained, evaluated = both(jax.random.key(0))
    for left, right in zip(trained, evaluated, strict=True):
        assert left.shape == right.shape and np.abs(left - right).max() > 0.01


def test_an_item_tower_without_mlp_is_the_embedding():
    config = models.model_config(
        embedding_dim=models.CANDIDATE_DIM, item_tower=model_schema.ItemTowerConfig()
    )
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    np.testing.assert_array_equal(models.build(config).apply({}, x, method="item"), x)
    cosine = models.build(dataclasses.replace(config, similarity="COSINE"))
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(cosine.apply({}, x, method="item"), x / norms, rtol=1e-6)


def user_vectors(config, **replace):
    """User vectors at parameters of one seed."""
    model = models.build(config)
    lookups, batch = laid_out()
    batch = dataclasses.replace(batch, **replace)
    variables = {"params": models.random_params(model)}
    return jax.jit(lambda v, h, c, b: model.apply(v, h, c, b, method="user"))(
        variables, lookups.history, lookups.contextual, batch
    )


def timed(pairs):
    units, counts = zip(*pairs, strict=True)
    periods = tower_schema.TimestampLayerNormConfig(
        time_duration_period_units=units, time_duration_units_per_period=counts
    )
    return models.model_config(
        encoder="mean",
        hstu={"output_postprocessor": "timestamp_layernorm", "timestamp_layernorm": periods},
    )


def test_the_time_of_the_last_token_reaches_the_user_vector():
    pairs = ((3600, 24), (86400, 7))
    times = np.array([0, 3600, 86400, 90000, 90000 + 5])
    phases = time_phases.time_phases(times, pairs)[None]
    # The same two periods of time for everyone, or everyone's own.
    there = user_vectors(timed(pairs), last_phase=phases)
    zero = user_vectors(timed(pairs), last_phase=np.zeros_like(phases))
    is_changed = np.abs(there - zero).max(axis=-1)[0] > 1e-3
    np.testing.assert_array_equal(is_changed, times > 0)


def simple(thresholds=(10.0,), weights=(256,)):
    uih = model_schema.UihPreprocessorConfig(
        action_encoder=model_schema.ActionEncoderConfig(
            simple_action_encoder=model_schema.SimpleActionEncoderConfig(
                watchtime_to_action_thresholds=thresholds, watchtime_to_action_weights=weights
            )
        )
    )
    return model_schema.InputPreprocessorConfig(uih_preprocessor=uih)


def positions(**fields):
    fields = {"num_position_buckets": 12, "num_time_buckets": 20, **fields}
    return model_schema.PositionalEncoderConfig(**fields)


# Each differs in one option, which leaves the other parameters' shapes alone.
OPTIONS = {
    "position encoding without time": {"positional_encoder": positions(use_time_encoding=False)},
    "log buckets": {"positional_encoder": positions(time_bucket_fn="log")},
    "increments": {"positional_encoder": positions(time_bucket_increments=7.0)},
    "watch-time thresholds": {"input_preprocessor": simple(thresholds=(40.0,))},
    "watch-time weights": {"input_preprocessor": simple(weights=(2,))},
    "postprocessor": {"output_postprocessor": "l2norm"},
}


def test_no_option_is_ignored():
    base = {"input_preprocessor": simple(), "positional_encoder": positions()}
    base["output_postprocessor"] = "layernorm"
    model = models.build(models.model_config(encoder="mean", hstu=base))
    params = models.random_params(model)  # those that a variant does not have are not read
    lookups, batch = laid_out()
    arguments = lookups.history, lookups.contextual, batch

    def vectors(hstu):
        variant = models.build(models.model_config(encoder="mean", hstu={**base, **hstu}))
        return variant.apply({"params": params}, *arguments, method="user")

    found = jax.jit(lambda: {name: vectors(hstu) for name, hstu in OPTIONS.items()})()
    reference = jax.jit(lambda: vectors({}))()
    ignored = [name for name, out in found.items() if np.abs(out - reference).max() < 1e-3]
    assert ignored == []


def parameterized(**fields):
    uih = model_schema.UihPreprocessorConfig(
        action_mlp=tower_schema.ActionMlpConfig(
            simple_mlp=None, parameterized_mlp=tower_schema.ParameterizedMlpConfig(**fields)
        )
    )
    return models.model_config(
        encoder="mean",
        hstu={"input_preprocessor": model_schema.InputPreprocessorConfig(uih_preprocessor=uih)},
    )


def test_the_parameterized_mlp_neither_sees_packing_nor_padding():
    config = parameterized(hidden_dim=7)
    model = models.build(config)
    params, content = models.random_params(model), models.random_content(LENGTHS)
    assert params["user_tower"]["encoder"]["preprocess"]["action_mlp"]["compress"][
        "kernel"
    ].shape == (
        10,
        7,
    )
    call = jax.jit(lambda p, h, c, b, key: model.apply({"params": p}, h, c, b, key, method="user"))
    grid = dict(rule=batches.ANY_RULE, row_len=16, num_rows=len(LENGTHS), num_users=7)
    vectors = []
    for packed, fill in ((False, 0.0), (True, 0.0), (True, np.nan)):
        lookups, batch = models.lay_out(content, packed=packed, fill=fill, **grid)
        vectors.append(call(params, lookups.history, lookups.contextual, batch, jax.random.key(3)))
    np.testing.assert_allclose(vectors[1], vectors[0], atol=2e-5)
    np.testing.assert_array_equal(vectors[2], vectors[1])
