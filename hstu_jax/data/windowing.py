"""Which stretches of events become windows, with which history and which positives.

Here: the window rule (calendar day, a fixed number of events, or leave-one-out), the split, the
choice of positives and the count of everything that a rule left out. Not here: turning a window into a
batch row (`features/windows.py`). Next on the path: `event_store.write_store`.
"""

import dataclasses
import datetime
from typing import Any

import numpy as np
from jaxtyping import Bool, Int8, Int64

from hstu_jax.data import schema
from hstu_jax.data.records import Events, Windows

SECONDS_PER_DAY = 86_400
# KuaiRand was logged in China; the generated sample follows it.
UTC_PLUS_8_S = 8 * 3_600
LEAVE_ONE_OUT = "leave_one_out"
WINDOW_MODES = ("day", "events", "train_events", LEAVE_ONE_OUT)


@dataclasses.dataclass(frozen=True)
class WindowOptions:
    """How events become windows.

    Attributes:
      mode: "day" (one user's events of one calendar day), "events" (`window_events` consecutive
        events of one user; the last window of a stretch may be shorter), "train_events"
        ("events" for training, "day" for validation and test: more and fresher training contexts,
        the same evaluation) or "leave_one_out" (a user's last positive is tested, the one before
        it validates, everything before that trains, in windows of `window_events`).
      window_events: events a window, in the modes other than "day". In "leave_one_out" 0 is all
        training events of a user in one window, whose history is empty: for the next-item
        objective, which gives every positive the events before it as its history.
      positive_actions: an event with at least one of these actions and no "hate" is a positive.
      max_positives: at most this many a window, the earliest; 0 ("leave_one_out") = all.
      min_history: windows with a shorter history are dropped.
      utc_offset_s: seconds added to UTC before the calendar day is taken.
    """

    mode: str = "day"
    window_events: int = 20
    positive_actions: tuple[str, ...] = ("click", "like", "follow", "comment", "forward")
    max_positives: int = 100
    min_history: int = 0
    utc_offset_s: int = UTC_PLUS_8_S

    def __post_init__(self) -> None:
        if self.mode not in WINDOW_MODES:
            raise ValueError(f"window_mode={self.mode!r}: unknown; choose from {WINDOW_MODES}.")
        least = 0 if self.mode == LEAVE_ONE_OUT else 1
        if self.window_events < least:
            raise ValueError(f"window_events={self.window_events}: must be at least {least}.")
        if self.max_positives < least:
            raise ValueError(f"max_positives={self.max_positives}: must be at least {least}.")
        if self.min_history < 0:
            raise ValueError(f"min_history={self.min_history}: must be 0 or more.")
        if not self.positive_actions:
            raise ValueError("positive_actions=(): empty; name at least one action.")
        if "hate" in self.positive_actions:
            raise ValueError("positive_actions: 'hate' excludes an event; leave it out.")
        schema.action_mask(self.positive_actions)


@dataclasses.dataclass(frozen=True)
class WindowedEvents:
    """Result of `build_windows`.

    Attributes:
      windows: the rows, ordered by user, then request time.
      is_training_event: one entry per event, True before the validation day (leave-one-out: before
        the user's validation event).
      stats: counts, rules and day boundaries for `stats.json`.
    """

    windows: Windows
    is_training_event: Bool[np.ndarray, "_"]
    stats: dict[str, Any]


def build_windows(events: Events, *, options: WindowOptions) -> WindowedEvents:
    """Cuts sorted events into windows and splits them by day, or by leave-one-out.

    The history of a window is every earlier event of the user with a timestamp strictly before the
    window's first event: an event at the same second is in neither history nor lost (it is in its
    own window). The last calendar day is the test split, the day before it validation; in the
    other modes a window ends where the split changes, so that no training window reaches into the
    validation day. An item counts once a window, at its first positive event.

    Leave-one-out: with a user's positives p[1] .. p[n] in the order of the events, the test window
    holds p[n], the validation window p[n - 1]; all events before p[n - 1] train. Users with n < 3
    only train, and are counted. Repeated items stay positives. The history is strictly before the
    request here too, so events of the same second as p[n] are not in its history: data whose order
    within a second is known is prepared with distinct times (`interactions.py`).

    Args:
      events: sorted by user, then time; times in seconds.
      options: the rules.

    Raises:
      ValueError: no event; all events on fewer than three days; leave-one-out, and no user with
        three positives.
    """
    if not len(events):
        raise ValueError("events: there is none; nothing can be prepared.")
    time = np.asarray(events.timestamp_s)
    user = np.asarray(events.user_index)
    day = (time + options.utc_offset_s) // SECONDS_PER_DAY
    if options.mode == LEAVE_ONE_OUT:
        split, split_stats = _split_last_positives(events, options)
    else:
        split, split_stats = _split_days(day, options)
    window_start = _window_starts(user, day, split, options)
    window_of_event = np.cumsum(window_start) - 1
    first_event = np.flatnonzero(window_start)

    user_first, earlier_end = _history_bounds(user, time)
    history_start, history_end = user_first[first_event], earlier_end[first_event]
    positives, counts = _positive_events(events, window_of_event, len(first_event), options)
    num_positives = np.bincount(window_of_event[positives], minlength=len(first_event))

    has_positive = num_positives > 0
    long_enough = history_end - history_start >= options.min_history
    keep = has_positive & long_enough
    kept_positives = positives[keep[window_of_event[positives]]]
    kept = first_event[keep]
    windows = Windows(
        user_index=user[kept],
        history_start=history_start[keep],
        history_end=history_end[keep],
        request_time_s=time[kept],
        split=split[kept],
        positive_offsets=np.concatenate([[0], np.cumsum(num_positives[keep])]).astype(np.int64),
        positive_events=kept_positives,
    )
    is_training_event = split == 0
    stats = {
        "window_options": dataclasses.asdict(options),
        **_window_counts(windows),
        "windows_with_empty_history": int((windows.history_end == windows.history_start).sum()),
        "dropped_windows": {
            "no positive event": int((~has_positive).sum()),
            f"history shorter than {options.min_history}": int((has_positive & ~long_enough).sum()),
        },
        "dropped_positives": {
            **counts,
            "in a dropped window": int(num_positives[~keep].sum()),
        },
        "events_per_split": _by_split(np.bincount(split, minlength=3)),
        "time_range_s": [int(time.min()), int(time.max())],
        **split_stats,
    }
    return WindowedEvents(windows=windows, is_training_event=is_training_event, stats=stats)


def _split_days(
    day: Int64[np.ndarray, "_"], options: WindowOptions
) -> tuple[Int8[np.ndarray, "_"], dict[str, Any]]:
    """Split of every event: the last day is the test, the day before it validation."""
    first_day, last_day = int(day.min()), int(day.max())
    if last_day - first_day < 2:
        raise ValueError(
            f"events: cover {last_day - first_day + 1} calendar day(s); at least 3 are needed "
            "(training, validation, test)."
        )
    days = {
        "utc_offset_s": options.utc_offset_s,
        "first": _date(first_day),
        "validation": _date(last_day - 1),
        "test": _date(last_day),
        "validation_start_s": (last_day - 1) * SECONDS_PER_DAY - options.utc_offset_s,
        "test_start_s": last_day * SECONDS_PER_DAY - options.utc_offset_s,
    }
    return np.clip(day - (last_day - 2), 0, 2).astype(np.int8), {"days": days}


def _split_last_positives(
    events: Events, options: WindowOptions
) -> tuple[Int8[np.ndarray, "_"], dict[str, Any]]:
    """Split of every event: from the last positive on test, from the one before on validation."""
    wanted, is_hated = _wanted(events, options)
    candidates = np.flatnonzero(wanted & ~is_hated)
    user = np.asarray(events.user_index)
    num_users = int(user[-1]) + 1
    counts = np.bincount(user[candidates], minlength=num_users)
    is_tested = counts >= 3
    if not is_tested.any():
        raise ValueError(
            "events: no user has 3 positives; leave-one-out needs one each for training, "
            "validation and test."
        )
    last = (np.cumsum(counts) - 1)[is_tested]
    split = np.zeros(len(user), np.int8)
    split[candidates[last - 1]] = split[candidates[last]] = 1
    # Adds up along a user: 1 from the validation positive on, 2 from the test positive on.
    before = np.cumsum(split, dtype=np.int64)
    first = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
    events_of = np.diff(np.concatenate([first, [len(user)]]))
    split = (before - np.repeat(before[first] - split[first], events_of)).astype(np.int8)
    seen = int(np.count_nonzero(counts))
    stats = {"users_tested": int(is_tested.sum()), "users_only_trained": seen - int(is_tested.sum())}
    return split, {LEAVE_ONE_OUT: stats}


def _window_starts(
    user: np.ndarray, day: np.ndarray, split: np.ndarray, options: WindowOptions
) -> np.ndarray:
    """True at the first event of each window."""
    new_user = np.concatenate([[True], user[1:] != user[:-1]])
    starts_day = new_user | np.concatenate([[True], day[1:] != day[:-1]])
    if options.mode == "day":
        return starts_day
    stretch_start = new_user | np.concatenate([[True], split[1:] != split[:-1]])
    position = np.arange(len(user))
    if options.mode == LEAVE_ONE_OUT and options.window_events == 0:
        return stretch_start
    since_start = position - np.maximum.accumulate(np.where(stretch_start, position, 0))
    starts_run = since_start % options.window_events == 0
    if options.mode == "events":
        return starts_run
    evaluated = stretch_start if options.mode == LEAVE_ONE_OUT else starts_day
    return np.where(split == 0, starts_run, evaluated)


def _wanted(
    events: Events, options: WindowOptions
) -> tuple[Bool[np.ndarray, "_"], Bool[np.ndarray, "_"]]:
    """Which events have a positive action, and which are hated."""
    action = np.asarray(events.action)
    wanted = (action & schema.action_mask(options.positive_actions)) != 0
    return wanted, (action & schema.ACTION_BITS["hate"]) != 0


def _history_bounds(user: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per event: the user's first event, and one past the last one strictly earlier in time."""
    position = np.arange(len(user), dtype=np.int64)
    new_user = np.concatenate([[True], user[1:] != user[:-1]])
    new_time = new_user | np.concatenate([[True], time[1:] != time[:-1]])
    user_first = np.maximum.accumulate(np.where(new_user, position, 0))
    return user_first, np.maximum.accumulate(np.where(new_time, position, 0))


def _positive_events(
    events: Events, window_of_event: np.ndarray, num_windows: int, options: WindowOptions
) -> tuple[Int64[np.ndarray, "_"], dict[str, int]]:
    """Positions of positives, ascending, without repeats and beyond-limit ones; and the counts."""
    wanted, is_hated = _wanted(events, options)
    once = candidates = np.flatnonzero(wanted & ~is_hated)
    if options.mode != LEAVE_ONE_OUT:
        # The earliest event of each (window, item): np.unique gives the first index of each value.
        num_items = int(events.item_index.max()) + 1
        window_item = window_of_event[candidates] * num_items + events.item_index[candidates]
        _, first = np.unique(window_item, return_index=True)
        once = candidates[np.sort(first)]
    window = window_of_event[once]
    window_begin = np.searchsorted(window, np.arange(num_windows))
    rank = np.arange(len(once)) - window_begin[window]
    within = rank < (options.max_positives or len(once))
    counts = {
        "positive action but hated": int((wanted & is_hated).sum()),
        "item again in the same window": len(candidates) - len(once),
    }
    if options.max_positives:
        counts[f"beyond the first {options.max_positives} of a window"] = int((~within).sum())
    return once[within], counts


def _window_counts(windows: Windows) -> dict[str, Any]:
    sizes = np.diff(windows.positive_offsets)
    lengths = windows.history_end - windows.history_start
    per_split = np.bincount(windows.split, minlength=3)
    positives = np.bincount(windows.split, weights=sizes, minlength=3).astype(int)
    return {
        "windows": len(windows),
        "windows_per_split": _by_split(per_split),
        "positives": int(sizes.sum()),
        "positives_per_split": _by_split(positives),
        "mean_positives_per_window": round(float(sizes.mean()), 3) if len(sizes) else 0.0,
        "mean_history": round(float(lengths.mean()), 3) if len(lengths) else 0.0,
        "max_history": int(lengths.max()) if len(lengths) else 0,
    }


def _by_split(counts: np.ndarray) -> dict[str, int]:
    return {name: int(count) for name, count in zip(schema.SPLIT_NAMES, counts, strict=True)}


def _date(day: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()
