"""Arrays of programs: which rows go together, and the gaps and phases that they read."""

import numpy as np
import pytest

from hstu_jax.features import ages, next_item, time_phases
from hstu_jax.serving import input_columns, user_batches
from hstu_jax.serving import manifest as manifest_lib

SIZES = (
    manifest_lib.Size(length=4, batches=(1, 3)),
    manifest_lib.Size(length=10, batches=(2,)),
)


def test_rows_go_to_the_shortest_length_that_holds_them():
    lengths = np.array([0, 5, 4, 10, 1, 3, 2])
    plans = list(user_batches.plan(lengths, SIZES))
    assert [(p.length, p.batch, p.rows.tolist()) for p in plans] == [
        (4, 3, [0, 2, 4]),
        (4, 3, [5, 6]),
        (10, 2, [1, 3]),
    ]
    first = plans[0]
    assert first.lengths.tolist() == [0, 4, 1]
    assert first.events.tolist() == [5, 6, 7, 8, 19] and first.slots.tolist() == [4, 5, 6, 7, 8]
    assert list(user_batches.item_batches(7, (1, 4))) == [(0, 4), (4, 4)]
    assert list(user_batches.item_batches(0, (1, 4))) == []


@pytest.mark.parametrize("kind", ["next_request", "own"])
def test_gaps_between_events_are_the_trainings(kind):
    """Rows without events and with one among others, in another order than they came."""
    rng = np.random.default_rng(0)
    lengths = np.array([3, 0, 1, 4])
    time = 1_650_000_000 + np.cumsum(rng.integers(0, 5000, 8))
    time[:1] = -(10**12)  # older than an age can be
    request = np.full(4, 1_660_000_000)
    histories = input_columns.Histories(
        lengths=lengths,
        num_truncated=0,
        num_dropped=0,
        columns={},
        timestamp_s=time,
        action=None,
        watch_time_s=None,
        anchor_s=request,
        newest_s=np.array([time[2], 0, time[3], time[7]]),
    )
    periods = ((3600, 24), (86400, 7))
    history = manifest_lib.History(
        items="items",
        timestamp="time",
        action=None,
        watch_time=None,
        request_time="request_time",
        sequence_length=0,
        sequence_delim="",
        newest_first=False,
        max_seq_len=10,
        periods=periods,
        step_time=kind,
    )
    expected = next_item.step_gaps(time, lengths, request, kind=kind)
    for plan in user_batches.plan(lengths, SIZES):
        inputs = user_batches.plain_inputs(plan, histories, history)
        gaps = inputs["step_gap_s"].reshape(-1)
        np.testing.assert_array_equal(gaps[plan.slots], expected[plan.events])
        assert np.count_nonzero(np.delete(gaps, plan.slots)) == 0
        event_request = np.repeat(request, lengths)[plan.events]
        np.testing.assert_array_equal(
            inputs["age_s"].reshape(-1)[plan.slots], ages.ages(event_request, time[plan.events])
        )
        phases = time_phases.time_phases(histories.newest_s[plan.rows], periods)
        np.testing.assert_array_equal(inputs["last_phase"][: len(plan.rows)], phases)
