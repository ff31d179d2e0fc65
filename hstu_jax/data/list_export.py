"""An event store written as list-column files: one training row a line, and the items.

Here: the files that `list_columns.py` reads back into equal batches. Ids are the store's dense
indices (`video_id` is the item_index, `user_id` the user_index), since those are the model's ids;
what the raw files called an item is its `original_id`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hstu_jax.data import item_file, raw_columns, sample_weights, schema
from hstu_jax.data.event_store import EventStore

_ROWS = 2048  # rows of a row group
DELIMITER = "|"
ITEMS_FILE = "items.parquet"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How rows are written.

    Attributes:
      delimited: strings with `|` between values in place of lists.
      max_history: newest history entries of a row; 0 = all of them, however long.
    """

    delimited: bool = False
    max_history: int = 0

    def __post_init__(self) -> None:
        if self.max_history < 0:
            raise ValueError(f"max_history={self.max_history}: must be 0 (all) or more.")


def export(store: EventStore, out_dir: str | pathlib.Path, *, options: ExportOptions) -> list[str]:
    """Writes `train/`, `validation/` and `test/` with a parquet file each, and the items.

    Args:
      store: an event store.
      out_dir: folder to make.
      options: how.

    Returns:
      The settings that read the files, as flags.

    Raises:
      FileExistsError: the folder is not empty.
    """
    folder = pathlib.Path(out_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"out_dir={folder}: exists and is not empty; choose another folder.")
    for split in schema.SPLIT_NAMES:
        file = folder / split / "part-00000.parquet"
        file.parent.mkdir(parents=True)
        _write_rows(store, store.windows_of_split(split), file, options)
    items = {
        "video_id": np.arange(store.num_items, dtype=np.int64),
        item_file.ORIGINAL_ID: store.items.item_id,
        item_file.TRAIN_COUNT: store.items.train_count,
    }
    features = {name: _to_arrow(column) for name, column in store.features.item.items()}
    pq.write_table(pa.table({**items, **features}), folder / ITEMS_FILE)
    flags = [
        "data.source=list_columns",
        f"data.list_columns.train_input_path={folder}/train/*.parquet",
        f"data.list_columns.validation_input_path={folder}/validation/*.parquet",
        f"data.list_columns.eval_input_path={folder}/test/*.parquet",
        f"data.list_columns.item_input_path={folder / ITEMS_FILE}",
    ]
    if options.delimited:
        flags += [f"sequences.{n}.sequence_delim='{DELIMITER}'" for n in ("uih_seq", "cand_seq")]
    return [f"--config.{flag}" for flag in flags]


def _to_arrow(column: raw_columns.RawColumn) -> pa.Array:
    values = pa.array(column.values)
    if column.codes is not None:
        values = values.take(pa.array(column.codes, mask=column.codes < 0))
    if column.offsets is None:
        return values
    return pa.LargeListArray.from_arrays(pa.array(column.offsets), values)


def _write_rows(
    store: EventStore, windows: np.ndarray, file: pathlib.Path, options: ExportOptions
) -> None:
    writer = None
    for start in range(0, max(len(windows), 1), _ROWS):
        table = pa.table(_columns(store, windows[start : start + _ROWS], options))
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _columns(
    store: EventStore, windows: np.ndarray, options: ExportOptions
) -> Mapping[str, pa.Array]:
    rows, events = store.windows, store.events
    user = rows.user_index[windows]
    own = sample_weights.further_window_columns(store).take(pa.array(windows))
    end = rows.history_end[windows]
    history_len = end - rows.history_start[windows]
    if options.max_history:
        history_len = np.minimum(history_len, options.max_history)
    history = _ranges(end - history_len, history_len)
    first = rows.positive_offsets[windows]
    candidate_len = rows.positive_offsets[windows + 1] - first
    candidate = rows.positive_events[_ranges(first, candidate_len)]

    def lists(values: np.ndarray, lengths: np.ndarray) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        if not options.delimited:
            return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
        # Arrow writes the shortest decimal that reads back to the same float32.
        words = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values).cast(pa.string()))
        return pc.binary_join(words, DELIMITER)

    def sequence(prefix: str, positions: np.ndarray, lengths: np.ndarray) -> dict[str, pa.Array]:
        return {
            f"{prefix}__video_id": lists(events.item_index[positions].astype(np.int64), lengths),
            f"{prefix}__action_weight": lists(events.action[positions].astype(np.int64), lengths),
            f"{prefix}__watch_time": lists(np.asarray(events.watch_time_s[positions]), lengths),
        }

    time = lists(np.asarray(events.timestamp_s[history]), history_len)
    users = {name: column for name, column in store.users.items() if name != "user_id"}
    further = {
        name: _to_arrow(column).take(pa.array(user))
        for name, column in store.features.user.items()
    }
    sequences = {
        **sequence("uih_seq", history, history_len),
        "uih_seq__action_timestamp": time,
        **sequence("cand_seq", candidate, candidate_len),
        "request_time": pa.array(np.asarray(rows.request_time_s[windows])),
    }
    taken = {*users, *further, *sequences, "user_id"}
    clashes = [name for name in own.column_names if name in taken]
    if clashes:
        where = "the exported sequences" if clashes[0] in sequences else schema.USERS_FILE
        raise ValueError(
            f"column {clashes[0]}: stands in both {schema.WINDOWS_FILE} and {where} of "
            f"{store.path}, and a row has one of a name; rename one of them."
        )
    return {
        "user_id": pa.array(user.astype(np.int64)),
        **{name: pa.array(column[user].astype(np.int64)) for name, column in users.items()},
        **further,
        **{name: own[name].combine_chunks() for name in own.column_names},
        **sequences,
    }


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[i], first[i] + 1, ... counts[i] numbers, for every i, one after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(first - before, counts) + np.arange(int(counts.sum()))
