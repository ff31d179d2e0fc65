"""The windows of a split and how much room each needs.

Here: which windows there are, their slots, queries and attention pairs. Not here: which of them
come together (`windows.py`, the next file on the path).
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from hstu_jax.data import event_store
from hstu_jax.features import balance, next_item
from pallas_kernels.hstu_attention import mask as attention_mask

_CAUSAL = attention_mask.MaskRule()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitWindows:
    """The windows of a split and how much room each needs.

    Attributes:
        windows: window numbers in the store, ascending.
        lengths: slots each window needs: contextual tokens and the newest `max_seq_len` items.
        num_positives: queries each window needs.
        dropped_tokens: history items beyond `max_seq_len`, which are left out.
        pairs: attention pairs of each window, by which groups are balanced.
    """

    windows: Int[np.ndarray, "W"]
    lengths: Int[np.ndarray, "W"]
    num_positives: Int[np.ndarray, "W"]
    dropped_tokens: Int[np.ndarray, "W"]
    pairs: Int[np.ndarray, "W"]


def split_windows(
    store: event_store.EventStore,
    *,
    split: str,
    num_contextual: int,
    max_seq_len: int,
    rows: next_item.TrainingRows | None = None,
    rule: attention_mask.MaskRule = _CAUSAL,
) -> SplitWindows:
    """Reads the sizes of a split's windows.

    Args:
        store: the event store.
        split: "train", "validation" or "test".
        num_contextual: C, contextual tokens in front of every history.
        max_seq_len: history items kept, the newest.
        rows: sizes of the next-item objective's training rows, which go on past the history;
            windows without a query are left out. None = the history alone.
        rule: the attention mask.

    Raises:
        ValueError: the split has no window, or none with a query.
    """
    windows = store.windows_of_split(split)
    if len(windows) == 0:
        is_rows = store.features.window is not None
        advice = "give files whose rows have candidates" if is_rows else "prepare data of more days"
        raise ValueError(f"split={split!r}: {store.path} has no such window; {advice}.")
    end, num_positives = store.windows.history_end, np.diff(store.windows.positive_offsets)
    if rows is not None:
        end, num_positives = rows.row_end, rows.num_queries
        windows = windows[num_positives[windows] > 0]
        if len(windows) == 0:
            raise ValueError(
                f"split={split!r}: no positive of {store.path} has an event before it to ask from; "
                "use model.objective='window', or give feature_groups.contextual a feature."
            )
    history = end[windows] - store.windows.history_start[windows]
    used = np.minimum(history, max_seq_len)
    return SplitWindows(
        windows=windows,
        lengths=used + num_contextual,
        num_positives=num_positives[windows],
        dropped_tokens=history - used,
        pairs=balance.visible_pairs(used + num_contextual, rule=rule),
    )
