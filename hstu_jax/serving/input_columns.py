"""Plain columns, numpy or Arrow, -> checked histories and values of rows.

The same format as the list columns of training (docs/your-own-events.md): lists or delimited
strings, oldest entry first, whole seconds. One of the loader's files (see `manifest.py`). Next on
the path: `feature_values.py`.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hstu_jax.serving import feature_values
from hstu_jax.serving import manifest as manifest_lib

# Unix seconds stay below this until the year 5138, milliseconds have been above it since 1973.
_MILLISECONDS_FROM = 10**11
_ARROW_TYPES = {
    "id": pa.int64(),
    "key": pa.string(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "number": pa.float64(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histories:
    """The histories of all rows, one after the other, oldest event first.

    Attributes:
        lengths: events of each row, at most `max_seq_len`.
        num_truncated: rows that lost events.
        num_dropped: events that they lost.
        columns: column -> its values.
        timestamp_s: seconds of every event, or None.
        action: bits of every event, or None.
        watch_time_s: seconds of every event, or None.
        anchor_s: time of each row that its events' ages are taken from; 0 without any.
        newest_s: time of each row's newest event; 0 without one.
    """

    lengths: np.ndarray
    num_truncated: int
    num_dropped: int
    columns: Mapping[str, pa.Array]
    timestamp_s: np.ndarray | None
    action: np.ndarray | None
    watch_time_s: np.ndarray | None
    anchor_s: np.ndarray
    newest_s: np.ndarray


def to_arrow(columns: Any, inputs: Sequence[manifest_lib.Input]) -> dict[str, pa.Array]:
    """The inputs' columns as Arrow arrays of equal length.

    Args:
        columns: a mapping of names to arrays or lists, or an Arrow table or batch; further columns
            are not looked at.
        inputs: which to take.

    Raises:
        ValueError: a missing column, or columns of unequal length.
        TypeError: no columns, or something that is no column.
    """
    if isinstance(columns, pa.Table | pa.RecordBatch):
        columns = {name: columns[name] for name in columns.schema.names}
    if not isinstance(columns, Mapping):
        raise TypeError(
            f"columns={type(columns).__name__}: must be a mapping of names to arrays, a "
            "pyarrow.Table or a pyarrow.RecordBatch."
        )
    arrays: dict[str, pa.Array] = {}
    for each in inputs:
        if each.name not in columns:
            near = difflib.get_close_matches(each.name, columns, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"column {each.name}: missing{hint}; the model reads "
                f"{[i.name for i in inputs]}, and got {sorted(columns)}."
            )
        arrays[each.name] = _to_array(columns[each.name], each.name)
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"columns of unequal length: {sizes}; give one value, or list, per row.")
    return arrays


def _to_array(column: Any, name: str) -> pa.Array:
    if isinstance(column, np.ndarray) and column.ndim > 1:
        column = list(column)
    if not isinstance(column, pa.Array | pa.ChunkedArray):
        try:
            column = pa.array(column)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError) as e:
            raise TypeError(f"column {name}: cannot be read as one column ({e}).") from None
    if isinstance(column, pa.ChunkedArray):
        kind = column.type
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    return column


def read_histories(
    arrays: Mapping[str, pa.Array],
    inputs: Sequence[manifest_lib.Input],
    history: manifest_lib.History,
) -> Histories:
    """Cuts every row to its newest events and checks the values.

    Args:
        arrays: from `to_arrow`.
        inputs: of the user tower.
        history: what the columns are for.

    Raises:
        ValueError: unequal lengths, a missing value, times that are negative, in milliseconds, out
            of order or after the request, actions below 0, watch times that are no durations.
        TypeError: a column of another type.
    """
    sizes: np.ndarray | None = None
    first, flat = "", {}
    for each in inputs:
        if each.kind != "sequence":
            continue
        lists = _as_lists(arrays[each.name], each.name, history.sequence_delim)
        found = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        if sizes is None:
            first, sizes = each.name, found
        elif (found != sizes).any():
            at = int(np.argmax(found != sizes))
            raise ValueError(
                f"row {at}: {first} has {sizes[at]} entries and {each.name} has {found[at]}; the "
                "columns of a history must be equally long."
            )
        flat[each.name] = _cast(lists.flatten(), each, sizes, history.sequence_delim)
    assert sizes is not None, "a history has at least its items"
    limit = history.max_seq_len
    if history.sequence_length:
        limit = min(limit, history.sequence_length)
    kept = np.minimum(sizes, limit)
    keep = _kept_positions(sizes, kept, newest_first=history.newest_first)
    if keep is not None:
        flat = {name: array.take(pa.array(keep)) for name, array in flat.items()}
    time, request = _times(arrays, flat, kept, history)
    newest = np.zeros(len(kept), np.int64)
    if time is not None:
        newest[kept > 0] = time[(np.cumsum(kept) - 1)[kept > 0]]
    return Histories(
        lengths=kept,
        num_truncated=int(np.count_nonzero(kept < sizes)),
        num_dropped=int((sizes - kept).sum()),
        columns=flat,
        timestamp_s=time,
        action=_actions(flat, kept, history.action),
        watch_time_s=_watch_times(flat, kept, history.watch_time),
        anchor_s=newest if request is None else request,
        newest_s=newest,
    )


def row_of(entry: int, lengths: np.ndarray) -> int:
    """Row of an entry of the concatenated histories."""
    return int(np.searchsorted(np.cumsum(lengths), entry, side="right"))


def _as_lists(column: pa.Array, name: str, delimiter: str) -> pa.Array:
    kind = column.type
    if column.null_count:
        at = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        empty = "an empty string" if delimiter else "an empty list"
        raise ValueError(f"row {at}: {name} is null; give {empty} for no entry.")
    if feature_values.is_text(kind) and delimiter:
        text = pc.if_else(pc.equal(column, ""), pa.scalar(None, kind), column)
        parts = pc.split_pattern(text, delimiter)
        return pc.if_else(parts.is_null(), pa.scalar([], parts.type), parts)
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not delimiter:
        return column
    if pa.types.is_null(kind) and not len(column):
        return pa.array([], pa.list_(pa.int64()))
    expected = f"strings with {delimiter!r} between the values" if delimiter else "lists"
    raise TypeError(f"column {name}: type {kind}: must be {expected}.")


def _cast(
    flat: pa.Array, column: manifest_lib.Input, lengths: np.ndarray, delimiter: str
) -> pa.Array:
    """The values with their type; ids and side features of lists stay as they are."""
    if flat.null_count and not column.is_null_allowed:
        at = int(np.argmax(flat.is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(
            f"row {row_of(at, lengths)}: {column.name} has a missing value; every entry needs one."
        )
    kind = _ARROW_TYPES[column.dtype]
    if pa.types.is_null(flat.type):
        return flat.cast(kind)
    if not delimiter and column.dtype not in ("int64", "float32"):
        return flat
    if pa.types.is_floating(kind) and pa.types.is_integer(flat.type):
        flat = flat.cast(pa.float64(), safe=False)  # float32 would refuse integers above 2^24
    try:
        return flat.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise TypeError(
            f"column {column.name}: values of type {flat.type} that are not {kind} ({error})."
        ) from None


def _kept_positions(
    sizes: np.ndarray, kept: np.ndarray, *, newest_first: bool
) -> np.ndarray | None:
    """Flat positions of the newest entries, oldest first; None = all as they are."""
    if not newest_first and (kept == sizes).all():
        return None
    ends = np.cumsum(sizes)
    place = np.arange(int(kept.sum())) - np.repeat(np.cumsum(kept) - kept, kept)
    if newest_first:
        return np.repeat(ends - sizes + kept - 1, kept) - place
    return np.repeat(ends - kept, kept) + place


def _times(arrays, flat, lengths, history) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(time of every event, time of every row)."""
    time = request = None
    if history.timestamp is not None:
        time = flat[history.timestamp].to_numpy(zero_copy_only=False)
        _check_times(time, history.timestamp, lengths)
        row = np.repeat(np.arange(len(lengths)), lengths)
        backwards = np.zeros(len(time), bool)
        backwards[1:] = (row[1:] == row[:-1]) & (time[1:] < time[:-1])
        order = "descend" if history.newest_first else "ascend"
        rule = f"is out of order; the times of a history {order}"
        _refuse(backwards, time, history.timestamp, rule, lengths)
    if history.request_time is not None:
        column = arrays[history.request_time]
        if column.null_count:
            at = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise ValueError(f"row {at}: {history.request_time} is null; every row needs one.")
        try:
            request = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise TypeError(
                f"column {history.request_time}: type {column.type}: must hold whole seconds."
            ) from None
        _check_times(request, history.request_time, None)
        if time is not None:
            rule = f"is later than the row's {history.request_time}"
            late = time > np.repeat(request, lengths)
            _refuse(late, time, history.timestamp, rule, lengths)
    return time, request


def _check_times(time: np.ndarray, name: str, lengths: np.ndarray | None) -> None:
    rule = "looks like milliseconds; times are whole seconds, divide by 1000"
    _refuse(time > _MILLISECONDS_FROM, time, name, rule, lengths)
    _refuse(time < 0, time, name, "is negative", lengths)


def _actions(flat, lengths, name) -> np.ndarray | None:
    if name is None:
        return None
    action = flat[name].to_numpy(zero_copy_only=False)
    is_bad = (action < 0) | (action > np.iinfo(np.int32).max)
    _refuse(is_bad, action, name, "must be action bits, 0 or more", lengths)
    return action.astype(np.int32)


def _watch_times(flat, lengths, name) -> np.ndarray | None:
    if name is None:
        return None
    watch = flat[name].to_numpy(zero_copy_only=False).astype(np.float32)
    is_bad = ~np.isfinite(watch) | (watch < 0)
    _refuse(is_bad, watch, name, "must be finite and not negative", lengths)
    return watch


def _refuse(is_bad, values, name, rule, lengths) -> None:
    """Raises on the first True; `lengths` of histories, or None for a value a row."""
    if is_bad.any():
        at = int(np.argmax(is_bad))
        row = at if lengths is None else row_of(at, lengths)
        more = int(is_bad.sum())
        raise ValueError(f"row {row}: {name}={values[at]} {rule} ({more} such values in all).")
