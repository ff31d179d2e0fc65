"""Replays recorded cases of the whole encoder, the whole model, scoring and the table optimizer.

Small operations and the comparisons are in `golden_runners.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.config import model_schema, schema, tower_schema
from hstu_jax.losses import sampled_softmax
from hstu_jax.metrics import ranking
from hstu_jax.model import encoder, match, reference_weights
from hstu_jax.model import lookups as model_lookups
from hstu_jax.tables import lookup, update
from tests import golden_cases, golden_fields, golden_runners
from tests.model import batches

# From the recorder's notes: (forward atol, rtol), (gradient atol, rtol).
_E = (2e-5, 1e-5), (2e-4, 1e-3)
_SIMILARITY = (1e-4, 1e-5)
_LOSS = (1e-6, 1e-5)
_F_GRADIENT = (1e-3, 1e-3)
_G = (1e-6, 1e-6)


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
        stu=model_schema.StuConfig(**args["stu"]),
        input_dropout_ratio=args["input_dropout_ratio"],
        attn_num_layers=args["attn_num_layers"],
        positional_encoder=model_schema.PositionalEncoderConfig(**args["positional_encoder"]),
        input_preprocessor=model_schema.InputPreprocessorConfig(
            uih_preprocessor=model_schema.UihPreprocessorConfig(
                action_encoder=actions, action_mlp=mlp
            )
        ),
        output_postprocessor=postprocessor.removesuffix("_postprocessor"),
        timestamp_layernorm=tower_schema.TimestampLayerNormConfig(
            **{name: tuple(int(n) for n in values) for name, values in periods.items()}
        ),
    )


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


def _batch(case, uih_lengths, contextual_len, rule, keys, **sizes):
    """The recorded users packed into rows; side features and gaps of contextual slots included."""
    lengths = np.asarray(uih_lengths) + contextual_len
    placement = golden_runners.place(lengths, rule=rule)
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
    if args["scaling_seqlen"] < 0:
        args["scaling_seqlen"] = max(case.args["uih_lengths"]) + contextual_len
    args["stu"] = {**args["stu"], "scaling_seqlen": args["scaling_seqlen"]}
    hstu = hstu_config(args)
    features, groups = _features(
        args["uih_embedding_dim"], [width] * contextual_len, hstu.stu.embedding_dim
    )
    config = model_schema.ModelConfig(user_tower=model_schema.UserTowerConfig(hstu=hstu))
    user_encoder = match.build_model(config, features, groups).user_tower.encoder
    user_encoder = user_encoder.clone(parent=None)
    assert isinstance(user_encoder, encoder.HstuEncoder)
    keys = {
        "timestamp": "in.uih_timestamp.sequence",
        "action": "in.uih_action.sequence",
        "watch_time": "in.uih_watchtime.sequence",
    }
    rule = user_encoder.stack.layers[0].rule
    placement, history_tokens, batch = _batch(
        case, case.args["uih_lengths"], contextual_len, rule, keys
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


def _model_config(text):
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
    config = _model_config(case.args["config"])
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
        model.user_tower.encoder.stack.layers[0].rule,
        keys,
        num_queries=num_queries,
        num_negatives=num_negatives,
    )
    batch = jax.tree.map(jnp.asarray, batch)
    positive_user = jnp.asarray(np.repeat(np.arange(len(pos_lengths)), pos_lengths))[None]
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
            negative=candidates[:, num_queries:],
        )
        vectors = model.apply({"params": params}, lookups, batch)
        scores = sampled_softmax.sampled_softmax(
            user=vectors.user,
            positive=vectors.positive,
            negative=vectors.negative,
            positive_user=positive_user,
            query_mask=batch.query_mask,
            positive_log_q=batch.positive_log_q,
            negative_log_q=batch.negative_log_q,
            temperature=config.temperature,
            log_q_correction=False,
            query_weight=None if weight is None else jnp.asarray(weight)[None],
        )
        return scores.loss_sum / scores.count, (vectors, scores)

    step = jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))
    (loss, (vectors, scores)), grads = step(params, tables)
    golden_runners.close(vectors.user[0], case["out.user_emb"], _E[0], "user_emb")
    items = np.concatenate([vectors.positive[0], vectors.negative[0]])
    golden_runners.close(items, case["out.item_emb"], _E[0], "item_emb")
    _check_scores(case, scores, positive_user[0], loss, metric="metric.recall@")
    _check_table_grads(case, grads[1])
    named = reference_weights.from_params(grads[0])
    recorded = {n: v for n, v in case.group("grad_w").items() if "embedding_group" not in n}
    golden_runners.check_weight_grads(recorded, named, _F_GRADIENT)


def _check_table_grads(case, grads):
    recorded = reference_weights.embedding_tables(case.group("grad_w"))
    assert set(recorded) == set(grads)
    for name, value in recorded.items():
        golden_runners.close(grads[name], value, _F_GRADIENT, f"grad of table {name}")


def _check_scores(case, scores, positive_user, loss, *, metric):
    """Similarity matrix, loss and recall."""
    negatives = np.asarray(scores.negative_scores[0])[np.asarray(positive_user)]
    similarity = np.concatenate([np.asarray(scores.positive_scores[0])[:, None], negatives], axis=1)
    golden_runners.close(similarity, case["out.similarity"], _SIMILARITY, "similarity")
    golden_runners.close(loss, case["out.loss"], _LOSS, "loss")
    cutoffs = (1, 5)
    hits, num_queries = ranking.sampled_hits(
        positive_scores=scores.positive_scores,
        negative_scores=scores.negative_scores,
        positive_user=positive_user[None],
        query_mask=jnp.ones((1, len(positive_user)), bool),
        cutoffs=cutoffs,
    )
    for cutoff, count in zip(cutoffs, hits, strict=True):
        name = f"out.{metric}{cutoff}"
        golden_runners.close(count / num_queries, case[name], (1e-7, 1e-6), name)


def run_scores(case: golden_cases.Case) -> None:
    """Family F: `sim_with_sampler`."""
    pos_lengths = case["in.pos_lengths"]
    num_queries = int(pos_lengths.sum())
    positive_user = jnp.asarray(np.repeat(np.arange(len(pos_lengths)), pos_lengths))
    zeros = jnp.zeros((1, num_queries))

    def fn(user, items):
        scores = sampled_softmax.sampled_softmax(
            user=user[None],
            positive=items[None, :num_queries],
            negative=items[None, num_queries:],
            positive_user=positive_user[None],
            query_mask=zeros == 0,
            positive_log_q=zeros,
            negative_log_q=jnp.zeros((1, items.shape[0] - num_queries)),
            temperature=case.args["temperature"],
            log_q_correction=False,
        )
        return scores.loss_sum / scores.count, scores

    user, items = jnp.asarray(case["in.user_emb"]), jnp.asarray(case["in.item_emb"])
    step = jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))
    (loss, scores), grads = step(user, items)
    _check_scores(case, scores, positive_user, loss, metric="recall_at_")
    golden_runners.close(grads[0], case["grad_in.user_emb"], _F_GRADIENT, "grad_in.user_emb")
    golden_runners.close(grads[1], case["grad_in.item_emb"], _F_GRADIENT, "grad_in.item_emb")


def run_rowwise_adagrad(case: golden_cases.Case) -> None:
    """Family G: table lookup, duplicate sums and the update, step by step."""
    args = case.args
    assert args["pooling"] == "NONE", "pooled features are one id each here"
    modes = {"NONE": "none", "L2": "l2", "DECOUPLE": "decoupled"}
    max_gradient = args["max_gradient"] if args.get("gradient_clipping") else None
    weights = jnp.asarray(case["in.weight0"])

    @jax.jit
    def advance(state, ids, cotangent, rate):
        unique = lookup.unique_rows(ids, capacity=len(ids), sentinel=weights.shape[0])
        out, vjp = jax.vjp(
            lambda rows: lookup.expand(rows, unique, max_gradient=max_gradient),
            lookup.gather(state.weights, unique),
        )
        new_state = update.rowwise_adagrad(
            state,
            unique,
            vjp(cotangent)[0],
            learning_rate=rate,
            weight_decay=args.get("weight_decay", 0.0),
            weight_decay_mode=modes[args["weight_decay_mode"]],
        )
        return out, new_state

    state = update.TableState(weights, jnp.zeros(weights.shape[0]))
    num_steps = len([name for name in case.arrays if name.endswith(".ids")])
    rates = args["lr_steps"] or [args["lr"]] * num_steps
    for step, rate in zip(range(num_steps), rates, strict=True):
        ids = jnp.asarray(case[f"step{step}.ids"], jnp.int32)
        cotangent = jnp.asarray(case[f"step{step}.cot"])
        out, state = advance(state, ids, cotangent, jnp.float32(rate))
        golden_runners.close(out, case[f"step{step}.out"], _G, f"step{step}.out")
        golden_runners.close(state.weights, case[f"step{step}.weight"], _G, f"step{step}.weight")
        golden_runners.close(state.accumulator, case[f"step{step}.sum"], _G, f"step{step}.sum")
