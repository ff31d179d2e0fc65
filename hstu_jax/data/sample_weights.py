"""Sample weights: one number per window, from a further column of the data.

Here: finding the column, of an event store in windows.arrow or users.parquet, and the rule of its
values. Of list columns it is a column of the rows, checked when they are read (`list_store.py`). Not
here: what the weights do (`hstu_jax.losses`, `hstu_jax.training.step`). Next on the path:
`hstu_jax.features.pipeline`.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Bool, Float32

from hstu_jax.data import event_store, refusal, schema

RULE = "must be finite and not negative"


def read_sample_weights(
    store: event_store.EventStore, name: str
) -> Float32[np.ndarray, "windows"]:
    """The weight of every window: its own, or its user's.

    Args:
      store: an event store, or list columns that were read with this name.
      name: a column of the rows, or of an event store a column beside the format's own: of
        windows.arrow (one value per window) or of users.parquet (one value per user, which all
        windows of the user take).

    Raises:
      ValueError: no such column, the same name in both files, missing values, or a value that is
        negative or not finite (file, row, value).
      TypeError: the column holds no numbers.
    """
    if store.features.window is not None:
        return store.features.window[name].values.astype(np.float32)
    users = pa.parquet.read_table(store.path / schema.USERS_FILE)
    windows = further_window_columns(store)
    own = {column.name for column in schema.USER_COLUMNS}
    found = {
        schema.WINDOWS_FILE: windows.column_names,
        schema.USERS_FILE: [column for column in users.column_names if column not in own],
    }
    files = [file for file, names in found.items() if name in names]
    if len(files) != 1:
        known = "; ".join(f"{file}: {names}" for file, names in found.items())
        what = "in both files" if files else "no such column beside those of the format"
        raise ValueError(
            f"data.sample_weight_fields={name!r}: {what} ({known}); add one column of numbers to "
            f"{store.path / schema.WINDOWS_FILE} or {schema.USERS_FILE}, or leave the field empty."
        )
    if files == [schema.USERS_FILE]:
        return _values(users, name, str(store.path / files[0]))[store.windows.user_index]
    return _values(windows, name, str(store.path / files[0]))


def further_window_columns(store: event_store.EventStore) -> pa.Table:
    """Columns of windows.arrow beside the format's own.

    Args:
      store: an event store on disk.
    """
    windows = pa.ipc.open_file(pa.memory_map(str(store.path / schema.WINDOWS_FILE))).read_all()
    own = {column.name for column in schema.WINDOW_COLUMNS}
    return windows.select([name for name in windows.column_names if name not in own])


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold weights."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def is_wrong(values: Float32[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which weights break `RULE`."""
    return ~np.isfinite(values) | (values < 0)


def _values(table: pa.Table, name: str, file: str) -> Float32[np.ndarray, "_"]:
    column = table[name]
    if not is_number(column.type):
        raise TypeError(f"{file} column {name}: {column.type} found; weights are numbers.")
    if column.null_count:
        raise ValueError(f"{file} column {name}: {column.null_count} missing values; set them.")
    values = column.to_numpy().astype(np.float32)
    refusal.refuse(
        is_wrong(values),
        values,
        place=lambda at: f"{file} row {at}",
        column=name,
        rule=RULE,
        unit="rows",
    )
    return values
