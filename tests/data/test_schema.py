"""Column checks and action names."""

import pytest

from hstu_jax.data import schema


def test_action_bits_are_the_agreed_ones():
    assert schema.ACTION_BITS == {
        "click": 1, "like": 2, "follow": 4, "comment": 8, "forward": 16, "hate": 32,
        "long_view": 64, "profile_enter": 128,
    }  # fmt: skip
    assert schema.action_mask(["click", "long_view"]) == 65


def test_unknown_action_names_the_nearest():
    with pytest.raises(ValueError, match=r"action='clik': unknown; did you mean 'click'\?"):
        schema.action_mask(["clik"])


def test_columns_present_pass_and_extra_ones_are_allowed():
    found = {column.name: column.dtype for column in schema.EVENT_COLUMNS}
    schema.check_columns({**found, "side": "int32"}, schema.EVENT_COLUMNS, file="f")


def test_missing_column_names_file_column_and_nearest():
    found = {column.name: column.dtype for column in schema.EVENT_COLUMNS}
    found["timestamps_s"] = found.pop("timestamp_s")
    with pytest.raises(
        ValueError, match=r"f column timestamp_s: missing \(did you mean 'timestamps_s'\?\)"
    ):
        schema.check_columns(found, schema.EVENT_COLUMNS, file="f")


def test_wrong_dtype_names_both():
    found = {column.name: column.dtype for column in schema.EVENT_COLUMNS}
    found["action"] = "int64"
    with pytest.raises(TypeError, match=r"f column action: dtype int64 found, int32 expected"):
        schema.check_columns(found, schema.EVENT_COLUMNS, file="f")
