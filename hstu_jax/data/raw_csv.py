"""Raw CSV files (plain or gzip) to checked NumPy columns, by DuckDB.

Here: the header, casts, and which cells are refused: every message names file, row (line of the
file, header = row 1), column, value and how many more. Not here: what the columns mean together
(`kuairand.py`, the next file on the path).
"""

import contextlib
import dataclasses
import difflib
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import duckdb
import numpy as np
from jaxtyping import Float32, Int32, Int64, Shaped

from hstu_jax.data import schema

_WHOLE = r"\s*[+-]?[0-9]+(\.0*)?\s*"  # a cell with a whole number; "1.0" is one


@dataclasses.dataclass(frozen=True)
class RawLog:
    """One log file, in file order.

    Attributes:
      name: file name.
      user_id, video_id: raw ids.
      time_ms: Unix milliseconds.
      action: sum of `schema.ACTION_BITS`.
      watch_time_s: seconds; 0 where the cell could not be used.
      num_bad_watch: how many cells could not be used.
    """

    name: str
    user_id: Int64[np.ndarray, "_"]
    video_id: Int64[np.ndarray, "_"]
    time_ms: Int64[np.ndarray, "_"]
    action: Int32[np.ndarray, "_"]
    watch_time_s: Float32[np.ndarray, "_"]
    num_bad_watch: int


@dataclasses.dataclass(frozen=True)
class RawUsers:
    """One user-features file, in file order; `categories` holds strings, "" where empty."""

    user_id: Int64[np.ndarray, "_"]
    categories: dict[str, Shaped[np.ndarray, "_"]]


def read_log(path: pathlib.Path, *, flags: Mapping[str, str], max_bad_watch_share: float) -> RawLog:
    """Reads one log.

    Args:
      path: `.csv` or `.csv.gz` with a header.
      flags: raw 0/1 column -> name in `schema.ACTION_BITS`.
      max_bad_watch_share: largest share of unusable `play_time_ms` cells, 0..1.

    Raises:
      ValueError: a column is missing; an id, time or flag is no whole number; an id is negative, a
        time is negative or in seconds, a flag is not 0 or 1; too many unusable watch times.
    """
    with duckdb.connect() as connection:
        _set_up(connection)
        source = _source(path)
        needed = ("user_id", "video_id", "time_ms", "play_time_ms", *flags)
        _check_header(connection, path, needed)
        whole = ("user_id", "video_id", "time_ms", *flags)
        casts = ", ".join(f'{_number(name, "BIGINT")} AS "{name}"' for name in whole)
        bits = " + ".join(f'"{raw}" * {schema.ACTION_BITS[n]}' for raw, n in flags.items())
        valid = " AND ".join(f'"{raw}" BETWEEN 0 AND 1' for raw in flags)
        query = (
            f"SELECT user_id, video_id, time_ms, {bits} AS action, coalesce({valid}, false) AS ok, "
            f"play FROM (SELECT {casts}, {_number('play_time_ms', 'DOUBLE')} AS play FROM {source})"
        )
        with _reading(path):
            columns = connection.execute(query).fetchnumpy()
        report = _Report(connection, path)
        user, video = report.whole("user_id", columns), report.whole("video_id", columns)
        time_ms = report.whole("time_ms", columns)
        report.refuse(user < 0, "user_id", "is negative")
        report.refuse(video < 0, "video_id", "is negative")
        report.refuse(time_ms < 0, "time_ms", "is negative")
        report.refuse(
            time_ms < schema.MILLISECONDS_FROM,
            "time_ms",
            "looks like seconds; milliseconds are expected",
        )
        bad_flags = ~np.ma.filled(columns["ok"], False).astype(bool)
        if bad_flags.any():
            report.refuse_flags(bad_flags, list(flags))
        watch = np.ma.filled(columns["play"].astype(np.float64), np.nan) / 1000.0
        bad_watch = ~np.isfinite(watch) | (watch < 0)
        if bad_watch.mean() > max_bad_watch_share if len(watch) else False:
            share = f"a share of {bad_watch.mean():.3g}, more than {max_bad_watch_share}"
            report.refuse(bad_watch, "play_time_ms", f"is missing or not usable ({share})")
    return RawLog(
        name=path.name,
        user_id=user,
        video_id=video,
        time_ms=time_ms,
        action=np.ma.filled(columns["action"], 0).astype(np.int32),
        watch_time_s=np.where(bad_watch, 0.0, watch).astype(np.float32),
        num_bad_watch=int(bad_watch.sum()),
    )


def read_user_features(path: pathlib.Path) -> RawUsers:
    """Reads user ids and the category columns of `schema.USER_CATEGORIES`.

    Raises:
      ValueError: a column is missing, or a user id is no whole number.
    """
    with duckdb.connect() as connection:
        _set_up(connection)
        _check_header(connection, path, ("user_id", *schema.USER_CATEGORIES))
        names = ", ".join(f"coalesce({name}, '') AS {name}" for name in schema.USER_CATEGORIES)
        query = f"SELECT {_number('user_id', 'BIGINT')} AS user_id, {names} FROM {_source(path)}"
        with _reading(path):
            columns = connection.execute(query).fetchnumpy()
        user_id = _Report(connection, path).whole("user_id", columns)
    categories = {
        name: np.asarray(columns[name], dtype=object).astype(object)
        for name in schema.USER_CATEGORIES
    }
    return RawUsers(user_id=user_id, categories=categories)


@dataclasses.dataclass(frozen=True)
class _Report:
    """Refuses rows of one file; reads the offending cell again for its message."""

    connection: duckdb.DuckDBPyConnection
    path: pathlib.Path

    def whole(self, name: str, columns: Mapping[str, np.ndarray]) -> Int64[np.ndarray, "_"]:
        values = columns[name]
        self.refuse(np.ma.getmaskarray(values), name, "is not a whole number")
        return np.asarray(values, dtype=np.int64)

    def refuse(self, bad: Shaped[np.ndarray, "_"], name: str, rule: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            value = self._cell(row, name)
            raise ValueError(
                f"{self.path} row {row + 2}: {name}={value} {rule} ({int(bad.sum())} rows in all)."
            )

    def refuse_flags(self, bad: Shaped[np.ndarray, "_"], names: Sequence[str]) -> None:
        row = int(np.argmax(bad))
        for name in names:
            if self._cell(row, name) not in ("0", "1"):
                self.refuse(bad, name, "is not 0 or 1")

    def _cell(self, row: int, name: str) -> str:
        found = self.connection.execute(
            f'SELECT "{name}" FROM {_source(self.path)} LIMIT 1 OFFSET {row}'
        ).fetchone()
        return str(found[0]) if found else "?"


def _set_up(connection: duckdb.DuckDBPyConnection) -> None:
    # Row numbers in messages, and ties in time, rely on the order of the file.
    connection.execute("SET preserve_insertion_order = true")
    connection.execute("SET enable_progress_bar = false")


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Makes ValueErrors of what DuckDB cannot read, also of lines behind those it looks at first."""
    try:
        yield
    except duckdb.Error as error:
        raise ValueError(f"{path}: cannot be read as CSV ({error}).") from error


def _number(column: str, kind: str) -> str:
    """SQL of a cell as a number, NULL where it is none.

    A bare TRY_CAST of a column is pushed into DuckDB 2.0's CSV reader as a hard cast, which raises
    on the first bad cell (duckdb issue 23818); NULLIF keeps the cast outside and changes nothing.
    A cast to BIGINT rounds 1.5, which is no whole number; 1.0 is one, as pandas writes it where
    another cell of the column is empty.
    """
    number = f"try_cast(nullif(\"{column}\", '') AS {kind})"
    if kind != "BIGINT":
        return number
    return f"CASE WHEN regexp_full_match(\"{column}\", '{_WHOLE}') THEN {number} END"


def _source(path: pathlib.Path) -> str:
    quoted = str(path).replace("'", "''")
    return (
        f"read_csv('{quoted}', header=true, all_varchar=true, delim=',', quote='\"', "
        "escape='\"', nullstr='', null_padding=false)"
    )


def _check_header(
    connection: duckdb.DuckDBPyConnection, path: pathlib.Path, needed: Sequence[str]
) -> None:
    with _reading(path):
        rows = connection.execute(f"DESCRIBE SELECT * FROM {_source(path)}").fetchall()
    present = [row[0] for row in rows]
    for name in needed:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{path} column {name}: missing{hint}; the file has {present}.")
