"""Sample weights: one number per window, from a further column of an event store's files.

Here: finding the column in windows.arrow or users.parquet and checking its values. Not here: what
the weights do (`hstu_jax.losses`, `hstu_jax.training.step`). Next on the path:
`hstu_jax.features.pipeline`.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Float32

from hstu_jax.data import event_store, schema


def read_sample_weights(
    store: event_store.EventStore, name: str
) -> Float32[np.ndarray, "windows"]:
    """The weight of every window: its own, or its user's.

    Args:
      store: the opened event store.
      name: a column beside the format's own: of windows.arrow (one value per window) or of
        users.parquet (one value per user, which all windows of the user take).

    Raises:
      ValueError: no such column, the same name in both files, missing values, or a value that is
        negative or not finite (file, row, value).
      TypeError: the column holds no numbers.
    """
    windows = pa.ipc.open_file(pa.memory_map(str(store.path / schema.WINDOWS_FILE))).read_all()
    users = pa.parquet.read_table(store.path / schema.USERS_FILE)
    found = {
        schema.WINDOWS_FILE: _further_columns(windows, schema.WINDOW_COLUMNS),
        schema.USERS_FILE: _further_columns(users, schema.USER_COLUMNS),
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


def _further_columns(table: pa.Table, format_columns: tuple[schema.Column, ...]) -> list[str]:
    own = {column.name for column in format_columns}
    return [name for name in table.column_names if name not in own]


def _values(table: pa.Table, name: str, file: str) -> Float32[np.ndarray, "_"]:
    column = table[name]
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise TypeError(f"{file} column {name}: {column.type} found; weights are numbers.")
    if column.null_count:
        raise ValueError(f"{file} column {name}: {column.null_count} missing values; set them.")
    values = column.to_numpy().astype(np.float32)
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(
            f"{file} row {at}: {name}={values[at]}: must be finite and not negative "
            f"({int(bad.sum())} rows in all)."
        )
    return values
