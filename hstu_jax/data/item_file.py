"""The item table file of list columns: one item a row, with its id and its features.

Here: reading the file, or making a catalogue of the ids that occur. Not here: the rows
(`list_columns.py`, which calls this) and the sampler's own table (`features/item_weights.py`).
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from hstu_jax.data import raw_columns

TRAIN_COUNT = "train_count"  # training events of an item; counted from the rows where absent
ORIGINAL_ID = "original_id"  # what the user calls an item whose id is a dense number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All items, by item_index.

    Attributes:
      key: ids as the rows have them, each once.
      columns: name -> values of every item, the id's own column among them.
      train_count: from the file; None = to be counted.
      item_id: what the user calls each item.
    """

    key: pa.Array
    columns: Mapping[str, raw_columns.RawColumn]
    train_count: Int[np.ndarray, "N"] | None
    item_id: np.ndarray

    def index_of(self, ids: pa.ChunkedArray) -> Int[np.ndarray, "_"]:
        """item_index of ids, -1 where the catalogue lacks one."""
        key = self.key
        if ids.type != key.type:  # integers of another width, or strings on one side
            is_text = not (pa.types.is_integer(ids.type) and pa.types.is_integer(key.type))
            kind = pa.string() if is_text else pa.int64()
            ids, key = ids.cast(kind), key.cast(kind)
        found = pc.index_in(ids, value_set=key)
        return found.fill_null(-1).to_numpy().astype(np.int32)


def read_items(path: str, *, id_column: str, feature_columns: tuple[str, ...]) -> Catalogue:
    """Reads an item file.

    Args:
      path: parquet file.
      id_column: bare name of the item id (`video_id`).
      feature_columns: further columns to read.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a missing column, an id that is null or on two rows, a count below 0.
      TypeError: ids that are neither integers nor strings.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(
            f"data.list_columns.item_input_path={path!r}: no such file; leave it '' to take the "
            "items from the rows."
        )
    table = pq.read_table(path)
    for name in (id_column, *feature_columns):
        if name not in table.column_names:
            near = difflib.get_close_matches(name, table.column_names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"{path} column {name}: missing{hint}; the file has {sorted(table.column_names)}."
            )
    key = _check_key(table[id_column], f"{path} column {id_column}", path)
    columns = {
        name: raw_columns.from_arrow(table[name], where=f"{path} column {name}")
        for name in (id_column, *feature_columns)
    }
    count = None
    if TRAIN_COUNT in table.column_names:
        count = table[TRAIN_COUNT].cast(pa.int64()).fill_null(0).to_numpy().astype(np.int64)
        if (count < 0).any():
            raise ValueError(
                f"{path} row {int(np.argmax(count < 0))}: {TRAIN_COUNT}={count.min()}: must not be "
                "negative."
            )
    item_id = to_numpy(key)
    if ORIGINAL_ID in table.column_names:
        item_id = to_numpy(table[ORIGINAL_ID].combine_chunks())
    return Catalogue(key=key, columns=columns, train_count=count, item_id=item_id)


def items_of_rows(ids: list[pa.ChunkedArray], *, id_column: str) -> Catalogue:
    """The catalogue of all ids that occur, ascending.

    Args:
      ids: id columns of histories and candidates.
      id_column: bare name of the item id.
    """
    distinct = [pc.unique(column) for column in ids if len(column)]
    kinds = {array.type for array in distinct}
    if any(map(raw_columns.is_text, kinds)):
        distinct = [array.cast(pa.string()) for array in distinct]
    else:
        distinct = [array.cast(pa.int64()) for array in distinct]
    key = pc.unique(pa.chunked_array(distinct)) if distinct else pa.array([], pa.int64())
    key = key.take(pc.sort_indices(key))
    column = raw_columns.from_arrow(key, where=id_column)
    return Catalogue(
        key=key, columns={id_column: column}, train_count=None, item_id=to_numpy(key)
    )


def to_numpy(array: pa.Array) -> np.ndarray:
    """Ids as int64 or as fixed-width strings."""
    if pa.types.is_integer(array.type):
        return array.to_numpy(zero_copy_only=False).astype(np.int64)
    return np.array(array.to_pylist(), dtype=np.str_)


def check_id_type(column: pa.ChunkedArray, *, where: str) -> None:
    """Checks that a column may hold ids.

    Args:
      column: ids of items or users.
      where: file and column, for messages.

    Raises:
      TypeError: neither integers nor strings.
      ValueError: an integer that needs 64 bits without a sign.
    """
    kind = column.type
    if not len(column):  # the type of no values may be anything
        return
    if not (pa.types.is_integer(kind) or raw_columns.is_text(kind)):
        raise TypeError(f"{where}: type {kind}: ids must be integers or strings.")
    if pa.types.is_uint64(kind):
        largest = pc.max(column).as_py() or 0
        if largest > np.iinfo(np.int64).max:
            raise ValueError(
                f"{where}: the id {largest} is 2^63 or more; write such ids as strings."
            )


def _check_key(column: pa.ChunkedArray, where: str, path: str) -> pa.Array:
    if column.null_count:
        at = int(np.argmax(column.is_null().to_numpy()))
        raise ValueError(f"{where}: row {at} is null; every item needs an id.")
    check_id_type(column, where=where)
    key = column.cast(pa.int64() if pa.types.is_integer(column.type) else pa.string())
    key = pa.concat_arrays(key.chunks) if key.num_chunks else pa.array([], key.type)
    if pa.types.is_string(key.type) and (is_empty := pc.equal(key, "").to_numpy(False)).any():
        raise ValueError(f"{where}: row {int(np.argmax(is_empty))} is empty; every item needs an id.")
    first = pc.index_in(key, value_set=pc.unique(key)).to_numpy()
    if len(key) and int(first.max()) + 1 < len(key):
        values, counts = np.unique(first, return_counts=True)
        again = key[int(np.flatnonzero(first == values[np.argmax(counts > 1)])[1])]
        raise ValueError(f"{where}: id {again} is on two rows; list each item once.")
    return key
