"""The text files of the reference's samplers: a header of `name:type` columns, one entry a line.

Here: items (id, weight, attrs), users (id, weight) and edges (user id, item id, weight) as columns,
with the line and the reason of the first entry that is wrong; and a writer of the same format. Not
here: whether an id exists (`hstu_jax.features.sampler_inputs`, the next file on the path).
"""

import io
import math
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv
from jaxtyping import Shaped

ITEM_COLUMNS = (("id", "int64"), ("weight", "float"), ("attrs", "string"))
USER_COLUMNS = (("id", "int64"), ("weight", "float"))
EDGE_COLUMNS = (("userid", "int64"), ("itemid", "int64"), ("weight", "float"))

_ARROW_TYPES = {"int64": pa.int64(), "float": pa.float64(), "string": pa.string()}
_MAX_INT64 = 2**63


def read_columns(
    path: str | pathlib.Path, columns: Sequence[tuple[str, str]], *, delimiter: str = "\t"
) -> dict[str, Shaped[np.ndarray, "_"]]:
    """The columns of a file, in the order of its lines; empty lines are skipped.

    The header's types must be the expected ones; its names are free, as in the reference.

    Args:
      path: the file.
      columns: (name to return it by, type) of each column, in order.
      delimiter: between columns.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another header, or a line with another number of columns or a value that is not of
        its column's type (line number, value, how many such lines).

    Source: the sampler inputs of TorchEasyRec 1.3.16. Ids may be strings, which are matched as they
    are (there they are hashed under USE_HASH_NODE_ID=1); the caller says so by the type.
    """
    path = pathlib.Path(path)
    with path.open(encoding="utf-8", newline="\n") as file:
        header = file.readline().rstrip("\r\n").split(delimiter)
    types = [kind for _, kind in columns]
    if [name.rpartition(":")[2] for name in header] != types:
        wanted = delimiter.join(f"{name}:{kind}" for name, kind in columns)
        raise ValueError(
            f"{path} line 1: header {header}: must have the types {types}, such as {wanted!r}; "
            "the first line of a file names and types its columns."
        )
    names = [name for name, _ in columns]
    try:
        table = pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(column_names=names, skip_rows=1),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, quote_char=False),
            convert_options=pa.csv.ConvertOptions(
                column_types={name: _ARROW_TYPES[kind] for name, kind in columns}, null_values=[""]
            ),
        )
    except pa.ArrowInvalid as error:
        if not _has_lines(path):
            return {name: _empty(kind) for name, kind in columns}
        _raise_on_first_bad_line(path, columns, delimiter)
        raise ValueError(f"{path}: {error}.") from error
    is_missing = any(table[name].null_count for name, kind in columns if kind != "string")
    values = {name: table[name].to_numpy() for name in names}
    if is_missing or any(not np.isfinite(values[n]).all() for n, kind in columns if kind == "float"):
        _raise_on_first_bad_line(path, columns, delimiter)
    return values


def write_columns(
    path: pathlib.Path,
    columns: Sequence[tuple[str, str]],
    values: Sequence[Shaped[np.ndarray, "_"]],
) -> None:
    """Writes tab-separated columns under their header."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(f"{name}:{kind}" for name, kind in columns) + "\n")
        texts = [
            [f"{value:.9g}" for value in column] if kind == "float" else map(str, column.tolist())
            for (_, kind), column in zip(columns, values, strict=True)
        ]
        file.writelines("\t".join(row) + "\n" for row in zip(*texts, strict=True))


def _empty(kind: str) -> np.ndarray:
    return np.empty(0, {"int64": np.int64, "float": np.float64, "string": object}[kind])


def _lines(file: io.TextIOBase):
    """(line number, text) of every line behind the header that is not empty."""
    for number, line in enumerate(file, start=1):
        text = line.rstrip("\r\n")
        if number > 1 and text:
            yield number, text


def _has_lines(path: pathlib.Path) -> bool:
    with path.open(encoding="utf-8", newline="\n") as file:
        return next(_lines(file), None) is not None


def _raise_on_first_bad_line(
    path: pathlib.Path, columns: Sequence[tuple[str, str]], delimiter: str
) -> None:
    first, count = "", 0
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, text in _lines(file):
            wrong = _what_is_wrong(text.split(delimiter), columns)
            if wrong:
                first, count = first or f"line {number}: {wrong}", count + 1
    if count:
        raise ValueError(f"{path} {first} ({count} such lines in all).")


def _what_is_wrong(values: Sequence[str], columns: Sequence[tuple[str, str]]) -> str:
    if len(values) != len(columns):
        return f"{len(values)} columns found, {len(columns)} expected"
    for value, (name, kind) in zip(values, columns, strict=True):
        if not _is_of_type(value, kind):
            return f"{name}={value!r}: must be {kind}"
    return ""


def _is_of_type(value: str, kind: str) -> bool:
    try:
        if kind == "int64":
            return -_MAX_INT64 <= int(value) < _MAX_INT64
        return kind == "string" or math.isfinite(float(value))
    except ValueError:
        return False
