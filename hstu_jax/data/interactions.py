"""Public interaction files (MovieLens, Amazon ratings, plain sequences) to an event store.

Here: which users and items stay, the order of a user's events, and leave-one-out windows, as the
published next-item figures have them. Reading is `raw_interactions.py`, cutting is `windowing.py`,
writing is `event_store.py`. Works in memory.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from hstu_jax.data import event_store, raw_interactions, schema, store_files, windowing
from hstu_jax.data.records import Events, ItemTable

SOURCE = "interactions"
CORES = ("once", "repeated")
# Texts of ids, a line each: line n + 1 is user_index or item_index n.
USER_IDS_FILE, ITEM_IDS_FILE = "user_ids.txt", "item_ids.txt"


@dataclasses.dataclass(frozen=True)
class InteractionOptions:
    """What `prepare` does with a raw file.

    Attributes:
      raw_format: a name in `raw_interactions.FORMATS`.
      min_user_events: users with fewer lines are left out; 0 keeps all.
      min_item_events: items with fewer lines are left out; 0 keeps all.
      core: "once" counts lines in the raw file, leaves out users and items by these counts, and
        then users who lost too many events by it; "repeated" counts again until nothing changes
        (a k-core).
      window_events: training events a window; 0 = all of a user in one, for the next-item
        objective.
      item_weight_exponent: weight in `item_table.tsv` = train_count ** exponent.
    """

    raw_format: str
    min_user_events: int = 0
    min_item_events: int = 0
    core: str = "once"
    window_events: int = 0
    item_weight_exponent: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_user_events", "min_item_events"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more.")
        if self.core not in CORES:
            raise ValueError(f"core={self.core!r}: unknown; choose from {CORES}.")

    @property
    def windows(self) -> windowing.WindowOptions:
        """Leave-one-out; every event is a positive, and none is cut off."""
        return windowing.WindowOptions(
            mode=windowing.LEAVE_ONE_OUT,
            window_events=self.window_events,
            positive_actions=("click",),
            max_positives=0,
        )


def prepare(
    raw_file: str | pathlib.Path,
    out_dir: str | pathlib.Path,
    *,
    options: InteractionOptions,
    overwrite: bool = False,
) -> event_store.EventStore:
    """Reads a file of interactions and writes an event store with leave-one-out windows.

    Deterministic: users and items are numbered in the order of their ids; a user's events are in
    the order of their times, and of the file where times are equal. Every event is a "click".

    Times: an event at the second of the one before it is moved one second past it, along the user,
    so that times are distinct and "strictly before the request" means "earlier in this order";
    `stats.json` says how many events moved and how far at most. Without times in the file an
    event's time is its number within the user: 1, 2, 3, ... seconds (`event_times` in the stats).

    Args:
      raw_file: the file.
      out_dir: folder to make.
      options: rules.
      overwrite: replace an event store that is already there.

    Returns:
      The opened store.

    Raises:
      FileNotFoundError: no such file.
      FileExistsError: `out_dir` exists and is not to be replaced.
      ValueError: a line is refused, or nothing is left by the options.
    """
    event_store.check_target(pathlib.Path(out_dir), overwrite=overwrite)
    path = pathlib.Path(raw_file)
    raw = raw_interactions.read(path, raw_format=options.raw_format)
    keep = _core(raw, options)
    if not keep.any():
        raise ValueError(
            f"min_user_events={options.min_user_events}, min_item_events="
            f"{options.min_item_events}: leave no event of the {len(raw):,}; use smaller ones."
        )
    events, user_ids, item_ids, time_stats = _sort(raw, keep)
    windowed = windowing.build_windows(events, options=options.windows)
    train_items = events.item_index[windowed.is_training_event]
    is_text = raw_interactions.FORMATS[options.raw_format].has_text_ids
    num_items = len(item_ids)
    items = ItemTable(
        item_id=np.arange(num_items) if is_text else item_ids,
        train_count=np.bincount(train_items, minlength=num_items).astype(np.int64),
    )
    pair = events.user_index.astype(np.int64) * num_items + events.item_index
    stats = {
        "source": SOURCE,
        "options": dataclasses.asdict(options),
        **windowed.stats,
        **time_stats,
        "raw_rows": {path.name: len(raw)},
        "dropped_events": {
            "of users or items with too few events": int(np.count_nonzero(~keep)),
        },
        "dropped_users": len(raw.user_ids) - len(user_ids),
        "dropped_items": len(raw.item_ids) - num_items,
        "mended_events": {
            "moved behind an event of the same second": time_stats["events_moved"],
        },
        "repeated_user_item_pairs": len(pair) - len(np.unique(pair)),
        "users_without_features": 0,
        "sha256_raw": {path.name: store_files.file_sha256(path)},
    }
    texts = {USER_IDS_FILE: user_ids, ITEM_IDS_FILE: item_ids} if is_text else {}
    return event_store.write_store(
        out_dir,
        events=events,
        windows=windowed.windows,
        users={
            "user_id": np.arange(len(user_ids)) if is_text else user_ids,
            **{name: np.zeros(len(user_ids), np.int32) for name in schema.USER_CATEGORIES},
        },
        items=items,
        vocabularies={name: [] for name in schema.USER_CATEGORIES},
        stats=stats,
        extra_files={name: _lines_writer(words) for name, words in texts.items()},
        item_weight_exponent=options.item_weight_exponent,
        overwrite=overwrite,
    )


def _core(
    raw: raw_interactions.RawInteractions, options: InteractionOptions
) -> Bool[np.ndarray, "lines"]:
    """Which lines stay."""
    keep = np.ones(len(raw), bool)
    while True:
        user_counts = np.bincount(raw.user[keep], minlength=len(raw.user_ids))
        item_counts = np.bincount(raw.item[keep], minlength=len(raw.item_ids))
        kept = keep & (user_counts[raw.user] >= options.min_user_events)
        kept &= item_counts[raw.item] >= options.min_item_events
        if options.core == "once":
            left = np.bincount(raw.user[kept], minlength=len(raw.user_ids))
            return kept & (left[raw.user] >= options.min_user_events)
        if np.array_equal(kept, keep):
            return keep
        keep = kept


def _sort(
    raw: raw_interactions.RawInteractions, keep: Bool[np.ndarray, "lines"]
) -> tuple[Events, np.ndarray, np.ndarray, dict[str, Any]]:
    """The kept lines as events in order with distinct times, and the ids of users and items."""
    used_users, user = np.unique(raw.user[keep], return_inverse=True)
    used_items, item = np.unique(raw.item[keep], return_inverse=True)
    if raw.timestamp_s is None:
        order = np.argsort(user, kind="stable")
        user, item = user[order], item[order]
        first = np.searchsorted(user, np.arange(len(used_users)))
        time = np.arange(len(user)) - first[user] + 1
        stats = {"event_times": "position", "events_moved": 0, "largest_move_s": 0}
    else:
        given = raw.timestamp_s[keep]
        order = np.lexsort((given, user))  # stable: equal times keep the file's order
        user, item, given = user[order], item[order], given[order]
        time = distinct_times(user, given)
        moved = time - given
        stats = {
            "event_times": "seconds",
            "events_moved": int(np.count_nonzero(moved)),
            "largest_move_s": int(moved.max(initial=0)),
        }
    events = Events(
        user_index=user.astype(np.int32),
        item_index=item.astype(np.int32),
        timestamp_s=time.astype(np.int64),
        action=np.full(len(user), schema.ACTION_BITS["click"], np.int32),
        watch_time_s=np.zeros(len(user), np.float32),
    )
    return events, raw.user_ids[used_users], raw.item_ids[used_items], stats


def distinct_times(
    user: Int64[np.ndarray, "events"], time: Int64[np.ndarray, "events"]
) -> Int64[np.ndarray, "events"]:
    """The smallest strictly ascending times within a user that are not before the given ones.

    new[i] = max(time[i], new[i - 1] + 1), along each user.

    Args:
      user: ascending.
      time: ascending within a user.

    >>> distinct_times(np.array([0, 0, 0, 1]), np.array([5, 5, 6, 5])).tolist()
    [5, 6, 7, 5]
    """
    if not len(user):
        return time
    # new[i] - i is the running maximum of time[i] - i; users are kept apart by a large step.
    ahead = time - np.arange(len(time))
    step = int(ahead.max() - ahead.min()) + 1
    return np.maximum.accumulate(ahead + user * step) - user * step + np.arange(len(time))


def _lines_writer(words: np.ndarray):
    return lambda path: path.write_text("\n".join(words.tolist()) + "\n")
