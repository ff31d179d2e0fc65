"""The column groups of an event store: events, windows and items as NumPy arrays.

Here: plain records without rules. Not here: the rules that their values keep (`store_checks.py`)
and the files (`event_store.py`, the next file on the path).
"""

import dataclasses

import numpy as np
from jaxtyping import Shaped


@dataclasses.dataclass(frozen=True)
class Events:
    """All events, sorted by user, then time; one entry per event.

    Attributes:
      user_index: int32, 0..users-1.
      item_index: int32, 0..items-1.
      timestamp_s: int64 Unix seconds.
      action: int32 sum of `schema.ACTION_BITS`.
      watch_time_s: float32 seconds.
    """

    user_index: Shaped[np.ndarray, "_"]
    item_index: Shaped[np.ndarray, "_"]
    timestamp_s: Shaped[np.ndarray, "_"]
    action: Shaped[np.ndarray, "_"]
    watch_time_s: Shaped[np.ndarray, "_"]

    def __len__(self) -> int:
        return len(self.timestamp_s)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Training and evaluation rows; one entry per window.

    The history of window w is `events[history_start[w]:history_end[w]]`; its positives are the
    events `positive_events[positive_offsets[w]:positive_offsets[w + 1]]`.

    Attributes:
      user_index: int32.
      history_start: int64 position of the user's first event.
      history_end: int64, one past the last event strictly before `request_time_s`.
      request_time_s: int64 Unix seconds.
      split: int8, 0 train, 1 validation, 2 test.
      positive_offsets: int64, windows + 1 entries, starts at 0.
      positive_events: int64 positions in events, ascending within a window.
    """

    user_index: Shaped[np.ndarray, "_"]
    history_start: Shaped[np.ndarray, "_"]
    history_end: Shaped[np.ndarray, "_"]
    request_time_s: Shaped[np.ndarray, "_"]
    split: Shaped[np.ndarray, "_"]
    positive_offsets: Shaped[np.ndarray, "_"]
    positive_events: Shaped[np.ndarray, "_"]

    def __len__(self) -> int:
        return len(self.user_index)

    def positives(self, window: int | np.integer) -> Shaped[np.ndarray, "_"]:
        """Event positions of one window's positives, ascending (a view)."""
        return self.positive_events[
            self.positive_offsets[window] : self.positive_offsets[window + 1]
        ]


@dataclasses.dataclass(frozen=True)
class ItemTable:
    """The catalogue; entry i is item_index i.

    Attributes:
      item_id: int64 id in the raw files.
      train_count: int64 number of events before the validation day (0 = cold item).
    """

    item_id: Shaped[np.ndarray, "_"]
    train_count: Shaped[np.ndarray, "_"]

    def __len__(self) -> int:
        return len(self.item_id)
