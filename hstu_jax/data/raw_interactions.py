"""Public interaction files to checked columns: one line per (user, item), with or without a time.

Here: the formats (MovieLens, Amazon ratings, plain sequences), casts, and which cells are refused:
messages name file, line (from 1), column, value and how many more. Not here: filters, order and
windows (`interactions.py`, the next file on the path).
"""

import dataclasses
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from jaxtyping import Int64

from hstu_jax.data import refusal, schema


@dataclasses.dataclass(frozen=True)
class RawFormat:
    """How the lines of a file look.

    Attributes:
      delimiter: between columns.
      columns: their names; "" where nothing is read (MovieLens-1M's "::" makes empty columns).
      has_header: the first line holds names, and they are `columns`.
      has_text_ids: ids are any text; otherwise whole numbers, 0 or more.
    """

    delimiter: str
    columns: tuple[str, ...]
    has_header: bool = False
    has_text_ids: bool = False

    @property
    def names(self) -> list[str]:
        """A name for every column of the file."""
        return [name or f"unused {place}" for place, name in enumerate(self.columns)]


# Column names of files without a header are ours; `USER`, `ITEM` and `TIME` say which are read.
FORMATS = {
    "sequences": RawFormat(" ", ("user", "item")),
    "movielens_100k": RawFormat("\t", ("user", "item", "rating", "timestamp")),
    "movielens_1m": RawFormat(":", ("user", "", "item", "", "rating", "", "timestamp")),
    "movielens_20m": RawFormat(",", ("userId", "movieId", "rating", "timestamp"), has_header=True),
    "amazon": RawFormat(",", ("user", "item", "rating", "timestamp"), has_text_ids=True),
}
_USER, _ITEM, _TIME = ("user", "userId"), ("item", "movieId"), ("timestamp",)
_WHOLE = "^[0-9]{1,18}$"


@dataclasses.dataclass(frozen=True)
class RawInteractions:
    """All lines of a file, in its order.

    Attributes:
      user: dense number of the user; numbered in the order of the ids.
      item: dense number of the item, same.
      timestamp_s: Unix seconds; None for a format without times.
      user_ids: the file's id of every user number: int64, or strings.
      item_ids: same of items.
    """

    user: Int64[np.ndarray, "lines"]
    item: Int64[np.ndarray, "lines"]
    timestamp_s: Int64[np.ndarray, "lines"] | None
    user_ids: np.ndarray
    item_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.user)


def read(path: pathlib.Path, *, raw_format: str) -> RawInteractions:
    """Reads a file, plain or `.gz`.

    Args:
      path: the file.
      raw_format: a name in `FORMATS`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown format, a line with more or fewer columns, another header, a cell that
        is no whole number, a time in milliseconds, or no line at all.
    """
    if raw_format not in FORMATS:
        raise ValueError(f"format={raw_format!r}: unknown; choose from {tuple(FORMATS)}.")
    if not path.is_file():
        raise FileNotFoundError(
            f"raw_file={path}: no such file; download the data set and name its file of events."
        )
    form = FORMATS[raw_format]
    table = _read_table(path, form)
    if not table.num_rows:
        raise ValueError(f"{path}: holds no line of data; name the file of events.")
    first_line = 2 if form.has_header else 1
    columns = {name: table[name].combine_chunks() for name in table.column_names}

    def whole(names: tuple[str, ...]) -> np.ndarray | None:
        found = [name for name in names if name in columns]
        return _whole(columns[found[0]], path, found[0], first_line) if found else None

    time = whole(_TIME)
    if time is not None:
        refusal.refuse(
            time > schema.MILLISECONDS_FROM,
            time,
            place=lambda at: f"{path} line {first_line + at}",
            column="timestamp",
            rule="looks like milliseconds; times are whole seconds, divide by 1000",
            unit="lines",
        )
    if form.has_text_ids:
        user, user_ids = _number_text(columns["user"])
        item, item_ids = _number_text(columns["item"])
    else:
        user_ids, user = np.unique(whole(_USER), return_inverse=True)
        item_ids, item = np.unique(whole(_ITEM), return_inverse=True)
    return RawInteractions(
        user=user.astype(np.int64),
        item=item.astype(np.int64),
        timestamp_s=time,
        user_ids=user_ids,
        item_ids=item_ids,
    )


def _read_table(path: pathlib.Path, form: RawFormat) -> pa.Table:
    """The read columns as strings."""
    used = [name for name in form.columns if name and name != "rating"]
    try:
        return pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(
                column_names=None if form.has_header else form.names
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=form.delimiter, quote_char=False, ignore_empty_lines=False
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(used, pa.string()),
                include_columns=used,
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ValueError(
            f"{path}: is not of this format, whose columns are {', '.join(form.names)} with "
            f"{form.delimiter!r} between them ({str(error).strip()}); choose another --format."
        ) from error


def _whole(column: pa.Array, path: pathlib.Path, name: str, first_line: int) -> np.ndarray:
    is_whole = pc.match_substring_regex(column, _WHOLE).to_numpy(zero_copy_only=False)
    if not is_whole.all():
        refusal.refuse(
            ~is_whole,
            column.to_numpy(zero_copy_only=False),
            place=lambda at: f"{path} line {first_line + at}",
            column=name,
            rule="is not a whole number of at most 18 digits",
            unit="lines",
        )
    return column.cast(pa.int64()).to_numpy()


def _number_text(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Numbers in the order of the strings, and the strings."""
    encoded = column.dictionary_encode()
    words = encoded.dictionary.to_numpy(zero_copy_only=False)
    order = np.argsort(words)
    number_of = np.empty(len(words), np.int64)
    number_of[order] = np.arange(len(words))
    return number_of[encoded.indices.to_numpy()], words[order]
