"""Vectors of users or items in parquet files, row by row of the input.

Columns of the result: the reserved ones, then `user_tower_emb` or `item_tower_emb`, a list of E
float32 numbers a row. Resumable as retrieval is (`parquet_parts.py`). Imports are the loader's.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from hstu_jax.serving import parquet_parts
from hstu_jax.serving.artifact import Artifact

TOWERS = ("user", "item")
_MOST_NUMBERS = 2**31 - 1  # of a column of lists, whose offsets are int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What is computed.

    Attributes:
        tower: one of `TOWERS`.
        reserved_columns: columns copied from the input.
        part_rows: rows of a part at least.
        batch_rows: rows at a time.
    """

    tower: str = "user"
    reserved_columns: tuple[str, ...] = ()
    part_rows: int = 65_536
    batch_rows: int = 1024

    def __post_init__(self) -> None:
        if self.tower not in TOWERS:
            raise ValueError(f"--tower={self.tower!r}: unknown; available: {', '.join(TOWERS)}.")


def predict(
    artifact: Artifact,
    *,
    input_path: str,
    output_path: str,
    options: PredictOptions,
    echo: Callable[[str], None] = print,
) -> parquet_parts.Summary:
    """Writes the vector of every row.

    Args:
        artifact: the export.
        input_path: parquet files, as a pattern.
        output_path: parquet file to make; `OUTPUT.parts/` stands beside it while it is made.
        options: what to compute.
        echo: where progress goes.

    Raises:
        FileNotFoundError: no input.
        FileExistsError: the output or its parts are of another run.
        ValueError, TypeError: a column that is missing or breaks a rule, or more rows at a time
            than a column of lists can hold.
    """
    files = parquet_parts.expand(input_path, flag="--input")
    is_user = options.tower == "user"
    inputs = artifact.manifest.user_inputs if is_user else artifact.manifest.item_inputs
    embed = artifact.embed_users if is_user else artifact.embed_items
    output_column, dim = artifact.manifest.outputs[options.tower], artifact.manifest.dim
    if options.batch_rows * dim > _MOST_NUMBERS:
        raise ValueError(
            f"batch_rows={options.batch_rows}: a column of lists holds {_MOST_NUMBERS // dim} "
            f"vectors of {dim} numbers; give at most that."
        )
    job = parquet_parts.Job(
        output=pathlib.Path(output_path),
        identity={
            "command": "predict",
            "model_version": artifact.manifest.model_version,
            "tower": options.tower,
        },
        process=lambda table: {output_column: vector_column(embed(table))},
        columns=tuple(column.name for column in inputs),
        reserved=options.reserved_columns,
        part_rows=options.part_rows,
        batch_rows=options.batch_rows,
    )
    return parquet_parts.run(files, job, echo=echo)


def vector_column(vectors: np.ndarray) -> pa.Array:
    """Lists of float32 from [n, E]."""
    num, dim = vectors.shape
    offsets = pa.array(np.arange(num + 1, dtype=np.int32) * dim)
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))
