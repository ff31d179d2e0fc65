"""Ranking metrics: sampled recall on the device, and means over users from ranks on the host.

Ties never help the model: an item with the same score as the positive counts as ranked before it.
Ranks over the whole catalogue are made in `catalogue.py`; the scores here come from
`hstu_jax.losses.sampled_softmax`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

CUTOFFS = (1, 5, 10, 50, 100)
_QUERY_BLOCK = 256


def sampled_hits(
    *,
    positive_scores: Float[Array, "G Q"],
    negative_scores: Float[Array, "G U M"],
    positive_user: Int[Array, "G Q"],
    query_mask: Bool[Array, "G Q"],
    cutoffs: tuple[int, ...],
) -> tuple[Float[Array, "k"], Float[Array, ""]]:
    """Hits and rows of recall@k among the positive and its group's negatives.

    A query is a hit at k if fewer than k negatives score at least as high as its positive.
    Recall@k over many batches and devices is sum of hits / sum of rows.

    Args:
        positive_scores: score of each query's positive.
        negative_scores: scores of the user slots against the negatives.
        positive_user: user slot of each query.
        query_mask: queries in use.
        cutoffs: the k, each at least 1.

    Returns:
        Hits per cutoff and the number of queries in use, as float32. A NaN score is no hit.

    Source: TorchEasyRec 1.3.16, tzrec/metrics/recall_at_k.py, where ties go as the sort leaves them
    (seen: in the model's favour).
    """
    num_groups, num_users, num_negatives = negative_scores.shape
    rows = negative_scores.reshape(num_groups * num_users, num_negatives)
    row = positive_user + num_users * jnp.arange(num_groups, dtype=jnp.int32)[:, None]

    def count_ahead(query):
        row, score = query
        return jnp.sum(~(rows[row] < score), dtype=jnp.int32)  # a NaN is not below

    # Counted, not sorted: a top_k of the negatives took 40 % of a training step on a CPU. In
    # blocks of queries: all rows at once would be the [Q, M] matrix that nobody stores.
    queries = (row.reshape(-1), positive_scores.reshape(-1))
    num_ahead = jax.lax.map(count_ahead, queries, batch_size=_QUERY_BLOCK)
    return hits_of_counts(
        num_ahead.reshape(positive_scores.shape),
        positive_scores=positive_scores,
        query_mask=query_mask,
        cutoffs=cutoffs,
    )


def hits_of_counts(
    num_ahead: Int[Array, "G Q"],
    *,
    positive_scores: Float[Array, "G Q"],
    query_mask: Bool[Array, "G Q"],
    cutoffs: tuple[int, ...],
) -> tuple[Float[Array, "k"], Float[Array, ""]]:
    """Hits per cutoff and rows, as `sampled_hits`, from negatives that are counted already.

    Args:
        num_ahead: negatives that do not score below each query's positive.
        positive_scores: of each query; NaN is no hit.
        query_mask: queries in use.
        cutoffs: the k, each at least 1.
    """
    is_query = query_mask & ~jnp.isnan(positive_scores)
    num_ahead = jnp.where(is_query, num_ahead, max(cutoffs))
    hits = [jnp.sum(num_ahead < cutoff, dtype=jnp.float32) for cutoff in cutoffs]
    return jnp.stack(hits), jnp.sum(query_mask, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class UserMetrics:
    """Metrics of every query-user that has a ranked positive.

    Attributes:
        values: "hit_rate@k", "recall@k", "ndcg@k" for every cutoff and "mrr" -> float64 per user.
        num_users: users with at least one ranked positive.
        num_positives: ranked positives.
    """

    values: dict[str, Float[np.ndarray, "users"]]
    num_users: int
    num_positives: int

    def means(self) -> dict[str, float]:
        """Mean of every metric over the users; NaN if there is none."""
        return {
            name: float(np.mean(value)) if value.size else float("nan")
            for name, value in self.values.items()
        }


def user_metrics(
    ranks: Int[np.ndarray, "positives"],
    offsets: Int[np.ndarray, "users_and_one"],
    *,
    cutoffs: tuple[int, ...] = CUTOFFS,
) -> UserMetrics:
    """Hit rate, recall, NDCG and MRR of every query-user from the ranks of its positives.

    With P ranked positives: hit_rate@k = any rank <= k; recall@k = found / P;
    ndcg@k = sum over found of 1 / log2(rank + 1), over the same of ranks 1..min(k, P);
    mrr = 1 / best rank.

    Args:
        ranks: 1 is best; 0 for positives that are not ranked and not counted.
        offsets: positives of query-user w are `offsets[w]:offsets[w + 1]`.
        cutoffs: the k, each at least 1.

    Returns:
        Values of the users that have a ranked positive, in order; the others are left out.
    """
    if ranks.size and ranks.min() < 0:
        raise ValueError(f"ranks={ranks.min()}: must be 1 or more, or 0 for a dropped positive.")
    user = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))[ranks > 0]
    ranks = ranks[ranks > 0]
    has_positive, user, num_positives = np.unique(user, return_inverse=True, return_counts=True)
    num_users = has_positive.size

    def total(per_positive):
        return np.bincount(user, weights=per_positive, minlength=num_users)

    discounts = 1.0 / np.log2(np.arange(max(cutoffs)) + 2.0)
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])
    values = {}
    for cutoff in cutoffs:
        found = total((ranks <= cutoff).astype(np.float64))
        values[f"hit_rate@{cutoff}"] = (found > 0).astype(np.float64)
        values[f"recall@{cutoff}"] = found / num_positives
        gains = np.where(ranks <= cutoff, 1.0 / np.log2(ranks + 1.0), 0.0)
        values[f"ndcg@{cutoff}"] = total(gains) / ideal[np.minimum(num_positives, cutoff)]
    best_rank = np.full(num_users, np.iinfo(np.int64).max)
    np.minimum.at(best_rank, user, ranks)
    values["mrr"] = 1.0 / best_rank
    return UserMetrics(values, int(num_users), int(ranks.size))


def bootstrap_interval(
    values: Float[np.ndarray, "users"],
    *,
    seed: int,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over users.

    Args:
        values: one value per user; users are what is drawn again.
        seed: of the resampling.
        num_resamples: at least 1.
        confidence: between 0 and 1.

    Returns:
        Lower and upper end; NaN without users.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must be between 0 and 1; 0.95 is usual.")
    if values.size == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    # How often each user is drawn is multinomial: the same resampling in one small array at a time.
    shares = np.full(values.size, 1.0 / values.size)
    means = [rng.multinomial(values.size, shares) @ values for _ in range(num_resamples)]
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(np.asarray(means) / values.size, [tail, 100.0 - tail])
    return float(low), float(high)
