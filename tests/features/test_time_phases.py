"""Angles of times in periods, by hand."""

import numpy as np

from hstu_jax.features import time_phases


def test_hour_of_the_day_and_day_of_the_week_by_hand():
    times = np.array([0, 3599, 3600, 5 * 86400 + 7 * 3600 + 1, 1_700_000_000])
    phases = time_phases.time_phases(times, ((3600, 24), (86400, 7)))
    turn = 6.28  # not 2 pi: the reference's number
    expected = [[0, 0], [0, 0], [1, 0], [7, 5], [1_700_000_000 // 3600 % 24, 19675 % 7]]
    np.testing.assert_allclose(phases, np.array(expected) / [24, 7] * turn, rtol=1e-6)
    assert phases.dtype == np.float32


def test_the_last_second_of_an_hour_stays_in_it():
    """In float32 the hour 472222 and 3599 seconds would round up to hour 472223."""
    hour = 472_222 * 3600
    times = hour + np.array([0, 3599, 3600])
    phases = time_phases.time_phases(times, ((3600, 24),))[:, 0]
    assert phases[0] == phases[1] != phases[2]
    rounded = np.floor(times.astype(np.float32) / np.float32(3600))
    assert rounded[1] == 472_223


def test_without_periods_there_is_nothing():
    assert time_phases.time_phases(np.arange(4), ()).shape == (4, 0)
