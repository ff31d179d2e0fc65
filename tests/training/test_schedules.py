"""Schedules by hand, and against the formulas in float64, by step and by epoch.

The reference's own numbers are replayed by `tests/test_golden.py`.
"""

import bisect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.config import train_schema
from hstu_jax.training import schedules


def rates(config, *, base, num_steps, run=None):
    run = run or schedules.RunLength(num_steps=num_steps)
    rate = jax.vmap(lambda s: schedules.learning_rate(config, base=base, run=run, step=s))
    return np.asarray(jax.jit(rate)(jnp.arange(num_steps, dtype=jnp.int32)))


def oracle(config, *, base, t, num_steps):
    """The formulas of docs/model.md in Python floats."""
    kind, warm, low = config.schedule, config.warmup_size, config.min_learning_rate
    if base == 0:
        return 0.0
    if kind == "manual_step":
        place = bisect.bisect_left(config.schedule_sizes, t)
        if place:
            return config.learning_rates[place - 1]
        slope = (config.learning_rates[0] - base) / config.schedule_sizes[0]
        return base + slope * t if config.warmup else base
    if t < warm:
        return (base - config.warmup_learning_rate) * t / warm + config.warmup_learning_rate
    t -= warm
    if kind == "exponential_decay":
        power = t / config.decay_size
        power = math.floor(power) if config.staircase else power
        return max(base * config.decay_factor**power, low)
    if kind == "constant":
        return base
    length = config.T_max or num_steps - warm
    if kind == "cosine_annealing_warm_restarts":
        length = config.T_0
        while t >= length:
            t, length = t - length, length * config.T_mult
    return low + (base - low) * 0.5 * (1 + math.cos(math.pi * min(t, length) / length))


WARM = dict(warmup_size=4, warmup_learning_rate=0.2)
CONFIGS = {
    "constant": {},
    "constant, warm": WARM,
    "exponential": dict(schedule="exponential_decay", decay_size=7, decay_factor=0.7),
    "exponential, smooth": dict(
        schedule="exponential_decay", decay_size=7, staircase=False, min_learning_rate=0.35, **WARM
    ),
    "manual": dict(schedule="manual_step", schedule_sizes=(3, 9), learning_rates=(0.3, 0.7)),
    "manual, warm": dict(
        schedule="manual_step", schedule_sizes=(3, 9), learning_rates=(0.3, 0.7), warmup=True
    ),
    "cosine": dict(schedule="cosine_annealing", T_max=11, min_learning_rate=0.1, **WARM),
    "cosine, whole run": dict(schedule="cosine_annealing", **WARM),
    "restarts": dict(schedule="cosine_annealing_warm_restarts", T_0=5, min_learning_rate=0.1),
    "restarts, growing": dict(schedule="cosine_annealing_warm_restarts", T_0=3, T_mult=3, **WARM),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_schedule_equals_its_formula(name):
    config = train_schema.LearningRateConfig(**CONFIGS[name])
    got = rates(config, base=0.4, num_steps=40)
    want = [oracle(config, base=0.4, t=t, num_steps=40) for t in range(40)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert name == "constant" or np.ptp(got) > 0.05
    assert not rates(config, base=0.0, num_steps=40).any()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.4, 0.4, 0.4, 0.4]),
        (WARM, [0.2, 0.25, 0.3, 0.35, 0.4]),
        ({"schedule": "cosine_annealing"}, [0.4, 0.4 * 0.5 * (1 + np.cos(np.pi / 8))]),
        # A manual rate is in force one step after its size.
        (CONFIGS["manual"], [0.4, 0.4, 0.4, 0.4, 0.3, 0.3]),
        (dict(schedule="exponential_decay", decay_size=2, decay_factor=0.5), [0.4, 0.4, 0.2, 0.2]),
    ],
)
def test_first_steps_by_hand(options, expected):
    config = train_schema.LearningRateConfig(**options)
    got = rates(config, base=0.4, num_steps=8)
    np.testing.assert_allclose(got[: len(expected)], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["exponential", "manual, warm", "cosine", "restarts, growing"])
def test_by_epoch_counts_completed_epochs(name):
    config = train_schema.LearningRateConfig(**CONFIGS[name], by_epoch=True)
    ends = (3, 3, 5, 9)  # the second epoch is shorter than a step
    run = schedules.RunLength(num_steps=12, epoch_ends=ends)
    got = rates(config, base=0.4, num_steps=12, run=run)
    epochs = [0, 0, 0, 2, 2, 3, 3, 3, 3, 4, 4, 4]
    want = [oracle(config, base=0.4, t=epoch, num_steps=12) for epoch in epochs]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_staircases_and_periods_change_at_whole_sizes():
    """Every multiple of every size: what a reciprocal in float32 would get wrong."""
    for size in (3, 7, 41, 49):
        config = train_schema.LearningRateConfig(
            schedule="exponential_decay", decay_size=size, decay_factor=0.5
        )
        halved = rates(config, base=1.0, num_steps=12 * size)
        assert np.flatnonzero(np.diff(halved)).tolist() == [size * n - 1 for n in range(1, 12)]
        config = train_schema.LearningRateConfig(
            schedule="cosine_annealing_warm_restarts", T_0=size
        )
        restarted = rates(config, base=1.0, num_steps=12 * size)
        assert np.flatnonzero(restarted == 1.0).tolist() == [size * n for n in range(12)]
