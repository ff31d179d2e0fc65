"""What a step reports: sums over the queries of the whole global batch, and their weights.

Used by `step.py`, which makes the scores; means and rates are made on the host (`log_window.py`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hstu_jax.config import schema
from hstu_jax.features import batch as batch_lib
from hstu_jax.losses import query_softmax, same_item, sampled_softmax
from hstu_jax.metrics import ranking
from hstu_jax.training import partition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Sums of one step over the whole global batch. Fields are `Any`: such trees hold specs too.

    Attributes:
        loss_sum: sum of the queries' losses; with sample weights their weighted mean times the
            number of queries, so that a mean over steps counts queries.
        num_queries: number of queries (positives).
        num_users: number of users.
        num_tokens: token slots in use, contextual ones included.
        recall_hits: [len(recall_at_k)] queries whose positive is among the k best.
        num_not_finite: values of the gradients that are not finite; 0 in evaluation.
        exchange_overflow: ids that had to wait for a second round of the exchange between devices.
    """

    loss_sum: Any
    num_queries: Any
    num_users: Any
    num_tokens: Any
    recall_hits: Any
    num_not_finite: Any
    exchange_overflow: Any


def query_weight(config: schema.Config, batch: batch_lib.Batch) -> Float[Array, "G Q"] | None:
    """The weight of each query's user, or None where none are configured."""
    if not config.data.sample_weight_fields:
        return None
    return jnp.take_along_axis(batch.sample_weight, batch.positive_user, axis=1)


def items_to_tell_apart(
    config: schema.Config, batch: batch_lib.Batch
) -> dict[str, same_item.ItemValues]:
    """What a loss needs to leave out of the negatives what is a positive of the query or user.

    The losses of users need it with shared negatives only: else their groups' draws, those of an
    evaluation too, leave out the group's positives.
    """
    if batch.query_slot is None and config.data.negative_sharing == "none":
        return {}
    if config.data.negative_sampler.exclusion == "group":
        return {}
    return {"positive_item": batch.positive, "negative_item": batch.negative}


def total_weight(config: schema.Config, batch: batch_lib.Batch) -> Float[Array, ""]:
    """Sum of the weights of all queries of the whole mesh: their number without weights."""
    weight = query_weight(config, batch)
    if weight is None:
        weight = jnp.ones_like(batch.query_mask, dtype=jnp.float32)
    return jax.lax.psum(jnp.sum(jnp.where(batch.query_mask, weight, 0)), partition.AXES)


def sums(
    config: schema.Config,
    scores: sampled_softmax.SampledSoftmax | query_softmax.QuerySoftmax,
    batch: batch_lib.Batch,
    *,
    num_not_finite: Float[Array, ""],
    num_waiting: Int[Array, ""],
) -> StepMetrics:
    """Sums over the whole mesh; `num_waiting` is this device's, from `step.fetch`."""
    cutoffs = config.metrics.recall_at_k
    if isinstance(scores, query_softmax.QuerySoftmax):
        hits, num_queries = ranking.hits_of_counts(
            scores.num_ahead,
            positive_scores=scores.positive_scores,
            query_mask=batch.query_mask,
            cutoffs=cutoffs,
        )
    else:
        negatives = [scores.negative_scores, scores.hard_negative_scores]
        hits, num_queries = ranking.sampled_hits(
            positive_scores=scores.positive_scores,
            negative_scores=jnp.concatenate(negatives, axis=-1),
            positive_user=batch.positive_user,
            query_mask=batch.query_mask,
            cutoffs=cutoffs,
        )
    found = StepMetrics(
        loss_sum=scores.loss_sum,
        num_queries=num_queries,
        num_users=jnp.sum(batch.user_mask, dtype=jnp.float32),
        num_tokens=jnp.sum(batch.segment_lengths).astype(jnp.float32),
        recall_hits=hits,
        num_not_finite=num_not_finite,
        exchange_overflow=num_waiting.astype(jnp.float32),
    )
    found = jax.lax.psum(found, partition.AXES)
    if not config.data.sample_weight_fields:
        return found
    total = total_weight(config, batch)
    mean = found.loss_sum / jnp.where(total > 0, total, 1.0)
    return dataclasses.replace(found, loss_sum=mean * found.num_queries)
