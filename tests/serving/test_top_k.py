"""Exact search against a ranking of everything in float64."""

import tracemalloc

import jax
import numpy as np
import pytest

from hstu_jax.serving import search_catalogue
from hstu_jax.serving.search_catalogue import Catalogue, Exclusions
from hstu_jax.serving.top_k import ExactSearch


def exclusions(lists):
    return Exclusions(
        np.concatenate([[0], np.cumsum([len(own) for own in lists])]).astype(np.int64),
        np.array([item for own in lists for item in own]),
    )


def brute_force(users, ids, vectors, k, hidden, *, by_id=1):
    """Every item scored and sorted; `by_id=-1` breaks ties by the higher id."""
    result = []
    for user, own_hidden in zip(users, hidden, strict=True):
        shown = ~np.isin(ids, own_hidden)
        scores = (vectors[shown].astype(np.float64) @ user.astype(np.float64)).astype(np.float32)
        place = np.lexsort((by_id * ids[shown], -scores))[:k]
        result.append((ids[shown][place].tolist(), scores[place].tolist()))
    return result


def rows(found):
    return [
        (ids[:count].tolist(), scores[:count].tolist())
        for ids, scores, count in zip(found.ids, found.scores, found.counts, strict=True)
    ]


def test_a_table_of_ties_by_hand():
    ids = np.array([40, 10, 30, 20, 50])
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [2, 0]], np.float32)
    users = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.float32)
    found = ExactSearch(ids, vectors, item_block=2).search(users, k=4)
    assert found.ids.tolist() == [
        [50, 30, 40, 10],
        [10, 20, 30, 40],
        [50, 10, 20, 30],
        [10, 20, 30, 40],
    ]
    assert found.scores.tolist() == [[2, 1, 1, 0], [1, 1, 0, 0], [2, 1, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("kind", ["whole numbers", "copies"])
def test_equals_brute_force_whatever_the_blocks_and_devices(kind):
    rng = np.random.default_rng(3)
    num_items, num_users = 230, 9
    vectors = rng.normal(size=(num_items, 6)).astype(np.float32)
    if kind == "whole numbers":  # ties everywhere
        vectors = rng.integers(-1, 2, (num_items, 6)).astype(np.float32)
    vectors[100:180] = vectors[7]  # more equal items than the candidates beyond k
    ids = rng.permutation(9 * num_items)[:num_items] - 50
    users = rng.normal(size=(num_users, 6)).astype(np.float32)
    users[1] = 20 * vectors[7]
    hidden = [rng.choice(ids, size=size) for size in rng.integers(0, 200, num_users)]
    hidden[0], hidden[1], hidden[2], hidden[3] = ids, [], ids[:-4], [*ids[:5], 10**12]
    expected = brute_force(users, ids, vectors, 10, hidden)
    for num_devices, block in ((1, 16), (2, 16), (2, 10_000)):
        search = ExactSearch(ids, vectors, devices=jax.devices()[:num_devices], item_block=block)
        found = search.search(users, k=10, exclusions=exclusions(hidden))
        assert rows(found) == expected, (num_devices, block)
        assert found.num_exhaustive >= 1  # the user of the copies
        assert (found.num_empty, found.counts[0], found.counts[2]) == (1, 0, 4)
        assert (found.ids[2, 4:] == -1).all() and (found.scores[2, 4:] == -np.inf).all()
    # The planted wrong variants are other answers.
    assert rows(found) != brute_force(users, ids, vectors, 10, hidden, by_id=-1)
    assert rows(found) != brute_force(users, ids, vectors, 10, [[]] * num_users)


def test_the_proof_is_needed(monkeypatch):
    """Without it, candidates of a device that rounds badly would miss items."""
    rng = np.random.default_rng(4)
    ids = np.arange(3_000)
    vectors = (1 + 1e-7 * rng.normal(size=(3_000, 8))).astype(np.float32)
    users = np.ones((2, 8), np.float32) / 3
    expected = brute_force(users, ids, vectors, 5, [[], []])
    found = ExactSearch(ids, vectors).search(users, k=5)
    assert found.num_exhaustive == 2 and rows(found) == expected
    monkeypatch.setattr(search_catalogue, "_ROUNDING", -1.0)
    assert rows(ExactSearch(ids, vectors).search(users, k=5)) != expected


def peak_mib(call):
    """(result, MiB that numpy held at most meanwhile)."""
    tracemalloc.start()
    result = call()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return result, peak


def test_memory_does_not_grow_with_the_candidates():
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((2_000, 64), np.float32)
    users = rng.standard_normal((32, 64), np.float32)
    positions = np.broadcast_to(np.arange(2_000), (32, 2_000))
    catalogue = Catalogue(np.arange(2_000), vectors)
    is_candidate = np.ones(positions.shape, bool)
    found, peak = peak_mib(
        lambda: catalogue.order(users, positions, is_candidate=is_candidate, k=2_000)
    )
    assert rows(found)[7] == brute_force(users[7:8], np.arange(2_000), vectors, 2_000, [[]])[0]
    assert peak < 40  # 98 MiB of vectors at 24 bytes a number


def test_one_very_long_history_costs_only_itself(monkeypatch):
    rng = np.random.default_rng(6)
    ids = np.arange(3_000)
    vectors = rng.normal(size=(3_000, 4)).astype(np.float32)
    users = rng.normal(size=(40, 4)).astype(np.float32)
    hidden = [rng.choice(ids, size=7) for _ in users]
    hidden[3], hidden[20], hidden[21] = ids[:2_500], ids[400:], ids[:1_000]
    expected = brute_force(users, ids, vectors, 10, hidden)
    monkeypatch.setattr(search_catalogue, "_BLOCK_HIDDEN", 40 * 16)
    sizes, padded = [], Catalogue.excluded_positions

    def excluded_positions(self, exclusions, num_users):
        sizes.append(padded(self, exclusions, num_users).shape)
        return padded(self, exclusions, num_users)

    monkeypatch.setattr(Catalogue, "excluded_positions", excluded_positions)
    assert rows(ExactSearch(ids, vectors).search(users, k=10, exclusions=exclusions(hidden))) == (
        expected
    )
    assert sorted(sizes) == [(1, 1024), (1, 4096), (1, 4096), (37, 8)]


def test_a_mask_leaves_items_out_and_k_may_be_all_of_the_rest():
    ids, vectors = np.arange(6), np.eye(6, dtype=np.float32)
    mask = np.array([1, 0, 1, 0, 1, 0], bool)
    search = ExactSearch(ids, vectors, item_mask=mask)
    assert search.search(np.ones((1, 6), np.float32), k=3).ids.tolist() == [[0, 2, 4]]
    with pytest.raises(ValueError, match=r"k=4: the catalogue has 3 items to show; give a k of 3"):
        search.search(np.ones((1, 6), np.float32), k=4)
    none = search.search(np.empty((0, 6), np.float32), k=2)
    assert none.ids.shape == (0, 2)


def test_ids_may_be_strings():
    ids = np.array(["b", "abc", "zz", "a"])
    search = ExactSearch(ids, np.ones((4, 2), np.float32))
    hidden = exclusions([["abc", "not there"], ["a", "b", "zz"]])
    found = search.search(np.ones((2, 2), np.float32), k=3, exclusions=hidden)
    assert found.ids.tolist() == [["a", "b", "zz"], ["abc", "", ""]]
    with pytest.raises(TypeError, match="ids are integers, the catalogue's strings"):
        search.search(np.ones((1, 2), np.float32), k=3, exclusions=exclusions([[4]]))


def test_bad_input_is_refused():
    ids, vectors = np.arange(3), np.eye(3, dtype=np.float32)
    search = ExactSearch(ids, vectors)
    users = np.ones((2, 3), np.float32)
    bad = users.copy()
    bad[1, 0] = np.nan
    for call, message in (
        (lambda: search.search(users, k=0), "k=0: must be 1 or more"),
        (lambda: search.search(bad, k=1), r"user_vectors\[1\]: not finite \(1 in all\)"),
        (lambda: search.search(3e38 * users, k=1), "may overflow float32"),
        (lambda: search.search(users[:, :2], k=1), r"must be \[users, 3\], as the items' vectors"),
        (
            lambda: search.search(users, k=1, exclusions=exclusions([[1]])),
            "exclusions=1 users: must be the 2 of user_vectors",
        ),
        (lambda: Exclusions(np.array([0, 2]), np.array([1])), r"exclusions.offsets=\(0, 2\)"),
        (lambda: ExactSearch(np.array([1, 2, 1]), vectors), "item_ids=1: is there twice"),
        (lambda: ExactSearch(ids, vectors * np.inf), "item_vectors of id 0: not finite"),
        (lambda: ExactSearch(ids[:2], vectors), "must be one row for each of the 2 ids"),
        (lambda: ExactSearch(ids[:0], vectors[:0]), "no item to search"),
    ):
        with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=message):
            call()
