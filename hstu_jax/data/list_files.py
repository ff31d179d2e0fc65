"""Parquet files of training rows -> checked, concatenated Arrow columns of one split.

Here: opening files, lists and delimited strings, equal lengths, `sequence_length`, and where a
value stands (file, row) for messages. Not here: what the columns mean to a model
(`list_columns.py`, the next file on the path). Rows count from 0 within their file.
"""

import dataclasses
import difflib
import glob
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int, Shaped

from hstu_jax.config.feature_schema import SequenceConfig
from hstu_jax.data import raw_columns, refusal

_BATCH_ROWS = 4096  # rows in memory twice while they are converted


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceColumns:
    """The columns of one sequence to read.

    Attributes:
      types: column -> type of its values; None = as the file has them, strings if delimited.
      config: length, delimiter, order.
      refuse_null: columns whose values must not be missing.
    """

    types: Mapping[str, pa.DataType | None]
    config: SequenceConfig
    refuse_null: frozenset[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """One sequence of every row.

    Attributes:
      lengths: entries of each row, after `sequence_length`.
      num_cut: entries that `sequence_length` left out.
      values: column -> values of all rows, one row after the other.
    """

    lengths: Int[np.ndarray, "rows"]
    num_cut: int
    values: Mapping[str, pa.ChunkedArray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one split.

    Attributes:
      files: in the order read.
      first_row: first row of each file, and the number of all rows.
      sequences: by name.
      scalars: column -> one value, or several, a row.
    """

    files: tuple[str, ...]
    first_row: Int[np.ndarray, "files_and_one"]
    sequences: Mapping[str, Sequences]
    scalars: Mapping[str, pa.ChunkedArray]

    def __len__(self) -> int:
        return int(self.first_row[-1])

    def where(self, row: int) -> str:
        """File and row within it, for messages."""
        file = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return f"{self.files[file]} row {row - self.first_row[file]}"

    def refuse(
        self,
        bad: Bool[np.ndarray, "_"],
        values: Shaped[np.ndarray, "_"],
        column: str,
        rule: str,
        *,
        lengths: Int[np.ndarray, "rows"] | None = None,
    ) -> None:
        """Raises on the first True of `bad`, naming file, row and value.

        Args:
          bad: per row, or per entry of a sequence.
          values: as long.
          column: its name.
          rule: what it breaks.
          lengths: of the sequence; None = `bad` is per row.

        Raises:
          ValueError: any is True.
        """

        def place(at: int) -> str:
            return self.where(at if lengths is None else _row_of(at, lengths))

        refusal.refuse(bad, values, place=place, column=column, rule=rule)


def expand_paths(pattern: str, *, field: str) -> tuple[str, ...]:
    """The files of a pattern, by name.

    Raises:
      FileNotFoundError: there is none.
    """
    files = tuple(sorted(glob.glob(pattern)))
    if not files:
        raise FileNotFoundError(
            f"{field}={pattern!r}: no such file; `python -m hstu_jax.prepare list_columns --from "
            "STORE --out_dir DIR` writes some from an event store."
        )
    return files


def column_names(file: str) -> tuple[str, ...]:
    """Columns of a parquet file.

    Raises:
      ValueError: not a parquet file.
    """
    return tuple(_open(file).schema_arrow.names)


def read_rows(
    files: tuple[str, ...],
    *,
    sequences: Mapping[str, SequenceColumns],
    scalars: tuple[str, ...],
) -> Rows:
    """Reads and checks the files of one split.

    Args:
      files: parquet files.
      sequences: by name.
      scalars: columns of one value, or several, a row.

    Raises:
      ValueError, TypeError: a missing column, another type, a row that is null, values that cannot
        be read, or sequences of unequal length; names file, row and column.
    """
    pieces: dict[str, list[pa.Array]] = {}
    lengths: dict[str, list[np.ndarray]] = {name: [] for name in sequences}
    num_cut = dict.fromkeys(sequences, 0)
    first_row = [0]
    for file in files:
        first_row.append(first_row[-1])
        for row, batch in _batches(file, sequences, scalars):
            first_row[-1] += batch.num_rows
            for name, wanted in sequences.items():
                size, cut, values = _read_sequence(batch, wanted, file=file, row=row)
                lengths[name].append(size)
                num_cut[name] += cut
                for column, array in values.items():
                    pieces.setdefault(column, []).append(array)
            for column in scalars:
                pieces.setdefault(column, []).append(batch.column(column))

    return Rows(
        files=files,
        first_row=np.array(first_row, dtype=np.int64),
        sequences={
            name: Sequences(
                lengths=np.concatenate([np.empty(0, np.int64), *lengths[name]]),
                num_cut=num_cut[name],
                values={column: join(pieces.get(column, []), column) for column in wanted.types},
            )
            for name, wanted in sequences.items()
        },
        scalars={column: join(pieces.get(column, []), column) for column in scalars},
    )


def join(arrays: list[pa.Array], column: str) -> pa.ChunkedArray:
    """One column of many arrays; those of numbers may differ in width, and the widest wins.

    Args:
      arrays: in order; () gives no integers.
      column: its name, for messages.

    Raises:
      TypeError: numbers in some and strings in others.
    """
    kinds = {array.type for array in arrays}
    if len(kinds) < 2:
        return pa.chunked_array(arrays, type=next(iter(kinds), pa.int64()))
    fields = [pa.schema([("values", kind)]) for kind in sorted(kinds, key=str)]
    try:
        kind = pa.unify_schemas(fields, promote_options="permissive").field("values").type
    except pa.ArrowTypeError:
        raise TypeError(
            f"column {column}: types {sorted(map(str, kinds))} in its files; write one of them."
        ) from None
    return pa.chunked_array([array.cast(kind) for array in arrays])


def _open(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(pathlib.Path(file))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a parquet file ({error}).") from error


def _batches(
    file: str, sequences: Mapping[str, SequenceColumns], scalars: tuple[str, ...]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of the wanted columns with the number of their first row."""
    wanted = [*scalars, *(column for s in sequences.values() for column in s.types)]
    with _open(file) as source:
        names = source.schema_arrow.names
        for column in wanted:
            if column not in names:
                near = difflib.get_close_matches(column, names, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(
                    f"{file} column {column}: missing{hint}; the file has {sorted(names)}."
                )
        row = 0
        for batch in source.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
            yield row, _plain(batch)
            row += batch.num_rows


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with dictionary-encoded columns (pandas' categories) written out."""
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    return pa.record_batch(columns, names=batch.schema.names)


def _read_sequence(
    batch: pa.RecordBatch, wanted: SequenceColumns, *, file: str, row: int
) -> tuple[np.ndarray, int, dict[str, pa.Array]]:
    """(lengths, entries left out, values) of one sequence in a batch."""
    first, sizes, values = "", np.empty(0), {}
    for column, kind in wanted.types.items():
        lists = _as_lists(batch.column(column), wanted.config, f"{file} column {column}", row)
        found = lists.value_lengths().fill_null(0).to_numpy().astype(np.int64)
        if first and (found != sizes).any():
            at = int(np.argmax(found != sizes))
            raise ValueError(
                f"{file} row {row + at}: {first} has {sizes[at]} entries and {column} has "
                f"{found[at]}: the columns of a sequence must be equally long "
                f"({int((found != sizes).sum())} rows in this batch)."
            )
        if not first:
            first, sizes = column, found
        flat = lists.flatten()
        if column in wanted.refuse_null and flat.null_count:
            at = _row_of(int(np.argmax(flat.is_null().to_numpy(zero_copy_only=False))), found)
            raise ValueError(
                f"{file} row {row + at}: {column} has a missing value; every entry needs one."
            )
        values[column] = _cast(flat, kind, found, f"{file}", row, column)
    kept, keep = _kept_positions(sizes, wanted.config)
    if keep is not None:
        values = {column: array.take(pa.array(keep)) for column, array in values.items()}
    return kept, int((sizes - kept).sum()), values


def _as_lists(column: pa.Array, config: SequenceConfig, where: str, row: int) -> pa.Array:
    kind = column.type
    if column.null_count:
        at = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        empty = "an empty string" if config.sequence_delim else "an empty list"
        raise ValueError(f"{where}: row {row + at} is null; write {empty} for no entry.")
    if raw_columns.is_text(kind) and config.sequence_delim:
        # An empty string is an empty sequence, not one empty value.
        text = pc.if_else(pc.equal(column, ""), pa.scalar(None, kind), column)
        return pc.split_pattern(text, config.sequence_delim)
    if raw_columns.is_list(kind) and not config.sequence_delim:
        return column
    expected = "strings" if config.sequence_delim else "lists"
    advice = "sequence_delim='' reads lists" if config.sequence_delim else "strings need it"
    raise TypeError(
        f"{where}: type {kind}: must be {expected}, since the sequence's "
        f"sequence_delim={config.sequence_delim!r}; {advice}."
    )


def _cast(
    flat: pa.Array,
    kind: pa.DataType | None,
    lengths: np.ndarray,
    file: str,
    row: int,
    column: str,
) -> pa.Array:
    if kind is None or flat.type == kind:
        return flat
    if pa.types.is_floating(kind) and pa.types.is_integer(flat.type):
        flat = flat.cast(pa.float64(), safe=False)  # float32 would refuse integers above 2^24
    try:
        return flat.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        for at, value in enumerate(flat):
            try:
                pa.array([value.as_py()], flat.type).cast(kind)
            except pa.ArrowNotImplementedError:
                raise TypeError(
                    f"{file} column {column}: values of type {flat.type} found, {kind} expected."
                ) from None
            except pa.ArrowInvalid:
                raise ValueError(
                    f"{file} row {row + _row_of(at, lengths)}: {column} has the value "
                    f"{value.as_py()!r}, which is not {kind}."
                ) from None
        raise


def _kept_positions(
    sizes: np.ndarray, config: SequenceConfig
) -> tuple[np.ndarray, np.ndarray | None]:
    """Lengths after cutting, and the flat positions to take, oldest first; None = all in order."""
    kept = np.minimum(sizes, config.sequence_length) if config.sequence_length else sizes
    if not config.newest_first and (kept == sizes).all():
        return kept, None
    ends = np.cumsum(sizes)
    place = np.arange(int(kept.sum())) - np.repeat(np.cumsum(kept) - kept, kept)
    if config.newest_first:  # the row's first `kept` entries, from the last of them to the first
        return kept, np.repeat(ends - sizes + kept - 1, kept) - place
    return kept, np.repeat(ends - kept, kept) + place


def _row_of(entry: int, lengths: np.ndarray) -> int:
    """Row of an entry of the concatenated sequences."""
    return int(np.searchsorted(np.cumsum(lengths), entry, side="right"))
