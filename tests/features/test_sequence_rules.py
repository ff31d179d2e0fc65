"""The second layout against plain loops, and the mask rule that host and model share."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_jax.config import model_schema
from hstu_jax.features import pipeline, sequence_rules
from hstu_jax.features.batch import BatchShape
from hstu_jax.model import match
from pallas_kernels.hstu_attention import mask as attention_mask
from tests.pallas_kernels import oracle

HISTORY_LENS = [0, 1, 2, 19, 20, 21, 57, 5, 8, 0, 13, 7, 3, 20, 4, 11]  # max_seq_len is 20


def with_model(config, *, stu=None, **hstu):
    """The configuration with other fields of `hstu` and `hstu.stu`."""
    tower = config.model.user_tower
    stu_config = dataclasses.replace(tower.hstu.stu, **(stu or {}))
    tower = dataclasses.replace(tower, hstu=dataclasses.replace(tower.hstu, stu=stu_config, **hstu))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, user_tower=tower))


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        (dict(), dict(contextual_len=2)),
        (dict(max_attn_len=3), dict(contextual_len=2, max_attn_len=3)),
        (dict(contextual_seq_len=0), dict()),
        (dict(contextual_seq_len=1), dict(contextual_len=1)),
        (dict(sla_k1=3, sla_k2=4), dict(contextual_len=2, sla_k1=3, sla_k2=4)),
        (dict(sla_k2=4, contextual_seq_len=0), dict(sla_k2=4)),
    ],
)
def test_host_and_model_use_the_same_rule(make_store, make_config, fields, rule):
    config = with_model(make_config(contextual=2), stu=fields)
    expected = attention_mask.MaskRule(**rule)
    assert pipeline.Pipeline(config, make_store([3, 4])).source.rule == expected
    layer = match.build_stu_layer(config.model.user_tower.hstu.stu, contextual_len=2, max_seq_len=9)
    assert layer.rule == expected


@st.composite
def _groups(draw):
    """Segments of two groups in slot order, unused ones last, and a cut."""
    contextual, longest = draw(st.integers(0, 3)), draw(st.integers(1, 12))
    used = st.integers(contextual, contextual + longest)
    lengths = [draw(st.lists(used, max_size=5)) for _ in range(2)]
    return (
        np.array([group + [0] * (5 - len(group)) for group in lengths], np.int32),
        contextual,
        draw(st.integers(1, 14)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from([{}, {"max_attn_len": 2}, {"sla_k1": 3}])),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(_groups())
def test_tail_holds_the_cut_users_and_its_schedule_is_the_mask(drawn):
    lengths, contextual, tail_len, block_len, fields = drawn
    rule = attention_mask.MaskRule(contextual_len=contextual, **fields)
    shape = BatchShape(
        groups=2,
        rows=5,
        row_len=max(int(lengths.max()), 1),
        users=5,
        queries=1,
        negatives=1,
        block_len=block_len,
        tail_segment_len=contextual + tail_len,
    )
    tail = sequence_rules.plan_tail(
        lengths,
        num_contextual=contextual,
        tail_len=tail_len,
        row_len=shape.tail_row_len,
        block_len=shape.tail_block_len,
        max_pairs=shape.tail_block_pairs,
        rule=rule,
    )
    for group in range(2):
        cursor = 0
        for user, length in enumerate(lengths[group]):
            kept = min(length, contextual + min(max(length - contextual, 0), tail_len))
            assert tail.segment_lengths[group, user] == kept
            assert tail.segment_starts[group, user] == cursor
            cursor += kept
        mask = oracle.dense_mask(
            tail.segment_starts[group],
            tail.segment_lengths[group],
            None,
            1,
            tail.row_len,
            rule,
        )
        blocks = np.argwhere(mask) // [1, tail.block_len, tail.block_len]
        touched = {tuple(pair) for pair in blocks.tolist()}
        count = tail.num_block_pairs[group]
        assert {tuple(pair) for pair in tail.block_pairs[group, :count].tolist()} == touched
        assert not tail.block_pairs[group, count:].any()


def test_targets_are_kept():
    lengths = np.array([14, 4, 8, 3])
    cut = sequence_rules.tail_lengths(
        lengths, num_contextual=2, tail_len=3, num_targets=np.array([3, 2, 1, 1])
    )
    np.testing.assert_array_equal(cut, [8, 4, 6, 3])


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_batches_carry_the_tail(make_store, make_config, layout):
    config = make_config(layout=layout, num_groups=2)
    truncated = with_model(config, attn_truncation_split_layer=1, attn_truncation_tail_len=4)
    store = make_store(HISTORY_LENS)
    pipe, plain = pipeline.Pipeline(truncated, store), pipeline.Pipeline(config, store)
    (shape,) = pipe.shapes
    assert shape.tail_segment_len == 2 + 4 and plain.shapes[0].tail_segment_len == 0
    assert shape.tail_row_len < shape.rows * shape.row_len
    for step in range(pipe.num_steps(0)):
        batch = pipe.batch_at(step).batch
        assert plain.batch_at(step).batch.tail is None
        lengths = np.minimum(batch.segment_lengths, 6)
        np.testing.assert_array_equal(batch.tail.segment_lengths, lengths)
        assert batch.tail.block_pairs.shape == (2, shape.tail_block_pairs, 3)
        assert batch.tail.row_len == shape.tail_row_len
        assert batch.tail.num_block_pairs.max() > 0


def test_the_mean_baseline_has_no_tail():
    hstu = model_schema.HstuConfig(attn_truncation_split_layer=1, attn_truncation_tail_len=4)
    tower = model_schema.UserTowerConfig(hstu=hstu)
    assert sequence_rules.tail_len(tower) == 4
    assert sequence_rules.tail_len(dataclasses.replace(tower, encoder="mean")) == 0


@pytest.mark.parametrize("fields", [dict(sla_k1=3), dict(sla_k1=3, sla_k2=1), dict(sla_k2=4)])
def test_semi_local_attention_of_next_item_shows_contextual_tokens(fields):
    stu = model_schema.StuConfig(**fields)
    rule = sequence_rules.mask_rule(stu, num_contextual=2, objective="next_item")
    assert rule.contextual_len == 0 and rule.prefix_len == max(2, stu.sla_k2)
    plain = sequence_rules.mask_rule(
        model_schema.StuConfig(), num_contextual=2, objective="next_item"
    )
    assert plain == attention_mask.MaskRule()
