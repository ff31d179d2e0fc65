"""The rules that the values of an event store keep, checked when it is written and opened.

Here: lengths, dtypes, order, ranges, units, and that no history reaches its request. Not here: the
columns' names and types on disk (`schema.py`) and the files (`event_store.py`, which calls this).
Every message names file, column, the first offending position and value, and how many more.
"""

import pathlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped

from hstu_jax.data import refusal, schema
from hstu_jax.data.records import Events, ItemTable, Windows

# Events are checked in blocks, so that a file larger than memory can be opened.
_BLOCK = 4_000_000


def check_columns_of(
    events: Events,
    windows: Windows,
    users: Mapping[str, np.ndarray],
    items: ItemTable,
    *,
    folder: pathlib.Path,
) -> None:
    """Checks names, dtypes and equal lengths of columns about to be written.

    Raises:
      ValueError: a column is missing, or columns of one table differ in length.
      TypeError: a column has another dtype than `schema` says.
    """
    tables = {
        schema.EVENTS_FILE: vars(events),
        schema.WINDOWS_FILE: {
            name: values
            for name, values in vars(windows).items()
            if name not in ("positive_offsets", "positive_events")
        },
        schema.USERS_FILE: dict(users),
        schema.ITEMS_FILE: vars(items),
    }
    for name, columns in tables.items():
        expected = [
            column
            for column in schema.COLUMNS_BY_FILE[name]
            if column.name in columns or not _is_made_by_writer(name, column.name)
        ]
        found = {key: str(values.dtype) for key, values in columns.items()}
        schema.check_columns(found, expected, file=str(folder / name))
        lengths = {key: len(values) for key, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{folder / name}: columns of unequal length {lengths}.")
    offsets, positives = windows.positive_offsets, windows.positive_events
    if offsets.dtype != np.int64 or positives.dtype != np.int64:
        raise TypeError(
            f"{folder / schema.WINDOWS_FILE} column positive_events: offsets {offsets.dtype} and "
            f"values {positives.dtype} found, int64 expected."
        )
    if len(offsets) != len(windows) + 1:
        raise ValueError(
            f"{folder / schema.WINDOWS_FILE} column positive_events: {len(offsets)} offsets for "
            f"{len(windows)} windows; one more than windows expected."
        )


def _is_made_by_writer(file: str, column: str) -> bool:
    made = {schema.USERS_FILE: "user_index", schema.ITEMS_FILE: "item_index"}
    return made.get(file) == column or column == "positive_events"


def check_values(
    events: Events,
    windows: Windows,
    *,
    num_users: int,
    num_items: int,
    folder: pathlib.Path,
) -> None:
    """Checks every value of events and windows.

    Raises:
      ValueError: ids out of range, times negative, in milliseconds or out of order, watch times
        that are not finite or negative, unknown action bits, or a window whose history is not
        strictly before its request or whose positives are not its user's events at or after it.
    """
    file = str(folder / schema.EVENTS_FILE)
    for start in range(0, len(events), _BLOCK):
        # One event more in front, so that order is checked across blocks too.
        part = slice(max(start - 1, 0), start + _BLOCK)
        _check_event_block(events, part, num_users=num_users, num_items=num_items, file=file)
    _check_windows(events, windows, num_users=num_users, file=str(folder / schema.WINDOWS_FILE))


def _check_event_block(
    events: Events, part: slice, *, num_users: int, num_items: int, file: str
) -> None:
    first = part.start
    user, item = events.user_index[part], events.item_index[part]
    time, action, watch = events.timestamp_s[part], events.action[part], events.watch_time_s[part]
    _refuse(time > schema.MILLISECONDS_FROM, time, first, file, "timestamp_s",
            "looks like milliseconds; times are whole seconds, divide by 1000")  # fmt: skip
    _refuse(time < 0, time, first, file, "timestamp_s", "negative time")
    _refuse((user < 0) | (user >= num_users), user, first, file, "user_index",
            f"outside 0..{num_users - 1} of users.parquet")  # fmt: skip
    _refuse((item < 0) | (item >= num_items), item, first, file, "item_index",
            f"outside 0..{num_items - 1} of items.parquet")  # fmt: skip
    _refuse((action & ~schema.ALL_ACTION_BITS) != 0, action, first, file, "action",
            f"unknown bits; known are 0..{schema.ALL_ACTION_BITS}")  # fmt: skip
    _refuse(~np.isfinite(watch) | (watch < 0), watch, first, file, "watch_time_s",
            "must be finite and not negative")  # fmt: skip
    _refuse(user[1:] < user[:-1], user[1:], first + 1, file, "user_index",
            "out of order; events are sorted by user, then time")  # fmt: skip
    backwards = (user[1:] == user[:-1]) & (time[1:] < time[:-1])
    _refuse(backwards, time[1:], first + 1, file, "timestamp_s",
            "out of order: earlier than the same user's event before it")  # fmt: skip


def _check_windows(events: Events, windows: Windows, *, num_users: int, file: str) -> None:
    user, request = windows.user_index, windows.request_time_s
    start, end, offsets = windows.history_start, windows.history_end, windows.positive_offsets
    positives = windows.positive_events
    _refuse((user < 0) | (user >= num_users), user, 0, file, "user_index",
            f"outside 0..{num_users - 1} of users.parquet")  # fmt: skip
    _refuse((windows.split < 0) | (windows.split > 2), windows.split, 0, file, "split",
            "must be 0, 1 or 2")  # fmt: skip
    _refuse(request > schema.MILLISECONDS_FROM, request, 0, file, "request_time_s",
            "looks like milliseconds; times are whole seconds, divide by 1000")  # fmt: skip
    _refuse((start < 0) | (start > end), start, 0, file, "history_start",
            "must be 0 or more and not after history_end")  # fmt: skip
    _refuse(end > len(events), end, 0, file, "history_end",
            f"after the last of {len(events)} events")  # fmt: skip
    has_history = np.flatnonzero(end > start)
    last = end[has_history] - 1
    _refuse_at(events.timestamp_s[last] >= request[has_history], has_history, end, file,
               "history_end", "the history must be strictly before request_time_s")  # fmt: skip
    other = (events.user_index[start[has_history]] != user[has_history]) | (
        events.user_index[last] != user[has_history]
    )
    _refuse_at(other, has_history, start, file, "history_start",
               "the history holds another user's events")  # fmt: skip
    sizes = np.diff(offsets)
    if len(offsets) and (offsets[0] != 0 or offsets[-1] != len(positives) or (sizes < 0).any()):
        raise ValueError(f"{file} column positive_events: broken offsets; prepare the data again.")
    _refuse(sizes == 0, sizes, 0, file, "positive_events", "a window without positives")
    _refuse((positives < 0) | (positives >= len(events)), positives, 0, file, "positive_events",
            f"outside 0..{len(events) - 1} of events.arrow")  # fmt: skip
    window = np.repeat(np.arange(len(windows)), sizes)
    _refuse_at(events.user_index[positives] != user[window], window, user, file,
               "positive_events", "a positive of another user")  # fmt: skip
    _refuse_at(events.timestamp_s[positives] < request[window], window, request, file,
               "positive_events", "a positive before request_time_s")  # fmt: skip


def _refuse(
    bad: Shaped[np.ndarray, "_"],
    values: Shaped[np.ndarray, "_"],
    first: int,
    file: str,
    column: str,
    rule: str,
) -> None:
    """Raises on the first True of `bad`; `first` is the row number of its first entry."""
    refusal.refuse(
        bad,
        values,
        place=lambda at: f"{file} row {first + at}",
        column=column,
        rule=rule,
        unit="rows",
    )


def _refuse_at(
    bad: Shaped[np.ndarray, "_"],
    rows: Shaped[np.ndarray, "_"],
    values: Shaped[np.ndarray, "_"],
    file: str,
    column: str,
    rule: str,
) -> None:
    """Like `_refuse` where `bad` belongs to the given rows; shows `values` of the row."""
    if bad.any():
        row = int(rows[np.argmax(bad)])
        raise ValueError(
            f"{file} row {row}: {column}: {rule} (value {values[row]}; {int(bad.sum())} in all)."
        )
