"""The list of batch shapes: sizes by hand."""

import pytest

from hstu_jax.config import data_schema as config_schema
from hstu_jax.features import shapes


def _shapes(*, num_contextual=6, max_seq_len=128, mean=60.5, max_positives=9, **data):
    return shapes.batch_shapes(
        config_schema.DataConfig(**data),
        num_contextual=num_contextual,
        max_seq_len=max_seq_len,
        mean_history_len=mean,
        max_positives=max_positives,
        num_negatives=32,
    )


def test_packed_rows_are_whole_blocks_that_hold_the_longest_user():
    (shape,) = _shapes(batch_size=128, num_groups=2)
    assert (shape.groups, shape.users, shape.row_len, shape.block_len) == (2, 64, 256, 128)
    # 64 users x 66.5 slots = 4256 slots = 16.6 rows.
    assert (shape.rows, shape.queries, shape.negatives) == (17, 768, 32)
    assert shape.block_pairs >= 17 * 3


@pytest.mark.parametrize(("tokens", "rows"), [(256, 1), (257, 2), (2560, 10)])
def test_token_budget_is_rounded_up_to_rows(tokens, rows):
    (shape,) = _shapes(batch_size=128, tokens_per_group=tokens)
    assert shape.rows == rows


def test_padded_rows_hold_one_user():
    (shape,) = _shapes(batch_size=16, layout="padded", block_len=200)
    assert (shape.rows, shape.users, shape.row_len, shape.block_len) == (16, 16, 134, 134)
    several = _shapes(batch_size=16, layout="padded", row_lens=(32, 70, 200), block_len=64)
    assert [s.row_len for s in several] == [32, 70, 200]
    assert [s.block_len for s in several] == [32, 64, 64]


def test_queries_hold_any_window():
    assert _shapes(batch_size=2)[0].queries == 100
    assert _shapes(batch_size=2, max_positives=130)[0].queries == 130
    assert _shapes(batch_size=2, queries_per_group=9)[0].queries == 9
    with pytest.raises(ValueError) as error:
        _shapes(batch_size=2, queries_per_group=8)
    assert str(error.value) == (
        "data.queries_per_group=8: one window has 9 positives; use at least 9, or 0."
    )
