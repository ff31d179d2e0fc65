"""Sample weights: from either file, and every value that is refused."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from hstu_jax.data import event_store, sample_weights, schema


@pytest.fixture
def write_users(tmp_path, store_parts):
    """Function: further user columns -> an opened store."""

    def write(**columns):
        users = store_parts["users"] | columns
        return event_store.write_store(tmp_path / "store", **{**store_parts, "users": users})

    return write


def _add_window_column(store, name, values):
    path = store.path / schema.WINDOWS_FILE
    table = pa.ipc.open_file(str(path)).read_all().append_column(name, pa.array(values))
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_batch(table.to_batches()[0])
    return event_store.open_store(store.path)


def _add_user_column(store, name, values):
    path = store.path / schema.USERS_FILE
    table = pa.parquet.read_table(path).append_column(name, pa.array(values))
    pa.parquet.write_table(table, path)
    return event_store.open_store(store.path)


def test_a_user_column_is_the_weight_of_the_users_windows(write_users, store_parts):
    windows = dataclasses.replace(store_parts["windows"], user_index=np.array([0, 1], np.int32))
    store = write_users(weight=np.array([2.5, 0.0]))
    weights = sample_weights.read_sample_weights(store, "weight")
    np.testing.assert_array_equal(weights, np.array([2.5, 0.0])[windows.user_index])
    assert weights.dtype == np.float32


def test_a_window_column_is_the_weight_itself(write_users):
    store = _add_window_column(write_users(other=np.array([1, 1])), "weight", [3, 4])
    np.testing.assert_array_equal(sample_weights.read_sample_weights(store, "weight"), [3, 4])


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (["a", "b"], TypeError, "windows.arrow column weight: string found; weights are numbers"),
        ([1.0, None], ValueError, "windows.arrow column weight: 1 missing values"),
        ([1.0, -1.0], ValueError, r"windows.arrow row 1: weight=-1\.0: must be finite and not"),
    ],
)
def test_wrong_window_columns_are_refused_where_they_are_used(write_users, values, kind, message):
    lists = pa.array([[1], [2, 3]], pa.large_list(pa.int64()))
    plain = write_users()
    offsets = plain.windows.positive_offsets.tolist()  # the file is replaced below its memory map
    store = _add_window_column(_add_window_column(plain, "tags", lists), "weight", values)
    assert store.windows.positive_offsets.tolist() == offsets
    with pytest.raises(kind, match=message):
        sample_weights.read_sample_weights(store, "weight")


def test_one_name_in_both_files_is_refused(write_users):
    store = _add_window_column(write_users(weight=np.array([1.0, 1.0])), "weight", [3.0, 4.0])
    with pytest.raises(ValueError, match=r"^data.sample_weight_fields='weight': in both files"):
        sample_weights.read_sample_weights(store, "weight")


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([1.0, -2.0], ValueError, r"row 1: weight=-2\.0: must be finite and not negative \(1 rows"),
        ([np.nan, np.inf], ValueError, r"row 0: weight=nan: must be finite .* \(2 rows"),
        (["a", "b"], TypeError, "column weight: string found; weights are numbers"),
        ([1.0, None], ValueError, "column weight: 1 missing values"),
    ],
)
def test_wrong_values_are_refused(write_users, values, kind, message):
    store = _add_user_column(write_users(), "weight", values)
    with pytest.raises(kind, match=message):
        sample_weights.read_sample_weights(store, "weight")


@pytest.mark.parametrize("name", ["heft", "user_index", "user_active_degree"])
def test_other_names_list_the_further_columns(write_users, name):
    store = write_users(weight=np.array([1.0, 1.0]))
    message = rf"^data.sample_weight_fields='{name}': no such column .*users.parquet: \['weight'\]"
    with pytest.raises(ValueError, match=message):
        sample_weights.read_sample_weights(store, name)
