"""Replays recorded cases of the whole encoder and the whole model.

Small operations and the comparisons are in `golden_runners.py`, scoring in `golden_scoring.py`,
trainings in `golden_training_runners.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.config import model_schema, schema, tower_schema
from hstu_jax.model import encoder, match, reference_weights
from hstu_jax.model import lookups as model_lookups
from tests import (
    golden_cases,
    golden_fields,
    golden_runners,
    golden_scoring,
    golden_stack_runners,
)
from tests.model import batches

# From the recorder's notes: (forward atol, rtol), (gradient atol, rtol).
_E = (2e-5, 1e-5), (2e-4, 1e-3)


def hstu_config(args: dict) -> model_schema.HstuConfig:
    """`hstu` section from the reference's nested arguments (other keys are ignored)."""
    uih = args["input_preprocessor"]["uih_preprocessor"]
    actions = uih.get("action_encoder")
    if actions is not None:
        fields = actions["simple_action_encoder"]
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        actions = model_schema.ActionEncoderConfig(
            simple_action_encoder=model_schema.SimpleActionEncoderConfig(**fields)
        )
    mlp = golden_fields.action_mlp_config(uih.get("action_mlp"))
    ((postprocessor, periods),) = args["output_postprocessor"].items()
    return model_schema.HstuConfig(
        stu=golden_stack_runners.stu_config(args["stu"]),
        input_dropout_ratio=args["input_dropout_ratio"],
        attn_num_layers=args["attn_num_layers"],
        positional_encoder=model_schema.PositionalEncoderConfig(**args["positional_encoder"]),
        input_preprocessor=model_schema.InputPreprocessorConfig(
            uih_preprocessor=model_schema.UihPreprocessorConfig(
                action_encoder=actions, action_mlp=mlp
            )
        ),
        output_postprocessor=postprocessor.removesuffix("_postprocessor"),
        **{name: args.get(name, 0) for name in _TRUNCATION},
        timestamp_layernorm=tower_schema.TimestampLayerNormConfig(
            **{name: tuple(int(n) for n in values) for name, values in periods.items()}
        ),
    )


_TRUNCATION = ("attn_truncation_split_layer", "attn_truncation_tail_len")


def _features(history: int, contextual: list[int], candidate: int):
    """Feature declarations of given widths, with their groups."""
    names = [f"context_{i}" for i in range(len(contextual))]
    widths = {
        "history": history,
        "candidate": candidate,
        **dict(zip(names, contextual, strict=True)),
    }
    features = {
        name: schema.IdFeature(num_buckets=1, embedding_dim=width) for name, width in widths.items()
    }
    groups = {"uih": ("history",), "candidate": ("candidate",), "contextual": tuple(names)}
    return features, groups


def _batch(case, uih_lengths, contextual_len, stack, tail_len, keys, **sizes):
    """The recorded users packed into rows; side features and gaps of contextual slots included."""
    lengths = np.asarray(uih_lengths) + contextual_len
    placement = golden_runners.place(lengths, rule=stack.layers[0].rule)
    if tail_len:
        sizes["tail"] = placement.tail(num_contextual=contextual_len, tail_len=tail_len)
    is_history = np.concatenate([np.arange(n) >= contextual_len for n in lengths])
    # The token of every recorded history item; rows run from oldest to newest, or back.
    history_tokens = np.flatnonzero(is_history)
    if _is_newest_first(case):
        ends = np.cumsum(uih_lengths)
        turned = [
            np.arange(end - 1, end - n - 1, -1) for end, n in zip(ends, uih_lengths, strict=True)
        ]
        history_tokens = history_tokens[np.concatenate(turned)]

    def per_token(values):
        full = np.zeros(len(is_history), values.dtype)
        full[history_tokens] = values[:, 0]
        return full

    query_time = case.arrays.get("in.query_time")
    timestamps = per_token(case[keys["timestamp"]])
    batch = batches.make_batch(
        placement,
        action=per_token(case[keys["action"]]),
        watch_time_s=per_token(case[keys["watch_time"]]),
        time_gap_s=golden_runners.time_gaps(timestamps, query_time, lengths),
        num_users=len(lengths),
        fill=np.nan,
        **sizes,
    )
    return placement, history_tokens, batch


def _is_newest_first(case):
    """Whether the recorded rows are stored from newest to oldest."""
    texts = case.args.get("asc", ""), case.args.get("config", "")
    return (
        case.args.get("sequence_timestamp_is_ascending") is False
        or texts[0] == "false"
        or "sequence_timestamp_is_ascending: false" in texts[1]
    )


def _history_grid(placement, history_tokens, values):
    """[number of history items, F] -> [1, R, L, F], NaN where there is no history item."""
    jagged = jnp.full((len(placement.slots), values.shape[-1]), jnp.nan)
    jagged = jagged.at[history_tokens].set(values)
    return golden_runners.to_grid(placement, jagged)[None]


def run_encoder(case: golden_cases.Case) -> None:
    """Family E: `HSTUMatchEncoder`."""
    args = dict(case.args["encoder"])
    contextual_len, width = args["max_contextual_seq_len"], args["contextual_feature_dim"]
    longest = max(case.args["uih_lengths"])
    divisor = args["scaling_seqlen"] if args["scaling_seqlen"] > 0 else longest + contextual_len
    args["stu"] = {**args["stu"], "scaling_seqlen": divisor}
    hstu = hstu_config(args)
    tail_len = hstu.attn_truncation_tail_len
    features, groups = _features(
        args["uih_embedding_dim"], [width] * contextual_len, hstu.stu.embedding_dim
    )
    config = model_schema.ModelConfig(user_tower=model_schema.UserTowerConfig(hstu=hstu))
    user_encoder = match.build_model(config, features, groups).user_tower.encoder
    user_encoder = user_encoder.clone(parent=None)
    assert isinstance(user_encoder, encoder.HstuEncoder)
    if tail_len and args["scaling_seqlen"] < 0:  # the longest row shrinks with the truncation
        stack, cut = user_encoder.stack, float(min(longest, tail_len) + contextual_len)
        layers = tuple(
            layer.clone(divisor=cut) if index >= stack.split_layer else layer
            for index, layer in enumerate(stack.layers)
        )
        user_encoder = user_encoder.clone(stack=stack.clone(layers=layers))
    keys = {
        "timestamp": "in.uih_timestamp.sequence",
        "action": "in.uih_action.sequence",
        "watch_time": "in.uih_watchtime.sequence",
    }
    placement, history_tokens, batch = _batch(
        case, case.args["uih_lengths"], contextual_len, user_encoder.stack, tail_len, keys
    )
    batch = jax.tree.map(jnp.asarray, batch)
    num_users = len(placement.lengths)

    def arrays(inputs):
        history = _history_grid(placement, history_tokens, inputs["uih.sequence"])
        return history, inputs["contextual"].reshape(1, num_users, contextual_len, width)

    def fn(params, inputs):
        return user_encoder.apply({"params": params}, *arrays(inputs), batch)

    inputs = {name: jnp.asarray(case[f"in.{name}"]) for name in ("uih.sequence", "contextual")}
    params, name_of = golden_runners.sub_params(
        case,
        user_encoder,
        golden_runners.ENCODER,
        "user_tower/encoder",
        *arrays(inputs),
        batch=batch,
    )
    golden_runners.check(case, "user_emb", fn, inputs, params, _E, name_of=name_of)


def model_config(text):
    """`ModelConfig` from the recorded text configuration."""
    raw = golden_fields.parse_fields(text)["hstu_match"]
    user = raw["user_tower"]
    args = {"input_dropout_ratio": 0.2, "attn_num_layers": 3, **user["hstu"]}
    return model_schema.ModelConfig(
        user_tower=model_schema.UserTowerConfig(
            hstu=hstu_config(args), max_seq_len=user["max_seq_len"]
        ),
        item_tower=model_schema.ItemTowerConfig(
            mlp=golden_fields.mlp_config(raw["item_tower"].get("mlp"))
        ),
        output_dim=raw.get("output_dim", 0),
        similarity=raw["similarity"],
        temperature=raw["temperature"],
    )


def run_match(case: golden_cases.Case) -> None:
    """Family F: `HSTUMatch`, from ids to loss, recall and every gradient, tables included."""
    config = model_config(case.args["config"])
    contextual = ("user_id", "ctx_a", "ctx_b")
    weights = case.group("w")
    tables = {
        name: jnp.asarray(table)
        for name, table in reference_weights.embedding_tables(weights).items()
    }
    video_dim = tables["video_id_emb"].shape[1]
    widths = [tables[f"{name}_emb"].shape[1] for name in contextual]
    model = match.build_model(config, *_features(video_dim, widths, video_dim))
    like = jax.eval_shape(lambda key: match.init_params(model, key), jax.random.key(0))
    params = jax.tree.map(jnp.asarray, reference_weights.to_params(weights, like=like))

    keys = {
        "timestamp": "in.uih_timestamp",
        "action": "in.uih_action",
        "watch_time": "in.uih_watchtime",
    }
    pos_lengths = case["in.pos_lengths"]
    num_queries, num_negatives = int(pos_lengths.sum()), case.args["num_sampled_neg"]
    placement, history_tokens, batch = _batch(
        case,
        case["in.uih_lengths"],
        len(contextual),
        model.user_tower.encoder.stack,
        config.user_tower.hstu.attn_truncation_tail_len,
        keys,
        num_queries=num_queries,
        num_negatives=num_negatives,
    )
    batch = jax.tree.map(jnp.asarray, batch)
    positive_user = np.repeat(np.arange(len(pos_lengths)), pos_lengths)
    hard = golden_scoring.hard_slots(case.arrays.get("in.hard_neg_indices"), num_queries)
    ids = {name: case[f"in.{name}"] for name in ("uih_video_id", "cand_video_id", *contextual)}
    weight = case.arrays.get("in.sample_weight")

    def fn(params, tables):
        video = tables["video_id_emb"]
        candidates = video[ids["cand_video_id"]][None]
        user_tokens = [tables[f"{name}_emb"][ids[name]] for name in contextual]
        lookups = model_lookups.Lookups(
            history=_history_grid(placement, history_tokens, video[ids["uih_video_id"]]),
            contextual=jnp.stack(user_tokens, axis=1)[None],
            positive=candidates[:, :num_queries],
            negative=candidates[:, num_queries : num_queries + num_negatives],
            hard_negative=jnp.zeros((1, len(pos_lengths), 0, candidates.shape[-1])),
        )
        vectors = model.apply({"params": params}, lookups, batch)
        items = [vectors.positive[0], vectors.negative[0]]
        hard_items = candidates[0, num_queries + num_negatives :]
        items.append(model.apply({"params": params}, hard_items, method="item"))
        scores = golden_scoring.score(
            vectors.user[0],
            *items,
            positive_user=positive_user,
            hard=hard,
            temperature=config.temperature,
            user_weight=weight,
        )
        return scores.loss_sum / scores.count, (vectors.user[0], items, scores)

    step = jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))
    (loss, (user, items, scores)), grads = step(params, tables)
    golden_runners.close(user, case["out.user_emb"], _E[0], "user_emb")
    golden_runners.close(np.concatenate(items), case["out.item_emb"], _E[0], "item_emb")
    golden_scoring.check_scores(
        case, scores, loss, positive_user=positive_user, hard=hard, metric="metric.recall@"
    )
    _check_table_grads(case, grads[1])
    named = reference_weights.from_params(grads[0])
    recorded = {n: v for n, v in case.group("grad_w").items() if "embedding_group" not in n}
    golden_runners.check_weight_grads(recorded, named, golden_scoring.GRADIENT)


def _check_table_grads(case, grads):
    recorded = reference_weights.embedding_tables(case.group("grad_w"))
    assert set(recorded) == set(grads)
    for name, value in recorded.items():
        golden_runners.close(grads[name], value, golden_scoring.GRADIENT, f"grad of table {name}")
