"""What a configuration reads and its event store does not have: refused before the first batch.

Here: rules about the whole store. Columns and ids are checked where they are read (`columns.py`),
rows and queries in `next_item.py`. Called by `pipeline.py`.
"""

import numpy as np

from hstu_jax.config import schema
from hstu_jax.data import event_store


def check(config: schema.Config, store: event_store.EventStore) -> None:
    """Checks that the store has the times that the model reads, and histories to train on.

    Raises:
        ValueError: an option reads times where the store's are positions; or the objective is
            "window" and no training window has a history.
    """
    if store.stats.get("event_times") == "position":
        _check_no_times(config)
    windows = store.windows
    is_training = np.asarray(windows.split) == 0
    has_history = np.asarray(windows.history_end) > np.asarray(windows.history_start)
    if config.model.objective == "window" and is_training.any():
        if not has_history[is_training].any():
            raise ValueError(
                "model.objective='window': the history of every training window is empty, as in a "
                "leave-one-out store of whole users, so nothing would be learned from histories; "
                "prepare with --window_events, or use 'next_item'."
            )


def _check_no_times(config: schema.Config) -> None:
    tower = config.model.user_tower
    hstu = tower.hstu
    reads = {
        "positional_encoder.use_time_encoding=True": hstu.positional_encoder.use_time_encoding,
        "stu.use_time_bias=True": tower.encoder == "hstu" and hstu.stu.use_time_bias,
        "output_postprocessor='timestamp_layernorm'": hstu.output_postprocessor
        == "timestamp_layernorm",
    }
    for field, is_read in reads.items():
        if is_read:
            raise ValueError(
                f"model.user_tower.hstu.{field}: reads the events' times, and those of this store "
                "are positions (its raw file had no times); switch it off."
            )
