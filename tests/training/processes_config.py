"""A small run for tests of several processes: --config=tests/training/processes_config.py:STORE."""

from tests.training import small_config

# One table is split over the devices, the other is whole on each.
_REPLICATED_BYTES = 20_000


def get_config(store_path):
    """Mean pooling, which compiles fast, with four groups and two tables."""
    raw = small_config.small_raw(
        store_path,
        "unused",
        data__source="event_store",
        data__num_groups=4,
        model__user_tower__encoder="mean",
        mesh__replicated_table_bytes=_REPLICATED_BYTES,
        feature_groups__contextual=("user_id",),
        # Independent of the run's length, so that a stopped run may go on to another one.
        train__dense_optimizer__learning_rate__schedule="constant",
        train__sparse_optimizer__learning_rate__schedule="constant",
        train__log_step_count_steps=1,
        train__save_checkpoints_steps=2,
    )
    used = {name for names in raw.feature_groups.values() for name in names}
    with raw.unlocked():
        for name in set(raw.features) - used:
            del raw.features[name]
    return raw
