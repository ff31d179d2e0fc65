"""Parameters and running statistics by the reference's state-dict names, to and from our trees.

Dense parameters go both ways; `embedding_tables` picks the tables, which live outside the dense
tree. Used to take over a trained reference model and by the golden tests.
Source of names and layouts: TorchEasyRec 1.3.16 state dicts (see docs/model.md).
"""

import re
from collections.abc import Mapping
from typing import Literal

import numpy as np
from flax import traverse_util

Layout = Literal["same", "linear", "token_bias"]

_ENCODER = ("user_tower._hstu_encoder.", "user_tower/encoder/")
_LAYER_NORM = {"weight": ("scale", "same"), "bias": ("bias", "same")}
# torch keeps a Linear's weight as [out, in]; ours is [in, out].
_LINEAR = {"weight": ("kernel", "linear"), "bias": ("bias", "same")}
_STATISTICS = {"running_mean": ("mean", "same"), "running_var": ("var", "same")}
_ACTION_MLP = "_input_preprocessor._action_embedding_mlp."
_STU_LAYER = {
    "_input_norm_weight": ("input_norm/scale", "same"),
    "_input_norm_bias": ("input_norm/bias", "same"),
    "_uvqk_weight": ("uvqk_kernel", "same"),
    "_uvqk_beta": ("uvqk_bias", "same"),
    "_output_norm_weight": ("output_norm_scale", "same"),
    "_output_norm_bias": ("output_norm_bias", "same"),
    "_output_weight": ("output_kernel", "same"),
}
# (reference's module inside the encoder, ours, its parameters); # stands for an index.
_ENCODER_MODULES = (
    ("_input_preprocessor._input_projection.", "preprocess/input_projection/", _LINEAR),
    (
        "_input_preprocessor._action_encoder.",
        "preprocess/actions/",
        {"_action_embedding_table": ("embedding", "same")},
    ),
    (f"{_ACTION_MLP}_mlp.0.", "preprocess/action_mlp/linear_in/", _LINEAR),
    (f"{_ACTION_MLP}_mlp.1.", "preprocess/action_mlp/swish_norm/norm/", _LAYER_NORM),
    (f"{_ACTION_MLP}_mlp.2.", "preprocess/action_mlp/linear_out/", _LINEAR),
    (f"{_ACTION_MLP}_mlp.3.", "preprocess/action_mlp/norm/", _LAYER_NORM),
    (f"{_ACTION_MLP}_dense_features_compress.", "preprocess/action_mlp/compress/", _LINEAR),
    (f"{_ACTION_MLP}_attn_raw_weights.0.", "preprocess/action_mlp/weights/", _LINEAR),
    (f"{_ACTION_MLP}_attn_weights_norm.", "preprocess/action_mlp/weights_norm/", _LAYER_NORM),
    (f"{_ACTION_MLP}_res_weights.0.", "preprocess/action_mlp/bias_in/", _LINEAR),
    (f"{_ACTION_MLP}_res_weights.1.", "preprocess/action_mlp/bias_swish_norm/norm/", _LAYER_NORM),
    (f"{_ACTION_MLP}_res_weights.2.", "preprocess/action_mlp/bias_out/", _LINEAR),
    (
        "_input_preprocessor.",
        "preprocess/",
        {
            "_batched_contextual_linear_weights": ("contextual_kernel", "same"),
            "_batched_contextual_linear_bias": ("contextual_bias", "token_bias"),
        },
    ),
    (
        "_positional_encoder.",
        "positions/",
        {
            "_position_embeddings_weight": ("position_embedding", "same"),
            "_timestamp_embeddings_weight": ("time_embedding", "same"),
        },
    ),
    ("_stu_module._stu_layers.#.", "stack/layers_#/", _STU_LAYER),
    ("_output_postprocessor._layer_norm.", "output_norm/", _LAYER_NORM),
    ("_output_postprocessor._time_feature_combiner.", "time_combiner/", _LINEAR),
)
_PERCEPTRON = "item_tower.mlp.mlp.#.perceptron."
_ALPHA = {"alpha": ("alpha", "same")}
_TOWER_MODULES = (
    ("user_tower.output.", "user_tower/output/", _LINEAR),
    (f"{_PERCEPTRON}0.", "item_tower/mlp/layers_#/", _LINEAR),
    (f"{_PERCEPTRON}1.", "item_tower/mlp/norms_#/", {**_LAYER_NORM, **_STATISTICS}),
    # Dice stands second in a layer without a norm and third behind one.
    (f"{_PERCEPTRON}1.", "item_tower/mlp/activations_#/", _ALPHA),
    (f"{_PERCEPTRON}1.bn.", "item_tower/mlp/activations_#/norm/", _STATISTICS),
    (f"{_PERCEPTRON}2.", "item_tower/mlp/normed_activations_#/", _ALPHA),
    (f"{_PERCEPTRON}2.bn.", "item_tower/mlp/normed_activations_#/norm/", _STATISTICS),
    ("item_tower.output.", "item_tower/output/", _LINEAR),
)
_WITHOUT_EFFECT = (
    "_target_action_embedding_table",  # for target positions, which HSTU Match does not have
    "num_batches_tracked",  # not read: the share of the newest batch is fixed
    "_period_units",  # configuration
    "_units_per_period",
)
_TABLE_NAME = re.compile(
    r"embedding_group\..*\.(?:embedding_bags|embeddings)\.(?P<table>[^.]+)\.weight"
)


def _list_rules() -> list[tuple[str, str, Layout]]:
    modules = [
        (_ENCODER[0] + theirs, _ENCODER[1] + ours, parameters)
        for theirs, ours, parameters in _ENCODER_MODULES
    ]
    return [
        (theirs + name, ours + leaf, layout)
        for theirs, ours, parameters in (*modules, *_TOWER_MODULES)
        for name, (leaf, layout) in parameters.items()
    ]


_RULES = _list_rules()
_STATISTIC_NAMES = tuple(f".{name}" for name in _STATISTICS)


def to_params(weights: Mapping[str, np.ndarray], *, like: Mapping) -> dict:
    """Our parameter tree from the reference's weights.

    Args:
        weights: reference name -> array. Embedding tables, running statistics and parameters
            without effect in HSTU Match are passed over.
        like: a tree of our model, for its names and shapes (arrays or `ShapeDtypeStruct`s).

    Returns:
        A nested dict of numpy arrays with the structure of `like`.

    Raises:
        ValueError: names that our model does not have, parameters that `weights` lacks, or a
            shape that differs; each named.
    """
    weights = {
        name: value for name, value in weights.items() if not name.endswith(_STATISTIC_NAMES)
    }
    return _to_tree(weights, like)


def to_batch_stats(weights: Mapping[str, np.ndarray], *, like: Mapping) -> dict:
    """Our tree of batch norm's running statistics from the reference's weights.

    Args:
        weights: reference name -> array; all but running statistics are passed over.
        like: `batch_stats` of our model, for its names and shapes; {} without batch norm.

    Raises:
        ValueError: as for `to_params`.
    """
    weights = {name: value for name, value in weights.items() if name.endswith(_STATISTIC_NAMES)}
    return _to_tree(weights, like)


def _to_tree(weights, like):
    expected = traverse_util.flatten_dict(like, sep="/")
    found, unexpected = {}, []
    for name, value in weights.items():
        if _TABLE_NAME.fullmatch(name) or name.endswith(_WITHOUT_EFFECT):
            continue
        path, layout = _translate(name, _RULES, source=0)
        if path not in expected:
            unexpected.append(name)
            continue
        array = _to_ours(np.asarray(value), layout)
        if array.shape != tuple(expected[path].shape):
            raise ValueError(
                f"weights[{name!r}].shape={np.shape(value)}: does not fit {path} of shape "
                f"{tuple(expected[path].shape)}; configure the model as the reference was."
            )
        found[path] = array
    missing = [path_to_name(path) for path in expected if path not in found]
    if unexpected or missing:
        raise ValueError(
            f"weights={len(weights)} arrays: unexpected {sorted(unexpected)}, missing "
            f"{sorted(missing)}; configure the model as the reference was."
        )
    return traverse_util.unflatten_dict(found, sep="/")


def from_params(params: Mapping) -> dict[str, np.ndarray]:
    """Reference name -> array in its layout; without the parameters that have no effect there.

    Args:
        params: our tree, a tree of the same structure such as gradients, or `batch_stats`.

    Raises:
        ValueError: a parameter that the reference does not have.
    """
    weights = {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        name, layout = _translate(path, _RULES, source=1)
        if name is None:
            raise ValueError(f"params[{path!r}]: the reference has no such parameter.")
        weights[name] = _to_theirs(np.asarray(value), layout)
    return weights


def path_to_name(path: str) -> str:
    """The reference's name of a parameter `a/b/c` of ours; the path itself if it has none."""
    return _translate(path, _RULES, source=1)[0] or path


def embedding_tables(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Embedding name -> table, from the reference's weights.

    Raises:
        ValueError: one embedding name with two tables (pooled and sequence features keep separate
            ones in the reference; here they share one).
    """
    tables = {}
    for name, value in weights.items():
        match = _TABLE_NAME.fullmatch(name)
        if match is None:
            continue
        if match["table"] in tables:
            raise ValueError(
                f"weights[{name!r}]: a second table named {match['table']!r}; "
                "give the features different embedding_name."
            )
        tables[match["table"]] = np.asarray(value)
    return tables


def _translate(name, rules, *, source):
    """(other side's name, layout), or (None, "same"); the index of # is carried over."""
    for rule in rules:
        pattern = re.escape(rule[source]).replace(re.escape("#"), r"(\d+)")
        match = re.fullmatch(pattern, name)
        if match:
            index = match[1] if match.groups() else ""
            return rule[1 - source].replace("#", index), rule[2]
    return None, "same"


def _to_ours(array, layout):
    if layout == "linear":
        return array.T
    return array[:, 0] if layout == "token_bias" else array


def _to_theirs(array, layout):
    if layout == "linear":
        return array.T
    return array[:, None] if layout == "token_bias" else array
