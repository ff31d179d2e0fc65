"""The reference's parameter names, both ways."""

import jax
import numpy as np
import pytest

from hstu_jax.model import reference_weights
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
