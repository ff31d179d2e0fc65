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
from jaxtyping import Array, Bool, Float, Int

from hstu_jax.config import schema
from hstu_jax.features import batch as batch_lib
from hstu_jax.losses import sampled_softmax
from hstu_jax.metrics import ranking
from hstu_jax.model import feature_lookup, match
from hstu_jax.tables import exchange, lookup
from hstu_jax.tables import spec as table_spec
from hstu_jax.training import optimizer as optimizer_lib
from hstu_jax.training import partition, state


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static about a run's steps.

    Attributes:
        config: the run's configuration.
        model: both towers.
        plan: which ids go to which table.
        specs: the embedding tables.
        optimizer: of the dense parameters.
        num_steps: length of the run, for the schedules.
    """

    config: schema.Config
    model: match.HstuMatch
    plan: feature_lookup.LookupPlan
    specs: tuple[table_spec.TableSpec, ...]
    optimizer: optax.GradientTransformation
    num_steps: int

    def spec(self, table: str) -> table_spec.TableSpec:
        """The table of that name."""
        return next(spec for spec in self.specs if spec.name == table)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Sums of one step over the whole global batch. Fields are `Any`: such trees hold specs too.

    Attributes:
        loss_sum: sum of the queries' losses.
        num_queries: number of queries (positives).
        num_users: number of users.
        num_tokens: token slots in use, contextual ones included.
        recall_hits: [len(recall_at_k)] queries whose positive is among the k best.
        num_not_finite: values of the gradients that are not finite; 0 in evaluation.
    """

    loss_sum: Any
    num_queries: Any
    num_users: Any
    num_tokens: Any
    recall_hits: Any
    num_not_finite: Any


def make_program(config: schema.Config, *, num_steps: int) -> Program:
    """The steps of a configuration."""
    features, tables = config.features, config.embedding_names
    specs = {
        tables[name]: table_spec.TableSpec(
            name=tables[name],
            num_rows=feature.num_buckets,
            dim=feature.embedding_dim,
            init_bound=feature.init_bound,
        )
        for name, feature in features.items()
    }
    return Program(
        config=config,
        model=match.build_model(
            config.model, features, config.feature_groups, axis_names=partition.AXES
        ),
        plan=feature_lookup.make_plan(config),
        specs=tuple(specs.values()),
        optimizer=optimizer_lib.dense_optimizer(config.train.dense_optimizer, num_steps=num_steps),
        num_steps=num_steps,
    )


def train_step(
    train_state: state.TrainState, batch: batch_lib.Batch, *, program: Program
) -> tuple[state.TrainState, StepMetrics]:
    """One optimizer step on this shard's groups and table rows.

    The loss is the sum over all queries of the global batch over their number, whatever the number
    of devices.

    Args:
        train_state: this shard's state; donate it.
        batch: this shard's groups.
        program: static.

    Returns:
        The new state, and sums over the whole mesh.
    """
    config, axes = program.config, partition.AXES
    sparse = config.train.sparse_optimizer
    unique, picked = fetch(program, train_state, feature_lookup.batch_ids(program.plan, batch))
    num_queries = jax.lax.psum(jnp.sum(batch.query_mask, dtype=jnp.float32), axes)
    dropout_key = jax.random.fold_in(jax.random.key(config.seed), train_state.step)

    def global_loss(params, picked):
        max_gradient = sparse.max_gradient if sparse.gradient_clipping else None
        vectors = {
            table: lookup.expand(rows, unique[table], max_gradient=max_gradient)
            for table, rows in picked.items()
        }
        inputs = feature_lookup.to_lookups(program.plan, batch, vectors)
        towers, changed = program.model.apply(
            train_state.variables(params), inputs, batch, dropout_key, mutable=["batch_stats"]
        )
        scores = score(program, towers, batch)
        loss = scores.loss_sum / jnp.maximum(num_queries, 1.0)
        return loss, (scores, changed.get("batch_stats", {}))

    (_, (scores, batch_stats)), (param_grads, row_grads) = jax.value_and_grad(
        global_loss, argnums=(0, 1), has_aux=True
    )(train_state.params, picked)

    num_not_finite = sum(
        jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32)
        for leaf in jax.tree.leaves((param_grads, row_grads))
    )
    param_grads = jax.lax.psum(param_grads, axes)
    updates, opt_state = program.optimizer.update(
        param_grads, train_state.opt_state, train_state.params
    )
    rate = optimizer_lib.learning_rate(
        sparse.learning_rate, base=sparse.lr, num_steps=program.num_steps, step=train_state.step
    )
    tables = {
        table: exchange.apply(
            train_state.tables[table],
            unique[table],
            row_grads[table],
            axis_names=axes,
            learning_rate=rate,
        )
        for table in row_grads
    }
    new_state = state.TrainState(
        step=train_state.step + 1,
        params=optax.apply_updates(train_state.params, updates),
        opt_state=opt_state,
        tables={**train_state.tables, **tables},
        batch_stats=batch_stats,
    )
    metrics = _metrics(program, scores, batch, num_not_finite=num_not_finite)
    return new_state, jax.lax.psum(metrics, axes)


def eval_step(
    train_state: state.TrainState, batch: batch_lib.Batch, *, program: Program
) -> tuple[StepMetrics, Float[Array, "G U E"]]:
    """A batch without dropout: sums over the whole mesh, and this shard's user vectors.

    User vectors are zeros in unused slots.
    """
    unique, picked = fetch(program, train_state, feature_lookup.batch_ids(program.plan, batch))
    vectors = {table: lookup.expand(rows, unique[table]) for table, rows in picked.items()}
    inputs = feature_lookup.to_lookups(program.plan, batch, vectors)
    towers = program.model.apply(train_state.variables(), inputs, batch)
    scores = score(program, towers, batch)
    metrics = _metrics(program, scores, batch, num_not_finite=jnp.float32(0))
    return jax.lax.psum(metrics, partition.AXES), towers.user


def item_step(
    train_state: state.TrainState,
    items: tuple[dict[str, Int[Array, "N"]], Bool[Array, "N"]],
    *,
    program: Program,
) -> Float[Array, "N E"]:
    """Item vectors of candidate feature ids; anything where not valid.

    Args:
        train_state: this shard's state.
        items: (candidate feature -> ids, valid) of this shard's items.
        program: static.
    """
    ids, valid = items
    unique, picked = fetch(program, train_state, feature_lookup.item_ids(program.plan, ids, valid))
    vectors = {table: lookup.expand(rows, unique[table]) for table, rows in picked.items()}
    embeddings = feature_lookup.to_item_inputs(program.plan, vectors, num_items=valid.shape[0])
    return program.model.apply(train_state.variables(), embeddings, method="item")


def score(
    program: Program, towers: match.Towers, batch: batch_lib.Batch
) -> sampled_softmax.SampledSoftmax:
    """Loss sum and scores of both towers' vectors."""
    return sampled_softmax.sampled_softmax(
        user=towers.user,
        positive=towers.positive,
        negative=towers.negative,
        positive_user=batch.positive_user,
        query_mask=batch.query_mask,
        positive_log_q=batch.positive_log_q,
        negative_log_q=batch.negative_log_q,
        temperature=program.config.model.temperature,
        log_q_correction=program.config.loss.log_q_correction,
    )


def fetch(
    program: Program,
    train_state: state.TrainState,
    table_ids: Mapping[str, feature_lookup.TableIds],
) -> tuple[dict[str, lookup.UniqueRows], dict[str, Float[Array, "capacity dim"]]]:
    """Unique rows of every table's ids, and their values, wherever they live."""
    unique, picked = {}, {}
    for table, occurrences in table_ids.items():
        spec = program.spec(table)
        rows = table_spec.rows_of(spec, occurrences.ids, occurrences.valid)
        unique[table] = lookup.unique_rows(
            rows, capacity=min(rows.shape[0], spec.padded_rows), sentinel=spec.padded_rows
        )
        picked[table] = exchange.fetch(
            train_state.tables[table].weights, unique[table], axis_names=partition.AXES
        )
    return unique, picked


def _metrics(program, scores, batch, *, num_not_finite) -> StepMetrics:
    hits, num_queries = ranking.sampled_hits(
        positive_scores=scores.positive_scores,
        negative_scores=scores.negative_scores,
        positive_user=batch.positive_user,
        query_mask=batch.query_mask,
        cutoffs=program.config.metrics.recall_at_k,
    )
    return StepMetrics(
        loss_sum=scores.loss_sum,
        num_queries=num_queries,
        num_users=jnp.sum(batch.user_mask, dtype=jnp.float32),
        num_tokens=jnp.sum(batch.segment_lengths).astype(jnp.float32),
        recall_hits=hits,
        num_not_finite=num_not_finite,
    )
