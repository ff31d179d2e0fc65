"""The choice of hard negatives: file order, random without bias, positives left out."""

import numpy as np
import pytest

from hstu_jax.features import hard_negatives, sampler_inputs

LISTS = [[7, 3, 9, 3], [], [5], list(range(20, 32))]  # items of users 0 to 3
NONE = np.empty(0, dtype=np.int64)


def _sampler(**options):
    counts = np.array([len(items) for items in LISTS])
    edges = sampler_inputs.HardEdges(
        start=np.cumsum(counts) - counts,
        count=counts,
        item_index=np.concatenate(LISTS).astype(np.int32),
        num_lines=int(counts.sum()) + 2,
        num_dropped=2,
        list_of_window=np.arange(len(LISTS)),
        number_of_window=np.arange(len(LISTS)),
    )
    return hard_negatives.HardNegativeSampler(edges, **options)


def _draw(sampler, users, *, salt=0, positives=()):
    rows, items = zip(*positives, strict=True) if positives else ((), ())
    drawn = sampler.draw(
        np.array(users, dtype=np.int64),
        salt=np.full(len(users), salt),
        positive_row=np.array(rows, dtype=np.int64),
        positive_item=np.array(items, dtype=np.int64),
    )
    assert not drawn.item_index[~drawn.mask].any()
    return [items[mask].tolist() for items, mask in zip(drawn.item_index, drawn.mask, strict=True)]


@pytest.mark.parametrize("num", [1, 3, 4, 50])
def test_full_is_the_beginning_of_the_list(num):
    drawn = _draw(_sampler(num_sample=num), [3, 1, 0, 2, 0])
    assert drawn == [LISTS[user][:num] for user in (3, 1, 0, 2, 0)]


def test_no_user_and_no_edge():
    assert _draw(_sampler(num_sample=3), []) == []
    assert _draw(_sampler(num_sample=3), [1, 1]) == [[], []]


def test_positives_of_the_same_row_are_left_out_before_the_cut():
    positives = [(0, 3), (0, 8), (1, 20), (2, 7)]
    users = [0, 3, 0]
    drawn = _draw(_sampler(num_sample=2), users, positives=positives)
    assert drawn == [[7, 9], [21, 22], [3, 9]]
    kept = _draw(_sampler(num_sample=2, exclude_positives=False), users, positives=positives)
    assert kept == [[7, 3], [20, 21], [7, 3]]


def test_random_is_a_choice_without_replacement_that_is_even():
    sampler = _sampler(num_sample=4, strategy="random")
    counts, pairs = np.zeros(12), np.zeros((12, 12))
    num_salts = 3000
    for salt in range(num_salts):
        (drawn,) = _draw(sampler, [3], salt=salt)
        assert len(set(drawn)) == 4 and set(drawn) <= set(LISTS[3])
        places = np.array(drawn) - 20
        counts[places] += 1
        pairs[np.ix_(places, places)] += 1
    expected = num_salts * 4 / 12
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    # Items are chosen together as often as chance has it: choices are not neighbours in the list.
    together = num_salts * 4 * 3 / (12 * 11)
    off_diagonal = pairs[~np.eye(12, dtype=bool)]
    assert np.abs(off_diagonal - together).max() < 5 * np.sqrt(together)


def test_a_random_choice_depends_on_salt_and_user_only():
    sampler = _sampler(num_sample=5, strategy="random")
    (alone,) = _draw(sampler, [3], salt=8)
    assert _draw(sampler, [0, 3, 2, 3], salt=8)[1::2] == [alone, alone]
    assert _draw(sampler, [3], salt=9) != [alone]
    assert sampler.is_random and not _sampler(num_sample=5).is_random


def test_summary_counts_what_is_dropped_and_what_is_positive():
    arguments = dict(
        window=np.array([0, 1, 3, 0]),
        positive_row=np.array([0, 0, 2, 3, 3]),
        positive_item=np.array([9, 5, 31, 7, 30]),
    )
    assert _sampler(num_sample=2).summary(**arguments) == (
        "17 hard edges (2 dropped: unknown user or item); up to 2 a user, full; 3 of 4 windows "
        "have some; 3 positives are hard negatives of their user, left out there"
    )
    kept = _sampler(num_sample=2, strategy="random", exclude_positives=False).summary(**arguments)
    assert kept.endswith("3 positives are hard negatives of their user, kept "
                         "(exclude_positives=False)")  # fmt: skip
