"""Dense optimizer and learning-rate schedules (optax); tables have their own in `hstu_jax.tables`.

A schedule is a function of the number of completed optimizer steps, 0 at the first one.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from hstu_jax.config import schema


def learning_rate(
    config: schema.LearningRateConfig, *, base: float, num_steps: int, step: Int[Array, ""]
) -> Float[Array, ""]:
    """The rate in force at a step.

    Linear from `warmup_learning_rate` to `base` over `warmup_size` steps; then `base`, or
    min + (base - min) * (1 + cos(pi * t / T)) / 2 with t counted from the end of the warm-up and
    T = num_steps - warmup_size. A base of 0 stays 0.

    Args:
        config: the schedule.
        base: learning rate after the warm-up.
        num_steps: length of the run; the cosine ends there.
        step: number of completed steps.

    Source: FACTS 7.3 (TorchEasyRec 1.3.16, tzrec/optim/lr_scheduler.py).
    """
    t = step.astype(jnp.float32)
    warm = float(config.warmup_size)
    if config.schedule == "cosine":
        span = max(num_steps - warm, 1.0)
        progress = jnp.clip((t - warm) / span, 0.0, 1.0)
        low = config.min_learning_rate
        rate = low + (base - low) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    else:
        rate = jnp.full_like(t, base)
    if warm > 0:
        start = config.warmup_learning_rate
        rate = jnp.where(t < warm, start + (base - start) * t / warm, rate)
    return rate if base != 0 else jnp.zeros_like(t)


def dense_optimizer(
    config: schema.DenseOptimizerConfig, *, num_steps: int
) -> optax.GradientTransformation:
    """Adam with L2 weight decay added to the gradient, as torch.optim.Adam."""

    def schedule(count):
        return learning_rate(
            config.learning_rate, base=config.lr, num_steps=num_steps, step=jnp.asarray(count)
        )

    return optax.chain(
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity(),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.scale_by_learning_rate(schedule),
    )
