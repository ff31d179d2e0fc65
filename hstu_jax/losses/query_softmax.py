"""Sampled softmax where every query has a vector of its own: the loss of the next-item objective.

The formula is that of `sampled_softmax.py`; what differs is that no two queries share their scores,
so `[Q, M]` scores are needed, and they are never kept: a block of queries at a time is scored, and
its gradient is taken in the same pass. One exp per score and three products, forward and backward.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hstu_jax.losses import same_item, sampled_softmax
from hstu_jax.losses.same_item import ItemValues

# Scores of a block, over all groups: 4 MiB, which stays in a CPU's cache between its uses.
_BLOCK_SCORES = 2**20
_PRECISE = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuerySoftmax:
    """Sums and scores of one shard. Fields are `Any`: trees of this shape also hold specs.

    Attributes:
        loss_sum: [] sum of (weighted) losses of the queries in use; the only field with a gradient.
        positive_scores: [G, Q] <query, positive> / temperature, no correction; 0 where masked.
        num_ahead: [G, Q] negatives that do not score below the positive; anything where masked.
    """

    loss_sum: Any
    positive_scores: Any
    num_ahead: Any


def query_softmax(
    *,
    query: Float[Array, "G Q E"],
    positive: Float[Array, "G Q E"],
    negative: Float[Array, "G M E"],
    query_mask: Bool[Array, "G Q"],
    positive_log_q: Float[Array, "G Q"],
    negative_log_q: Float[Array, "G M"],
    temperature: float,
    log_q_correction: bool,
    query_weight: Float[Array, "G Q"] | None = None,
    positive_item: ItemValues | None = None,
    negative_item: ItemValues | None = None,
    block_scores: int = _BLOCK_SCORES,
) -> QuerySoftmax:
    """Loss sum of sampled softmax with the positive as the right class.

    score = <query, item> / temperature, z = score - log q (or score, without the correction);
    loss[q] = log(exp(z_pos[q]) + sum_m exp(z_neg[q, m])) - z_pos[q].

    Args:
        query: user vectors at the queries, normalised by the caller if the similarity is cosine;
            masked slots may hold anything.
        positive: item vectors of the positives, likewise.
        negative: item vectors of the negatives, shared by the group; M may be 0, then losses are 0.
        query_mask: queries in use.
        positive_log_q: log of the probability with which the sampler draws the positive.
        negative_log_q: the same of each negative.
        temperature: above 0.
        log_q_correction: subtract log q.
        query_weight: weight of each query's loss, at least 0; None weighs all alike.
        positive_item: what the item tower reads of every positive, [G, Q, ...]; with
            `negative_item`, [G, M, ...]: a negative that is the same item as a query's positive is
            not among that query's negatives. None = the sampler has left such items out.
        negative_item: same.
        block_scores: scores of a block, about; changes memory, and sums only in their order.

    Returns:
        `QuerySoftmax`. With no query in use the sum is 0 and gradients are zero, not NaN.

    Raises:
        ValueError: temperature not above 0.
    """
    sampled_softmax.check_temperature(temperature)
    weight = sampled_softmax.loss_weight(query_mask, query_weight)
    positive_log_q = jnp.where(query_mask, positive_log_q, 0)
    if not log_q_correction:
        positive_log_q = jnp.zeros_like(positive_log_q)
        negative_log_q = jnp.zeros_like(negative_log_q)
    # Unused inputs are cut off here: 0 * NaN in a backward pass would reach the shared negatives.
    items = (positive_item or {}, negative_item or {})
    slot = jnp.arange(1, query_mask.shape[1] + 1, dtype=jnp.int32)
    num_used = jnp.max(jnp.where(query_mask, slot, 0), initial=0)
    loss_sum, scores, num_ahead = _total(
        jnp.where(query_mask[..., None], query, 0),
        jnp.where(query_mask[..., None], positive, 0),
        negative,
        (weight, positive_log_q, negative_log_q, *items, num_used),
        temperature,
        block_scores,
    )
    return QuerySoftmax(loss_sum=loss_sum, positive_scores=scores, num_ahead=num_ahead)


def looped_flops(
    *,
    groups: int,
    num_queries: int,
    num_negatives: int,
    width: int,
    block_scores: int = _BLOCK_SCORES,
) -> int:
    """Operations of the products in the loop over blocks, forward and backward, all queries in use.

    3 * 2 G Q M E: every score, and its part of the query's and of the negative's gradient. They are
    float32 products of full precision. Who counts the products of a traced program does not find
    them, since the loop's length is data; 0 where all queries fit one block: then there is no loop.
    """
    if _largest_block(groups, num_negatives, block_scores) >= num_queries:
        return 0
    return 3 * 2 * groups * num_queries * num_negatives * width


def _largest_block(groups, num_negatives, block_scores) -> int:
    return max(block_scores // max(groups * num_negatives, 1), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _total(query, positive, negative, constants, temperature, block_scores):
    """Loss sum, scores of the positives and how many negatives reach them."""
    terms, _ = _scan_blocks(query, positive, negative, constants, temperature, block_scores)
    return jnp.sum(terms.loss), terms.score, terms.num_ahead


def _total_forward(query, positive, negative, constants, temperature, block_scores):
    # The loss sum is linear in the queries' losses, so gradients are ready but for a factor.
    terms, to_negative = _scan_blocks(
        query, positive, negative, constants, temperature, block_scores, with_gradients=True
    )
    out = (jnp.sum(terms.loss), terms.score, terms.num_ahead)
    to_negative = jnp.swapaxes(to_negative, 1, 2)
    return out, (terms.to_query, terms.to_positive, to_negative, constants)


def _total_backward(temperature, block_scores, saved, cotangents):
    del temperature, block_scores
    *gradients, constants = saved
    zeros = jax.tree.map(_no_gradient, constants)
    return *(cotangents[0] * gradient for gradient in gradients), zeros


def _no_gradient(x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.zeros_like(x) if is_float else np.zeros(x.shape, jax.dtypes.float0)


_total.defvjp(_total_forward, _total_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Terms:
    """What a block gives for each of its queries: [G, q], the gradients [G, q, E] or None."""

    loss: Any
    score: Any
    num_ahead: Any
    to_query: Any = None
    to_positive: Any = None


def _scan_blocks(
    query, positive, negative, constants, temperature, block_scores, *, with_gradients=False
):
    """`_Terms` of all queries and the negatives' gradient, [G, E, M] or None, block by block."""
    weight, positive_log_q, negative_log_q, positive_item, negative_item, num_used = constants
    groups, num_queries, _ = query.shape
    run = functools.partial(
        _block,
        negative=negative,
        negative_log_q=negative_log_q,
        negative_item=negative_item,
        temperature=temperature,
        with_gradients=with_gradients,
    )
    rows = (query, positive, weight, positive_log_q, positive_item)
    # The sum over queries is a product of rows with rows if they also lie the other way round: the
    # product of columns takes a CPU two to three times as long. Not made without gradients.
    columns = jnp.swapaxes(query, 1, 2)
    largest = _largest_block(groups, negative.shape[1], block_scores)
    if largest >= num_queries:
        return run(*rows, columns)
    num_blocks = -(-num_queries // largest)
    size = -(-num_queries // num_blocks)
    padding = num_blocks * size - num_queries
    rows = jax.tree.map(lambda x: _pad(x, 1, padding), rows)
    columns = _pad(columns, 2, padding)

    def one_block(index):
        block = jax.tree.map(lambda x: _cut(x, index * size, size, axis=1), rows)
        return run(*block, _cut(columns, index * size, size, axis=2))

    def step(index, carry):
        terms, to_negative = carry
        now, share = one_block(index)
        terms = jax.tree.map(
            lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, index * size, axis=1),
            terms,
            now,
        )
        return terms, jax.tree.map(jnp.add, to_negative, share)

    terms, to_negative = jax.eval_shape(one_block, jnp.int32(0))
    terms = jax.tree.map(
        lambda x: jnp.zeros((groups, num_blocks * size, *x.shape[2:]), x.dtype), terms
    )
    to_negative = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), to_negative)
    # The trip count is data: slots behind the last query cost nothing.
    num_steps = (num_used + size - 1) // size
    terms, to_negative = jax.lax.fori_loop(0, num_steps, step, (terms, to_negative))
    return jax.tree.map(lambda x: x[:, :num_queries], terms), to_negative


def _pad(x, axis, count):
    return jnp.pad(x, [(0, count if each == axis else 0) for each in range(x.ndim)])


def _cut(x, start, size, *, axis):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _block(
    query,
    positive,
    weight,
    positive_log_q,
    positive_item,
    columns,
    *,
    negative,
    negative_log_q,
    negative_item,
    temperature,
    with_gradients,
):
    """Losses of some queries and, with z = score - log q, o = log sum_m exp(z_m), c = weight
    sigmoid(o - z_pos), their gradients:

    d query = c (sum_m softmax(z)_m negative_m - positive) / temperature, d positive = -c query /
    temperature, d negative_m = sum over the queries of c softmax(z)_m query / temperature.
    """
    score = jnp.einsum("gqe,gqe->gq", query, positive, **_PRECISE) / temperature
    scores = jnp.einsum("gqe,gme->gqm", query, negative, **_PRECISE) / temperature
    is_ahead = ~(scores < score[..., None])  # NaN: not below
    logit, logits = score - positive_log_q, scores - negative_log_q[:, None]
    if positive_item:
        is_other = ~same_item.is_same_item(positive_item, negative_item)
        is_ahead &= is_other
        logits = jnp.where(is_other, logits, -jnp.inf)
    num_ahead = jnp.sum(is_ahead, axis=-1, dtype=jnp.int32)
    # A query may have no negative: an empty sum's logarithm.
    peak = jnp.max(logits, axis=-1, initial=-jnp.finfo(jnp.float32).max)
    share = jnp.exp(logits - peak[..., None])
    total = jnp.sum(share, axis=-1)
    divisor = jnp.where(total == 0, 1, total)  # NaN stays: it must reach the loss
    others = jnp.where(total == 0, -jnp.inf, peak + jnp.log(divisor))
    loss = weight * jax.nn.softplus(others - logit)
    if not with_gradients:
        return _Terms(loss, score, num_ahead), None
    factor = weight * jax.nn.sigmoid(others - logit) / temperature
    scaled = share * (factor / divisor)[..., None]
    to_query = jnp.einsum("gqm,gme->gqe", scaled, negative, **_PRECISE)
    to_negative = jnp.einsum("geq,gqm->gem", columns, scaled, **_PRECISE)
    terms = _Terms(
        loss=loss,
        score=score,
        num_ahead=num_ahead,
        to_query=to_query - factor[..., None] * positive,
        to_positive=-factor[..., None] * query,
    )
    return terms, to_negative
