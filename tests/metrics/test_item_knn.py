"""Item-kNN against a dense loop in float64."""

import dataclasses

import numpy as np
import pytest

from hstu_jax.metrics import item_knn
from tests.metrics.test_baselines import NUM_ITEMS, draw


def world(seed=0, users=30):
    """(user, item) events of training, users ascending, and validation windows."""
    train, validation = draw(seed, users=users)
    sizes = np.diff(train.positive_offsets)
    user = np.repeat(np.arange(train.history_start.size) // 3, sizes)
    return user, train.positive_items, validation


def dense_similarity(user, item, shrinkage):
    had = np.zeros((user.max() + 1, NUM_ITEMS))
    had[user, item] = 1
    common = had.T @ had
    norm = np.sqrt(np.diag(common))
    with np.errstate(invalid="ignore"):
        found = common / (norm[:, None] * norm + shrinkage)
    found[~np.isfinite(found)] = 0
    np.fill_diagonal(found, 0)
    return found


def slow_scores(user, item, queries, options, popularity):
    similarity = dense_similarity(user, item, options.shrinkage)
    scores = np.zeros((queries.history_start.size, NUM_ITEMS))
    for i, row in enumerate(similarity):
        order = sorted(range(NUM_ITEMS), key=lambda j: (-row[j], j))[: options.num_neighbours]
        similarity[i] = [row[j] if j in order else 0 for j in range(NUM_ITEMS)]
    for window in range(scores.shape[0]):
        events = np.arange(queries.history_start[window], queries.history_end[window])
        if options.positives_only:
            events = events[queries.event_is_positive[events]]
        events = events[-options.last_items :] if options.last_items else events
        for i in queries.event_items[events]:
            scores[window] += similarity[i]
    return scores + 1e-6 * popularity / popularity.max()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_neighbours": 3},
        {"num_neighbours": 3, "shrinkage": 5.0},
        {"num_neighbours": 4, "last_items": 2},
        {"num_neighbours": 4, "positives_only": False},
    ],
)
def test_scores_equal_the_dense_loop_and_no_option_is_ignored(changes, monkeypatch):
    monkeypatch.setattr(item_knn, "_PAIRS_PER_BLOCK", 60)  # several blocks
    user, item, queries = world()
    item = np.where(item == 7, 6, item)  # an item that nobody has
    options = item_knn.ItemKnnOptions(**changes)
    popularity = np.bincount(item, minlength=NUM_ITEMS).astype(np.float64)
    (found,) = item_knn.find_neighbours(
        *item_knn.user_items(user, item),
        num_items=NUM_ITEMS,
        shrinkages=(options.shrinkage,),
        num_neighbours=options.num_neighbours,
    )
    block = item_knn.scores(
        found.cut(options.num_neighbours), queries, options, popularity=popularity
    )
    scores = np.concatenate([block(0, 9), block(9, 30)])
    expected = slow_scores(user, item, queries, options, popularity)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    if changes:
        plain = slow_scores(user, item, queries, item_knn.ItemKnnOptions(), popularity)
        assert np.abs(scores - plain).max() > 1e-3


def test_a_smaller_k_is_the_beginning_of_a_larger_one():
    user, item, _ = world(1)
    pairs = item_knn.user_items(user, item)
    sizes = dict(num_items=NUM_ITEMS, shrinkages=(0.0, 9.0))
    large = item_knn.find_neighbours(*pairs, **sizes, num_neighbours=8)
    small = item_knn.find_neighbours(*pairs, **sizes, num_neighbours=3)
    for many, few in zip(large, small, strict=True):
        for left, right in zip(
            dataclasses.astuple(many.cut(3)), dataclasses.astuple(few), strict=True
        ):
            np.testing.assert_array_equal(left, right)
        assert (np.diff(few.offsets) <= 3).all()


def test_the_newest_items_of_a_user_count_once(monkeypatch):
    monkeypatch.setattr(item_knn, "MAX_ITEMS_PER_USER", 2)
    user, item = np.array([0, 0, 0, 0, 1]), np.array([3, 4, 3, 5, 9])
    found = set(zip(*(x.tolist() for x in item_knn.user_items(user, item)), strict=True))
    assert found == {(0, 5), (0, 3), (1, 9)}
    nothing = item_knn.user_items(user[:0], item[:0])
    (empty,) = item_knn.find_neighbours(*nothing, num_items=4, shrinkages=(0.0,), num_neighbours=2)
    assert empty.items.size == 0 and not empty.offsets.any()


def test_tune_takes_the_best_of_the_grid():
    user, item, validation = world(2, users=60)
    popularity = np.bincount(item, minlength=NUM_ITEMS).astype(np.float64)
    grid = tuple(
        item_knn.ItemKnnOptions(k, shrinkage) for k in (1, 3, 9) for shrinkage in (0.0, 20.0)
    )
    result, similarities = item_knn.tune(
        user,
        item,
        validation,
        popularity=popularity,
        excluded_offsets=np.zeros(61, int),
        excluded_items=np.zeros(0, int),
        grid=grid,
    )
    assert dict(result.tried)[result.options] == result.recall == max(r for _, r in result.tried)
    assert np.diff(similarities.offsets).max() <= result.options.num_neighbours
    assert len({recall for _, recall in result.tried}) > 1


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="num_neighbours=0: must be at least 1"):
        item_knn.ItemKnnOptions(num_neighbours=0)
    with pytest.raises(ValueError, match="shrinkage=-1.0: must be 0 or more"):
        item_knn.ItemKnnOptions(shrinkage=-1.0)
