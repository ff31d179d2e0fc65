"""Replays recorded trainings through the real training step, batch by batch.

Recorded hard negatives belong to queries and ours to users, so every query is a user of its own
here, with a copy of its user's history: the same vectors, and gradients that add up to the same.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.config import schema, train_schema
from hstu_jax.model import reference_weights
from hstu_jax.tables import spec as table_spec
from hstu_jax.tables import update
from hstu_jax.training import partition, schedules, state, step
from tests import (
    golden_cases,
    golden_fields,
    golden_model_runners,
    golden_runners,
    golden_scoring,
)
from tests.model import batches

# From the recorder's notes: (atol, rtol). Adam turns the rounding of a gradient near zero into a
# full step, so weights after some steps agree less than their losses.
_WEIGHTS = (2e-3, 1e-4)
_ROW_SUMS = (2e-4, 1e-2)
_LOSSES = (1e-6, 2e-4)
_HISTORY, _CANDIDATE = "uih_seq__video_id", "cand_seq__video_id"


def run_training(case: golden_cases.Case) -> None:
    """Family I: `HSTUMatch train steps` with Adam and row-wise Adagrad, dropout ratios 0."""
    args = case.args
    assert args["dense"] == "adam" and args["sparse"].startswith("rowwise_adagrad")
    assert args["sparse_eps"] == 1e-8, "fixed here"
    config = _config(case)
    program = step.make_program(config, run_length=schedules.RunLength(num_steps=args["steps"]))
    mesh = partition.make_mesh(config.mesh, jax.devices()[:1])
    run_step = partition.place_train_step(functools.partial(step.train_step, program=program), mesh)
    train_state = _first_state(case, program, mesh)
    steps = [_batch(case, number, program) for number in range(args["steps"])]
    losses = []
    for batch in steps:
        train_state, metrics = run_step(train_state, partition.put_batch(batch, mesh))
        losses.append(float(metrics.loss_sum / metrics.num_queries))
    golden_runners.close(losses, case["out.losses"], _LOSSES, "losses")
    last = case.group(f"w{args['steps']}")
    named = reference_weights.from_params(train_state.params)
    for name, value in last.items():
        if name in named:
            golden_runners.close(named[name], value, _WEIGHTS, name)
    sums = reference_weights.embedding_tables(case.group(f"acc{args['steps']}"))
    for name, value in reference_weights.embedding_tables(last).items():
        rows = _rows(program.spec(name))
        table = train_state.tables[name]
        golden_runners.close(table.weights[rows], value, _WEIGHTS, name)
        golden_runners.close(
            table.slots["accumulator"][rows], sums[name], _ROW_SUMS, f"sums of {name}"
        )


def _config(case) -> schema.Config:
    """The recorded model, features and optimizers as a configuration of ours."""
    text = golden_fields.parse_text(case.args["config"])
    groups = {
        group["group_name"][0]: tuple(group["feature_names"]) for group in text["feature_groups"]
    }
    tables = reference_weights.embedding_tables(case.group("w0"))

    def feature(name):
        table = "video_id_emb" if name in (_HISTORY, _CANDIDATE) else f"{name}_emb"
        rows, dim = tables[table].shape
        return schema.IdFeature(num_buckets=rows, embedding_dim=dim, embedding_name=table)

    names = (*groups.get("contextual", ()), *groups["uih"], *groups["candidate"])
    args = case.args
    beta1, beta2 = args["betas"]
    return schema.Config(
        features={name: feature(name) for name in names},
        feature_groups=groups,
        model=golden_model_runners.model_config(args["config"]),
        loss=schema.LossConfig(log_q_correction=False),
        train=train_schema.TrainConfig(
            num_steps=args["steps"],
            dense_optimizer=train_schema.DenseOptimizerConfig(
                lr=args["lr_dense"], beta1=beta1, beta2=beta2, eps=args["adam_eps"]
            ),
            sparse_optimizer=train_schema.SparseOptimizerConfig(lr=args["lr_sparse"]),
        ),
    )


def _rows(spec):
    ids = jnp.arange(spec.num_rows)
    return np.asarray(table_spec.rows_of(spec, ids, ids >= 0))


def _first_state(case, program, mesh):
    weights = case.group("w0")
    model = program.model
    like = jax.eval_shape(lambda key: step.match.init_params(model, key), jax.random.key(0))
    params = reference_weights.to_params(weights, like=like)
    tables = {}
    split = partition.split_sharding(mesh)
    for name, table in reference_weights.embedding_tables(weights).items():
        spec = program.spec(name)
        rows = np.zeros((spec.padded_rows, spec.dim), np.float32)
        rows[_rows(spec)] = table
        sums = np.zeros(spec.padded_rows, np.float32)
        tables[name] = jax.device_put(update.TableState(rows, {"accumulator": sums}), split)
    return state.init_state(
        {"params": params, "batch_stats": {}},
        optimizer=program.optimizer,
        tables=tables,
        replicated=partition.replicated_sharding(mesh),
        has_ema=False,
    )


@dataclasses.dataclass(frozen=True)
class _Queries:
    """A recorded batch, every query with its own history; sizes common to all steps."""

    user: np.ndarray  # [Q] recorded user
    history: np.ndarray  # token numbers of the recorded history, query after query
    lengths: np.ndarray  # [Q] tokens, contextual ones included


def _queries(case, number, contextual_len) -> _Queries:
    uih_lengths = case[f"step{number}.uih_lengths"]
    pos_lengths = case[f"step{number}.pos_lengths"]
    user = np.repeat(np.arange(len(pos_lengths)), pos_lengths)
    first = np.cumsum(uih_lengths) - uih_lengths
    history = [first[u] + np.arange(uih_lengths[u]) for u in user]
    return _Queries(user, np.concatenate(history), uih_lengths[user] + contextual_len)


def _batch(case, number, program):
    """The batch of a step, padded to the largest step so that all compile once."""
    contextual = program.config.feature_groups.get("contextual", ())
    every = [_queries(case, n, len(contextual)) for n in range(case.args["steps"])]
    num_queries = max(len(queries.user) for queries in every)
    row_len = max(int(queries.lengths.max()) for queries in every) + 3
    queries = every[number]
    used = len(queries.user)
    placement = batches.place(
        queries.lengths.tolist(),
        row_len=row_len,
        packed=True,
        rule=program.model.user_tower.encoder.stack.layers[0].rule,
        num_rows=num_queries,
        num_users=num_queries,
    )
    recorded = case.group(f"step{number}")
    position = np.concatenate([np.arange(n) for n in queries.lengths])

    def per_token(values):
        full = np.zeros(len(position), values.dtype)
        full[position >= len(contextual)] = values[queries.history].reshape(-1)
        return full

    def per_query(values):
        return np.concatenate([values, np.zeros(num_queries - used, values.dtype)])[None]

    query_time = recorded["query_time"][queries.user] if "query_time" in recorded else None
    no_watch_time = np.zeros_like(recorded["uih_action"])
    batch = batches.make_batch(
        placement,
        action=per_token(recorded["uih_action"]),
        watch_time_s=per_token(recorded.get("uih_watchtime", no_watch_time)),
        time_gap_s=golden_runners.time_gaps(
            per_token(recorded["uih_timestamp"]), query_time, queries.lengths
        ),
        num_users=used,
        num_queries=num_queries,
    )
    items = recorded["cand_video_id"].astype(np.int32)
    history = per_token(recorded["uih_video_id"].astype(np.int32))
    user_ids = {name: recorded[name][queries.user].astype(np.int32) for name in contextual}
    hard_ids, hard_mask = _hard_negatives(case, number, items, used, num_queries)
    negative = items[used : len(items) - int(hard_mask.sum())]
    return dataclasses.replace(
        batch,
        history={_HISTORY: placement.to_grid(history)[None]},
        contextual={name: per_query(ids) for name, ids in user_ids.items()},
        positive={_CANDIDATE: per_query(items[:used])},
        positive_user=np.arange(num_queries, dtype=np.int32)[None],
        query_mask=(np.arange(num_queries) < used)[None],
        negative={_CANDIDATE: negative[None]},
        negative_log_q=np.zeros((1, len(negative)), np.float32),
        hard_negative={_CANDIDATE: hard_ids[None]},
        hard_negative_mask=hard_mask[None],
        hard_negative_log_q=np.zeros((1, *hard_mask.shape), np.float32),
    )


def _hard_negatives(case, number, items, used, num_queries):
    """Ids and mask [num_queries, Hn] of a step, Hn that of the step with the longest list."""
    names = [f"step{n}.hard_neg_indices" for n in range(case.args["steps"])]
    width = max((int(case[n][:, 1].max()) + 1 for n in names if n in case.arrays), default=0)
    ids = np.zeros((num_queries, width), np.int32)
    mask = np.zeros(ids.shape, bool)
    slots = golden_scoring.hard_slots(case.arrays.get(names[number]), used)
    if slots is not None:
        hard_items = items[len(items) - len(case[names[number]]) :]
        ids[:used, : slots.mask.shape[1]] = np.where(slots.mask, hard_items[slots.index], 0)
        mask[:used, : slots.mask.shape[1]] = slots.mask
    return ids, mask
