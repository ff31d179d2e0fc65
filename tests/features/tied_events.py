"""An event store whose users have several events in one second, for the next-item tests."""

import numpy as np

from hstu_jax.data import event_store, windowing
from hstu_jax.data import schema as data_schema

FIRST_TIME_S = 1_650_000_000
NUM_ITEMS = 50


def random_events(*, num_users=24, seed=0):
    """Users with 1 to 60 events over some days; a third of the events share the second before."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 61, num_users)
    user = np.repeat(np.arange(num_users, dtype=np.int32), counts)
    steps = rng.choice([0, 1, 90, 5_000, 40_000], size=len(user), p=[0.35, 0.15, 0.2, 0.2, 0.1])
    first = np.cumsum(counts) - counts
    steps[first] = rng.integers(0, 200_000, num_users)
    total = np.cumsum(steps)
    time_s = FIRST_TIME_S + total - np.repeat(total[first] - steps[first], counts)
    return event_store.Events(
        user_index=user,
        item_index=rng.integers(0, NUM_ITEMS, len(user), dtype=np.int32),
        timestamp_s=time_s.astype(np.int64),
        action=rng.choice([1, 2, 64, 32 | 1], size=len(user), p=[0.5, 0.2, 0.2, 0.1]).astype(
            np.int32
        ),
        watch_time_s=rng.uniform(0.5, 90, len(user)).astype(np.float32),
    )


def write_store(path, *, events=None, seed=0, **window_options):
    """The opened store of `events` (or of random ones), cut by the window rules."""
    events = random_events(seed=seed) if events is None else events
    options = windowing.WindowOptions(**window_options)
    windowed = windowing.build_windows(events, options=options)
    num_users = int(events.user_index.max()) + 1
    rng = np.random.default_rng(seed + 1)
    users = {"user_id": np.arange(num_users, dtype=np.int64)}
    users |= {
        name: rng.integers(0, 9, num_users, dtype=np.int32) for name in data_schema.USER_CATEGORIES
    }
    counts = np.bincount(events.item_index[windowed.is_training_event], minlength=NUM_ITEMS)
    items = event_store.ItemTable(
        item_id=np.arange(NUM_ITEMS, dtype=np.int64), train_count=counts.astype(np.int64)
    )
    return event_store.write_store(
        path,
        events=events,
        windows=windowed.windows,
        users=users,
        items=items,
        vocabularies={},
        stats=windowed.stats,
    )
