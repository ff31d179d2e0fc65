"""Which stretches of events become windows, with which history and which positives.

Here: the window rule (calendar day or a fixed number of events), the split by day, the choice of
positives and the count of everything that a rule left out. Not here: turning a window into a
batch row (`features/windows.py`). Next on the path: `event_store.write_store`.
"""

import dataclasses
import datetime
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from hstu_jax.data import schema
from hstu_jax.data.records import Events, Windows

SECONDS_PER_DAY = 86_400
# KuaiRand was logged in China; the generated sample follows it.
UTC_PLUS_8_S = 8 * 3_600
WINDOW_MODES = ("day", "events", "train_events")


@dataclasses.dataclass(frozen=True)
class WindowOptions:
    """How events become windows.

    Attributes:
      mode: "day" (one user's events of one calendar day), "events" (`window_events` consecutive
        events of one user; the last window of a stretch may be shorter) or "train_events"
        ("events" for training, "day" for validation and test: more and fresher training contexts,
        the same evaluation).
      window_events: events a window in modes "events" and "train_events".
      positive_actions: an event with at least one of these actions and no "hate" is a positive.
      max_positives: at most this many a window, the earliest.
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
        if self.window_events < 1:
            raise ValueError(f"window_events={self.window_events}: must be at least 1.")
        if self.max_positives < 1:
            raise ValueError(f"max_positives={self.max_positives}: must be at least 1.")
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
      is_training_event: one entry per event, True before the validation day.
      stats: counts, rules and day boundaries for `stats.json`.
    """

    windows: Windows
    is_training_event: Bool[np.ndarray, "_"]
    stats: dict[str, Any]


def build_windows(events: Events, *, options: WindowOptions) -> WindowedEvents:
    """Cuts sorted events into windows and splits them by day.

    The history of a window is every earlier event of the user with a timestamp strictly before the
    window's first event: an event at the same second is in neither history nor lost (it is in its
    own window). The last calendar day is the test split, the day before it validation; in the
    other modes a window ends where the split changes, so that no training window reaches into the
    validation day. An item counts once a window, at its first positive event.

    Args:
      events: sorted by user, then time; times in seconds.
      options: the rules.

    Raises:
      ValueError: no event, or all events on fewer than three days.
    """
    if not len(events):
        raise ValueError("events: there is none; nothing can be prepared.")
    time = np.asarray(events.timestamp_s)
    day = (time + options.utc_offset_s) // SECONDS_PER_DAY
    first_day, last_day = int(day.min()), int(day.max())
    if last_day - first_day < 2:
        raise ValueError(
            f"events: cover {last_day - first_day + 1} calendar day(s); at least 3 are needed "
            "(training, validation, test)."
        )
    split = np.clip(day - (last_day - 2), 0, 2).astype(np.int8)
    user = np.asarray(events.user_index)
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
        "days": {
            "utc_offset_s": options.utc_offset_s,
            "first": _date(first_day),
            "validation": _date(last_day - 1),
            "test": _date(last_day),
            "validation_start_s": (last_day - 1) * SECONDS_PER_DAY - options.utc_offset_s,
            "test_start_s": last_day * SECONDS_PER_DAY - options.utc_offset_s,
        },
    }
    return WindowedEvents(windows=windows, is_training_event=is_training_event, stats=stats)


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
    since_start = position - np.maximum.accumulate(np.where(stretch_start, position, 0))
    starts_run = since_start % options.window_events == 0
    return starts_run if options.mode == "events" else np.where(split == 0, starts_run, starts_day)


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
    action = np.asarray(events.action)
    wanted = (action & schema.action_mask(options.positive_actions)) != 0
    is_hated = (action & schema.ACTION_BITS["hate"]) != 0
    candidates = np.flatnonzero(wanted & ~is_hated)
    # The earliest event of each (window, item): np.unique returns the first index of each value.
    num_items = int(events.item_index.max()) + 1
    window_item = window_of_event[candidates] * num_items + events.item_index[candidates]
    _, first = np.unique(window_item, return_index=True)
    once = candidates[np.sort(first)]
    window = window_of_event[once]
    window_begin = np.searchsorted(window, np.arange(num_windows))
    rank = np.arange(len(once)) - window_begin[window]
    within = rank < options.max_positives
    counts = {
        "positive action but hated": int((wanted & is_hated).sum()),
        "item again in the same window": len(candidates) - len(once),
        f"beyond the first {options.max_positives} of a window": int((~within).sum()),
    }
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
