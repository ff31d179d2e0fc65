"""Sampled softmax of positives against shared negatives and every user's own hard negatives.

Only scores, masks and the loss; which negatives are drawn is the pipeline's, ranking metrics are in
`hstu_jax.metrics.ranking`. Users are scored once against the negatives, `[G, U, M]` and
`[G, U, Hn]`; the matrix of queries by negatives is never made. The sums over devices and the
division are the training step's.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hstu_jax.losses import same_item
from hstu_jax.losses.same_item import ItemValues


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HardNegatives:
    """Every user's own negatives, shared by the user's queries. Fields are `Any`, as below.

    Attributes:
        vectors: [G, U, Hn, E] item vectors; anything where masked.
        mask: [G, U, Hn] the ones that are there.
        log_q: [G, U, Hn] log of the probability with which the sampler draws the item; anything
            where masked.
    """

    vectors: Any
    mask: Any
    log_q: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledSoftmax:
    """Sums and scores of one shard. Fields are `Any`: trees of this shape also hold specs.

    Attributes:
        loss_sum: [] sum of (weighted) losses of the queries in use.
        count: [] number of queries in use, or the sum of their weights.
        positive_scores: [G, Q] <user, positive> / temperature, no correction; 0 in masked queries.
        negative_scores: [G, U, M] <user, negative> / temperature, no correction; 0 for users
            without a query; minus infinity where the item is a positive of the user, if that was
            asked for.
        hard_negative_scores: [G, U, Hn] <user, hard negative> / temperature, no correction; minus
            infinity where there is none, so that it ranks before nothing.
    """

    loss_sum: Any
    count: Any
    positive_scores: Any
    negative_scores: Any
    hard_negative_scores: Any


def sampled_softmax(
    *,
    user: Float[Array, "G U E"],
    positive: Float[Array, "G Q E"],
    negative: Float[Array, "G M E"],
    positive_user: Int[Array, "G Q"],
    query_mask: Bool[Array, "G Q"],
    positive_log_q: Float[Array, "G Q"],
    negative_log_q: Float[Array, "G M"],
    temperature: float,
    log_q_correction: bool,
    query_weight: Float[Array, "G Q"] | None = None,
    hard: HardNegatives | None = None,
    positive_item: ItemValues | None = None,
    negative_item: ItemValues | None = None,
) -> SampledSoftmax:
    """Loss sum, query count and scores of sampled softmax with the positive as the right class.

    score = <user, item> / temperature, z = score - log q (or score, without the correction);
    loss[q] = log(exp(z_pos[q]) + sum_m exp(z_neg[user of q, m])
                  + sum_n exp(z_hard[user of q, n])) - z_pos[q],
    the last sum over the hard negatives that the user has.
    The mean over all devices is psum(loss_sum) / psum(count). The positive is corrected as well, so
    that equal log q everywhere changes nothing. A hard negative is not drawn from q, but it is
    corrected like the same item among the drawn ones: left alone it would stand lower than all
    others by -log q, about log(number of items), and would teach nothing.

    Args:
        user: user vectors, normalised by the caller if the similarity is cosine; unused slots and
            users without a query may hold anything.
        positive: item vectors of the positives; masked slots may hold anything.
        negative: item vectors of the negatives, shared by the group; M may be 0. A user without a
            negative of either kind has loss 0.
        positive_user: user slot of each query, 0..U-1; anything in range where masked.
        query_mask: queries in use.
        positive_log_q: log of the probability with which the sampler draws the positive.
        negative_log_q: the same of each negative.
        temperature: above 0.
        log_q_correction: subtract log q.
        query_weight: weight of each query's loss, at least 0; None weighs all alike.
        hard: hard negatives; None = there are none.
        positive_item: what the item tower reads of every positive, [G, Q, ...]; with
            `negative_item`, [G, M, ...]: a negative that is the same item as a positive of one of a
            user's queries is not among that user's negatives. None = the sampler has left such
            items out.
        negative_item: same.

    Returns:
        `SampledSoftmax`. With no query in use both sums are 0 and gradients are zero, not NaN.

    Raises:
        ValueError: temperature not above 0.

    Source: TorchEasyRec 1.3.16, tzrec/models/match_model.py and hstu.py. There each query repeats
    its user's scores and its own list of hard negatives, absent ones are scored -1e32 /
    temperature, and sample weights are per user row and fit only one query a row.
    """
    check_temperature(temperature)
    # Unused inputs are cut off here: 0 * NaN in a backward pass would reach the shared negatives.
    positive_user = jnp.where(query_mask, positive_user, 0)
    positive = jnp.where(query_mask[..., None], positive, 0)
    group = jnp.arange(user.shape[0])[:, None]
    has_query = jnp.zeros(user.shape[:2], bool).at[group, positive_user].max(query_mask)
    user = jnp.where(has_query[..., None], user, 0)

    # Full float32 products: logits reach 1 / temperature, and TF32 keeps 10 bits of them.
    precise = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    query = jnp.take_along_axis(user, positive_user[..., None], axis=1)
    positive_scores = jnp.einsum("gqe,gqe->gq", query, positive, **precise) / temperature
    negative_scores = jnp.einsum("gue,gme->gum", user, negative, **precise) / temperature

    if hard is None:
        hard = _no_hard_negatives(user)
    hard_vectors = jnp.where((hard.mask & has_query[..., None])[..., None], hard.vectors, 0)
    hard_scores = jnp.einsum("gue,guhe->guh", user, hard_vectors, **precise) / temperature

    positive_logits, negative_logits, hard_logits = positive_scores, negative_scores, hard_scores
    if log_q_correction:
        positive_logits = positive_logits - jnp.where(query_mask, positive_log_q, 0)
        negative_logits = negative_logits - negative_log_q[:, None, :]
        hard_logits = hard_logits - jnp.where(hard.mask, hard.log_q, 0)
    is_negative = None
    if positive_item:
        is_negative = ~same_item.positives_of_users(
            positive_item=positive_item,
            negative_item=negative_item,
            positive_user=positive_user,
            query_mask=query_mask,
            num_users=user.shape[1],
        )
        negative_scores = jnp.where(is_negative, negative_scores, -jnp.inf)
    others = _log_sum_of_negatives(negative_logits, is_negative, hard_logits, hard.mask)  # [G, U]
    others = jnp.take_along_axis(others, positive_user, axis=1)
    # log(exp(p) + exp(o)) - p, without the cancellation of a large p.
    loss = jax.nn.softplus(others - positive_logits)
    weight = loss_weight(query_mask, query_weight)
    return SampledSoftmax(
        loss_sum=jnp.sum(weight * jnp.where(query_mask, loss, 0)),
        count=jnp.sum(weight),
        positive_scores=positive_scores,
        negative_scores=negative_scores,
        hard_negative_scores=jnp.where(hard.mask, hard_scores, -jnp.inf),
    )


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless scores can be divided by it."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0; 0.05 is the seed's value.")


def loss_weight(
    query_mask: Bool[Array, "G Q"], query_weight: Float[Array, "G Q"] | None
) -> Float[Array, "G Q"]:
    """Weight of each query's loss: 0 where masked; None weighs all others alike."""
    if query_weight is None:
        return query_mask.astype(jnp.float32)
    return jnp.where(query_mask, query_weight, 0).astype(jnp.float32)


def _no_hard_negatives(user: Float[Array, "G U E"]) -> HardNegatives:
    groups, users, width = user.shape
    return HardNegatives(
        vectors=jnp.zeros((groups, users, 0, width), user.dtype),
        mask=jnp.zeros((groups, users, 0), bool),
        log_q=jnp.zeros((groups, users, 0)),
    )


def _log_sum_of_negatives(
    shared: Float[Array, "G U M"],
    shared_mask: Bool[Array, "G U M"] | None,
    own: Float[Array, "G U Hn"],
    own_mask: Bool[Array, "G U Hn"],
) -> Float[Array, "G U"]:
    """log(sum of exp) over a user's negatives of both kinds; minus infinity if there is none."""
    if shared_mask is None and own.shape[-1] == 0 and shared.shape[-1] > 0:
        return jax.nn.logsumexp(shared, axis=-1)
    if shared_mask is None:
        shared_mask = jnp.ones(shared.shape, bool)
    logits, mask = shared, shared_mask
    if own.shape[-1] > 0:  # jaxlib 0.11.2 crashes compiling joins with nothing, on several CPUs
        logits = jnp.concatenate([shared, own], axis=-1)
        mask = jnp.concatenate([shared_mask, own_mask], axis=-1)
    # A row without any negative is summed over zeros instead: log(0) has no gradient but NaN.
    is_some = mask.any(axis=-1)
    logits = jnp.where(mask, logits, jnp.where(is_some, -jnp.inf, 0)[..., None])
    if logits.shape[-1] == 0:
        return jnp.full(is_some.shape, -jnp.inf)
    return jnp.where(is_some, jax.nn.logsumexp(logits, axis=-1), -jnp.inf)
