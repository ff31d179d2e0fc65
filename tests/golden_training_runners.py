"""Replays recorded cases of the table optimizer, the schedules and whole trainings.

A training is replayed from ids to updated rows with the package's own lookup, optimizers and
towers; only the softmax is written out here, since it has a column for every hard negative.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hstu_jax.config import train_schema
from hstu_jax.model import lookups as model_lookups
from hstu_jax.model import match, reference_weights
from hstu_jax.tables import lookup, optimizers, update
from hstu_jax.training import optimizer as dense_optimizers
from hstu_jax.training import schedules
from tests import golden_cases, golden_runners
from tests import golden_model_runners as model_runners
from tests.model import batches

_G = (1e-6, 1e-6)
_RATE = (0.0, 1e-6)
# Adam magnifies the noise of gradients near zero.
_LOSSES, _TRAINED = (0.0, 2e-4), (2e-3, 0.0)
_NOT_A_CELL = -1e32
_SCHEDULES = {
    "ConstantLR": "constant",
    "ExponentialDecayLR": "exponential_decay",
    "ManualStepLR": "manual_step",
    "CosineAnnealingLR": "cosine_annealing",
    "CosineAnnealingWarmRestartsLR": "cosine_annealing_warm_restarts",
}


def run_rowwise_adagrad(case: golden_cases.Case) -> None:
    """Family G: table lookup, duplicate sums and the update, step by step."""
    args = case.args
    rule = optimizers.RowwiseAdagrad(
        args.get("weight_decay", 0.0), args["weight_decay_mode"].lower()
    )
    max_gradient = args["max_gradient"] if args.get("gradient_clipping") else None
    weights = jnp.asarray(case["in.weight0"])

    @jax.jit
    def advance(state, ids, bags, cotangent, rate):
        unique = lookup.unique_rows(ids, capacity=len(ids), sentinel=weights.shape[0])

        def look_up(rows):
            vectors = lookup.expand(rows, unique, max_gradient=max_gradient)
            if args["pooling"] == "NONE":
                return vectors
            return jax.ops.segment_sum(vectors, bags, num_segments=cotangent.shape[0])

        out, vjp = jax.vjp(look_up, lookup.gather(state.weights, unique))
        new_state = update.apply(state, unique, vjp(cotangent)[0], rule=rule, learning_rate=rate)
        return out, new_state

    assert args["pooling"] in ("NONE", "SUM"), args["pooling"]
    state = update.TableState(weights, {"accumulator": jnp.zeros(weights.shape[0])})
    num_steps = len([name for name in case.arrays if name.endswith(".ids")])
    rates = args["lr_steps"] or [args["lr"]] * num_steps
    for step, rate in zip(range(num_steps), rates, strict=True):
        ids = jnp.asarray(case[f"step{step}.ids"], jnp.int32)
        counts = np.diff(case[f"step{step}.offsets"])
        bags = jnp.asarray(np.repeat(np.arange(counts.size), counts), jnp.int32)
        cotangent = jnp.asarray(case[f"step{step}.cot"])
        out, state = advance(state, ids, bags, cotangent, jnp.float32(rate))
        golden_runners.close(out, case[f"step{step}.out"], _G, f"step{step}.out")
        golden_runners.close(state.weights, case[f"step{step}.weight"], _G, f"step{step}.weight")
        golden_runners.close(
            state.slots["accumulator"], case[f"step{step}.sum"], _G, f"step{step}.sum"
        )


def run_lr_schedules(case: golden_cases.Case) -> None:
    """Family I: the rate in force after 0, 1, ... steps of the scheduler."""
    for name, recorded in case.args["schedules"].items():
        args = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items()}
        base, num_steps = args.pop("base_lr"), args.pop("n")
        args.pop("by_epoch", None)  # what a step of the scheduler is does not show in the numbers
        config = train_schema.LearningRateConfig(schedule=_SCHEDULES[args.pop("cls")], **args)
        run = schedules.RunLength(num_steps=num_steps)

        @jax.jit
        @jax.vmap
        def rates(step, config=config, base=base, run=run):
            return schedules.learning_rate(config, base=base, run=run, step=step)

        got = rates(jnp.arange(num_steps, dtype=jnp.int32))
        golden_runners.close(got, case[f"lr.{name}"], _RATE, f"lr.{name}")


def run_training(case: golden_cases.Case) -> None:
    """Family I: steps of the full model, Adam and row-wise Adagrad."""
    args, weights = case.args, case.group("w0")
    model_config = model_runners._model_config(args["config"])
    groups = model_runners.parse_text(args["config"])["feature_groups"]
    has_context = any("contextual" in group["group_name"] for group in groups)
    contextual = ("user_id", "ctx_a", "ctx_b") if has_context else ()
    recorded = reference_weights.embedding_tables(weights)
    video_dim = recorded["video_id_emb"].shape[1]
    widths = [recorded[f"{name}_emb"].shape[1] for name in contextual]
    model = match.build_model(model_config, *model_runners._features(video_dim, widths, video_dim))
    like = jax.eval_shape(lambda key: match.init_params(model, key), jax.random.key(0))
    params = jax.tree.map(jnp.asarray, reference_weights.to_params(weights, like=like))
    assert args["sparse"].startswith("rowwise_adagrad"), args["sparse"]
    tables = {
        name: update.TableState(jnp.asarray(value), {"accumulator": jnp.zeros(len(value))})
        for name, value in recorded.items()
    }
    beta1, beta2 = args["betas"]
    config = train_schema.DenseOptimizerConfig(
        kind=args["dense"], lr=args["lr_dense"], beta1=beta1, beta2=beta2, eps=args["adam_eps"]
    )
    optimizer = dense_optimizers.dense_optimizer(
        config, run=schedules.RunLength(num_steps=args["steps"])
    )
    opt_state = optimizer.init(params)
    rule = model.user_tower.encoder.stack.layers[0].rule
    inputs = _training_inputs(case, contextual, {n: len(t) for n, t in recorded.items()}, rule)
    advance = _advance(case, model, model_config, optimizer, contextual)
    step = jax.jit(advance, compiler_options={"xla_backend_optimization_level": 0})
    losses = []
    for each in inputs:
        loss, params, opt_state, tables = step(params, opt_state, tables, each)
        losses.append(float(loss))
    golden_runners.close(losses, case["out.losses"], _LOSSES, "losses")
    last = f"{args['steps']}"
    named = reference_weights.from_params(params)
    for name, value in named.items():
        golden_runners.close(value, case[f"w{last}.{name}"], _TRAINED, name)
    trained = reference_weights.embedding_tables(case.group(f"w{last}"))
    sums = reference_weights.embedding_tables(case.group(f"acc{last}"))
    for name, table in tables.items():
        golden_runners.close(table.weights, trained[name], _TRAINED, name)
        golden_runners.close(table.slots["accumulator"], sums[name], (1e-6, 1e-2), f"sums {name}")


def _padded(values, size, fill):
    values = np.asarray(values)
    full = np.full((size, *values.shape[1:]), fill, values.dtype)
    full[: len(values)] = values
    return full


def _training_inputs(case, contextual, table_sizes, rule):
    """The recorded batches as arrays of one shape, so that the step compiles once."""
    steps = []
    for number in range(case.args["steps"]):
        step = case.group(f"step{number}")
        step.setdefault("uih_watchtime", np.zeros_like(step["uih_action"]))
        step.setdefault("hard_neg_indices", np.zeros((0, 2), np.int32))
        steps.append(step)
    lengths = [step["uih_lengths"] + len(contextual) for step in steps]
    row_len = int(max(each.max() for each in lengths)) + 3
    places = [
        batches.place(list(map(int, each)), row_len=row_len, packed=True, rule=rule)
        for each in lengths
    ]
    num_rows = max(place.num_rows for place in places)
    sizes = {
        "history": max(len(step["uih_video_id"]) for step in steps),
        "queries": max(int(step["pos_lengths"].sum()) for step in steps),
        "hard": max(len(step["hard_neg_indices"]) for step in steps),
    }
    for step, each in zip(steps, lengths, strict=True):
        place = batches.place(
            list(map(int, each)), row_len=row_len, packed=True, rule=rule, num_rows=num_rows
        )
        yield _one_input(step, place, contextual, table_sizes, sizes)


def _one_input(step, place, contextual, table_sizes, sizes):
    is_history = np.concatenate([np.arange(n) >= len(contextual) for n in place.lengths])

    def per_token(values):
        full = np.zeros(len(is_history), values.dtype)
        full[is_history] = values[:, 0]
        return full

    num_queries, num_hard = int(step["pos_lengths"].sum()), len(step["hard_neg_indices"])
    positive, sampled, hard = np.split(
        step["cand_video_id"], [num_queries, len(step["cand_video_id"]) - num_hard]
    )
    gaps = golden_runners.time_gaps(
        per_token(step["uih_timestamp"]), step["query_time"], place.lengths
    )
    batch = batches.make_batch(
        place,
        action=per_token(step["uih_action"]),
        watch_time_s=per_token(step["uih_watchtime"]),
        time_gap_s=gaps,
        num_users=len(place.lengths),
        fill=np.nan,
        num_queries=sizes["queries"],
        num_negatives=len(sampled),
    )
    none = table_sizes["video_id_emb"]
    query_user = np.repeat(np.arange(len(step["pos_lengths"])), step["pos_lengths"])
    return {
        "batch": jax.tree.map(jnp.asarray, batch),
        "history": _padded(step["uih_video_id"], sizes["history"], none),
        "slots": _padded(
            np.asarray(place.slots)[is_history], sizes["history"], place.num_rows * place.row_len
        ),
        "positive": _padded(positive, sizes["queries"], none),
        "sampled": sampled,
        "hard": _padded(hard, sizes["hard"], none),
        "cells": _padded(step["hard_neg_indices"], sizes["hard"], sizes["queries"]),
        "query_user": _padded(query_user, sizes["queries"], 0),
        "is_query": np.arange(sizes["queries"]) < num_queries,
        **{f"{name}_emb": step[name] for name in contextual},
    }


def _advance(case, model, model_config, optimizer, contextual):
    """(params, opt_state, tables, inputs) -> (loss before the update, the three after it)."""
    videos = ("history", "positive", "sampled", "hard")

    def loss_of(params, picked, unique, inputs):
        vectors = {name: lookup.expand(rows, unique[name]) for name, rows in picked.items()}
        sizes = np.cumsum([len(inputs[name]) for name in videos])[:-1]
        history, *candidates = jnp.split(vectors["video_id_emb"], sizes)
        batch = inputs["batch"]
        _, num_rows, row_len = batch.time_gap_s.shape
        grid = jnp.full((num_rows * row_len, history.shape[1]), jnp.nan)
        grid = grid.at[inputs["slots"]].set(history, mode="drop")
        context = [vectors[f"{name}_emb"] for name in contextual]
        num_users = batch.user_mask.shape[1]
        lookups = model_lookups.Lookups(
            history=grid.reshape(1, num_rows, row_len, -1),
            contextual=jnp.stack(context, axis=1)[None]
            if context
            else jnp.zeros((1, num_users, 0, 0)),
            positive=candidates[0][None],
            negative=jnp.concatenate(candidates[1:])[None],
        )
        towers = model.apply({"params": params}, lookups, batch)
        query = towers.user[0][inputs["query_user"]]
        sampled, hard = jnp.split(towers.negative[0], [len(inputs["sampled"])])
        # One column for each hard negative's ordinal; a query has no more of them than there are.
        row, ordinal = inputs["cells"][:, 0], inputs["cells"][:, 1]
        cells = jnp.full((len(query), len(hard)), _NOT_A_CELL)
        found = jnp.sum(query.at[row].get(mode="fill", fill_value=0) * hard, axis=1)
        cells = cells.at[row, ordinal].set(found, mode="drop")
        scores = [jnp.sum(query * towers.positive[0], axis=1)[:, None], query @ sampled.T, cells]
        logits = jnp.concatenate(scores, axis=1) / model_config.temperature
        losses = jax.nn.logsumexp(logits, axis=1) - logits[:, 0]
        is_query = inputs["is_query"]
        return jnp.sum(jnp.where(is_query, losses, 0)) / jnp.sum(is_query)

    def advance(params, opt_state, tables, inputs):
        ids = {"video_id_emb": jnp.concatenate([inputs[name] for name in videos])}
        ids |= {f"{name}_emb": inputs[f"{name}_emb"] for name in contextual}
        unique = {
            name: lookup.unique_rows(
                rows, capacity=len(rows), sentinel=tables[name].weights.shape[0]
            )
            for name, rows in ids.items()
        }
        picked = {name: lookup.gather(tables[name].weights, rows) for name, rows in unique.items()}
        loss, (grads, row_grads) = jax.value_and_grad(loss_of, argnums=(0, 1))(
            params, picked, unique, inputs
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        updated = {
            name: update.apply(
                tables[name],
                unique[name],
                row_grads[name],
                rule=optimizers.RowwiseAdagrad(),
                learning_rate=case.args["lr_sparse"],
            )
            for name in ids
        }
        return loss, optax.apply_updates(params, updates), opt_state, {**tables, **updated}

    return advance
