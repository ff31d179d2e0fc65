"""Item files -> `items/`: the vectors of all items as parquet for others and as arrays for us.

One of the loader's files (see `manifest.py`): new items are embedded without the training code.
"""

import ctypes
import dataclasses
import glob
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_jax.serving import artifact as artifact_lib
from hstu_jax.serving import feature_values, item_folder, unfinished
from hstu_jax.serving import manifest as manifest_lib

BATCH_ROWS = 8192
ORIGINAL_ID = "original_id"  # what the raw data calls an item whose id is a dense number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_items` wrote."""

    num_items: int
    num_cold: int


def read_rows(pattern: str) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Batches of parquet files with the file each is from.

    Args:
        pattern: paths, with `*`; files are read in the order of their names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a parquet file, or no rows in all of them.
    """
    files = sorted(glob.glob(pattern))
    if not files:
        raise FileNotFoundError(
            f"item_input_path={pattern!r}: no such file; give parquet files with one item a row."
        )
    original = _original_type({file: _read_schema(file) for file in files})
    num_rows = 0
    for file in files:
        with pq.ParquetFile(file) as source:
            for batch in source.iter_batches(batch_size=BATCH_ROWS):
                num_rows += batch.num_rows
                yield file, _with_original_id(batch, original, file)
    if not num_rows:
        raise ValueError(f"item_input_path={pattern!r}: no rows in {', '.join(files)}.")


def check_files(
    pattern: str, *, columns: Sequence[str], id_column: str, must_be_integers: bool
) -> None:
    """Checks item files before the long part of an export.

    Args:
        pattern: as of `read_rows`.
        columns: that the files must have.
        id_column: which of them has the ids.
        must_be_integers: whether ids may not be strings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no rows, a missing column, an id that is missing or on two rows.
        TypeError: ids of another kind.
    """
    ids = []
    for file, batch in read_rows(pattern):
        for name in columns:
            if name not in batch.schema.names:
                raise ValueError(
                    f"{file} column {name}: missing; the file has {sorted(batch.schema.names)}."
                )
        some = item_ids(batch, id_column, where=file)
        if must_be_integers and some.dtype.kind == "U":
            raise TypeError(
                f"{file} column {id_column}: type {batch.column(id_column).type}: item ids are "
                "integers here."
            )
        ids.append(some)
    _refuse_twice(np.concatenate(ids), f"item_input_path={pattern!r} column {id_column}")


def _read_schema(file: str) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a parquet file ({error}).") from None


def _original_type(schemas: Mapping[str, pa.Schema]) -> pa.DataType | None:
    """The type of `original_id` in all files together, or None where no file has it.

    Raises:
        TypeError: two files have it of types that do not go together.
    """
    found: pa.Schema | None = None
    first = ""
    for file, schema in schemas.items():
        if ORIGINAL_ID not in schema.names:
            continue
        kind = schema.field(ORIGINAL_ID).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        one = pa.schema([(ORIGINAL_ID, kind)])
        try:
            found = pa.unify_schemas([found or one, one], promote_options="permissive")
        except pa.ArrowTypeError:
            raise TypeError(
                f"{file} column {ORIGINAL_ID}: type {kind}, and {found.field(0).type} in {first}; "
                "write one type."
            ) from None
        first = first or file
    return None if found is None else found.field(0).type


def _with_original_id(
    batch: pa.RecordBatch, kind: pa.DataType | None, where: str
) -> pa.RecordBatch:
    """The rows with `original_id` of that type, null where their file has none."""
    if kind is None:
        return batch
    if ORIGINAL_ID not in batch.schema.names:
        return batch.append_column(ORIGINAL_ID, pa.nulls(batch.num_rows, kind))
    at = batch.schema.get_field_index(ORIGINAL_ID)
    try:
        values = batch.column(at).cast(kind)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where} column {ORIGINAL_ID}: not all of {kind} ({error}).") from None
    return batch.set_column(at, ORIGINAL_ID, values)


def write_items(
    artifact: artifact_lib.Artifact,
    item_rows: Iterable[tuple[str, pa.RecordBatch]],
    folder: str | os.PathLike[str],
    *,
    on_cold: Literal["count", "refuse"] = "count",
) -> Written:
    """Embeds items and writes `<folder>/items`, in place of those that are there.

    `items.parquet` has `item_id`, `item_tower_emb` (float32 list), `is_cold`, and `original_id`
    where the rows have it. The folder appears under its name when it is whole.

    Args:
        artifact: embeds them.
        item_rows: (where from, rows with the columns of `manifest.item_inputs`).
        folder: usually `artifact.path`.
        on_cold: what to do with items that training has not seen: count and mark them, or raise.

    Raises:
        ValueError, TypeError: an id twice or missing, a missing column or one of another type, no
            rows at all, or a cold item that is refused; names file and column.
    """
    folder = pathlib.Path(folder)
    unfinished.remove_abandoned(folder, rf"\.(old-)?{item_folder.FOLDER}-\d+")
    temporary = folder / f".{item_folder.FOLDER}-{os.getpid()}"
    with unfinished.held(temporary):
        written = _write(artifact, item_rows, temporary, on_cold)
        sync_tree(temporary)
        _put_in_place(temporary, folder / item_folder.FOLDER)
    return written


def sync_tree(folder: pathlib.Path) -> None:
    """Waits until a folder's files and names are on disk."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(new: pathlib.Path, target: pathlib.Path) -> None:
    """Gives `new` the name `target`; what was there ends as `new`, or is removed."""
    if not target.exists():
        new.rename(target)
    elif not exchange(new, target):
        old = target.with_name(f".old-{target.name}-{os.getpid()}")
        target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Exchanges the names of two folders in one step, so that there is always one of either.

    Returns:
        Whether the system can: Linux, on the usual file systems. If not, nothing is changed.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), swap) == 0


def _write(artifact, item_rows, folder: pathlib.Path, on_cold: str) -> Written:
    manifest = artifact.manifest
    column = manifest.item_id_column
    ids, is_cold = [], []
    writer, vectors_file = None, folder / item_folder.VECTORS
    with vectors_file.open("wb") as vectors:
        np.lib.format.write_array_header_1_0(vectors, _header(0, manifest.dim))
        for where, batch in item_rows:
            if not batch.num_rows:
                continue
            some, rows = _embed(artifact, where, batch)
            ids.append(some["item_id"])
            is_cold.append(some["is_cold"])
            if on_cold == "refuse" and some["is_cold"].any():
                at = int(np.argmax(some["is_cold"]))
                raise ValueError(
                    f"{where} column {column}: item {some['item_id'][at]} has no training event "
                    f"({int(some['is_cold'].sum())} in this batch); leave it out, or count them."
                )
            vectors.write(rows.tobytes())
            writer = writer or pq.ParquetWriter(folder / item_folder.PARQUET, _schema(some))
            if _schema(some) != writer.schema:
                raise ValueError(
                    f"{where}: columns {_schema(some).to_string()} and in earlier rows "
                    f"{writer.schema.to_string()}; give all rows the same id columns."
                )
            writer.write_table(_table(some, rows, writer.schema))
        if writer is None:
            raise ValueError("item rows: there are none; give at least one item.")
        writer.close()
        # NumPy leaves room in the header for a first axis that grows.
        vectors.seek(0)
        np.lib.format.write_array_header_1_0(vectors, _header(sum(map(len, ids)), manifest.dim))
    all_ids, cold = np.concatenate(ids), np.concatenate(is_cold)
    _refuse_twice(all_ids, column)
    np.save(folder / item_folder.IDS, all_ids, allow_pickle=False)
    np.save(folder / item_folder.IS_COLD, cold, allow_pickle=False)
    record = item_folder.Record(
        format_version=manifest_lib.FORMAT_VERSION,
        model_version=manifest.model_version,
        num_items=len(all_ids),
        num_cold=int(cold.sum()),
        parts={name: manifest_lib.describe_part(folder / name) for name in item_folder.PARTS},
    )
    text = json.dumps(dataclasses.asdict(record), indent=1, sort_keys=True)
    (folder / item_folder.FILE).write_text(text + "\n")
    return Written(num_items=record.num_items, num_cold=record.num_cold)


def _embed(
    artifact: artifact_lib.Artifact, where: str, batch: pa.RecordBatch
) -> tuple[dict[str, Any], np.ndarray]:
    """(columns of the items, vectors) of a batch."""
    name = artifact.manifest.item_id_column
    try:
        vectors = artifact.embed_items(batch)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where} {error}") from None
    ids = item_ids(batch, name, where=where)
    _refuse_twice(ids, f"{where} column {name}")
    columns = {"item_id": ids, "is_cold": ~artifact.has_training_event(ids)}
    if ORIGINAL_ID in batch.schema.names:
        columns[ORIGINAL_ID] = batch.column(ORIGINAL_ID)
    return columns, vectors


def item_ids(batch: pa.RecordBatch, name: str, *, where: str) -> np.ndarray:
    """Item ids of rows: int64, or strings.

    Raises:
        ValueError: an id is missing, or is an integer of 2^63 or more.
        TypeError: neither integers nor strings.
    """
    array = batch.column(name)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.null_count:
        at = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(f"{where} column {name}: row {at} is null; every item needs an id.")
    if pa.types.is_integer(array.type):
        try:
            return array.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{where} column {name}: an id is 2^63 or more ({error}); write such ids as "
                "strings."
            ) from None
    if feature_values.is_text(array.type):
        return np.array(array.to_pylist(), dtype=np.str_)
    raise TypeError(
        f"{where} column {name}: type {array.type}: item ids must be integers or strings."
    )


def _refuse_twice(ids: np.ndarray, where: str) -> None:
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"{where}: id {values[np.argmax(counts > 1)]} is on two rows "
            f"({int((counts > 1).sum())} such ids); list each item once."
        )


def _schema(columns: dict[str, Any]) -> pa.Schema:
    id_type = pa.int64() if columns["item_id"].dtype.kind == "i" else pa.string()
    fields = [
        ("item_id", id_type), ("item_tower_emb", pa.list_(pa.float32())), ("is_cold", pa.bool_()),
    ]  # fmt: skip
    if ORIGINAL_ID in columns:
        fields.append((ORIGINAL_ID, columns[ORIGINAL_ID].type))
    return pa.schema(fields)


def _table(columns: dict[str, Any], vectors: np.ndarray, schema: pa.Schema) -> pa.Table:
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1]
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.reshape(-1)))
    values = {**columns, "item_tower_emb": lists}
    return pa.table([pa.array(values[field.name]) for field in schema], schema=schema)


def _header(num_rows: int, dim: int) -> dict[str, Any]:
    return {"descr": "<f4", "fortran_order": False, "shape": (num_rows, dim)}
