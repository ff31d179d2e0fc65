"""Popularity and co-occurrence against loops over windows."""

import collections
import dataclasses

import numpy as np
import pytest

from hstu_jax.metrics import baselines, catalogue

NUM_ITEMS = 12


def draw(seed=0, users=6, days=4, per_day=5):
    """Training windows (all but the last day) and validation windows of a small random world."""
    rng = np.random.default_rng(seed)
    items = rng.integers(0, NUM_ITEMS, users * days * per_day)
    is_positive = rng.random(items.size) < 0.6
    user_start = np.repeat(np.arange(users) * days * per_day, days)
    window_start = user_start + np.tile(np.arange(days) * per_day, users)
    positives = [
        window + np.flatnonzero(is_positive[window : window + per_day]) for window in window_start
    ]
    windows = baselines.Windows(
        event_items=items,
        event_is_positive=is_positive,
        history_start=user_start,
        history_end=window_start,
        positive_offsets=np.cumsum([0] + [part.size for part in positives]),
        positive_items=items[np.concatenate(positives)],
    )
    is_last = np.tile(np.arange(days) == days - 1, users)
    return windows.take(np.flatnonzero(~is_last)), windows.take(np.flatnonzero(is_last))


def history(windows, window, options):
    events = np.arange(windows.history_start[window], windows.history_end[window])
    if options.positives_only:
        events = events[windows.event_is_positive[events]]
    return windows.event_items[events[-options.last_items :]].tolist()


def positives(windows, window):
    offsets = windows.positive_offsets
    return windows.positive_items[offsets[window] : offsets[window + 1]].tolist()


def loop_scores(train, queries, options, popularity):
    """Oracle: one pair at a time."""
    pairs = collections.Counter()
    for window in range(train.history_start.size):
        own = positives(train, window)
        if options.source == "history_to_window":
            pairs.update((i, j) for i in history(train, window, options) for j in own)
        else:
            pairs.update((i, j) for i in own for j in own if i != j)
    sources, targets = collections.Counter(), collections.Counter()
    for (i, j), count in pairs.items():
        sources[i] += count
        targets[j] += count
    scores = np.zeros((queries.history_start.size, NUM_ITEMS))
    for window in range(scores.shape[0]):
        for i in history(queries, window, options):
            for j in range(NUM_ITEMS):
                if not pairs[i, j]:
                    continue
                divisor = {
                    "count": 1.0,
                    "inverse_sqrt": np.sqrt(sources[i]),
                    "cosine": np.sqrt(sources[i] * targets[j]),
                }[options.weighting]
                scores[window, j] += pairs[i, j] / divisor
    return scores + 1e-6 * popularity / popularity.max()


@pytest.mark.parametrize("options", baselines.GRID[::2])
def test_cooccurrence_equals_the_loop(options, monkeypatch):
    monkeypatch.setattr(baselines, "_PAIRS_PER_CHUNK", 37)  # several chunks
    options = dataclasses.replace(options, last_items=options.last_items // 3)
    train, validation = draw()
    popularity = baselines.global_popularity(train.positive_items, num_items=NUM_ITEMS)
    pairs = baselines.count_pairs(train, options, num_items=NUM_ITEMS)
    block = baselines.cooccurrence_scores(pairs, validation, options, popularity=popularity)
    scores = np.concatenate([block(0, 4), block(4, 6)])
    np.testing.assert_allclose(scores, loop_scores(train, validation, options, popularity))


def test_pairs_of_one_chunk_equal_those_of_many(monkeypatch):
    train, _ = draw(1)
    options = baselines.CooccurrenceOptions()
    whole = baselines.count_pairs(train, options, num_items=NUM_ITEMS)
    monkeypatch.setattr(baselines, "_PAIRS_PER_CHUNK", 1)
    parts = baselines.count_pairs(train, options, num_items=NUM_ITEMS)
    for left, right in zip(dataclasses.astuple(whole), dataclasses.astuple(parts), strict=True):
        np.testing.assert_array_equal(left, right)
    empty = baselines.count_pairs(train.take(np.zeros(0, int)), options, num_items=NUM_ITEMS)
    assert empty.items.size == 0 and not empty.offsets.any()


def test_popularity_by_hand():
    items, day = np.array([1, 1, 2, 0, 2, 2]), np.array([3, 3, 3, 4, 4, 4])
    assert baselines.global_popularity(items, num_items=4).tolist() == [1, 2, 3, 0]
    assert baselines.last_day_popularity(items, day, num_items=4).tolist() == [1, 0, 2, 0]
    none = np.zeros(0, int)
    assert baselines.last_day_popularity(none, none, num_items=4).tolist() == [0, 0, 0, 0]
    block = baselines.same_for_all(np.array([1.0, 2.0]))
    assert block(3, 6).tolist() == [[1, 2]] * 3


def test_tune_takes_the_best_of_the_grid_on_validation():
    train, validation = draw(2, users=40)
    popularity = baselines.global_popularity(train.positive_items, num_items=NUM_ITEMS)
    nothing = (np.zeros(41, int), np.zeros(0, int))
    result = baselines.tune(
        train,
        validation,
        popularity=popularity,
        excluded_offsets=nothing[0],
        excluded_items=nothing[1],
    )
    assert len(result.tried) == len(baselines.GRID)
    assert result.recall == max(recall for _, recall in result.tried)
    assert dict(result.tried)[result.options] == result.recall
    # The reported figure is that of ranking the variant directly.
    pairs = baselines.count_pairs(train, result.options, num_items=NUM_ITEMS)
    ranks = catalogue.ranks_from_scores(
        baselines.cooccurrence_scores(pairs, validation, result.options, popularity=popularity),
        num_items=NUM_ITEMS,
        positive_offsets=validation.positive_offsets,
        positive_items=validation.positive_items,
        excluded_offsets=nothing[0],
        excluded_items=nothing[1],
    ).ranks
    shares = [
        np.mean(ranks[a:b] <= 10)
        for a, b in zip(
            validation.positive_offsets[:-1], validation.positive_offsets[1:], strict=True
        )
        if b > a
    ]
    assert result.recall == pytest.approx(np.mean(shares))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="last_items=0: must be at least 1"):
        baselines.CooccurrenceOptions(last_items=0)
    train, validation = draw()
    with pytest.raises(ValueError, match="validation=0 windows: must hold a positive"):
        baselines.tune(
            train,
            validation.take(np.zeros(0, int)),
            popularity=np.ones(NUM_ITEMS),
            excluded_offsets=np.zeros(1, int),
            excluded_items=np.zeros(0, int),
        )
