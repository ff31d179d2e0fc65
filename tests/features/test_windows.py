"""Epoch plans: each window once, groups within their limits, orders that depend on the seed."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from hstu_jax.features import window_sizes, windows
from hstu_jax.features.batch import BatchShape
from pallas_kernels.hstu_attention import layout as attention_layout

CHECKED = hypothesis.settings(derandomize=True, deadline=None, max_examples=80, database=None)


def _shape(**sizes):
    defaults = {"groups": 2, "rows": 3, "row_len": 16, "users": 5, "queries": 12, "negatives": 4}
    sizes = defaults | sizes
    return BatchShape(**sizes, block_len=min(8, sizes["row_len"]))


def _split(lengths, num_positives):
    lengths = np.array(lengths, dtype=np.int64)
    return window_sizes.SplitWindows(
        windows=np.arange(len(lengths)) * 2 + 7,  # store numbers differ from places
        lengths=lengths,
        num_positives=np.array(num_positives, dtype=np.int64),
        dropped_tokens=np.zeros_like(lengths),
        pairs=lengths * (lengths + 1) // 2,
    )


def _check_plan(plan, split, shapes, *, one_user_per_row):
    """Every promise of a plan, by plain loops."""
    place = {int(window): i for i, window in enumerate(split.windows)}
    seen = []
    for index in range(plan.num_steps):
        shape_index = int(plan.shape_index[index])
        shape = shapes[shape_index]
        groups = plan.groups(index)
        assert len(groups) == shape.groups
        assert sum(len(group.windows) > 0 for group in groups) >= plan.num_groups[index] > 0
        for group in groups:
            members = [place[int(window)] for window in group.windows]
            seen += members
            lengths = split.lengths[members]
            assert len(members) <= shape.users
            assert split.num_positives[members].sum() <= shape.queries
            order = np.lexsort((lengths, group.starts))
            attention_layout.check_segments(
                group.starts[order], lengths[order], num_rows=shape.rows, row_len=shape.row_len
            )
            if shape_index:
                assert (lengths > shapes[shape_index - 1].row_len).all()
            if one_user_per_row:
                np.testing.assert_array_equal(group.starts, np.arange(len(members)) * shape.row_len)
    assert sorted(seen) == list(range(len(split.windows)))


@CHECKED
@hypothesis.given(
    sizes=strategies.lists(
        strategies.tuples(strategies.integers(0, 16), strategies.integers(1, 12)),
        min_size=1,
        max_size=70,
    ),
    rows=strategies.integers(1, 4),
    users=strategies.integers(1, 6),
    groups=strategies.integers(1, 3),
    seed=strategies.integers(0, 5),
)
def test_packed_plan_holds_each_window_once_within_all_limits(sizes, rows, users, groups, seed):
    split = _split(*zip(*sizes, strict=True))
    shapes = (_shape(rows=rows, users=users, groups=groups),)
    order = np.random.default_rng(seed).permutation(len(sizes))
    plan = windows.plan_epoch(split, shapes=shapes, one_user_per_row=False, order=order)
    _check_plan(plan, split, shapes, one_user_per_row=False)


@CHECKED
@hypothesis.given(
    sizes=strategies.lists(
        strategies.tuples(strategies.integers(0, 16), strategies.integers(1, 12)),
        min_size=1,
        max_size=70,
    ),
    row_lens=strategies.sampled_from([(16,), (4, 16), (3, 9, 16), (1, 2, 20)]),
    users=strategies.integers(1, 6),
    groups=strategies.integers(1, 3),
)
def test_padded_plan_takes_the_shortest_row_that_fits(sizes, row_lens, users, groups):
    split = _split(*zip(*sizes, strict=True))
    shapes = tuple(_shape(rows=users, users=users, groups=groups, row_len=n) for n in row_lens)
    plan = windows.plan_epoch(
        split,
        shapes=shapes,
        one_user_per_row=True,
        order=np.arange(len(sizes)),
        step_rng=np.random.default_rng(0),
    )
    _check_plan(plan, split, shapes, one_user_per_row=True)


def test_first_fit_by_hand():
    # Rows of 10 slots, two of them: 6 -> row 0; 5 -> row 1; 4 -> row 0; 6 waits; 5 -> row 1;
    # then both rows are full, and 6 and 1 make the second group.
    split = _split([6, 5, 4, 6, 5, 1], [1] * 6)
    shape = _shape(groups=1, rows=2, row_len=10, users=9)
    plan = windows.plan_epoch(split, shapes=(shape,), one_user_per_row=False, order=np.arange(6))
    first, second = plan.groups(0)[0], plan.groups(1)[0]
    np.testing.assert_array_equal((first.windows - 7) // 2, [0, 1, 2, 4])
    np.testing.assert_array_equal(first.starts, [0, 10, 6, 15])
    np.testing.assert_array_equal((second.windows - 7) // 2, [3, 5])
    np.testing.assert_array_equal(second.starts, [0, 6])


def test_windows_without_slots_take_no_room():
    starts = windows.place_windows(
        np.array([0, 10, 0, 10]), shape=_shape(rows=2, row_len=10), one_user_per_row=False
    )
    np.testing.assert_array_equal(starts, [20, 0, 20, 10])


def test_place_windows_refuses_what_does_not_fit_one_group():
    shape = _shape(rows=2, row_len=10)
    with pytest.raises(ValueError, match=r"^lengths=\[6, 6, 6\]: do not fit one group of 2 rows"):
        windows.place_windows(np.array([6, 6, 6]), shape=shape, one_user_per_row=False)
    with pytest.raises(ValueError, match="do not fit one group"):
        windows.place_windows(np.array([11]), shape=shape, one_user_per_row=False)


def _schedule(seed, *, num=200):
    rng = np.random.default_rng(9)
    split = _split(rng.integers(0, 17, num), rng.integers(1, 5, num))
    return windows.Schedule(split, shapes=(_shape(),), one_user_per_row=False, seed=seed)


def test_orders_depend_on_seed_and_epoch_only():
    first = _schedule(1)
    late = _schedule(1).plan(3)  # planned alone, without the epochs before it
    for epoch in range(3):
        first.plan(epoch)
    np.testing.assert_array_equal(first.plan(3).windows, late.windows)
    assert (first.plan(0).windows != first.plan(1).windows).any()
    assert (first.plan(0).windows != _schedule(2).plan(0).windows).any()


def test_shuffle_is_uniform_enough():
    # Mean place of each window over 60 epochs; a rotation or a partial shuffle is far off.
    places = np.array([np.argsort(_schedule(4).plan(e).windows) for e in range(60)]) / 200
    assert np.abs(places.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 60)
    assert np.abs(np.corrcoef(places) - np.eye(60)).max() < 5 / np.sqrt(200)


def test_stored_order_keeps_the_order_of_windows():
    rng = np.random.default_rng(9)
    split = _split(rng.integers(1, 3, 40), np.ones(40))
    schedule = windows.Schedule(split, shapes=(_shape(),), one_user_per_row=False, seed=None)
    np.testing.assert_array_equal(schedule.plan(0).windows, split.windows)
    np.testing.assert_array_equal(schedule.plan(1).windows, split.windows)


def test_locate_inverts_first_step():
    schedule = _schedule(1)
    sizes = [_schedule(1).plan(epoch).num_steps for epoch in range(4)]
    expected = [(epoch, i) for epoch, size in enumerate(sizes) for i in range(size)]
    far = _schedule(1)
    assert far.locate(len(expected) - 1) == expected[-1]  # at once, as after a restart
    assert [schedule.locate(step) for step in range(len(expected))] == expected
    assert schedule.first_step(3) == sum(sizes[:3])


def test_empty_split_is_refused(make_store):
    store = make_store([3, 4])
    with pytest.raises(ValueError, match=r"^split='test': .* has no such window; prepare data"):
        window_sizes.split_windows(store, split="test", num_contextual=0, max_seq_len=5)


def test_split_windows_counts_what_truncation_drops(make_store):
    store = make_store([0, 4, 9, 5], [1, 2, 3, 1], splits=[0, 0, 0, 1])
    split = window_sizes.split_windows(store, split="train", num_contextual=2, max_seq_len=5)
    np.testing.assert_array_equal(split.windows, [0, 1, 2])
    np.testing.assert_array_equal(split.lengths, [2, 6, 7])
    np.testing.assert_array_equal(split.num_positives, [1, 2, 3])
    np.testing.assert_array_equal(split.dropped_tokens, [0, 0, 4])
