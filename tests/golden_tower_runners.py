"""Replays recorded cases of the modules around the sequence layers (family D).

MLPs, norms, pre- and postprocessors; the comparisons are in `golden_runners.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.config import tower_schema
from hstu_jax.features import time_phases
from hstu_jax.model import (
    contextual_mlp,
    encoder,
    match,
    normalization,
    positional_encoder,
    preprocessor,
    reference_weights,
)
from tests import golden_cases, golden_fields, golden_runners

_ACTION_MLP = f"{golden_runners.PREPROCESSOR}_action_embedding_mlp."
_ACTION_MLP_PATH = "user_tower/encoder/preprocess/action_mlp"
_D = golden_runners.D_TOLERANCE


def run_simple_mlp(case: golden_cases.Case) -> None:
    """`SimpleContextualizedMLP`; it does not read the contextual features."""
    args = case.args
    module = contextual_mlp.SimpleMlp(args["hidden_dim"], args["sequential_output_dim"])
    _run_rowwise(case, module, _ACTION_MLP, _ACTION_MLP_PATH)


def run_parameterized_mlp(case: golden_cases.Case) -> None:
    """`ParameterizedContextualizedMLP` on packed users."""
    args = case.args
    module = contextual_mlp.ParameterizedMlp(
        hidden_dim=args["hidden_dim"],
        output_dim=args["sequential_output_dim"],
        contextual_dropout_ratio=args.get("contextual_dropout_ratio", 0.3),
    )
    placement = golden_runners.place(np.diff(case["in.offsets"]))
    keywords = dict(layout=placement.layout(), skip=0)
    inputs = {name: jnp.asarray(case[f"in.{name}"]) for name in ("x", "contextual")}

    def arrays(inputs):
        return golden_runners.to_grid(placement, inputs["x"], fill=0.0), inputs["contextual"]

    params, name_of = golden_runners.sub_params(
        case, module, _ACTION_MLP, _ACTION_MLP_PATH, *arrays(inputs), **keywords
    )

    def fn(params, inputs):
        out = module.apply({"params": params}, *arrays(inputs), **keywords)
        return golden_runners.from_grid(placement, out)

    golden_runners.check(case, "y", fn, inputs, params, _D, name_of=name_of)


def run_swish_layer_norm(case: golden_cases.Case) -> None:
    """`SwishLayerNorm`."""
    module = contextual_mlp.SwishLayerNorm()
    _run_rowwise(case, module, f"{_ACTION_MLP}_mlp.1.", f"{_ACTION_MLP_PATH}/swish_norm")


def run_layer_norm(case: golden_cases.Case) -> None:
    """`LayerNorm`."""
    module = normalization.LayerNorm(eps=case.args["eps"])
    prefix = f"{golden_runners.ENCODER}_output_postprocessor._layer_norm."
    _run_rowwise(case, module, prefix, "user_tower/encoder/output_norm")


_POSTPROCESSORS = {
    "L2NormPostprocessor": "l2norm",
    "LayerNormPostprocessor": "layernorm",
    "TimestampLayerNormPostprocessor": "timestamp_layernorm",
}


def _phases(timestamps, pair):
    """Phases of one period, of times that the reference would take for the same.

    It divides in float32, also integers, and may round up into the next unit near its edge; ours
    does not. So each time is replaced by the start of the unit that the reference finds.
    """
    unit, _ = pair
    found = np.floor(timestamps.astype(np.float32) / np.float32(unit)).astype(np.int64)
    return time_phases.time_phases(found * unit, (pair,))


def run_postprocessor(case: golden_cases.Case) -> None:
    """The three output postprocessors, at every token."""
    x = jnp.asarray(case["in.x"])
    kind, phase = _POSTPROCESSORS[case.op], np.zeros((x.shape[0], 0), np.float32)
    if kind == "timestamp_layernorm":
        periods = tower_schema.TimestampLayerNormConfig(
            time_duration_period_units=tuple(case.args["time_duration_period_units"]),
            time_duration_units_per_period=tuple(case.args["time_duration_units_per_period"]),
        )
        phase = np.concatenate(
            [_phases(case["in.timestamps"].reshape(-1), pair) for pair in periods.pairs], axis=1
        )
    module = encoder.Encoder(
        preprocess=preprocessor.UihPreprocessor(
            output_dim=x.shape[1], contextual_len=0, actions=None, action_mlp=None
        ),
        positions=positional_encoder.PositionalEncoder(
            num_position_buckets=1,
            num_time_buckets=1,
            use_time_encoding=False,
            time_bucket_fn="sqrt",
            time_bucket_increments=1.0,
            contextual_len=0,
        ),
        input_dropout_ratio=0.0,
        postprocessor=kind,
    )
    keywords = dict(phase=jnp.asarray(phase), method="postprocess")
    prefix = f"{golden_runners.ENCODER}_output_postprocessor."
    params, name_of = golden_runners.sub_params(
        case, module, prefix, "user_tower/encoder", x, **keywords
    )

    def fn(params, inputs):
        return module.apply({"params": params}, inputs["x"], **keywords)

    golden_runners.check(case, "y", fn, {"x": x}, params, _D, name_of=name_of)


def run_mlp(case: golden_cases.Case) -> None:
    """`MLP`, in evaluation: running statistics come from `buf.*`."""
    text = case.args.get("config")
    fields = golden_fields.parse_fields(text) if text else case.args
    fields = fields.get("mlp", fields)
    known = {field.name for field in dataclasses.fields(tower_schema.MlpConfig)}
    config = golden_fields.mlp_config({n: v for n, v in fields.items() if n in known})
    module = match.build_mlp(config)
    prefix = "item_tower.mlp."
    x = jnp.asarray(case["in.x"])
    like = jax.eval_shape(module.init, jax.random.key(0), x).get("batch_stats", {})
    buffers = {prefix + name: value for name, value in case.group("buf").items()}
    stats = reference_weights.to_batch_stats(buffers, like={"item_tower": {"mlp": like}})
    stats = stats.get("item_tower", {}).get("mlp", {})
    _run_rowwise(case, module, prefix, "item_tower/mlp", batch_stats=stats)


def _run_rowwise(case, module, reference_prefix, path, *, batch_stats=None):
    """A module of one input array `x`; the inputs it does not have are recorded as zero."""
    inputs = {name: jnp.asarray(case[f"in.{name}"]) for name in case.group("grad_in")}
    params, name_of = golden_runners.sub_params(case, module, reference_prefix, path, inputs["x"])

    def fn(params, inputs):
        variables = {"params": params, "batch_stats": batch_stats or {}}
        return module.apply(variables, inputs["x"])

    golden_runners.check(case, "y", fn, inputs, params, _D, name_of=name_of)


def run_preprocessor(case: golden_cases.Case) -> None:
    """`input_preprocessor`: the UIH preprocessor, with or without actions."""
    args = case.args
    uih = args.get("config", {}).get("uih_preprocessor", {})
    contextual_len = args["max_contextual_seq_len"]
    actions, action_mlp = None, None
    if "action_encoder" in uih:
        actions = golden_runners.action_encoder_of(uih["action_encoder"]["simple_action_encoder"])
        config = golden_fields.action_mlp_config(uih["action_mlp"])
        action_mlp = match.build_action_mlp(config, output_dim=args["output_embedding_dim"])
    module = preprocessor.UihPreprocessor(
        output_dim=args["output_embedding_dim"],
        contextual_len=contextual_len,
        actions=actions,
        action_mlp=action_mlp,
    )
    lengths = np.asarray(args["uih_lengths"]) + contextual_len
    np.testing.assert_array_equal(lengths, case["out.seq_lengths"])
    placement = golden_runners.place(lengths)
    is_history = np.concatenate([np.arange(n) >= contextual_len for n in lengths])

    def per_token(name, dtype):
        full = np.zeros(len(is_history), dtype)
        full[is_history] = case.arrays.get(name, np.zeros((is_history.sum(), 1)))[:, 0]
        return jnp.asarray(placement.to_grid(full))

    keywords = dict(
        action=per_token("in.uih_action.sequence", np.int32),
        watch_time_s=per_token("in.uih_watchtime.sequence", np.float32),
        layout=placement.layout(),
        history_mask=jnp.asarray(placement.to_grid(is_history)),
    )

    def arrays(inputs):
        history = jnp.full((len(is_history), inputs["uih.sequence"].shape[-1]), jnp.nan)
        history = history.at[np.flatnonzero(is_history)].set(inputs["uih.sequence"])
        contextual = inputs.get("contextual", jnp.zeros((len(lengths), 0)))
        contextual = contextual.reshape(
            len(lengths), contextual_len, args["contextual_feature_dim"]
        )
        return golden_runners.to_grid(placement, history), contextual

    inputs = {name: jnp.asarray(case[f"in.{name}"]) for name in case.group("grad_in")}
    path = "user_tower/encoder/preprocess"
    params, name_of = golden_runners.sub_params(
        case, module, golden_runners.PREPROCESSOR, path, *arrays(inputs), **keywords
    )

    def fn(params, inputs):
        out = module.apply({"params": params}, *arrays(inputs), **keywords)
        return golden_runners.from_grid(placement, out)

    golden_runners.check(case, "embeddings", fn, inputs, params, _D, name_of=name_of)
