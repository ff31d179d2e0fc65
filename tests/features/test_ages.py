"""Ages in whole seconds: as int64 arithmetic has them, in training and evaluation."""

import dataclasses

import numpy as np
import pytest

from hstu_jax.features import ages, pipeline
from tests.features import tied_events

YEARS = 30 * 365 * 86_400


def test_ages_are_clipped_where_differences_would_not_fit():
    now = np.full(5, 1_700_000_000)
    time = np.array([now[0] - 3, now[0] - YEARS - 1, -(10**12), now[0] + 5, 10**12])
    expected = [3, YEARS + 1, ages.OLDEST_S, -5, ages.NEWEST_S]
    np.testing.assert_array_equal(ages.ages(now, time), expected)
    assert ages.OLDEST_S - ages.NEWEST_S == 2**31 - 1


def config_of(config, **stu):
    """The configuration for the next-item objective with other fields of its layers."""
    tower = config.model.user_tower
    hstu = dataclasses.replace(tower.hstu, stu=dataclasses.replace(tower.hstu.stu, **stu))
    tower = dataclasses.replace(tower, hstu=hstu)
    model = dataclasses.replace(config.model, objective="next_item", user_tower=tower)
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize("split", ["train", "test"])
def test_batches_hold_the_ages_that_a_bias_reads(split, tmp_path, make_config):
    """Users whose newest events come 30 years after the others: no second is lost."""
    events = tied_events.random_events()
    is_late = np.append(np.diff(events.user_index) > 0, True)
    time = events.timestamp_s + np.where(is_late, YEARS, 0)
    events = dataclasses.replace(events, timestamp_s=time)
    store = tied_events.write_store(tmp_path, events=events, mode="leave_one_out", window_events=0)
    pipe = pipeline.Pipeline(config_of(make_config(), use_time_bias=True), store)
    if split == "test":
        with pipe.eval_batches("test") as batches:
            found = next(iter(batches))
    else:
        found = pipe.batch_at(0)
    batch, rows, table = found.batch, pipe.source.rows, store.windows
    oldest = 0
    for group, slot in np.argwhere(batch.user_mask):
        window = found.window_index[group, slot]
        end = rows.row_end[window] if split == "train" else table.history_end[window]
        request = (rows if split == "train" else table).request_time_s[window]
        start, length = (
            array[group, slot] for array in (batch.segment_starts, batch.segment_lengths)
        )
        age = batch.age_s[group].reshape(-1)[start : start + length]
        assert not age[:2].any()  # contextual tokens have none
        np.testing.assert_array_equal(age[2:], request - time[end - length + 2 : end])
        oldest = max(oldest, age.max())
    assert batch.age_s.dtype == np.int32 and (oldest > YEARS) == (split == "test")
    without = pipeline.Pipeline(config_of(make_config()), store)
    assert without.batch_at(0).batch.age_s is None
