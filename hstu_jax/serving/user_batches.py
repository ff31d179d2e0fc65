"""Histories of any length -> the few array shapes that a folder has programs for.

One of the loader's files (see `manifest.py`): plain NumPy. Used by `artifact.py`.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from hstu_jax.serving import input_columns
from hstu_jax.serving import manifest as manifest_lib

# The reference's turn is 2 * 3.14, not 2 * pi.
_TURN = np.float32(2 * 3.14)
# Differences of any two ages fit int32.
_NEWEST_S, _OLDEST_S = -(2**24), 2**31 - 1 - 2**24


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserBatch:
    """Rows that go through a program together.

    Attributes:
        length: S, history slots.
        batch: B, rows of the program, at least as many as `rows`.
        rows: row numbers in the first places.
        events: numbers of the rows' events in the concatenated histories.
        slots: places of these events among the B * S slots.
        lengths: [B] events of each row; 0 in places without a row.
    """

    length: int
    batch: int
    rows: np.ndarray
    events: np.ndarray
    slots: np.ndarray
    lengths: np.ndarray


def plan(lengths: np.ndarray, sizes: Sequence[manifest_lib.Size]) -> Iterator[UserBatch]:
    """Deals the rows to programs: each to the shortest length that holds it.

    Args:
        lengths: events of each row, at most the longest of `sizes`.
        sizes: history lengths, ascending, and their batch sizes.
    """
    first_event = np.cumsum(lengths) - lengths
    size_of = np.searchsorted([size.length for size in sizes], lengths)
    for number, size in enumerate(sizes):
        rows = np.flatnonzero(size_of == number)
        start = 0
        while start < len(rows):
            batch = _batch_for(len(rows) - start, size.batches)
            some = rows[start : start + batch]
            counts = lengths[some]
            padded = np.zeros(batch, np.int32)
            padded[: len(some)] = counts
            place = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            yield UserBatch(
                length=size.length,
                batch=batch,
                rows=some,
                events=np.repeat(first_event[some], counts) + place,
                slots=np.repeat(np.arange(len(some)) * size.length, counts) + place,
                lengths=padded,
            )
            start += batch


def item_batches(num_items: int, batches: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first item, rows of the program) of every batch."""
    start = 0
    while start < num_items:
        batch = _batch_for(num_items - start, batches)
        yield start, batch
        start += batch


def _batch_for(num: int, batches: Sequence[int]) -> int:
    """The smallest batch that holds `num` rows, or the largest there is."""
    return next((batch for batch in batches if batch >= num), batches[-1])


def plain_inputs(
    batch: UserBatch, histories: input_columns.Histories, history: manifest_lib.History
) -> dict[str, np.ndarray]:
    """What a program may read besides the embeddings; each names what it does read.

    `time_gap_s` is the anchor minus the event's time, taken in int64: float32 holds Unix seconds
    to 128 s only. `age_s` is the same in whole seconds, for biases by time. `last_phase` is
    ((floor(t / unit) mod count) / count) * 2 * 3.14 of the newest event's time t.
    """
    inputs = {"lengths": batch.lengths}

    def spread(values: np.ndarray, dtype: type) -> np.ndarray:
        slots = np.zeros(batch.batch * batch.length, dtype)
        slots[batch.slots] = values
        return slots.reshape(batch.batch, batch.length)

    if histories.action is not None:
        inputs["action"] = spread(histories.action[batch.events], np.int32)
    if histories.watch_time_s is not None:
        inputs["watch_time_s"] = spread(histories.watch_time_s[batch.events], np.float32)
    if histories.timestamp_s is not None:
        anchor = histories.anchor_s[batch.rows]
        gap = np.repeat(anchor, histories.lengths[batch.rows]) - histories.timestamp_s[batch.events]
        inputs["time_gap_s"] = spread(gap, np.float32)
        inputs["age_s"] = spread(np.clip(gap, _NEWEST_S, _OLDEST_S), np.int32)
        inputs["anchor_s"] = _padded(anchor.astype(np.float32), batch.batch)
        if history.step_time is not None:
            counts = histories.lengths[batch.rows]
            time = histories.timestamp_s[batch.events]
            inputs["step_gap_s"] = spread(_step_gaps(time, counts, anchor, history), np.float32)
    if history.periods:
        phase = _phases(histories.newest_s[batch.rows], history.periods)
        inputs["last_phase"] = _padded(phase, batch.batch)
    return inputs


def padded_history(batch: UserBatch, vectors: np.ndarray) -> np.ndarray:
    """[B, S, F] from the vectors of the batch's events; zeros elsewhere."""
    slots = np.zeros((batch.batch * batch.length, vectors.shape[1]), np.float32)
    slots[batch.slots] = vectors
    return slots.reshape(batch.batch, batch.length, -1)


def padded_rows(batch: UserBatch, values: np.ndarray) -> np.ndarray:
    """[B, ...] from values of all rows; zeros in places without a row."""
    return _padded(values[batch.rows], batch.batch)


def _padded(values: np.ndarray, num: int) -> np.ndarray:
    padded = np.zeros((num, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    return padded


def _step_gaps(
    time_s: np.ndarray, lengths: np.ndarray, request_s: np.ndarray, history: manifest_lib.History
) -> np.ndarray:
    """Seconds from an event to the row's next one, or the request; or from the one before.

    The first event of a row has none before it, and reads the largest float32.
    """
    row = np.repeat(np.arange(len(lengths)), lengths)
    is_new_row = np.diff(row, prepend=-1) > 0
    if history.step_time == "own":
        gaps = np.diff(time_s, prepend=0).astype(np.float32)
        return np.where(is_new_row, np.finfo(np.float32).max, gaps)
    is_last = np.append(is_new_row[1:], True)[: len(row)]
    following = np.where(is_last, request_s[row], np.append(time_s[1:], 0)[: len(row)])
    return (following - time_s).astype(np.float32)


def _phases(time_s: np.ndarray, periods: Sequence[tuple[int, int]]) -> np.ndarray:
    units = np.array([unit for unit, _ in periods], dtype=np.int64)
    counts = np.array([count for _, count in periods], dtype=np.int64)
    passed = time_s[:, None] // units[None] % counts[None]
    return passed.astype(np.float32) / counts[None].astype(np.float32) * _TURN
