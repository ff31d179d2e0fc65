"""One training step and the evaluation forwards, written for one shard of the mesh.

    ids -> unique rows -> fetch -> [ expand -> model -> loss ] -> gradients -> updates

The part in brackets is differentiated, with respect to the dense parameters and the fetched rows,
never to a table. `partition.py` places these functions on the mesh; collectives name its axes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Num

from hstu_jax.config import schema, train_schema
from hstu_jax.features import batch as batch_lib
from hstu_jax.losses import query_softmax, sampled_softmax
from hstu_jax.model import feature_lookup, match
from hstu_jax.tables import exchange, lookup, optimizers, update
from hstu_jax.tables import spec as table_spec
from hstu_jax.training import gradients as gradients_lib
from hstu_jax.training import optimizer as optimizer_lib
from hstu_jax.training import partition, schedules, shared_negatives, state, step_metrics
from hstu_jax.training.step_metrics import StepMetrics


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static about a run's steps.

    Attributes:
        config: the run's configuration.
        model: both towers.
        plan: which ids go to which table.
        specs: the embedding tables.
        optimizer: of the dense parameters.
        table_rule: optimizer of the tables.
        run_length: what the schedules know of the run.
        is_ragged: the exchange sends filled places only (`partition.is_ragged`), of which tables
            `sends_filled` tells.
    """

    config: schema.Config
    model: match.HstuMatch
    plan: feature_lookup.LookupPlan
    specs: tuple[table_spec.TableSpec, ...]
    optimizer: optax.GradientTransformation
    table_rule: optimizers.Rule
    run_length: schedules.RunLength
    is_ragged: bool = False

    def spec(self, table: str) -> table_spec.TableSpec:
        """The table of that name."""
        return next(spec for spec in self.specs if spec.name == table)

    def sends_filled(self, table: str) -> bool:
        """Whether a table's exchange sends filled places only.

        By "auto" it does for widths of a multiple of 128: a TPU's ragged operation pads others to
        that, which takes away what it saves.
        """
        is_asked_for = self.config.mesh.exchange == "ragged"
        return self.is_ragged and (is_asked_for or self.spec(table).dim % 128 == 0)


def make_program(
    config: schema.Config, *, run_length: schedules.RunLength, is_ragged: bool = False
) -> Program:
    """The steps of a configuration; arguments as in `Program`."""
    features = config.all_features
    specs = {
        table: table_spec.TableSpec(
            name=table,
            num_rows=features[name].num_ids,
            dim=features[name].embedding_dim,
            init_bound=features[name].init_bound,
        )
        for name, table in config.embedding_names.items()
    }
    return Program(
        config=config,
        model=match.build_model(
            config.model, features, config.feature_groups, axis_names=partition.AXES
        ),
        plan=feature_lookup.make_plan(config),
        specs=tuple(specs.values()),
        optimizer=optimizer_lib.dense_optimizer(config.train.dense_optimizer, run=run_length),
        table_rule=table_rule(config.train.sparse_optimizer),
        run_length=run_length,
        is_ragged=is_ragged,
    )


def table_rule(config: train_schema.SparseOptimizerConfig) -> optimizers.Rule:
    """The tables' optimizer of a configuration."""
    if config.kind == "sgd":
        return optimizers.Sgd()
    if config.kind == "adagrad":
        return optimizers.Adagrad(config.initial_accumulator_value)
    if config.kind == "rowwise_adagrad":
        return optimizers.RowwiseAdagrad(config.weight_decay, config.weight_decay_mode)
    return optimizers.Adam(
        beta1=config.beta1,
        beta2=config.beta2,
        weight_decay=config.weight_decay,
        is_rowwise=config.kind == "partial_rowwise_adam",
    )


def train_step(
    train_state: state.TrainState,
    batch: batch_lib.Batch | tuple[batch_lib.Batch, ...],
    *,
    program: Program,
) -> tuple[state.TrainState, StepMetrics]:
    """One optimizer step on this shard's groups and table rows.

    The loss is the sum over all queries of the global batch over their number, whatever the number
    of devices; with sample weights sum(weight * loss) / sum(weight), and 0 where that sum is 0. The
    metrics count every query alike. With `gradient_accumulation_steps` n the step takes n batches:
    mode "mean" divides by the queries (or weights) of all of them, "sum" adds the n losses, each
    over its own number.

    Args:
        train_state: this shard's state; donate it.
        batch: this shard's groups; a tuple of n batches with accumulation.
        program: static.

    Returns:
        The new state, and sums over the whole mesh.
    """
    train, axes, first = program.config.train, partition.AXES, train_state.step
    found, tables = _step_gradients(program, train_state, batch)
    param_grads = gradients_lib.clip(jax.lax.psum(found.params, axes), train.grad_clipping)
    updates, opt_state = program.optimizer.update(
        param_grads, train_state.opt_state, train_state.params
    )
    params = optax.apply_updates(train_state.params, updates)
    new_state = state.TrainState(
        step=first + 1,
        params=params,
        opt_state=opt_state,
        tables=update_tables(program, tables, found.rows, step=first, iteration=first + 1),
        batch_stats=found.batch_stats,
        ema=gradients_lib.average(train_state.ema, params, train.dense_optimizer.ema, step=first),
    )
    return new_state, found.metrics


def _step_gradients(program, train_state, batch) -> tuple[gradients_lib.BatchGradients, Any]:
    """Gradients of all batches of a step; the tables, which `table_updates` "batch" changes."""
    train, first = program.config.train, train_state.step
    num_batches, tables = train.gradient_accumulation_steps, train_state.tables
    if num_batches == 1:
        total = step_metrics.total_weight(program.config, batch)
        return batch_gradients(program, train_state, batch, number=first, divisor=total), tables
    total = None
    if train.gradient_accumulation_mode == "mean":
        total = sum(step_metrics.total_weight(program.config, each) for each in batch)

    def gradients_of(tables, batch_stats, each, number):
        return batch_gradients(
            program,
            dataclasses.replace(train_state, tables=tables, batch_stats=batch_stats),
            each,
            number=first * num_batches + number,
            divisor=step_metrics.total_weight(program.config, each) if total is None else total,
        )

    def update_now(tables, rows, number):
        iteration = first * num_batches + number + 1
        return update_tables(program, tables, rows, step=first, iteration=iteration)

    return gradients_lib.accumulate(
        gradients_of,
        batch,
        tables,
        train_state.batch_stats,
        update_tables=update_now if train.table_updates == "batch" else None,
    )


def compute_dtype(config: schema.Config) -> jnp.dtype:
    """In which the towers compute training batches."""
    return jnp.dtype("bfloat16" if config.train.mixed_precision == "BF16" else "float32")


def batch_gradients(
    program: Program,
    train_state: state.TrainState,
    batch: batch_lib.Batch,
    *,
    number: Int[Array, ""],
    divisor: Float[Array, ""],
) -> gradients_lib.BatchGradients:
    """Gradients of one batch on this shard; not yet summed over the mesh.

    Args:
        program: static.
        train_state: this shard's parameters and tables.
        batch: this shard's groups.
        number: of the batch in the run, from 0; keys dropout.
        divisor: what the loss sum of the whole mesh is divided by; the loss is 0 where this is 0.
    """
    sparse = program.config.train.sparse_optimizer
    table_ids = feature_lookup.batch_ids(program.plan, batch)
    unique, picked, num_waiting = fetch(program, train_state, table_ids)
    dropout_key = jax.random.fold_in(jax.random.key(program.config.seed), number)

    def global_loss(params, picked):
        max_gradient = sparse.max_gradient if sparse.gradient_clipping else None
        vectors = {
            table: lookup.expand(rows, unique[table], max_gradient=max_gradient)
            for table, rows in picked.items()
        }
        inputs = feature_lookup.to_lookups(program.plan, batch, vectors)
        # The model computes in the dtype of its inputs; gradients of rows are float32 again.
        inputs = jax.tree.map(lambda x: x.astype(compute_dtype(program.config)), inputs)
        towers, changed = program.model.apply(
            train_state.variables(params), inputs, batch, dropout_key, mutable=["batch_stats"]
        )
        scores = score(program, towers, batch)
        loss = scores.loss_sum / jnp.where(divisor > 0, divisor, 1.0)
        return loss, (scores, changed.get("batch_stats", {}))

    (_, (scores, batch_stats)), (param_grads, row_grads) = jax.value_and_grad(
        global_loss, argnums=(0, 1), has_aux=True
    )(train_state.params, picked)
    num_not_finite = sum(
        jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32)
        for leaf in jax.tree.leaves((param_grads, row_grads))
    )
    return gradients_lib.BatchGradients(
        params=param_grads,
        rows={table: (unique[table], row_grads[table]) for table in row_grads},
        metrics=step_metrics.sums(
            program.config,
            scores,
            batch,
            num_not_finite=num_not_finite,
            num_waiting=num_waiting,
        ),
        batch_stats=batch_stats,
    )


def update_tables(
    program: Program,
    tables: Mapping[str, update.TableState],
    rows: Mapping[str, tuple[lookup.UniqueRows, Float[Array, "capacity dim"]]],
    *,
    step: Int[Array, ""],
    iteration: Int[Array, ""],
) -> dict[str, update.TableState]:
    """Tables after an update of the rows that have gradients.

    Args:
        program: static.
        tables: this shard's tables.
        rows: table -> its rows and their gradients on this shard.
        step: completed optimizer steps, for the learning rate.
        iteration: number of this update, from 1.
    """
    sparse = program.config.train.sparse_optimizer
    rate = schedules.learning_rate(
        sparse.learning_rate, base=sparse.lr, run=program.run_length, step=step
    )
    updated = {
        table: exchange.apply(
            tables[table],
            unique,
            gradients,
            axis_names=partition.AXES,
            slack=program.config.mesh.exchange_slack,
            host_slack=program.config.mesh.host_exchange_slack,
            is_ragged=program.sends_filled(table),
            rule=program.table_rule,
            learning_rate=rate,
            iteration=iteration,
        )
        for table, (unique, gradients) in rows.items()
    }
    return {**tables, **updated}


def eval_step(
    train_state: state.TrainState, batch: batch_lib.Batch, *, program: Program
) -> tuple[StepMetrics, Float[Array, "G U E"]]:
    """A batch without dropout: sums over the whole mesh, and this shard's user vectors.

    User vectors are zeros in unused slots.
    """
    table_ids = feature_lookup.batch_ids(program.plan, batch)
    unique, picked, num_waiting = fetch(program, train_state, table_ids)
    vectors = {table: lookup.expand(rows, unique[table]) for table, rows in picked.items()}
    inputs = feature_lookup.to_lookups(program.plan, batch, vectors)
    towers = program.model.apply(train_state.variables(), inputs, batch)
    scores = score(program, towers, batch)
    metrics = step_metrics.sums(
        program.config,
        scores,
        batch,
        num_not_finite=jnp.float32(0),
        num_waiting=num_waiting,
    )
    return metrics, towers.user


def item_step(
    train_state: state.TrainState,
    items: tuple[dict[str, Num[Array, "N"]], Bool[Array, "N"]],
    *,
    program: Program,
) -> Float[Array, "N E"]:
    """Item vectors of candidate feature ids; anything where not valid.

    Args:
        train_state: this shard's state.
        items: (candidate feature -> values, valid) of this shard's items.
        program: static.
    """
    ids, valid = items
    table_ids = feature_lookup.item_ids(program.plan, ids, valid)
    unique, picked, _ = fetch(program, train_state, table_ids)
    vectors = {table: lookup.expand(rows, unique[table]) for table, rows in picked.items()}
    embeddings = feature_lookup.to_item_inputs(program.plan, vectors, ids)
    return program.model.apply(train_state.variables(), embeddings, method="item")


def score(
    program: Program, towers: match.Towers, batch: batch_lib.Batch
) -> sampled_softmax.SampledSoftmax | query_softmax.QuerySoftmax:
    """Loss sum and scores of both towers' vectors: of users, or of queries that have their own."""
    config, is_shared = program.config, program.config.data.negative_sharing == "all"
    arguments = dict(
        positive=towers.positive,
        negative=towers.negative,
        query_mask=batch.query_mask,
        positive_log_q=batch.positive_log_q,
        negative_log_q=batch.negative_log_q,
        query_weight=step_metrics.query_weight(config, batch),
        **step_metrics.items_to_tell_apart(config, batch),
    )
    if batch.query_slot is not None:
        loss = query_softmax.query_softmax
        arguments |= dict(query=towers.user)
    else:
        loss = sampled_softmax.sampled_softmax
        hard = sampled_softmax.HardNegatives(
            vectors=towers.hard_negative,
            mask=batch.hard_negative_mask,
            log_q=batch.hard_negative_log_q,
        )
        arguments |= dict(user=towers.user, positive_user=batch.positive_user, hard=hard)
    if is_shared:
        arguments = shared_negatives.share(arguments)
    scores = loss(
        **arguments,
        temperature=config.model.temperature,
        log_q_correction=config.loss.log_q_correction,
    )
    return shared_negatives.per_group(scores, groups=len(batch.query_mask)) if is_shared else scores


def fetch(
    program: Program,
    train_state: state.TrainState,
    table_ids: Mapping[str, feature_lookup.TableIds],
) -> tuple[dict[str, lookup.UniqueRows], dict[str, Float[Array, "capacity dim"]], Int[Array, ""]]:
    """Unique rows of every table's ids, their values, and how many ids waited for a second round.

    The values may live anywhere on the mesh; the count is this device's.
    """
    unique, picked, num_waiting = {}, {}, jnp.int32(0)
    for table, occurrences in table_ids.items():
        spec = program.spec(table)
        rows = table_spec.rows_of(spec, occurrences.ids, occurrences.valid)
        unique[table] = lookup.unique_rows(
            rows, capacity=min(rows.shape[0], spec.padded_rows), sentinel=spec.padded_rows
        )
        picked[table], waiting = exchange.fetch(
            train_state.tables[table].weights,
            unique[table],
            axis_names=partition.AXES,
            slack=program.config.mesh.exchange_slack,
            host_slack=program.config.mesh.host_exchange_slack,
            is_ragged=program.sends_filled(table),
        )
        num_waiting += waiting
    return unique, picked, num_waiting
