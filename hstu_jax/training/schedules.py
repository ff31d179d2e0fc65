"""Learning-rate schedules: the rate in force at an optimizer step, for dense parameters and tables.

A schedule is a function of t, the number of completed optimizer steps (0 at the first one) or, with
`by_epoch`, of completed epochs. Nothing of it is saved: a resumed run gets t from its step.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hstu_jax.config import train_schema

_MAX_STEPS = 2**31 - 1  # steps are int32


@dataclasses.dataclass(frozen=True)
class RunLength:
    """What schedules know of a run.

    Attributes:
        num_steps: its optimizer steps; a cosine without `T_max` ends there.
        epoch_ends: for every epoch that ends within the run, the first step that begins after all
            of the epoch's batches. Read by `by_epoch` only.
    """

    num_steps: int
    epoch_ends: tuple[int, ...] = ()


def learning_rate(
    config: train_schema.LearningRateConfig,
    *,
    base: float,
    run: RunLength,
    step: Int[Array, ""],
) -> Float[Array, ""]:
    """The rate in force at a step.

    With w = `warmup_size` and t as in the module's description:

    - t < w: warmup_learning_rate + (base - warmup_learning_rate) * t / w (not `manual_step`).
    - constant: base.
    - exponential_decay: max(base * decay_factor^p, min), p = (t - w) / decay_size, rounded down if
      `staircase`.
    - manual_step: base until t = schedule_sizes[0], then learning_rates[i] from
      schedule_sizes[i] + 1 on. With `warmup`, linear from base to learning_rates[0] before.
    - cosine_annealing: min + (base - min) * (1 + cos(pi * u / T)) / 2, u = min(t - w, T); T is
      `T_max`, or what the warm-up leaves of the run.
    - cosine_annealing_warm_restarts: the same in periods of T_0 * T_mult^n steps, u counted from
      the period's start.

    A base of 0 stays 0.

    Args:
        config: the schedule.
        base: learning rate after the warm-up.
        run: the run's length and epochs.
        step: number of completed optimizer steps.

    Source: TorchEasyRec 1.3.16, tzrec/optim/lr_scheduler.py. There `warmup_size` of a constant rate
        and a cosine without `T_max` do not exist.
    """
    if base == 0:
        return jnp.zeros((), jnp.float32)
    if config.by_epoch:
        step = jnp.sum(jnp.asarray(run.epoch_ends, jnp.int32) <= step, dtype=jnp.int32)
    if config.schedule == "manual_step":
        return _manual(config, base, step)
    t = step.astype(jnp.float32)
    warm = float(config.warmup_size)
    low = config.min_learning_rate
    if config.schedule == "exponential_decay":
        since = step - config.warmup_size
        # In whole numbers: XLA divides floats by a constant as it pleases.
        power = since // config.decay_size if config.staircase else since / config.decay_size
        factor = jnp.power(jnp.float32(config.decay_factor), power.astype(jnp.float32))
        rate = jnp.maximum(base * factor, low)
    elif config.schedule == "cosine_annealing":
        length = config.T_max or max(run.num_steps - config.warmup_size, 1)
        since = jnp.clip(step - config.warmup_size, 0, length)
        rate = low + (base - low) * _half_cosine(since, length)
    elif config.schedule == "cosine_annealing_warm_restarts":
        rate = low + (base - low) * _half_cosine(*_period(config, step - config.warmup_size))
    else:
        rate = jnp.full_like(t, base)
    if warm > 0:
        start = config.warmup_learning_rate
        rate = jnp.where(t < warm, start + (base - start) * t / warm, rate)
    return rate


def _manual(config, base, step):
    """The rate of the last size that is strictly less than the step."""
    sizes = jnp.asarray(config.schedule_sizes, jnp.int32)
    place = jnp.sum(sizes < step)
    rates = jnp.asarray((base, *config.learning_rates), jnp.float32)
    if not config.warmup:
        return rates[place]
    first = base + (config.learning_rates[0] - base) * step / config.schedule_sizes[0]
    return jnp.where(place == 0, first, rates[place])


def _half_cosine(since, length):
    """(1 + cos(pi * since / length)) / 2, to the last digits near its end too."""
    left = (length - since) / length
    return jnp.square(jnp.sin(0.5 * jnp.pi * left))


def _period(config, since_warmup):
    """Steps since the current period's start, and its length."""
    lengths, starts = [config.T_0], [0]
    if config.T_mult > 1:
        while starts[-1] + lengths[-1] <= _MAX_STEPS:
            starts.append(starts[-1] + lengths[-1])
            lengths.append(min(lengths[-1] * config.T_mult, _MAX_STEPS))
    period = jnp.maximum(jnp.sum(jnp.asarray(starts, jnp.int32) <= since_warmup) - 1, 0)
    length = jnp.asarray(np.array(lengths), jnp.int32)[period]
    position = since_warmup - jnp.asarray(starts, jnp.int32)[period]
    return position % length, length
