"""The single files of an event store: Arrow, parquet, tab-separated item table, JSON, hashes.

Here: columns to bytes and back. Not here: the folder as a whole (`event_store.py`, which calls
this) and the rules of the values (`store_checks.py`).
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from hstu_jax.data import raw_columns, schema
from hstu_jax.data.records import Events, ItemTable, Windows


def file_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_arrow(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The format's columns of a one-batch Arrow file as views of its memory map.

    The list column gives two entries: its own name (all values) and `positive_offsets`. Further
    columns, such as weights of windows, are read where they are used (`sample_weights.py`).

    Raises:
      ValueError, TypeError: not an Arrow file, wrong columns, several batches, missing values.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not an Arrow file ({error}); prepare the data again.") from error
    _check_schema(reader.schema, path)
    if reader.num_record_batches != 1:
        raise ValueError(
            f"{path}: {reader.num_record_batches} record batches found, 1 expected; "
            "prepare the data again."
        )
    batch = reader.get_batch(0)
    known = {column.name for column in schema.COLUMNS_BY_FILE[path.name]}
    columns: dict[str, np.ndarray] = {}
    for field, values in zip(batch.schema, batch.columns, strict=True):
        if field.name not in known:
            continue
        if values.null_count:
            raise ValueError(
                f"{path} column {field.name}: {values.null_count} missing values; none is allowed."
            )
        if pa.types.is_large_list(field.type):
            columns["positive_offsets"] = values.offsets.to_numpy(zero_copy_only=True)
            values = values.values
        columns[field.name] = values.to_numpy(zero_copy_only=True)
    return columns


def read_parquet(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Columns of `users.parquet` or `items.parquet`, in memory.

    Raises:
      ValueError, TypeError: wrong columns, or an index column that is not 0, 1, 2, ...
    """
    table = pa.parquet.read_table(path)
    _check_schema(table.schema, path)
    columns = {
        name: table[name].to_numpy()
        for name in (column.name for column in schema.COLUMNS_BY_FILE[path.name])
    }
    index_name = schema.COLUMNS_BY_FILE[path.name][0].name
    if not np.array_equal(columns[index_name], np.arange(table.num_rows)):
        raise ValueError(f"{path} column {index_name}: must be 0, 1, 2, ...; prepare again.")
    return columns


def read_further_columns(path: pathlib.Path) -> dict[str, raw_columns.RawColumn]:
    """Columns of `users.parquet` or `items.parquet` that the format does not know: side features.

    Raises:
      TypeError: a column that holds neither numbers nor strings.
    """
    known = {column.name for column in schema.COLUMNS_BY_FILE[path.name]}
    names = [name for name in pa.parquet.read_schema(path).names if name not in known]
    table = pa.parquet.read_table(path, columns=names) if names else None
    return {
        name: raw_columns.from_arrow(table[name], where=f"{path} column {name}") for name in names
    }


def add_feature_columns(digest: Any, features: raw_columns.FeatureColumns) -> None:
    """Feeds the contents of feature columns to a hash."""
    for kind in ("event", "user", "window", "item"):
        for name, column in sorted((getattr(features, kind) or {}).items()):
            for part in ("values", "codes", "offsets"):
                values = getattr(column, part)
                if values is not None:
                    _add_array(digest, f"{kind}/{name}/{part}", values)


def _check_schema(arrow_schema: pa.Schema, path: pathlib.Path) -> None:
    # Arrow prints float32 as "float" and float64 as "double".
    names = {"float": "float32", "double": "float64"}
    found = {field.name: names.get(str(field.type), str(field.type)) for field in arrow_schema}
    schema.check_columns(found, schema.COLUMNS_BY_FILE[path.name], file=str(path))


def write_columns(
    folder: pathlib.Path,
    events: Events,
    windows: Windows,
    users: Mapping[str, np.ndarray],
    items: ItemTable,
    item_features: Mapping[str, np.ndarray],
) -> None:
    """Writes the two Arrow files (uncompressed, one batch) and the two parquet files."""
    event_batch = pa.record_batch(
        {column.name: getattr(events, column.name) for column in schema.EVENT_COLUMNS}
    )
    positives = pa.LargeListArray.from_arrays(
        np.asarray(windows.positive_offsets), np.asarray(windows.positive_events)
    )
    window_columns = [c.name for c in schema.WINDOW_COLUMNS if c.name != "positive_events"]
    window_batch = pa.record_batch(
        {
            **{name: pa.array(getattr(windows, name)) for name in window_columns},
            "positive_events": positives,
        }
    )
    for name, batch in ((schema.EVENTS_FILE, event_batch), (schema.WINDOWS_FILE, window_batch)):
        with pa.ipc.new_file(str(folder / name), batch.schema) as writer:
            writer.write_batch(batch)
    user_index = np.arange(len(users["user_id"]), dtype=np.int32)
    item_index = np.arange(len(items), dtype=np.int32)
    pa.parquet.write_table(
        pa.table({"user_index": user_index, **users}), folder / schema.USERS_FILE
    )
    item_columns = {"item_id": items.item_id, "train_count": items.train_count, **item_features}
    pa.parquet.write_table(
        pa.table({"item_index": item_index, **item_columns}), folder / schema.ITEMS_FILE
    )


def write_item_table(path: pathlib.Path, items: ItemTable, exponent: float) -> None:
    """Writes the reference's sampler table: id, weight = train_count ** exponent, attrs.

    A cold item has weight 0 unless the exponent is 0.

    Raises:
      ValueError: an exponent that is negative or not finite.
    Source: TorchEasyRec 1.3.16, negative sampler input (`id:int64 weight:float attrs:string`).
    """
    if not 0 <= exponent < np.inf:
        raise ValueError(f"item_weight_exponent={exponent}: must not be negative, nor infinite.")
    weights = items.train_count.astype(np.float64) ** exponent
    with path.open("w", newline="\n") as file:
        file.write("id:int64\tweight:float\tattrs:string\n")
        rows = zip(weights.tolist(), items.item_id.tolist(), strict=True)
        file.writelines(f"{i}\t{weight:.9g}\t{item}\n" for i, (weight, item) in enumerate(rows))


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes indented UTF-8 JSON, keys in the given order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def content_sha256(
    events: Events, windows: Windows, users: Mapping[str, np.ndarray], items: ItemTable
) -> str:
    """Hash of names, dtypes and values, so it does not change with the version of pyarrow."""
    digest = hashlib.sha256()
    add = functools.partial(_add_array, digest)
    for table in (events, windows, items):
        for field in dataclasses.fields(table):
            add(field.name, getattr(table, field.name))
    for name in sorted(users):
        add(name, users[name])
    return digest.hexdigest()


def _add_array(digest: Any, name: str, values: np.ndarray) -> None:
    digest.update(f"{name}:{values.dtype.str}:{len(values)};".encode())
    digest.update(np.ascontiguousarray(values).data)
