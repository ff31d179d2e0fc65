"""Dealing a batch to its groups: even within all limits, and beside plain dealing."""

import itertools

import numpy as np
import pytest

from hstu_jax.features import balance, window_sizes, windows
from hstu_jax.features.batch import BatchShape
from pallas_kernels.hstu_attention import mask as attention_mask


def _shape(**sizes):
    defaults = dict(groups=4, rows=2, row_len=4224, users=34, queries=500, negatives=4)
    return BatchShape(**defaults | sizes, block_len=min(128, sizes.get("row_len", 128)))


def _plan(lengths, *, shape, num_positives=None, one_user_per_row=False):
    lengths = np.array(lengths, dtype=np.int64)
    split = window_sizes.SplitWindows(
        windows=np.arange(len(lengths)),
        lengths=lengths,
        num_positives=np.ones_like(lengths) if num_positives is None else num_positives,
        dropped_tokens=np.zeros_like(lengths),
        pairs=balance.visible_pairs(lengths, rule=attention_mask.MaskRule()),
    )
    order = np.random.default_rng(0).permutation(len(lengths))
    options = dict(shapes=(shape,), one_user_per_row=one_user_per_row)
    return windows.plan_epoch(split, **options, order=order)


def _most(lengths, groups):
    """The most tokens of a group over the mean."""
    tokens = [np.array(lengths)[each].sum() for each in groups]
    return max(tokens) / np.mean(tokens)


@pytest.mark.parametrize("one_user_per_row", [False, True])
@pytest.mark.parametrize("mean", [120, 130, 150, 200])
def test_a_long_history_among_short_ones(mean, one_user_per_row):
    """One of 4,096 and 100 short ones. The long one alone is within 1.1 times the mean where the
    short ones have 108 tokens or more on average."""
    lengths = [*np.random.default_rng(mean).integers(mean // 2, mean * 3 // 2, 100), 4096]
    shape = _shape(rows=34 if one_user_per_row else 2)
    plan = _plan(lengths, shape=shape, one_user_per_row=one_user_per_row)
    assert plan.num_steps == 1
    dealt = [group.windows for group in plan.groups(0)]
    assert sorted(np.concatenate(dealt)) == list(range(101))
    assert _most(lengths, dealt) <= 1.1
    # One after the other in turn, and groups filled in turn, as they are without the dealing.
    assert _most(lengths, [plan.positions[start::4] for start in range(4)]) > 1.3
    filled = [plan.positions[a:b] for a, b in itertools.pairwise(plan.group_offsets)]
    assert _most(lengths, [*filled, *[[]] * (4 - len(filled))]) > 1.3


def test_no_dealing_is_below_the_longest_history():
    lengths = [*[20] * 100, 4096]
    plan = _plan(lengths, shape=_shape())
    loads = plan.loads()
    assert loads.tokens.max() == 4096
    # The others are even in what they have, tokens and pairs.
    rest = np.sort(loads.tokens[0])[:3]
    assert rest.max() - rest.min() <= 20


def test_pairs_decide_where_tokens_leave_room():
    """Four long histories go to four groups, and groups of short ones have as many tokens."""
    lengths = [*[100] * 4, *[10] * 80, *[1] * 100]
    plan = _plan(lengths, shape=_shape(rows=4, row_len=128, users=60, queries=60))
    (step,) = (plan.groups(index) for index in range(plan.num_steps))
    assert [np.sum(group.windows < 4) for group in step] == [1] * 4
    loads = plan.loads()
    assert balance.imbalance(loads.tokens, num_parts=4).max() < 1.05
    assert balance.imbalance(loads.pairs, num_parts=4).max() < 1.05


@pytest.mark.parametrize("num_groups", [2, 3, 4, 8])
def test_limits_hold_where_everything_is_full(num_groups):
    """Users, queries and slots all bind; a batch keeps its windows, and one group its order."""
    rng = np.random.default_rng(num_groups)
    lengths, positives = rng.integers(0, 60, 1500), rng.integers(1, 9, 1500)
    sizes = dict(rows=4, row_len=64, users=9, queries=40)
    plan = _plan(lengths, shape=_shape(**sizes, groups=num_groups), num_positives=positives)
    single = _plan(lengths, shape=_shape(**sizes, groups=1), num_positives=positives)
    np.testing.assert_array_equal(plan.positions, single.positions)
    for index in range(plan.num_steps):
        groups = plan.groups(index)
        assert len(groups) == num_groups
        alone = [single.groups(n)[0] for n in range(index * num_groups, (index + 1) * num_groups)
                 if n < single.num_steps]  # fmt: skip
        assert set(np.concatenate([g.windows for g in groups])) == set(
            np.concatenate([g.windows for g in alone])
        )
        for group in groups:
            assert len(group.windows) <= 9 and positives[group.windows].sum() <= 40
            used = np.zeros(4 * 64, dtype=int)
            for window, start in zip(group.windows, group.starts, strict=True):
                length = lengths[window]
                assert length == 0 or start // 64 == (start + length - 1) // 64
                used[start : start + length] += 1
            assert used.max() <= 1
    dealt = balance.imbalance(plan.loads().tokens, num_parts=num_groups)
    assert dealt[:-1].mean() < 1.05  # few windows are left for the last
    # One group is as it was filled.
    alone = [single.groups(index)[0] for index in range(single.num_steps)]
    np.testing.assert_array_equal(np.concatenate([g.starts for g in alone]), single.starts)
    np.testing.assert_array_equal(np.concatenate([g.windows for g in alone]), single.windows)


def test_halves_are_even_where_groups_cannot_be():
    """Long histories in some groups: spread over the devices, whatever their number."""
    lengths = np.where(np.random.default_rng(0).random(4000) < 0.02, 1000, 20)
    loads = _plan(lengths, shape=_shape(groups=16, users=32)).loads()
    found = [balance.imbalance(loads.pairs, num_parts=n)[:-1].max() for n in (2, 4, 16)]
    assert found[0] < 1.15 < found[1] < 1.4 < 1.5 < found[2]


def test_imbalance_by_hand():
    loads = np.array([[1, 3, 2, 2], [0, 0, 0, 0], [8, 0, 0, 0]])
    np.testing.assert_allclose(balance.imbalance(loads, num_parts=4), [1.5, 1, 4])
    np.testing.assert_allclose(balance.imbalance(loads, num_parts=2), [1, 1, 2])
    line = balance.Loads(tokens=loads, pairs=2 * loads[:, ::-1], num_steps=3).line(2)
    assert line == (
        "most / mean of an epoch's steps, mean (worst): "
        "4 groups tokens 2.17 (4.00), attention pairs 2.17 (4.00); "
        "2 devices tokens 1.33 (2.00), attention pairs 1.33 (2.00)"
    )


@pytest.mark.parametrize(
    "rule",
    [
        attention_mask.MaskRule(),
        attention_mask.MaskRule(contextual_len=3),
        attention_mask.MaskRule(contextual_len=3, max_attn_len=4),
        attention_mask.MaskRule(contextual_len=3, sla_k1=2, sla_k2=5),
    ],
)
def test_pairs_are_those_of_the_mask(rule):
    """Counted token by token from the rule in words."""

    def sees(i, j, n):
        if rule.is_semi_local:
            return j <= i and (j < max(rule.sla_k2, 3) or i - j < rule.sla_k1)
        ids = [max(p - rule.contextual_len + 1, 0) if rule.contextual_len else p for p in (i, j)]
        near = not rule.max_attn_len or ids[0] - ids[1] <= rule.max_attn_len
        is_first = rule.contextual_len > 0 and ids[0] == 0
        return (near and (ids[0] > ids[1] or i == j)) or is_first

    lengths = np.array([7, 3, 12, 7])
    counted = [sum(sees(i, j, n) for i in range(n) for j in range(n)) for n in lengths]
    np.testing.assert_array_equal(balance.visible_pairs(lengths, rule=rule), counted)
