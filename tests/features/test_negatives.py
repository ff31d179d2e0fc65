"""Negatives: frequencies follow weights, exclusion is exact, generators are independent."""

import numpy as np
import pytest

from hstu_jax.features import item_weights, negatives, random_streams

NONE = np.empty(0, dtype=np.int64)


def _rng(*, seed=0, major=0, minor=0, stream=random_streams.Stream.NEGATIVES):
    return random_streams.generator(seed=seed, stream=stream, major=major, minor=minor)


def _chi_square(drawn, probability):
    """Statistic in standard deviations above its mean; 5 is beyond chance."""
    has_weight = probability > 0
    observed = np.bincount(drawn, minlength=len(probability))
    assert observed[~has_weight].sum() == 0
    expected = probability[has_weight] * len(drawn)
    statistic = ((observed[has_weight] - expected) ** 2 / expected).sum()
    degrees = has_weight.sum() - 1
    return (statistic - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_excluded", [0, 3, 30])
def test_frequencies_follow_weights_given_the_exclusion(exponent, num_excluded):
    count = np.random.default_rng(1).zipf(1.5, 40).clip(max=500)
    count[[5, 17]] = 0
    weights = item_weights.train_count_weights(count, exponent=exponent)
    # The most popular first: with 30, more than half of the weight is excluded, the other way.
    excluded = np.argsort(-weights)[:num_excluded]
    drawn = negatives.NegativeSampler(weights).draw(_rng(), num=60_000, excluded=excluded)
    assert not np.isin(drawn, excluded).any()
    allowed = weights.copy()
    allowed[excluded] = 0
    assert _chi_square(drawn, allowed / allowed.sum()) < 5
    wrong = np.where(allowed > 0, allowed + 0.3 * allowed.mean(), 0)
    if allowed[allowed > 0].std() > 0:
        assert _chi_square(drawn, wrong / wrong.sum()) > 5


def test_a_sampler_without_exclusion_is_caught():
    weights = np.ones(20)
    excluded = np.arange(3)
    drawn = negatives.NegativeSampler(weights).draw(_rng(), num=500, excluded=NONE)
    assert np.isin(drawn, excluded).any()


@pytest.mark.parametrize("num_items", [4, 11])
def test_one_item_left_is_always_drawn(num_items):
    sampler = negatives.NegativeSampler(np.ones(num_items))
    excluded = np.tile(np.arange(1, num_items), 2)
    np.testing.assert_array_equal(sampler.draw(_rng(), num=7, excluded=excluded), np.zeros(7))


def test_weight_all_excluded_is_an_error():
    weights = np.array([1.0, 2.0, 0.0, 3.0])
    sampler = negatives.NegativeSampler(weights, origin="item_table.tsv")
    with pytest.raises(ValueError) as error:
        sampler.draw(_rng(), num=5, excluded=np.array([3, 0, 1]))
    assert str(error.value) == (
        "negative_sampler: all 3 items with weight in item_table.tsv are positives of one group; "
        "use a smaller data.batch_size or more data.num_groups."
    )


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match=r"^table row 1: weight=-1\.0: must be finite .* \(2 rows"):
        negatives.NegativeSampler(np.array([1.0, -1.0, np.nan]), origin="table")
    with pytest.raises(ValueError, match=r"^table: all 3 weights are 0; at least one item"):
        negatives.NegativeSampler(np.zeros(3), origin="table")


def test_log_q_is_the_log_of_the_share_and_finite_for_cold_items():
    weights = np.array([4.0, 0.0, 1.0, 3.0])
    log_q = negatives.NegativeSampler(weights).log_q(np.array([0, 1, 2, 3, 0]))
    np.testing.assert_allclose(log_q, np.log([0.5, 0.125, 0.125, 0.375, 0.5]), rtol=1e-6)
    assert log_q.dtype == np.float32


def test_equal_weights_give_equal_log_q_also_to_cold_items():
    weights = item_weights.train_count_weights(np.array([9, 0, 1, 4]), exponent=0.0)
    np.testing.assert_array_equal(weights, [1, 0, 1, 1])
    log_q = negatives.NegativeSampler(weights).log_q(np.arange(4))
    assert len(set(log_q.tolist())) == 1


def test_generators_depend_on_each_of_their_numbers_only():
    base = _rng(seed=3, major=5, minor=1).random(8)
    np.testing.assert_array_equal(base, _rng(seed=3, major=5, minor=1).random(8))
    others = [
        _rng(seed=4, major=5, minor=1),
        _rng(seed=3, major=6, minor=1),
        _rng(seed=3, major=5, minor=2),
        _rng(seed=3, major=1, minor=5),
        _rng(seed=-3, major=5, minor=1),
        _rng(seed=-4, major=5, minor=1),  # neighbours that float64 cannot tell apart
        _rng(seed=3, major=5, minor=1, stream=random_streams.Stream.EVAL_NEGATIVES),
    ]
    draws = [base, *(rng.random(8) for rng in others)]
    assert len({value for draw in draws for value in draw.tolist()}) == 8 * len(draws)


def test_neighbouring_generators_are_uncorrelated():
    draws = np.array(
        [_rng(major=step, minor=g).random(4000) for step in range(4) for g in range(3)]
    )
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)
