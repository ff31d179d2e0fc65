"""Whole-catalogue ranks against one loop over everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hstu_jax.metrics import catalogue


def lists(rng, num_lists, num_items, longest):
    """Random lists (some empty) as offsets and items."""
    sizes = rng.integers(0, longest + 1, num_lists)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return offsets, rng.integers(0, num_items, offsets[-1])


def brute_force(scores, positives, excluded, catalogue_mask):
    ranks, seen, cold = [], 0, 0
    for user, row in enumerate(scores):
        hidden = set(excluded[1][excluded[0][user] : excluded[0][user + 1]].tolist())
        for item in positives[1][positives[0][user] : positives[0][user + 1]]:
            if item in hidden or not catalogue_mask[item]:
                ranks.append(0)
                seen += item in hidden
                cold += item not in hidden
                continue
            others = [
                j for j in range(row.size) if j != item and catalogue_mask[j] and j not in hidden
            ]
            ranks.append(1 + sum(bool(row[j] >= row[item]) for j in others))
    return ranks, seen, cold


def arguments(positives, excluded, **more):
    return {
        "positive_offsets": positives[0],
        "positive_items": positives[1],
        "excluded_offsets": excluded[0],
        "excluded_items": excluded[1],
        **more,
    }


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("user_block", [1, 5, 64])
def test_ranks_equal_brute_force_with_ties_exclusions_and_cold_items(user_block, on_device):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (13, 30)).astype(np.float32)
    scores[2] = -np.inf
    positives, excluded = lists(rng, 13, 30, 6), lists(rng, 13, 30, 9)
    mask = rng.random(30) < 0.8

    def block(start, stop):
        found = np.zeros((user_block, 30), np.float32)  # rows behind the last one: not looked at
        found[: stop - start] = scores[start:stop]
        return jnp.asarray(found) if on_device else scores[start:stop]

    got = catalogue.ranks_from_scores(
        block,
        num_items=30,
        user_block=user_block,
        **arguments(positives, excluded, catalogue_mask=mask),
    )
    ranks, seen, cold = brute_force(scores, positives, excluded, mask)
    np.testing.assert_array_equal(got.ranks, ranks)
    nothing = (np.zeros(14, int), np.zeros(0, int))
    np.testing.assert_array_equal(
        got.ranks_with_seen, brute_force(scores, positives, nothing, mask)[0]
    )
    assert (got.num_ranked, got.num_seen, got.num_cold) == (np.count_nonzero(ranks), seen, cold)
    assert seen and cold and got.num_ranked
    # The planted wrong variant, ties in the model's favour, is another answer.
    kind = brute_force(scores + 1e-3 * np.arange(30)[::-1], positives, excluded, mask)[0]
    assert kind != ranks


def test_vectors_are_ranked_by_inner_product_whatever_the_block():
    rng = np.random.default_rng(1)
    users, items = (rng.normal(size=(n, 8)).astype(np.float32) for n in (13, 30))
    positives, excluded = lists(rng, 13, 30, 5), lists(rng, 13, 30, 5)
    scores = users.astype(np.float64) @ items.T
    ranks = brute_force(scores, positives, excluded, np.ones(30, bool))[0]
    for block in (4, None):
        got = catalogue.positive_ranks(
            users, items, user_block=block, **arguments(positives, excluded)
        )
        np.testing.assert_array_equal(got.ranks, ranks)


def test_a_catalogue_split_over_devices_gives_the_same_ranks():
    rng = np.random.default_rng(2)
    # Few different scores, so that many tie; an odd number of items, and a row behind the last.
    users, items = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (13, 31))
    positives, excluded = lists(rng, 13, 31, 5), lists(rng, 13, 31, 9)
    mask = rng.random(31) < 0.8
    mesh = jax.make_mesh((1, 2), ("host", "chip"), axis_types=(AxisType.Auto,) * 2)
    padded = np.concatenate([items, np.full((1, 3), 9, np.float32)])
    split = jax.device_put(padded, NamedSharding(mesh, PartitionSpec(("host", "chip"))))
    scores = catalogue.vector_scores(users, split, user_block=4)
    assert scores(0, 4).sharding.shard_shape((4, 32)) == (4, 16)
    got = catalogue.ranks_from_scores(
        scores,
        num_items=31,
        user_block=4,
        **arguments(positives, excluded, catalogue_mask=mask),
    )
    ranks, seen, cold = brute_force(users @ items.T, positives, excluded, mask)
    np.testing.assert_array_equal(got.ranks, ranks)
    assert (got.num_seen, got.num_cold) == (seen, cold)
    nothing = (np.zeros(14, int), np.zeros(0, int))
    expected = brute_force(users @ items.T, positives, nothing, mask)[0]
    np.testing.assert_array_equal(got.ranks_with_seen, expected)
    broken = users.copy()
    broken[5] = np.nan
    with pytest.raises(ValueError, match=r"scores\[5\]=nan"):
        catalogue.ranks_from_scores(
            catalogue.vector_scores(broken, split, user_block=4),
            num_items=31,
            user_block=4,
            **arguments(positives, excluded, catalogue_mask=mask),
        )


def test_only_positive_of_an_empty_catalogue_is_cold_and_no_users_is_fine():
    got = catalogue.ranks_from_scores(
        lambda start, stop: np.zeros((stop - start, 3)),
        num_items=3,
        catalogue_mask=np.zeros(3, bool),
        **arguments((np.array([0, 1]), np.array([2])), (np.array([0, 0]), np.zeros(0, int))),
    )
    assert (got.num_ranked, got.num_seen, got.num_cold) == (0, 0, 1)
    nothing = (np.array([0]), np.zeros(0, int))
    got = catalogue.positive_ranks(
        np.zeros((0, 4), np.float32), np.zeros((3, 4), np.float32), **arguments(nothing, nothing)
    )
    assert got.ranks.size == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"positive_offsets": np.array([0, 1, 3])}, r"positive_offsets=\(0, 3\): must run from 0"),
        ({"positive_items": np.array([0, 7])}, r"positive_items=7: must be 0..4 \(1 in all"),
        (
            {"excluded_offsets": np.array([0, 0])},
            "excluded_offsets=1 query-users: must be the same",
        ),
        ({"positive_offsets": np.array([0, 3, 2])}, r"positive_offsets\[2\]: must not be below"),
    ],
)
def test_bad_lists_are_refused(change, message):
    good = arguments(
        (np.array([0, 1, 2]), np.array([0, 1])), (np.array([0, 0, 0]), np.zeros(0, int))
    )
    with pytest.raises(ValueError, match=message):
        catalogue.ranks_from_scores(
            lambda start, stop: np.zeros((stop - start, 5)), num_items=5, **{**good, **change}
        )


def test_nan_scores_are_refused_and_not_ranked_first():
    scores = np.zeros((2, 5))
    scores[1, 3] = np.nan
    good = arguments(
        (np.array([0, 1, 2]), np.array([0, 1])), (np.array([0, 0, 0]), np.zeros(0, int))
    )
    with pytest.raises(ValueError, match=r"scores\[1\]=nan: a query-user's scores must be"):
        catalogue.ranks_from_scores(lambda start, stop: scores[start:stop], num_items=5, **good)
    with pytest.raises(ValueError, match=r"scores\[1\]=nan: a query-user's scores must be"):
        catalogue.ranks_from_scores(lambda start, stop: jnp.asarray(scores), num_items=5, **good)


def test_scores_of_the_host_are_compared_in_float64():
    scores = np.array([[1.0, 1.0 + 1e-12]])
    lists = arguments((np.array([0, 1]), np.array([1])), (np.zeros(2, int), np.zeros(0, int)))
    got = catalogue.ranks_from_scores(lambda start, stop: scores, num_items=2, **lists)
    assert got.ranks.tolist() == [1]
    tied = jnp.asarray(scores, jnp.float32)
    got = catalogue.ranks_from_scores(lambda start, stop: tied, num_items=2, **lists)
    assert got.ranks.tolist() == [2]
