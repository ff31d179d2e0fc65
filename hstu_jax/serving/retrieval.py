"""Users in parquet files -> their best items, as list columns of a parquet file.

Columns of the result: the reserved ones, then `item_ids` and `scores`, best first; a row of fewer
than k entries belongs to a user who may be shown no more. Rows keep the input's order.

Here: what is searched and what a user has seen. Not here: the search (`top_k.py`,
`item_index.py`) and resumable output (`parquet_parts.py`). Imports are the loader's.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hstu_jax.serving import feature_values, index_folder, item_index, parquet_parts, top_k
from hstu_jax.serving.artifact import Artifact
from hstu_jax.serving.search_catalogue import Exclusions

IDS_COLUMN, SCORES_COLUMN = "item_ids", "scores"
INDEXES = ("exact", "faiss")
Search = top_k.ExactSearch | item_index.AnnSearch


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrieveOptions:
    """What is retrieved.

    Attributes:
        k: items a user.
        exclude_seen: leave out the items of the row's history, all of it and not only what the
            model reads.
        exclude_cold: leave out items without a training event.
        index: one of `INDEXES`.
        reserved_columns: columns copied from the input.
        part_rows: rows of a part at least.
        batch_rows: users at a time.
    """

    k: int = 100
    exclude_seen: bool = False
    exclude_cold: bool = False
    index: str = "exact"
    reserved_columns: tuple[str, ...] = ()
    part_rows: int = 65_536
    batch_rows: int = 1024

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"--k={self.k}: must be 1 or more.")
        if self.index not in INDEXES:
            raise ValueError(f"--index={self.index!r}: unknown; available: {', '.join(INDEXES)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrieveSummary:
    """What a retrieval did.

    Attributes:
        parts: rows and parts.
        short: rows computed now that have fewer than k items.
        empty: of these, rows without any.
    """

    parts: parquet_parts.Summary
    short: int
    empty: int

    def short_line(self, options: RetrieveOptions) -> str:
        """For the screen; "" where every list is full."""
        if not self.short:
            return ""
        why = "may be shown no more"
        if options.index != "exact":
            why += ", or the index found no more for them (compare with --index=exact)"
        return (
            f"short     {self.short:,} users have fewer than {options.k} items, {self.empty:,} of "
            f"them none: they {why}"
        )


def retrieve(
    artifact: Artifact,
    *,
    input_path: str,
    output_path: str,
    options: RetrieveOptions,
    echo: Callable[[str], None] = print,
) -> RetrieveSummary:
    """Writes the best items of every row.

    Args:
        artifact: the export.
        input_path: parquet files of users, as a pattern.
        output_path: parquet file to make; `OUTPUT.parts/` stands beside it while it is made.
        options: what to retrieve.
        echo: where progress goes.

    Raises:
        FileNotFoundError: no input, no items, no index.
        FileExistsError: the output or its parts are of another run.
        ValueError, TypeError: k over the catalogue, a column that is missing or breaks a rule.
    """
    files = parquet_parts.expand(input_path, flag="--input")
    search = make_search(artifact, index=options.index, exclude_cold=options.exclude_cold)
    search.check_k(options.k)
    short = empty = 0

    def process(table: pa.Table) -> dict[str, pa.Array]:
        nonlocal short, empty
        users = artifact.embed_users(table)
        seen = seen_items(artifact, table) if options.exclude_seen else None
        found = search.search(users, k=options.k, exclusions=seen)
        short += int(np.count_nonzero(found.counts < options.k))
        empty += found.num_empty
        is_used = np.arange(options.k) < found.counts[:, None]
        offsets = pa.array(np.concatenate([[0], np.cumsum(found.counts)]).astype(np.int32))
        return {
            IDS_COLUMN: pa.ListArray.from_arrays(offsets, pa.array(found.ids[is_used])),
            SCORES_COLUMN: pa.ListArray.from_arrays(offsets, pa.array(found.scores[is_used])),
        }

    identity = {
        "command": "retrieve",
        "model_version": artifact.manifest.model_version,
        "items_sha256": index_folder.items_sha256(artifact),
        "k": options.k,
        "exclude_seen": options.exclude_seen,
        "exclude_cold": options.exclude_cold,
        "index": options.index,
    }
    if options.index == "faiss":
        identity["index_sha256"] = index_folder.read(artifact).file_sha256
    job = parquet_parts.Job(
        output=pathlib.Path(output_path),
        identity=identity,
        process=process,
        columns=user_columns(artifact),
        reserved=options.reserved_columns,
        part_rows=options.part_rows,
        batch_rows=options.batch_rows,
    )
    parts = parquet_parts.run(files, job, echo=echo)
    return RetrieveSummary(parts=parts, short=short, empty=empty)


def user_columns(artifact: Artifact) -> tuple[str, ...]:
    """Columns that the user tower reads."""
    return tuple(column.name for column in artifact.manifest.user_inputs)


def make_search(artifact: Artifact, *, index: str, exclude_cold: bool) -> Search:
    """The search over an export's items.

    Args:
        artifact: the export.
        index: one of `INDEXES`.
        exclude_cold: leave out items without a training event.
    """
    mask = ~artifact.item_is_cold() if exclude_cold else None
    if index == "faiss":
        return item_index.AnnSearch(artifact, item_mask=mask)
    return top_k.ExactSearch(artifact.item_ids(), artifact.item_vectors(), item_mask=mask)


def seen_items(artifact: Artifact, table: pa.Table) -> Exclusions:
    """The items of every row's whole history.

    Raises:
        TypeError: the history's column is not of lists, or of delimited strings where the model was
            trained on these.
    """
    return list_items(artifact, table, artifact.manifest.history_column)


def list_items(artifact: Artifact, table: pa.Table, column: str) -> Exclusions:
    """Item ids of a list column by row; delimited strings where the model was trained on these.

    Args:
        artifact: whose ids they are.
        table: rows.
        column: its name.

    Raises:
        TypeError: neither lists nor such strings, or ids of another kind than the items'.
        ValueError: an id is missing.
    """
    values = _one_array(table[column])
    delimiter = artifact.manifest.history.sequence_delim
    if feature_values.is_text(values.type) and delimiter:
        text = pc.if_else(pc.equal(values, ""), pa.scalar(None, values.type), values)
        values = pc.split_pattern(text, delimiter)
    elif not hasattr(values, "value_lengths"):
        expected = f"lists, or strings with {delimiter!r}" if delimiter else "lists"
        raise TypeError(f"column {column}: type {values.type}: must be {expected}.")
    counts = values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = _one_array(values.flatten())
    if flat.null_count:
        raise ValueError(f"column {column}: has a missing id; every entry needs one.")
    kind = pa.string() if artifact.item_ids().dtype.kind == "U" else pa.int64()
    try:
        flat = flat.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise TypeError(f"column {column}: item ids are {kind} here ({error}).") from error
    ids = flat.to_numpy(zero_copy_only=False)
    return Exclusions(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids if kind == pa.int64() else np.array(flat.to_pylist(), np.str_),
    )


def _one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        kind = column.type
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
