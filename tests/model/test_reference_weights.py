"""The reference's parameter names, both ways."""

import jax
import numpy as np
import pytest

from hstu_jax.config import model_schema, tower_schema
from hstu_jax.model import match, reference_weights
from tests.model import models


@pytest.fixture(scope="module")
def params():
    config = models.model_config(output_dim=9, hstu={"output_postprocessor": "layernorm"})
    return models.random_params(models.build(config))


def test_round_trip(params):
    weights = reference_weights.from_params(params)
    assert len(weights) == len(jax.tree.leaves(params))
    back = reference_weights.to_params(weights, like=params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert jax.tree.structure(back) == jax.tree.structure(params)


def test_layouts(params):
    weights = reference_weights.from_params(params)
    projection = params["user_tower"]["encoder"]["preprocess"]["input_projection"]["kernel"]
    prefix = "user_tower._hstu_encoder._input_preprocessor."
    np.testing.assert_array_equal(weights[f"{prefix}_input_projection.weight"], projection.T)
    assert weights[f"{prefix}_batched_contextual_linear_bias"].shape == (2, 1, 16)
    layer = params["user_tower"]["encoder"]["stack"]["layers_1"]
    name = "user_tower._hstu_encoder._stu_module._stu_layers.1._uvqk_weight"
    np.testing.assert_array_equal(weights[name], layer["uvqk_kernel"])


def test_missing_and_unexpected_names_are_listed(params):
    weights = reference_weights.from_params(params)
    del weights["item_tower.output.bias"]
    weights["user_tower.extra"] = np.zeros(1)
    message = r"unexpected \['user_tower.extra'\], missing \['item_tower.output.bias'\]; configure"
    with pytest.raises(ValueError, match=message):
        reference_weights.to_params(weights, like=params)


def test_a_wrong_shape_is_named(params):
    weights = reference_weights.from_params(params)
    weights["item_tower.output.bias"] = np.zeros(8)
    message = r"weights\['item_tower.output.bias'\].shape=\(8,\): does not fit item_tower/output"
    with pytest.raises(ValueError, match=message):
        reference_weights.to_params(weights, like=params)


def test_tables_and_parameters_without_effect_are_passed_over(params):
    weights = reference_weights.from_params(params)
    table = "embedding_group.seq_emb_impls.__BASE__.ec_dict.24.embeddings.video_id_emb.weight"
    weights[table] = np.ones((3, 24))
    prefix = "user_tower._hstu_encoder._input_preprocessor._action_encoder."
    weights[f"{prefix}_target_action_embedding_table"] = np.zeros((1, 64))
    reference_weights.to_params(weights, like=params)
    tables = reference_weights.embedding_tables(weights)
    assert list(tables) == ["video_id_emb"] and tables["video_id_emb"].shape == (3, 24)
    second = "embedding_group.emb_impls.__BASE__.ebc.embedding_bags.video_id_emb.weight"
    weights[second] = np.ones((3, 24))
    with pytest.raises(ValueError, match="a second table named 'video_id_emb'; give the features"):
        reference_weights.embedding_tables(weights)


def variables_with_every_name():
    """Variables of two models that have all names between them."""
    uih = model_schema.UihPreprocessorConfig(
        action_mlp=tower_schema.ActionMlpConfig(
            simple_mlp=None, parameterized_mlp=tower_schema.ParameterizedMlpConfig(hidden_dim=4)
        )
    )
    periods = tower_schema.TimestampLayerNormConfig(
        time_duration_period_units=(3600,), time_duration_units_per_period=(24,)
    )
    hstu = {
        "input_preprocessor": model_schema.InputPreprocessorConfig(uih_preprocessor=uih),
        "output_postprocessor": "timestamp_layernorm",
        "timestamp_layernorm": periods,
    }
    for options in ({"use_bn": True}, {"use_ln": True}, {"bias": False}):
        mlp = tower_schema.MlpConfig(hidden_units=(8, 16), activation="Dice", **options)
        item_tower = model_schema.ItemTowerConfig(mlp=mlp)
        model = models.build(models.model_config(hstu=hstu, item_tower=item_tower))
        yield models.random_tree(
            jax.eval_shape(lambda model=model: match.init_variables(model, jax.random.key(0)))
        )


def test_round_trip_of_every_option_with_statistics():
    names = set()
    for variables in variables_with_every_name():
        params, stats = variables["params"], variables["batch_stats"]
        weights = reference_weights.from_params(params)
        assert len(weights) == len(jax.tree.leaves(params))
        buffers = reference_weights.from_params(stats)
        assert len(buffers) == len(jax.tree.leaves(stats))
        # As in a state dict: parameters, statistics and what has no effect, all in one.
        everything = {**weights, **buffers, "item_tower.mlp.x.num_batches_tracked": np.array(3)}
        everything["user_tower._hstu_encoder._output_postprocessor._period_units"] = np.ones((1, 1))
        for back, tree in (
            (reference_weights.to_params(everything, like=params), params),
            (reference_weights.to_batch_stats(everything, like=stats), stats),
        ):
            jax.tree.map(np.testing.assert_array_equal, back, tree)
        names |= set(weights) | set(buffers)
    tower, encoder = "item_tower.mlp.mlp.1.perceptron.", "user_tower._hstu_encoder."
    mlp = f"{encoder}_input_preprocessor._action_embedding_mlp."
    assert names >= {
        f"{tower}0.weight",
        f"{tower}1.weight",
        f"{tower}1.running_var",
        f"{tower}1.alpha",
        f"{tower}1.bn.running_mean",
        f"{tower}2.alpha",
        f"{tower}2.bn.running_mean",
        f"{encoder}_output_postprocessor._time_feature_combiner.weight",
        f"{encoder}_output_postprocessor._layer_norm.bias",
        f"{mlp}_dense_features_compress.weight",
        f"{mlp}_attn_raw_weights.0.weight",
        f"{mlp}_attn_weights_norm.weight",
        f"{mlp}_res_weights.1.weight",
    }


def test_missing_statistics_are_named():
    variables = next(variables_with_every_name())
    buffers = reference_weights.from_params(variables["batch_stats"])
    del buffers["item_tower.mlp.mlp.0.perceptron.1.running_var"]
    with pytest.raises(
        ValueError, match=r"missing \['item_tower.mlp.mlp.0.perceptron.1.running_var"
    ):
        reference_weights.to_batch_stats(buffers, like=variables["batch_stats"])
