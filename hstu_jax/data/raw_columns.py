"""`RawColumn`: the values of a feature as the files hold them, each distinct value once if need be.

Here: Arrow columns to NumPy, with missing values and several values a row. Not here: which file a
column comes from (`list_columns.py`, `store_files.py`) and what becomes of a value
(`features/id_mapping.py`, the next file on the path).
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawColumn:
    """A value, or several, for each entry (an event, a row, a user or an item).

    Attributes:
      values: integers, floats, or strings; without `codes` one for each place.
      codes: position in `values` of each place, -1 = the value is missing; None = place i has
        value i.
      offsets: entry e has the places `offsets[e]:offsets[e + 1]`; None = one place an entry.
    """

    values: Shaped[np.ndarray, "_"]
    codes: Int[np.ndarray, "_"] | None = None
    offsets: Int[np.ndarray, "_"] | None = None

    def __len__(self) -> int:
        if self.offsets is not None:
            return len(self.offsets) - 1
        return len(self.values if self.codes is None else self.codes)

    def take(self, entries: Int[np.ndarray, "_"]) -> "RawColumn":
        """The column of other entries, each of which has the value of one of this column's.

        Raises:
          ValueError: the column has several values an entry.
        """
        if self.offsets is not None:
            raise ValueError("a column with several values an entry cannot be taken apart.")
        codes = entries if self.codes is None else self.codes[entries]
        return RawColumn(values=self.values, codes=codes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureColumns:
    """Columns that features may read besides those that every store has, by column name.

    Attributes:
      event: one entry per event.
      user: one entry per user.
      window: one entry per window; None = features of a window are those of its user.
      item: one entry per item.
      item_key: what the user's own files call an item; None = its item_index.
      notes: lines about what was left out on reading.
    """

    event: Mapping[str, RawColumn] = dataclasses.field(default_factory=dict)
    user: Mapping[str, RawColumn] = dataclasses.field(default_factory=dict)
    window: Mapping[str, RawColumn] | None = None
    item: Mapping[str, RawColumn] = dataclasses.field(default_factory=dict)
    item_key: Shaped[np.ndarray, "_"] | None = None
    notes: tuple[str, ...] = ()


def from_arrow(column: pa.Array | pa.ChunkedArray, *, where: str) -> RawColumn:
    """An Arrow column of numbers, booleans or strings, or of lists of them.

    A null list is an entry without values; a null in a list or in a plain column, and an empty
    string, is a missing value.

    Args:
      column: of any length.
      where: file and column, for messages.

    Raises:
      TypeError: another type.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of a column without chunks
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_dictionary(array.type):  # pandas' categories
        array = array.dictionary_decode()
    offsets = None
    if is_list(array.type):
        lengths = np.zeros(len(array), np.int64)
        lengths[:] = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        array = array.flatten()
    kind = array.type
    if pa.types.is_boolean(kind):
        array, kind = array.cast(pa.int8()), pa.int8()
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    holds_text = is_text(kind)
    if not holds_text and not is_number:
        raise TypeError(
            f"{where}: type {column.type}: must be numbers, booleans or strings, or lists of them."
        )
    if not holds_text and array.null_count == 0:
        return RawColumn(values=array.to_numpy(zero_copy_only=False), offsets=offsets)
    if holds_text:
        array = pc.if_else(pc.equal(array, ""), pa.scalar(None, kind), array)
    coded = array.dictionary_encode()
    words = coded.dictionary
    if holds_text:
        values = np.array(words.to_pylist(), dtype=np.str_)
    else:
        values = words.to_numpy(zero_copy_only=False)
    codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    return RawColumn(values=values, codes=codes, offsets=offsets)


def split_strings(column: RawColumn, separator: str) -> RawColumn:
    """The column with strings that hold `separator` taken apart into several values an entry.

    A missing string stays one missing value, and an empty part becomes one. Numbers, lists and strings without the separator stay
    as they are.

    Args:
      column: one value an entry, or several.
      separator: not empty.
    """
    words = column.values
    if column.offsets is not None or words.dtype.kind != "U":
        return column
    parts = [word.split(separator) for word in words.tolist()]
    if all(len(part) == 1 for part in parts):
        return column
    codes = np.arange(len(words)) if column.codes is None else column.codes
    values, flat = np.unique([word for part in parts for word in part], return_inverse=True)
    # One more part, a missing one, in the last place: code -1 finds it.
    flat = np.append(np.where(values[flat] == "", -1, flat), -1)
    counts = np.array([*map(len, parts), 1])
    first = np.cumsum(counts) - counts
    offsets = np.concatenate([[0], np.cumsum(counts[codes])])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts[codes])
    places = flat[np.repeat(first[codes], counts[codes]) + within]
    return RawColumn(values=values, codes=places.astype(np.int32), offsets=offsets)


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is a string, of either size of offsets."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether an Arrow type is a list of one of the variable-length kinds."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)
