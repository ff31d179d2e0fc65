"""Hand-made tables for every metric, then brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from hstu_jax.metrics import catalogue, groups, ranking


def hits(positive, negative, user, mask, cutoffs):
    got, rows = jax.jit(ranking.sampled_hits, static_argnames="cutoffs")(
        positive_scores=jnp.asarray(positive, jnp.float32),
        negative_scores=jnp.asarray(negative, jnp.float32),
        positive_user=jnp.asarray(user),
        query_mask=jnp.asarray(mask),
        cutoffs=cutoffs,
    )
    return got.tolist(), float(rows)


def test_sampled_hits_by_hand_with_ties_against_the_model():
    negative = [[[0.5, 0.5, 0.1], [3.0, 2.0, 1.0]]]
    positive = [[0.5, 0.6, 0.2, 2.5, 9.0]]  # ranks 3, 1, 3, 2, masked
    user, mask = [[0, 0, 0, 1, 1]], [[True, True, True, True, False]]
    assert hits(positive, negative, user, mask, (1, 2, 3, 4)) == ([1, 2, 4, 4], 4)


def test_sampled_hits_edges():
    no_negatives = np.zeros((1, 1, 0))
    assert hits([[0.0]], no_negatives, [[0]], [[True]], (1, 5)) == ([1, 1], 1)
    assert hits([[np.nan]], no_negatives, [[0]], [[True]], (1, 5)) == ([0, 0], 1)
    assert hits([[1.0]], [[[0.0]]], [[0]], [[False]], (1,)) == ([0], 0)
    assert hits([[np.nan]], [[[0.0]]], [[0]], [[True]], (1,)) == ([0], 1)


def test_sampled_hits_equal_counting():
    rng = np.random.default_rng(0)
    negative = rng.integers(0, 8, (2, 3, 12)).astype(np.float32)
    positive = rng.integers(0, 8, (2, 20)).astype(np.float32)
    user, mask = rng.integers(0, 3, (2, 20)), rng.random((2, 20)) < 0.8
    ahead = (negative[np.arange(2)[:, None], user] >= positive[..., None]).sum(axis=-1)
    got, rows = hits(positive, negative, user, mask, (1, 5, 20))
    assert got == [float(((ahead < k) & mask).sum()) for k in (1, 5, 20)]
    assert rows == mask.sum()


def test_user_metrics_by_hand():
    # User 0: ranks 1, 3, 12; user 1: nothing ranked; user 2: rank 2; user 3: rank 200.
    ranks, offsets = np.array([3, 0, 1, 12, 0, 2, 200]), np.array([0, 4, 5, 6, 7])
    got = ranking.user_metrics(ranks, offsets, cutoffs=(1, 5, 100))
    assert (got.num_users, got.num_positives) == (3, 5)
    log2 = np.log2
    expected = {
        "hit_rate@1": [1, 0, 0],
        "recall@1": [1 / 3, 0, 0],
        "ndcg@1": [1, 0, 0],
        "hit_rate@5": [1, 1, 0],
        "recall@5": [2 / 3, 1, 0],
        "ndcg@5": [(1 + 1 / log2(4)) / (1 + 1 / log2(3) + 1 / log2(4)), 1 / log2(3), 0],
        "hit_rate@100": [1, 1, 0],
        "recall@100": [1, 1, 0],
        "ndcg@100": [
            (1 + 1 / log2(4) + 1 / log2(13)) / (1 + 1 / log2(3) + 1 / log2(4)),
            1 / log2(3),
            0,
        ],
        "mrr": [1, 1 / 2, 1 / 200],
    }
    assert set(got.values) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got.values[name], value, err_msg=name)
    assert got.means()["recall@5"] == pytest.approx(5 / 9)
    # Dividing by the positives of a window rather than the ranked ones is another number.
    assert got.values["recall@5"][0] != pytest.approx(2 / 4)


def test_no_ranked_positive_gives_nan_means():
    got = ranking.user_metrics(np.array([0, 0]), np.array([0, 2]))
    assert got.num_users == 0
    assert np.isnan(got.means()["recall@10"])
    with pytest.raises(ValueError, match="ranks=-1: must be 1 or more, or 0"):
        ranking.user_metrics(np.array([-1]), np.array([0, 1]))


def test_bootstrap_interval_is_seeded_and_has_the_width_of_the_standard_error():
    values = np.random.default_rng(0).random(400)
    low, high = ranking.bootstrap_interval(values, seed=1)
    assert (low, high) == ranking.bootstrap_interval(values, seed=1)
    assert low < values.mean() < high
    np.testing.assert_allclose(high - low, 2 * 1.96 * values.std() / 20, rtol=0.15)
    assert np.isnan(ranking.bootstrap_interval(np.zeros(0), seed=1)).all()
    with pytest.raises(ValueError, match="confidence=95.0: must be between 0 and 1"):
        ranking.bootstrap_interval(values, seed=1, confidence=95.0)


def test_paired_interval_is_narrower_than_that_of_unrelated_users():
    rng = np.random.default_rng(0)
    easy = rng.random(500)  # what makes a user easy for both rankings
    mine, theirs = easy + 0.03 + 0.02 * rng.random(500), easy + 0.02 * rng.random(500)
    low, high = ranking.paired_interval(mine, theirs, seed=1)
    assert low < np.mean(mine - theirs) < high
    assert 0 < low and high - low < 0.005
    unpaired = ranking.paired_interval(mine, theirs[::-1], seed=1)
    assert unpaired[1] - unpaired[0] > 10 * (high - low)
    assert (low, high) == ranking.paired_interval(mine, theirs, seed=1)


def test_metrics_equal_another_library():
    """scikit-learn knows these metrics under other names; scores without ties, seen items last."""
    rng = np.random.default_rng(3)
    num_users, num_items = 40, 60
    scores = rng.permuted(np.tile(np.arange(num_items) / 7.0, (num_users, 1)), axis=1)
    sizes = np.where(np.arange(num_users) < 20, 1, 3)
    positives = [rng.choice(num_items, size, replace=False) for size in sizes]
    seen = [np.setdiff1d(rng.integers(0, num_items, 9), own) for own in positives]
    ranks = catalogue.ranks_from_scores(
        lambda start, stop: jnp.asarray(scores[start:stop], jnp.float32),
        num_items=num_items,
        positive_offsets=np.cumsum([0, *sizes]),
        positive_items=np.concatenate(positives),
        excluded_offsets=np.cumsum([0, *map(len, seen)]),
        excluded_items=np.concatenate(seen),
    )
    got = ranking.user_metrics(ranks.ranks, np.cumsum([0, *sizes]), cutoffs=(1, 5, 10, 50))
    truth, shown = np.zeros((num_users, num_items)), scores.copy()
    for user in range(num_users):
        truth[user, positives[user]] = 1
        shown[user, seen[user]] = -1 - np.arange(len(seen[user]))
    for k in (1, 5, 10, 50):
        expected = sklearn.metrics.ndcg_score(truth, shown, k=k, ignore_ties=True)
        assert got.means()[f"ndcg@{k}"] == pytest.approx(expected)
        one = slice(0, 20)  # users with one positive: their class, and its place among the top k
        expected = sklearn.metrics.top_k_accuracy_score(
            truth[one].argmax(axis=1), shown[one], k=k, labels=np.arange(num_items)
        )
        assert got.values[f"hit_rate@{k}"][one].mean() == pytest.approx(expected)
        assert got.values[f"recall@{k}"][one].mean() == pytest.approx(expected)
    expected = sklearn.metrics.label_ranking_average_precision_score(truth[one], shown[one])
    assert got.values["mrr"][one].mean() == pytest.approx(expected)


def test_groups_by_hand():
    ranks, offsets = np.array([1, 0, 20, 3, 7]), np.array([0, 2, 3, 5])
    found = groups.group_table(
        ranks,
        offsets,
        history_len=np.array([0, 15, 900]),
        popularity=np.array([5, 5, 0, 10, 9_999]),
        cutoffs=(5,),
    )
    assert [(g.kind, g.name, g.count, g.means["recall@5"]) for g in found] == [
        ("history", "0", 1, 1.0),
        ("history", "10-19", 1, 0.0),
        ("history", "500+", 1, 0.5),
        ("popularity", "0", 1, 0.0),
        ("popularity", "1-9", 1, 1.0),
        ("popularity", "10-29", 1, 1.0),
        ("popularity", "3000+", 1, 0.0),
    ]
    assert found[2].means["mrr"] == pytest.approx(1 / 3)
