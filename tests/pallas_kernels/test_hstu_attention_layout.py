"""Layout, mask rule, block schedule: every visible pair is scheduled, bad segments refused."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.hstu_attention import cases, layout
from pallas_kernels.hstu_attention.mask import MaskRule
from tests.pallas_kernels import oracle


@st.composite
def _segments(draw):
    """Rows of segments with gaps, a rule and targets, all small."""
    rule = MaskRule(
        contextual_len=draw(st.integers(0, 5)),
        max_attn_len=draw(st.sampled_from([0, 0, 1, 3, 9])),
        min_full_attn_len=draw(st.sampled_from([0, 2, 7])),
        sla_k1=draw(st.sampled_from([0, 0, 0, 1, 4])),
        sla_k2=draw(st.sampled_from([0, 0, 0, 2, 8])),
    )
    row_len, num_rows = draw(st.integers(5, 30)), draw(st.integers(1, 2))
    starts, lengths = [], []
    for row in range(num_rows):
        slot = draw(st.integers(0, 3))
        while slot < row_len and len(starts) < 8:
            length = draw(st.integers(0, row_len - slot))
            if 0 < length < rule.contextual_len:
                length = 0
            starts.append(row * row_len + slot)
            lengths.append(length)
            slot += length + draw(st.integers(0, 4)) + (length == 0)
    starts.append(num_rows * row_len)
    lengths.append(0)
    targets = None
    if draw(st.booleans()):
        spare = [max(length - rule.contextual_len, 0) for length in lengths]
        targets = np.array([draw(st.integers(0, s)) for s in spare], np.int32)
    return (
        rule,
        np.array(starts, np.int32),
        np.array(lengths, np.int32),
        targets,
        num_rows,
        row_len,
        draw(st.integers(1, row_len)),
    )


def _touched(mask, block_len):
    row, query, key = np.nonzero(mask)
    return sorted(set(zip(row.tolist(), (query // block_len).tolist(), (key // block_len).tolist(),
                          strict=True)))  # fmt: skip


@settings(max_examples=120, deadline=None, derandomize=True)
@given(_segments())
def test_schedule_is_exactly_the_touched_blocks(drawn):
    rule, starts, lengths, targets, num_rows, row_len, block_len = drawn
    capacity = layout.max_block_pairs(num_rows, row_len, block_len, rule)
    assert capacity <= layout.max_block_pairs(num_rows, row_len, block_len)
    pairs, count = layout.build_block_pairs(
        starts,
        lengths,
        num_rows=num_rows,
        row_len=row_len,
        block_len=block_len,
        rule=rule,
        max_pairs=capacity,
        num_targets=targets,
    )
    mask = oracle.dense_mask(starts, lengths, targets, num_rows, row_len, rule)
    # Equality with the sorted list also says: in order of row, query block, key block.
    assert [tuple(pair) for pair in pairs[:count].tolist()] == _touched(mask, block_len)
    assert pairs.shape == (capacity, 3) and not pairs[count:].any()


def test_schedule_of_a_wrong_mask_is_caught():
    """The schedule of a window misses pairs of the full mask, so the property can fail."""
    lengths = np.array([21], np.int32)
    narrow = layout.from_lengths(lengths, row_len=21, block_len=4, rule=MaskRule(max_attn_len=3))
    full = oracle.dense_mask(narrow.starts, lengths, None, 1, 21, MaskRule())
    scheduled = narrow.block_pairs[0, : narrow.num_block_pairs[0]].tolist()
    assert not set(_touched(full, 4)) <= {tuple(pair) for pair in scheduled}


def test_token_segments_and_positions():
    case = cases.Case("", ((3, 0, 2), (), (6,)), row_len=6, block_len=4, num_unused=2)
    built = cases.build_layout(case)
    np.testing.assert_array_equal(
        np.asarray(jax.jit(layout.token_segments)(built)),
        [[0, 0, 0, 2, 2, -1], [-1] * 6, [3] * 6],
    )
    np.testing.assert_array_equal(
        np.asarray(jax.jit(layout.token_positions)(built)),
        [[0, 1, 2, 0, 1, 0], [0] * 6, [0, 1, 2, 3, 4, 5]],
    )


def test_from_lengths_gives_each_user_a_row():
    built = layout.from_lengths(np.array([4, 0, 3]), row_len=4, block_len=128)
    assert built.starts.tolist() == [0, 4, 8] and built.block_len == 4
    assert built.block_pairs[0, : built.num_block_pairs[0]].tolist() == [[0, 0, 0], [2, 0, 0]]


def test_merge_groups_moves_segments_and_blocks_to_the_shard():
    group = cases.build_layout(cases.Case("", ((3,), (2, 2)), row_len=5, block_len=2, num_unused=1))
    merged = layout.merge_groups(
        np.stack([group.starts] * 2),
        np.stack([group.lengths] * 2),
        np.concatenate([group.block_pairs] * 2),
        np.concatenate([group.num_block_pairs] * 2),
        num_rows_per_group=2,
        row_len=5,
        block_len=2,
    )
    assert merged.starts.tolist() == [0, 5, 7, 10, 10, 15, 17, 20]
    assert (merged.num_rows, merged.row_len, merged.block_len) == (4, 5, 2)
    assert (merged.block_pairs[1, :, 0] == merged.block_pairs[0, :, 0] + 2).all()
    segments = np.asarray(jax.jit(layout.token_segments)(merged))
    # The unused entry of the first group starts where the second group's first segment does.
    assert segments[2].tolist() == [4, 4, 4, -1, -1]


def test_layout_survives_trees_without_arrays():
    built = layout.from_lengths(np.array([4]), row_len=4)
    assert jax.tree.map(lambda leaf: None, built).starts is None
    assert jax.tree.structure(built) == jax.tree.structure(jax.tree.map(np.copy, built))


@pytest.mark.parametrize(
    ("starts", "lengths", "message"),
    [
        ([0, 3], [4, 2], r"starts\[1\]=3, lengths\[1\]=2: the segment begins before the end"),
        ([4, 0], [4, 4], r"starts\[1\]=0, lengths\[1\]=4: the segment begins before the end"),
        ([0, 8], [9, 4], r"starts\[0\]=0, lengths\[0\]=9: the segment leaves its row of 8 slots"),
        ([0, 14], [4, 4], r"starts\[1\]=14, lengths\[1\]=4: the segment leaves its row"),
        ([0, 8], [-1, 4], r"starts\[0\]=0, lengths\[0\]=-1: the segment leaves its row"),
        ([0, 17], [4, 0], r"starts\[1\]=17, lengths\[1\]=0: the segment leaves its row"),
        ([0, 8], [1, 4], r"lengths\[0\]=1: the segment is shorter than contextual_len=2 \(1 in"),
    ],
)
def test_bad_segments_are_refused(starts, lengths, message):
    with pytest.raises(ValueError, match=message):
        layout.check_segments(
            np.array(starts, np.int32),
            np.array(lengths, np.int32),
            num_rows=2,
            row_len=8,
            rule=MaskRule(contextual_len=2),
        )


def test_schedule_refuses_what_does_not_fit():
    options = dict(num_rows=1, row_len=8, rule=MaskRule())
    starts, lengths = np.array([0], np.int32), np.array([8], np.int32)
    with pytest.raises(ValueError, match="max_pairs=2: the mask touches 3 block pairs"):
        layout.build_block_pairs(starts, lengths, block_len=4, max_pairs=2, **options)
    with pytest.raises(ValueError, match="block_len=9: must be between 1 and row_len=8"):
        layout.build_block_pairs(starts, lengths, block_len=9, max_pairs=9, **options)
    with pytest.raises(ValueError, match="too many num_targets"):
        layout.build_block_pairs(
            starts, lengths, block_len=4, max_pairs=9, num_targets=np.array([9]), **options
        )


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"max_attn_len": -1}, ValueError, "max_attn_len=-1: must not be negative; use 0 for off"),
        ({"contextual_len": 1.5}, TypeError, "contextual_len=1.5: must be an int, got float"),
        ({"sla_k1": True}, TypeError, "sla_k1=True: must be an int, got bool"),
    ],
)
def test_mask_rule_refuses_bad_fields(fields, error, message):
    # Past the annotation checks of the test session, to the checks that users meet.
    rule = object.__new__(MaskRule)
    for name in ("contextual_len", "max_attn_len", "min_full_attn_len", "sla_k1", "sla_k2"):
        object.__setattr__(rule, name, fields.get(name, 0))
    with pytest.raises(error, match=message):
        rule.__post_init__()
