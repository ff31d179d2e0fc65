"""Rows of list-column files -> `EventStore`: events, windows, users, items, with checked values.

Events are the histories of all rows, one after the other and not deduplicated, then the candidates
of all rows. Here: the rules of times, actions and watch times, dropped rows, training counts and
the fingerprint. Not here: reading the files (`list_files.py`).
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hstu_jax.config.feature_checks import sequence_name
from hstu_jax.data import (
    item_file,
    list_files,
    raw_columns,
    sample_weights,
    schema,
    store_files,
    windowing,
)
from hstu_jax.data.event_store import EventStore
from hstu_jax.data.list_layout import ListLayout
from hstu_jax.data.records import Events, ItemTable, Windows

SOURCE = "list columns"
# Mode of `stats["window_options"]`: windows came as they are, and cannot be cut again.
WINDOW_MODE = "list_columns"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Split:
    """The rows of a split that have candidates; arrays by row, history entry or candidate."""

    row: np.ndarray  # numbers of the kept rows within the split
    history_len: np.ndarray
    candidate_len: np.ndarray
    request_time_s: np.ndarray
    history: dict[str, np.ndarray]  # item_index, timestamp_s, action, watch_time_s
    candidate: dict[str, np.ndarray]  # the same
    side: dict[str, pa.ChunkedArray]  # history entries
    scalars: dict[str, pa.ChunkedArray]  # rows
    notes: tuple[str, ...]


def build(
    layout: ListLayout,
    splits: Mapping[str, list_files.Rows],
    *,
    catalogue: item_file.Catalogue,
    history_of_items: Mapping[str, str],
    path: pathlib.Path,
) -> EventStore:
    """Checks the values and puts the store together.

    Args:
      layout: what the columns are.
      splits: rows by split name, "train" first.
      catalogue: the items.
      history_of_items: history column -> item column that it is taken from.
      path: shown as the store's path.

    Raises:
      ValueError, TypeError: a value breaks a rule; names file, row and column.
    """
    parts = {
        name: _check_split(name, layout, rows, catalogue) for name, rows in splits.items()
    }
    history = _concatenate([part.history for part in parts.values()])
    candidate = _concatenate([part.candidate for part in parts.values()])
    history_len = np.concatenate([part.history_len for part in parts.values()])
    candidate_len = np.concatenate([part.candidate_len for part in parts.values()])
    users, user_index = _users(layout, parts)
    history_end = np.cumsum(history_len)
    num_history = len(history["timestamp_s"])
    per_event = np.concatenate([np.repeat(user_index, n) for n in (history_len, candidate_len)])
    events = Events(
        user_index=per_event,
        **{name: np.concatenate([history[name], candidate[name]]) for name in history},
    )
    windows = Windows(
        user_index=user_index,
        history_start=history_end - history_len,
        history_end=history_end,
        request_time_s=np.concatenate([part.request_time_s for part in parts.values()]),
        split=np.concatenate(
            [
                np.full(len(part.row), schema.SPLIT_NAMES.index(name), np.int8)
                for name, part in parts.items()
            ]
        ),
        positive_offsets=np.concatenate([[0], np.cumsum(candidate_len)]).astype(np.int64),
        positive_events=num_history + np.arange(len(candidate["timestamp_s"]), dtype=np.int64),
    )
    count = catalogue.train_count
    if count is None:
        count = _train_count(parts["train"], len(catalogue.key))
    items = ItemTable(item_id=catalogue.item_id, train_count=count)
    features = raw_columns.FeatureColumns(
        event=_history_columns(parts, history_of_items, catalogue, history["item_index"]),
        window=_window_columns(layout, parts),
        item=dict(catalogue.columns),
        item_key=item_file.to_numpy(catalogue.key),
        notes=tuple(note for part in parts.values() for note in part.notes),
    )
    return EventStore(
        path=path,
        events=events,
        windows=windows,
        users={"user_id": users},
        items=items,
        vocabularies={},
        stats=_stats(events, windows, users, items, features),
        features=features,
    )


def _check_split(
    name: str, layout: ListLayout, rows: list_files.Rows, catalogue: item_file.Catalogue
) -> _Split:
    history = rows.sequences[sequence_name(layout.history_item)]
    candidate = rows.sequences[sequence_name(layout.candidate_item)]
    if layout.user_id:
        _refuse_null(layout.user_id, rows, "; or set data.list_columns.user_id_field=''")
    if layout.sample_weight:
        _check_weights(layout.sample_weight, rows)
    time = history.values[layout.timestamp].to_numpy()
    request = _request_times(layout, rows, history, time)
    _check_times(layout, rows, history, time, request)
    num_history, num_candidate = int(history.lengths.sum()), int(candidate.lengths.sum())
    values = {
        "item_index": _items(layout.history_item, rows, history, catalogue),
        "timestamp_s": time,
        "action": _actions(layout.action, rows, history, num_history),
        "watch_time_s": _watch_times(layout.watch_time, rows, history, num_history),
    }
    labels = {
        "item_index": _items(layout.candidate_item, rows, candidate, catalogue),
        "timestamp_s": np.repeat(request, candidate.lengths),
        "action": _actions(layout.label_like(layout.action), rows, candidate, num_candidate),
        "watch_time_s": _watch_times(
            layout.label_like(layout.watch_time), rows, candidate, num_candidate
        ),
    }
    has_candidate = candidate.lengths > 0
    row = np.flatnonzero(has_candidate)
    kept_history = np.repeat(has_candidate, history.lengths)
    is_all = bool(has_candidate.all())

    def of_rows(column: pa.ChunkedArray, kept: np.ndarray) -> pa.ChunkedArray:
        return column if is_all else column.filter(pa.array(kept))

    empty = int((history.lengths[row] == 0).sum())
    notes = (
        f"{name}: {len(row):,} rows of {len(rows.files)} file(s); {len(rows) - len(row):,} without "
        f"a candidate left out, {empty:,} without history; sequence_length left out "
        f"{history.num_cut:,} history entries and {candidate.num_cut:,} candidates",
    )
    return _Split(
        row=row,
        history_len=history.lengths[row],
        candidate_len=candidate.lengths[row],
        request_time_s=request[row],
        history={k: v if is_all else v[kept_history] for k, v in values.items()},
        candidate=labels,
        side={c: of_rows(history.values[c], kept_history) for c in layout.history_side},
        scalars={c: of_rows(values, has_candidate) for c, values in rows.scalars.items()},
        notes=notes,
    )


def _request_times(
    layout: ListLayout, rows: list_files.Rows, history: list_files.Sequences, time: np.ndarray
) -> np.ndarray:
    if layout.request_time is None:
        newest = np.zeros(len(rows), np.int64)
        has_history = history.lengths > 0
        newest[has_history] = time[(np.cumsum(history.lengths) - 1)[has_history]]
        return newest
    _refuse_null(layout.request_time, rows)
    column = rows.scalars[layout.request_time]
    try:
        return column.cast(pa.int64()).to_numpy().astype(np.int64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise TypeError(
            f"{rows.files[0]} column {layout.request_time}: type {column.type}: must hold whole "
            "seconds."
        ) from None


def _refuse_null(column: str, rows: list_files.Rows, advice: str = "") -> None:
    values = rows.scalars[column]
    if values.null_count:
        at = int(np.argmax(values.is_null().to_numpy()))
        raise ValueError(f"{rows.where(at)}: {column} is null; every row needs one{advice}.")


def _check_weights(column: str, rows: list_files.Rows) -> None:
    weights = rows.scalars[column]
    if not sample_weights.is_number(weights.type):
        raise TypeError(
            f"{rows.files[0]} column {column}: {weights.type} found; a weight is one number a row."
        )
    _refuse_null(column, rows)
    values = weights.to_numpy().astype(np.float32)
    rows.refuse(sample_weights.is_wrong(values), values, column, sample_weights.RULE)


def _check_times(
    layout: ListLayout,
    rows: list_files.Rows,
    history: list_files.Sequences,
    time: np.ndarray,
    request: np.ndarray,
) -> None:
    in_ms = "looks like milliseconds; times are whole seconds, divide by 1000"
    name, lengths = layout.timestamp, history.lengths
    rows.refuse(time > schema.MILLISECONDS_FROM, time, name, in_ms, lengths=lengths)
    rows.refuse(time < 0, time, name, "negative time", lengths=lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    backwards = np.concatenate([[False], (row[1:] == row[:-1]) & (time[1:] < time[:-1])])
    rule = (
        "out of order: earlier than the entry before it; a row's history ascends in time (with "
        f"sequences.{sequence_name(name)}.newest_first=True it descends)"
    )
    rows.refuse(backwards[: len(time)], time, name, rule, lengths=lengths)
    if layout.request_time is None:
        return
    rows.refuse(request > schema.MILLISECONDS_FROM, request, layout.request_time, in_ms)
    rows.refuse(request < 0, request, layout.request_time, "negative time")
    rule = f"later than the row's {layout.request_time}: the history must not reach past it"
    rows.refuse(time > np.repeat(request, lengths), time, name, rule, lengths=lengths)


def _items(
    column: str,
    rows: list_files.Rows,
    sequence: list_files.Sequences,
    catalogue: item_file.Catalogue,
) -> np.ndarray:
    ids = sequence.values[column]
    if raw_columns.is_text(ids.type):
        is_empty = pc.equal(ids, "").to_numpy()
        rows.refuse(is_empty, np.full(len(ids), ""), column, "an empty id", lengths=sequence.lengths)
    index = catalogue.index_of(ids)
    if len(index) and index.min() < 0:
        shown = item_file.to_numpy(ids.combine_chunks())
        rule = "no such item in data.list_columns.item_input_path; add it there"
        rows.refuse(index < 0, shown, column, rule, lengths=sequence.lengths)
    return index


def _actions(
    column: str | None, rows: list_files.Rows, sequence: list_files.Sequences, num: int
) -> np.ndarray:
    if column is None:
        return np.zeros(num, np.int32)
    action = sequence.values[column].to_numpy()
    bad = (action < 0) | (action > np.iinfo(np.int32).max)
    rows.refuse(bad, action, column, "must be action bits, 0 or more", lengths=sequence.lengths)
    return action.astype(np.int32)


def _watch_times(
    column: str | None, rows: list_files.Rows, sequence: list_files.Sequences, num: int
) -> np.ndarray:
    if column is None:
        return np.zeros(num, np.float32)
    watch = sequence.values[column].to_numpy().astype(np.float32)
    bad = ~np.isfinite(watch) | (watch < 0)
    rows.refuse(bad, watch, column, "must be finite and not negative", lengths=sequence.lengths)
    return watch


def _users(layout: ListLayout, parts: Mapping[str, _Split]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, user_index of every row)."""
    num_rows = sum(len(part.row) for part in parts.values())
    if not layout.user_id:
        return np.arange(num_rows, dtype=np.int64), np.arange(num_rows, dtype=np.int32)
    ids = _join_rows(layout.user_id, parts)
    distinct = pc.unique(ids)
    index = pc.index_in(ids, value_set=distinct).to_numpy().astype(np.int32)
    return item_file.to_numpy(distinct), index


def _window_columns(
    layout: ListLayout, parts: Mapping[str, _Split]
) -> dict[str, raw_columns.RawColumn]:
    return {
        name: raw_columns.from_arrow(_join_rows(name, parts), where=f"column {name}")
        for name in layout.contextual
    }


def _history_columns(
    parts: Mapping[str, _Split],
    history_of_items: Mapping[str, str],
    catalogue: item_file.Catalogue,
    item_index: np.ndarray,
) -> dict[str, raw_columns.RawColumn]:
    """Columns of the history's features; entry e belongs to history event e."""
    names = parts["train"].side
    columns = {
        name: raw_columns.from_arrow(
            list_files.join([c for p in parts.values() for c in p.side[name].chunks], name),
            where=f"column {name}",
        )
        for name in names
    }
    for name, item_column in history_of_items.items():
        columns[name] = catalogue.columns[item_column].take(item_index)
    return columns


def _join_rows(name: str, parts: Mapping[str, _Split]) -> pa.ChunkedArray:
    return list_files.join([c for p in parts.values() for c in p.scalars[name].chunks], name)


def _train_count(train: _Split, num_items: int) -> np.ndarray:
    """Training rows' candidates of each item, and at least 1 where a training history has it."""
    count = np.bincount(train.candidate["item_index"], minlength=num_items).astype(np.int64)
    seen = np.bincount(train.history["item_index"], minlength=num_items) > 0
    return np.maximum(count, seen)


def _concatenate(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _stats(
    events: Events,
    windows: Windows,
    users: np.ndarray,
    items: ItemTable,
    features: raw_columns.FeatureColumns,
) -> dict:
    digest = hashlib.sha256()
    base = store_files.content_sha256(events, windows, {"user_id": users}, items)
    digest.update(base.encode())
    store_files.add_feature_columns(digest, features)
    rules = windowing.WindowOptions()
    return {
        "source": SOURCE,
        "content_sha256": digest.hexdigest(),
        # What the counted baselines need: which history events count as liked, and when a day ends.
        "window_options": {
            "mode": WINDOW_MODE,
            "positive_actions": list(rules.positive_actions),
            "utc_offset_s": 0,
        },
    }


