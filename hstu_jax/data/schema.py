"""Column names, dtypes and units of an event store, and the check that a file has them.

Here: what every file of a prepared folder contains, the action bits, the limit that tells seconds
from milliseconds. Not here: reading and writing (`event_store.py`, the next file on the path) and
the raw columns of a data set (`kuairand.py`).
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence

FORMAT_VERSION = 1

EVENTS_FILE = "events.arrow"
WINDOWS_FILE = "windows.arrow"
USERS_FILE = "users.parquet"
ITEMS_FILE = "items.parquet"
ITEM_TABLE_FILE = "item_table.tsv"
VOCABULARIES_FILE = "vocabularies.json"
STATS_FILE = "stats.json"

PREPARE_COMMAND = "python -m hstu_jax.prepare sample --out_dir {path}"

# One bit per signal of an event; an event's `action` is the sum of its bits.
ACTION_BITS: dict[str, int] = {
    "click": 1,
    "like": 2,
    "follow": 4,
    "comment": 8,
    "forward": 16,
    "hate": 32,
    "long_view": 64,
    "profile_enter": 128,
}
ALL_ACTION_BITS = sum(ACTION_BITS.values())

SPLIT_NAMES = ("train", "validation", "test")  # position = value of the `split` column

# Category columns of a user; id 0 is "unknown or missing" in each.
USER_CATEGORIES = (
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
)

# Unix seconds stay below this until the year 5138, milliseconds have been above it since 1973.
MILLISECONDS_FROM = 10**11


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a file: Arrow type name, unit and meaning (shown in error messages)."""

    name: str
    dtype: str
    meaning: str


EVENT_COLUMNS = (
    Column("user_index", "int32", "dense user index, 0..users-1, ascending"),
    Column("item_index", "int32", "dense item index, 0..items-1"),
    Column("timestamp_s", "int64", "Unix time in seconds, ascending within a user"),
    Column("action", "int32", "sum of ACTION_BITS"),
    Column("watch_time_s", "float32", "seconds watched, finite and not negative"),
)
WINDOW_COLUMNS = (
    Column("user_index", "int32", "dense user index"),
    Column("history_start", "int64", "first history event, a position in events.arrow"),
    Column("history_end", "int64", "one past the last history event"),
    Column("request_time_s", "int64", "Unix seconds; every history event is earlier"),
    Column("split", "int8", "0 train, 1 validation, 2 test"),
    Column("positive_events", "large_list<item: int64>", "positions in events.arrow, ascending"),
)
USER_COLUMNS = (
    Column("user_index", "int32", "0, 1, 2, ..."),
    Column("user_id", "int64", "id in the raw files"),
    *(Column(name, "int32", "category id, 0 = unknown") for name in USER_CATEGORIES),
)
ITEM_COLUMNS = (
    Column("item_index", "int32", "0, 1, 2, ..."),
    Column("item_id", "int64", "id in the raw files"),
    Column("train_count", "int64", "events before the validation day"),
)

COLUMNS_BY_FILE: dict[str, tuple[Column, ...]] = {
    EVENTS_FILE: EVENT_COLUMNS,
    WINDOWS_FILE: WINDOW_COLUMNS,
    USERS_FILE: USER_COLUMNS,
    ITEMS_FILE: ITEM_COLUMNS,
}


def check_columns(found: Mapping[str, str], expected: Sequence[Column], *, file: str) -> None:
    """Checks that a file has every expected column with the expected dtype.

    Args:
      found: column name -> dtype name, as the file declares them. More columns than expected are
        allowed (side features).
      expected: the columns of the format.
      file: path shown in the message.

    Raises:
      ValueError: a column is missing; names it, the nearest one present and all present.
      TypeError: a column has another dtype; names both.
    """
    for column in expected:
        if column.name not in found:
            near = difflib.get_close_matches(column.name, found, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"{file} column {column.name}: missing{hint}; expected {column.dtype}, "
                f"{column.meaning}; the file has {sorted(found)}."
            )
        if found[column.name] != column.dtype:
            raise TypeError(
                f"{file} column {column.name}: dtype {found[column.name]} found, {column.dtype} "
                f"expected ({column.meaning}); prepare the data again."
            )


def action_mask(names: Sequence[str]) -> int:
    """The bit mask of action names.

    >>> action_mask(["click", "follow"])
    5

    Raises:
      ValueError: an unknown name; lists the known ones and the nearest.
    """
    mask = 0
    for name in names:
        if name not in ACTION_BITS:
            near = difflib.get_close_matches(name, ACTION_BITS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"action={name!r}: unknown; {hint}known are {sorted(ACTION_BITS)}.")
        mask |= ACTION_BITS[name]
    return mask
