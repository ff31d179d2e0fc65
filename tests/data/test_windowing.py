"""The window rule: hand-made days, ties in time, and a slow loop that says the same."""

import numpy as np
import pytest

from hstu_jax.data import windowing
from hstu_jax.data.records import Events

DAY = windowing.SECONDS_PER_DAY
MIDNIGHT = 100 * DAY - windowing.UTC_PLUS_8_S  # of day 100 in UTC+8
CLICK, LIKE, HATE, LONG_VIEW = 1, 2, 32, 64


def make_events(rows):
    """Events from (user, item, seconds after day 100's midnight in UTC+8, action)."""
    user, item, second, action = (np.array(column) for column in zip(*rows, strict=True))
    return Events(
        user_index=user.astype(np.int32),
        item_index=item.astype(np.int32),
        timestamp_s=second.astype(np.int64) + MIDNIGHT,
        action=action.astype(np.int32),
        watch_time_s=np.zeros(len(user), np.float32),
    )


def as_lists(windows):
    return [
        (
            int(windows.user_index[w]),
            int(windows.history_start[w]),
            int(windows.history_end[w]),
            int(windows.request_time_s[w]) - MIDNIGHT,
            int(windows.split[w]),
            windows.positives(w).tolist(),
        )
        for w in range(len(windows))
    ]


BY_HAND = [
    (0, 0, 10, CLICK),  # 0: day 0, a window with an empty history
    (0, 1, DAY - 1, LONG_VIEW),  # 1: no positive action
    (0, 2, DAY, CLICK),  # 2: midnight belongs to the next day
    (0, 2, DAY + 5, LIKE),  # 3: the same item again in the window
    (0, 3, DAY + 5, CLICK | HATE),  # 4: hated
    (0, 3, 3 * DAY + 7, LIKE),  # 5: last day: test
    (1, 0, 5, HATE),  # 6: a window without positives
    (1, 1, 2 * DAY + 9, CLICK),  # 7: validation
    (1, 4, 2 * DAY + 9, CLICK),  # 8: equal time: a positive, not history
]


def test_days_by_hand():
    result = windowing.build_windows(make_events(BY_HAND), options=windowing.WindowOptions())
    assert as_lists(result.windows) == [
        (0, 0, 0, 10, 0, [0]),
        (0, 0, 2, DAY, 0, [2]),
        (0, 0, 5, 3 * DAY + 7, 2, [5]),
        (1, 6, 7, 2 * DAY + 9, 1, [7, 8]),
    ]
    assert result.is_training_event.tolist() == [True] * 5 + [False, True, False, False]
    stats = result.stats
    assert stats["windows_with_empty_history"] == 1
    assert stats["dropped_windows"] == {"no positive event": 1, "history shorter than 0": 0}
    assert stats["dropped_positives"] == {
        "positive action but hated": 1,
        "item again in the same window": 1,
        "beyond the first 100 of a window": 0,
        "in a dropped window": 0,
    }
    assert stats["windows_per_split"] == {"train": 2, "validation": 1, "test": 1}
    assert stats["days"]["first"] == "1970-04-11"
    assert stats["days"]["test_start_s"] == MIDNIGHT + 3 * DAY


def test_options_change_positives_and_are_counted():
    events = make_events(BY_HAND)
    options = windowing.WindowOptions(
        positive_actions=("long_view", "like"), max_positives=1, min_history=1
    )
    result = windowing.build_windows(events, options=options)
    assert as_lists(result.windows) == [(0, 0, 2, DAY, 0, [3]), (0, 0, 5, 3 * DAY + 7, 2, [5])]
    assert result.stats["dropped_windows"] == {
        "no positive event": 2,
        "history shorter than 1": 1,
    }
    cut = windowing.build_windows(events, options=windowing.WindowOptions(max_positives=1))
    assert cut.stats["dropped_positives"]["beyond the first 1 of a window"] == 1
    assert as_lists(cut.windows)[-1][-1] == [7]


def test_event_windows_by_hand():
    rows = [(0, item, second, CLICK) for item, second in enumerate((1, 2, 2, 3, 4))]
    rows += [(0, 5, DAY + 1, CLICK), (0, 6, 2 * DAY + 1, CLICK), (0, 7, 2 * DAY + 1, CLICK)]
    options = windowing.WindowOptions(mode="events", window_events=2)
    result = windowing.build_windows(make_events(rows), options=options)
    assert as_lists(result.windows) == [
        (0, 0, 0, 1, 0, [0, 1]),
        # Event 1 has the request's second: it is not in this history.
        (0, 0, 1, 2, 0, [2, 3]),
        # The next day has another split: the window ends there.
        (0, 0, 4, 4, 0, [4]),
        (0, 0, 5, DAY + 1, 1, [5]),
        (0, 0, 6, 2 * DAY + 1, 2, [6, 7]),
    ]


def slow_windows(events, options):
    """The rule of the docstring, event by event."""
    time, user = events.timestamp_s.tolist(), events.user_index.tolist()
    day = [(t + options.utc_offset_s) // DAY for t in time]
    last = max(day)
    split = [2 if d == last else 1 if d == last - 1 else 0 for d in day]
    groups = []
    for event in range(len(time)):
        group = groups[-1] if groups else None
        if group is None or user[group[0]] != user[event]:
            joins = False
        elif options.mode == "day" or (options.mode == "train_events" and split[event] > 0):
            joins = day[group[0]] == day[event]
        else:
            joins = split[group[0]] == split[event] and len(group) < options.window_events
        if joins:
            group.append(event)
        else:
            groups.append([event])
    found = []
    for group in groups:
        start = user.index(user[group[0]])
        request = time[group[0]]
        history = [e for e in range(start, group[0]) if time[e] < request]
        positives, items = [], set()
        for event in group:
            action = int(events.action[event])
            item = int(events.item_index[event])
            if action & 31 and not action & HATE and item not in items:
                items.add(item)
                positives.append(event)
        positives = positives[: options.max_positives]
        if positives and len(history) >= options.min_history:
            first = request - MIDNIGHT
            end = start + len(history)
            found.append((user[group[0]], start, end, first, split[group[0]], positives))
    return found


@pytest.mark.parametrize(
    "options",
    [
        windowing.WindowOptions(max_positives=3),
        windowing.WindowOptions(min_history=4, utc_offset_s=-3_600),
        windowing.WindowOptions(mode="events", window_events=4),
        windowing.WindowOptions(mode="events", window_events=1, max_positives=1),
        windowing.WindowOptions(mode="train_events", window_events=3),
    ],
)
def test_equal_to_the_slow_rule(options):
    rng = np.random.default_rng(5)
    size = 600
    user = np.sort(rng.integers(0, 12, size))
    # Coarse times, so that many events share a second, also across a window's edge.
    second = rng.integers(0, 4 * 24 * 6, size) * 600
    order = np.lexsort((second, user))
    rows = zip(
        user, rng.integers(0, 9, size), second[order], rng.choice([0, 1, 3, 33, 64], size),
        strict=True,
    )  # fmt: skip
    events = make_events(list(rows))
    result = windowing.build_windows(events, options=options)
    assert as_lists(result.windows) == slow_windows(events, options)
    # A planted wrong rule (history up to the window instead of strictly before) is seen.
    wrong = [(u, s, e + 1, *rest) for u, s, e, *rest in slow_windows(events, options)]
    assert as_lists(result.windows) != wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "week"}, r"window_mode='week': unknown; choose from \('day', 'events', 'tr"),
        ({"window_events": 0}, "window_events=0: must be at least 1"),
        ({"max_positives": 0}, "max_positives=0: must be at least 1"),
        ({"mode": "leave_one_out", "max_positives": -1}, "max_positives=-1: must be at least 0"),
        ({"min_history": -1}, "min_history=-1: must be 0 or more"),
        ({"positive_actions": ()}, "positive_actions=.*: empty; name at least one"),
        ({"positive_actions": ("hate",)}, "'hate' excludes an event"),
        ({"positive_actions": ("share",)}, "action='share': unknown"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        windowing.WindowOptions(**changes)


def slow_leave_one_out(events, options):
    """Last positive tests, the one before validates, runs of events before that train."""
    found = []
    for user in np.unique(events.user_index):
        own = np.flatnonzero(events.user_index == user).tolist()
        time, action = events.timestamp_s, events.action
        positives = [e for e in own if action[e] & 31 and not action[e] & HATE]
        tested = positives[-2:] if len(positives) >= 3 else []
        training = [e for e in own if not tested or e < tested[0]]
        size = options.window_events or len(training)
        groups = [training[i : i + size] for i in range(0, len(training), size)]
        for split, group in [(0, group) for group in groups] + [
            (1 + i, [event]) for i, event in enumerate(tested)
        ]:
            request = int(time[group[0]])
            asked = [e for e in group if e in positives][: options.max_positives or None]
            length = sum(int(time[e]) < request for e in own)
            if asked and length >= options.min_history:
                first = own[0]
                found.append((int(user), first, first + length, request - MIDNIGHT, split, asked))
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"window_events": 0, "max_positives": 0},
        {"window_events": 5, "max_positives": 2},
        {"window_events": 1, "max_positives": 0, "min_history": 3},
    ],
)
def test_leave_one_out_equals_the_loop(changes):
    rng = np.random.default_rng(6)
    size = 300
    user = np.sort(np.append(rng.integers(0, 12, size - 2), [13, 13]))  # user 13 is too short
    second = rng.integers(0, 90, size)
    order = np.lexsort((second, user))
    rows = zip(
        user, rng.integers(0, 9, size), second[order], rng.choice([0, 1, 3, 33, 64], size),
        strict=True,
    )  # fmt: skip
    events = make_events(list(rows))
    options = windowing.WindowOptions(mode="leave_one_out", **changes)
    result = windowing.build_windows(events, options=options)
    found = as_lists(result.windows)
    assert found == slow_leave_one_out(events, options)
    assert result.stats["leave_one_out"]["users_only_trained"] >= 1
    assert "days" not in result.stats
    # All training events, and no event from the validation positive on, are training events.
    first_kept = {window[0]: window[-1][0] for window in found if window[4] == 1}
    expected = [e < first_kept.get(int(u), len(user)) for e, u in enumerate(user)]
    if not options.min_history:
        assert result.is_training_event.tolist() == expected


def test_leave_one_out_keeps_repeated_items():
    rows = [(0, 4, second, CLICK) for second in range(5)]
    options = windowing.WindowOptions(mode="leave_one_out", window_events=0, max_positives=0)
    result = windowing.build_windows(make_events(rows), options=options)
    assert [window[3:] for window in as_lists(result.windows)] == [
        (0, 0, [0, 1, 2]),
        (3, 1, [3]),
        (4, 2, [4]),
    ]
    with pytest.raises(ValueError, match="no user has 3 positives; leave-one-out needs one each"):
        windowing.build_windows(make_events(rows[:2]), options=options)


def test_too_few_days_or_events():
    options = windowing.WindowOptions()
    with pytest.raises(ValueError, match=r"cover 2 calendar day\(s\); at least 3 are needed"):
        windowing.build_windows(make_events([(0, 0, 1, 1), (0, 0, DAY, 1)]), options=options)
    empty = Events(*(np.zeros(0, np.int32) for _ in range(5)))
    with pytest.raises(ValueError, match="events: there is none"):
        windowing.build_windows(empty, options=options)
