"""Scores, loss and recall of recorded cases: `sim_with_sampler`, and the same end of whole models.

Recorded hard negatives belong to queries, with any list for any of them; ours belong to users.
Where a case has some, every query gets a user slot of its own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.losses import sampled_softmax
from hstu_jax.metrics import ranking
from tests import golden_cases, golden_runners

_SIMILARITY = (1e-4, 1e-5)
_LOSS = (1e-6, 1e-5)
GRADIENT = (1e-3, 1e-3)
_CUTOFFS = (1, 5)


@dataclasses.dataclass(frozen=True)
class HardSlots:
    """Which hard negative is at which place of a query's list.

    Attributes:
        index: [Q, Hn] number of the hard negative; 0 where masked.
        mask: [Q, Hn] places that are taken.
    """

    index: np.ndarray
    mask: np.ndarray


def hard_slots(indices: np.ndarray | None, num_queries: int) -> HardSlots | None:
    """The places of recorded (query, ordinal) pairs; None without hard negatives."""
    if indices is None:
        return None
    assert len(np.unique(indices, axis=0)) == len(indices), "a place is taken twice"
    index = np.zeros((num_queries, int(indices[:, 1].max()) + 1), np.int32)
    mask = np.zeros(index.shape, bool)
    index[indices[:, 0], indices[:, 1]] = np.arange(len(indices))
    mask[indices[:, 0], indices[:, 1]] = True
    return HardSlots(index, mask)


def score(user, positive, negative, hard_items, *, positive_user, hard, temperature, user_weight):
    """`sampled_softmax` of one group of recorded vectors, without log q.

    Args:
        user: [B, E].
        positive: [Q, E].
        negative: [M, E].
        hard_items: [number of hard negatives, E].
        positive_user: [Q] user of each query.
        hard: from `hard_slots`.
        temperature: of the case.
        user_weight: [B] sample weights, or None.
    """
    num_queries = len(positive)
    zeros = jnp.zeros((1, num_queries))
    slots = positive_user
    options = {}
    if user_weight is not None:
        options["query_weight"] = jnp.asarray(user_weight)[positive_user][None]
    if hard is not None:
        user, slots = user[positive_user], np.arange(num_queries)
        options["hard"] = sampled_softmax.HardNegatives(
            vectors=jnp.where(hard.mask[..., None], hard_items[hard.index], jnp.nan)[None],
            mask=jnp.asarray(hard.mask)[None],
            log_q=jnp.zeros(hard.mask.shape)[None],
        )
    return sampled_softmax.sampled_softmax(
        user=user[None],
        positive=positive[None],
        negative=negative[None],
        positive_user=jnp.asarray(slots)[None],
        query_mask=zeros == 0,
        positive_log_q=zeros,
        negative_log_q=jnp.zeros((1, len(negative))),
        temperature=temperature,
        log_q_correction=False,
        **options,
    )


def check_scores(case, scores, loss, *, positive_user, hard, metric):
    """Similarity matrix, loss and recall of `score`."""
    slots = positive_user if hard is None else np.arange(len(positive_user))
    negative_scores = jnp.concatenate([scores.negative_scores, scores.hard_negative_scores], -1)
    similarity = np.concatenate(
        [np.asarray(scores.positive_scores[0])[:, None], np.asarray(negative_scores[0])[slots]],
        axis=1,
    )
    recorded = case["out.similarity"]
    assert similarity.shape == recorded.shape
    is_there = np.isfinite(similarity)
    assert (recorded[~is_there] < -1e30).all(), "a hard negative is missing"
    golden_runners.close(similarity[is_there], recorded[is_there], _SIMILARITY, "similarity")
    golden_runners.close(loss, case["out.loss"], _LOSS, "loss")
    hits, num_queries = ranking.sampled_hits(
        positive_scores=scores.positive_scores,
        negative_scores=negative_scores,
        positive_user=jnp.asarray(slots)[None],
        query_mask=jnp.ones((1, len(slots)), bool),
        cutoffs=_CUTOFFS,
    )
    for cutoff, count in zip(_CUTOFFS, hits, strict=True):
        name = f"out.{metric}{cutoff}"
        golden_runners.close(count / num_queries, case[name], (1e-7, 1e-6), name)


def run_scores(case: golden_cases.Case) -> None:
    """Family F: `sim_with_sampler`."""
    pos_lengths = case["in.pos_lengths"]
    num_queries, num_negatives = int(pos_lengths.sum()), case.args["num_sampled_neg"]
    positive_user = np.repeat(np.arange(len(pos_lengths)), pos_lengths)
    hard = hard_slots(case.arrays.get("in.hard_neg_indices"), num_queries)

    def fn(user, items):
        scores = score(
            user,
            items[:num_queries],
            items[num_queries : num_queries + num_negatives],
            items[num_queries + num_negatives :],
            positive_user=positive_user,
            hard=hard,
            temperature=case.args["temperature"],
            user_weight=None,
        )
        return scores.loss_sum / scores.count, scores

    user, items = jnp.asarray(case["in.user_emb"]), jnp.asarray(case["in.item_emb"])
    step = jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))
    (loss, scores), grads = step(user, items)
    check_scores(case, scores, loss, positive_user=positive_user, hard=hard, metric="recall_at_")
    golden_runners.close(grads[0], case["grad_in.user_emb"], GRADIENT, "grad_in.user_emb")
    golden_runners.close(grads[1], case["grad_in.item_emb"], GRADIENT, "grad_in.item_emb")
