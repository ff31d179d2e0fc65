"""What a row must not be, by message; a folder's inputs are strict about what training was."""

import numpy as np
import pyarrow as pa
import pytest

from hstu_jax.serving import input_columns
from tests.serving.conftest import one_user

TIME = 1_650_000_000


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"uih_seq__video_id": [[5, 6]]}, ValueError, "row 0: uih_seq__video_id has 2 entries and"),
        ({"uih_seq__video_id": [None]}, ValueError, "row 0: uih_seq__video_id is null; give an em"),
        ({"uih_seq__video_id": [[5, None, 6]]}, ValueError, "row 0: uih_seq__video_id has a miss"),
        ({"uih_seq__video_id": [5]}, TypeError, "uih_seq__video_id: type int64: must be lists"),
        ({"uih_seq__video_id": ["5,6,7"]}, TypeError, "video_id: type string: must be lists"),
        ({"uih_seq__video_id": [[5.5, 6.0, 7.0]]}, TypeError, "item ids are integers here"),
        ({"uih_seq__video_id": [["a", "b", "c"]]}, TypeError, "item ids are integers here"),
        (
            {"uih_seq__action_timestamp": [[TIME * 1000] * 3]},
            ValueError,
            "row 0: uih_seq__action_timestamp=1650000000000 looks like milliseconds",
        ),
        (
            {"uih_seq__action_timestamp": [[TIME, TIME - 1, TIME]]},
            ValueError,
            r"action_timestamp=1649999999 is out of order; the times of a history ascend \(1 such",
        ),
        ({"uih_seq__action_timestamp": [[-5, 0, 1]]}, ValueError, "timestamp=-5 is negative"),
        ({"uih_seq__action_timestamp": [[0.5, 1, 2]]}, TypeError, "values of type double that are"),
        ({"request_time": [TIME]}, ValueError, "is later than the row's request_time"),
        ({"request_time": [None]}, ValueError, "row 0: request_time is null; every row needs one"),
        ({"request_time": ["now"]}, TypeError, "request_time: type string: must hold whole seco"),
        ({"uih_seq__action_weight": [[1, -2, 3]]}, ValueError, "weight=-2 must be action bits"),
        ({"uih_seq__watch_time": [[1.0, np.nan, 3]]}, ValueError, "=nan must be finite and not"),
        ({"user_id": [1, 2]}, ValueError, "columns of unequal length: .*'user_id': 2"),
        ({"user_id": ["anna"]}, TypeError, "column user_id: strings found; ids are integers 0..25"),
        ({"user_id": [[[1]]]}, TypeError, "column user_id: type list"),
        ({"user_id": [1, "a"]}, TypeError, "column user_id: cannot be read as one column"),
    ],
)
def test_wrong_rows_are_refused(opened, columns, error, message):
    with pytest.raises(error, match=message):
        opened.embed_users(one_user(**columns))


def test_missing_columns_are_named(opened):
    row = one_user()
    row["uih_seq__vidoe_id"] = row.pop("uih_seq__video_id")
    with pytest.raises(ValueError, match="column uih_seq__video_id: missing .did you mean 'uih"):
        opened.embed_users(row)
    with pytest.raises(ValueError, match="column video_id: missing; the model reads"):
        opened.embed_items({"item": [1]})
    with pytest.raises(TypeError, match="columns=list: must be a mapping of names"):
        input_columns.to_arrow([row], opened.manifest.user_inputs)


def test_null_and_unknown_values_of_features_are_zero_vectors(opened):
    """A user that training had not, and one without an id."""
    before = dict(opened.counts)
    unknown = opened.embed_users(one_user(user_id=[999]))
    missing = opened.embed_users(one_user(user_id=pa.array([None], pa.int64())))
    np.testing.assert_array_equal(unknown, missing)
    assert not np.array_equal(unknown, opened.embed_users(one_user()))
    assert opened.counts["unknown_values"] - before["unknown_values"] == 1
    assert opened.counts["missing_values"] - before["missing_values"] == 1


def test_other_widths_of_numbers_and_further_columns_change_nothing(opened):
    row = one_user()
    expected = opened.embed_users(row)
    narrow = {
        name: pa.array([each], pa.list_(pa.int32())) if name.endswith(("id", "weight")) else [each]
        for name, (each,) in row.items()
        if name.startswith("uih_seq")
    }
    narrow["uih_seq__watch_time"] = pa.array([[0.5, 1.5, 2.0]], pa.list_(pa.float64()))
    narrow["uih_seq__action_timestamp"] = pa.array(
        [row["uih_seq__action_timestamp"][0]], pa.list_(pa.int64(), 3)
    )
    found = opened.embed_users({**row, **narrow, "country": ["de"]})
    np.testing.assert_array_equal(found, expected)
