"""Training rows of the next-item objective, and the times that their tokens read.

With `model.objective = "next_item"` every positive event asks at its own time: its query is the
output at the user's last event strictly before it. Here: where these queries lie, which tokens a
window's training row holds, and the gaps that its tokens read. Evaluation and serving keep the
window form, history before one request, whose last position is the same query. `windows.py` takes
the sizes, `packing.py` the values.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from hstu_jax.config import schema
from hstu_jax.data import event_store

StepTime = Literal["next_request", "own"]
# What a token reads that has no gap: longer than any, so always the last time bucket.
NO_GAP_S = np.finfo(np.float32).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """The tokens and queries of every window's training row.

    The tokens of window w are the events `row_start[w]:row_end[w]`, behind its contextual tokens.
    A query is the token with which it asks: `query_end` is one past that event. Where no event
    precedes the positive it is the user's first event, and the last contextual token asks, whatever
    the row holds.

    Attributes:
        row_start: first event of each row: the newest `max_seq_len` before `row_end`.
        row_end: one past the last event before the window's last positive.
        request_time_s: time of the row's last request, which is that of its last positive.
        query_end: for every positive of the store, in the order of `positive_events`.
        is_kept: positives that have a query in their row.
        num_queries: kept positives of each window.
        num_cut: positives of training windows whose query lies before `row_start`.
        num_first: those with neither an earlier event nor a contextual token.
        num_empty: training windows without a query, which are left out.
    """

    row_start: Int[np.ndarray, "W"]
    row_end: Int[np.ndarray, "W"]
    request_time_s: Int[np.ndarray, "W"]
    query_end: Int[np.ndarray, "positives"]
    is_kept: Bool[np.ndarray, "positives"]
    num_queries: Int[np.ndarray, "W"]
    num_cut: int
    num_first: int
    num_empty: int

    def note(self) -> str:
        """What the objective leaves out of the training windows, in one line."""
        return (
            f"next item: left out {self.num_cut:,} positives that ask before their row's newest "
            f"items and {self.num_first:,} that have nothing before them; {self.num_empty:,} "
            "windows have no other"
        )


def training_rows(
    store: event_store.EventStore, *, num_contextual: int, max_seq_len: int
) -> TrainingRows:
    """Finds the query of every positive and cuts the rows.

    Events of one second never see each other: the query of a positive at second t is the user's
    last event before t. So is every token of a row before the row's last request.

    Args:
        store: its windows' histories start at the user's first event.
        num_contextual: C, contextual tokens in front of every row.
        max_seq_len: events of a row, at most.

    Raises:
        ValueError: a history that does not start at an event of its user before the positives.
    """
    table, events = store.windows, store.events
    offsets = np.asarray(table.positive_offsets)
    positives = np.asarray(table.positive_events)
    window = np.repeat(np.arange(len(table)), np.diff(offsets))
    first = np.asarray(table.history_start)
    _check_first_events(store, positives[offsets[:-1]])
    query_end = _first_of_the_second(np.asarray(events.timestamp_s), first[window], positives)
    last = positives[offsets[1:] - 1]
    row_end = query_end[offsets[1:] - 1]
    row_start = np.maximum(first, row_end - max_seq_len)
    has_event = query_end > first[window]
    is_cut = has_event & (query_end <= row_start[window])
    is_first = ~has_event & (num_contextual == 0)
    is_kept = ~is_cut & ~is_first
    num_queries = np.bincount(window, weights=is_kept, minlength=len(table)).astype(np.int64)
    is_training = np.asarray(table.split) == 0
    return TrainingRows(
        row_start=row_start,
        row_end=row_end,
        request_time_s=np.asarray(events.timestamp_s)[last],
        query_end=query_end,
        is_kept=is_kept,
        num_queries=num_queries,
        num_cut=int(np.count_nonzero(is_cut & is_training[window])),
        num_first=int(np.count_nonzero(is_first & is_training[window])),
        num_empty=int(np.count_nonzero(is_training & (num_queries == 0))),
    )


def step_time(config: schema.Config) -> StepTime | None:
    """Which gap the tokens of a configuration's batches read besides `time_gap_s`, if any."""
    model = config.model
    if model.objective == "window":
        return None
    has_times = model.user_tower.hstu.positional_encoder.use_time_encoding
    return model.next_item.time if has_times else None


def step_gaps(
    timestamp_s: Int[np.ndarray, "tokens"],
    lengths: Int[np.ndarray, "rows"],
    request_time_s: Int[np.ndarray, "rows"],
    *,
    kind: StepTime,
) -> Float[np.ndarray, "tokens"]:
    """The gap that each history token reads, by integer arithmetic.

    "next_request": t(i + 1) - t(i), for the last token request - t(i): how long after this event
    the user came back. The next event may be of the same second (0); the request of a token's own
    query is the first later one. "own": t(i) - t(i - 1), `NO_GAP_S` for a row's first token.
    Neither needs more than a token's own row up to its next request, so a row that goes on gives
    its tokens the gaps that a request in their place would.

    Args:
        timestamp_s: times of the rows' tokens, oldest to newest, one row after the other.
        lengths: tokens of each row.
        request_time_s: the last request of each row.
        kind: which gap.
    """
    ends = np.cumsum(lengths)
    is_used = lengths > 0
    if kind == "next_request":
        following = np.empty_like(timestamp_s)
        following[:-1] = timestamp_s[1:]
        following[ends[is_used] - 1] = request_time_s[is_used]
        return (following - timestamp_s).astype(np.float32)
    gaps = np.diff(timestamp_s, prepend=timestamp_s[:1]).astype(np.float32)
    gaps[(ends - lengths)[is_used]] = NO_GAP_S
    return gaps


def _first_of_the_second(
    time_s: Int[np.ndarray, "events"],
    low: Int[np.ndarray, "n"],
    event: Int[np.ndarray, "n"],
) -> Int[np.ndarray, "n"]:
    """The first event in `low..event` with the time of `event`, by bisection."""
    low, high, time = low.astype(np.int64), event.astype(np.int64), time_s[event]
    # Invariant: the answer is in low..high; times rise within a user.
    while np.any(low < high):
        middle = (low + high) // 2
        is_before = time_s[middle] < time
        low, high = np.where(is_before, middle + 1, low), np.where(is_before, high, middle)
    return high


def _check_first_events(store: event_store.EventStore, first_positive: np.ndarray) -> None:
    table = store.windows
    start = np.asarray(table.history_start)
    inside = np.minimum(start, len(store.events) - 1)
    bad = (start > first_positive) | (store.events.user_index[inside] != table.user_index)
    if bad.any():
        window = int(np.argmax(bad))
        raise ValueError(
            f"{store.path} window {window}: history_start={start[window]} is no event of its user "
            f"before its positives ({int(bad.sum())} in all); model.objective='next_item' needs "
            "the user's first event there, prepare the data again."
        )
