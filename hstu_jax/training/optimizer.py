"""Optimizers of the dense parameters with the semantics of torch.optim, on optax where it agrees.

Tables have their own (`hstu_jax.tables.optimizers`); schedules are in `schedules.py`, clipping and
averaging in `gradients.py`.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from hstu_jax.config import train_schema
from hstu_jax.model import reference_weights
from hstu_jax.training import schedules

_REST = "rest"  # label of the parameters that no part takes


def dense_optimizer(
    config: train_schema.DenseOptimizerConfig, *, run: schedules.RunLength
) -> optax.GradientTransformation:
    """The optimizer of a configuration, its parts included.

    Args:
        config: the section `train.dense_optimizer`.
        run: what the schedules know of the run.

    Returns:
        A transformation whose `init` raises ValueError for a part without a parameter.
    """
    rest = _optimizer(config, config.learning_rate, run)
    if not config.part_optimizers:
        return rest
    parts = {_REST: rest}
    for number, part in enumerate(config.part_optimizers):
        parts[f"part{number}"] = _optimizer(part, part.learning_rate or config.learning_rate, run)
    patterns = tuple(part.regex_pattern for part in config.part_optimizers)
    return optax.partition(parts, lambda params: part_labels(params, patterns=patterns))


def part_labels(params: Any, *, patterns: tuple[str, ...]) -> Any:
    """Label of every parameter: "part0", "part1", ... or "rest".

    The first pattern that matches the whole of a parameter's name takes it. Names are ours, such as
    `user_tower/encoder/stack/layers_0/uvqk_kernel`, and the reference's, such as
    `user_tower._hstu_encoder._stu_module._stu_layers.0._uvqk_weight`; either may match.

    Args:
        params: nested dict of the dense parameters.
        patterns: regular expressions, one per part.

    Raises:
        ValueError: a pattern that takes no parameter; lists the names.
    """
    parts = part_numbers(params, patterns=patterns)
    labels = {path: _REST if part is None else f"part{part}" for path, part in parts.items()}
    for number, pattern in enumerate(patterns):
        if number not in parts.values():
            raise ValueError(
                f"train.dense_optimizer.part_optimizers[{number}].regex_pattern={pattern!r}: takes "
                "no parameter (it must match a whole name, and the first part that matches takes "
                f"it); the names are {', '.join(sorted(labels))}, or the reference's for them."
            )
    return traverse_util.unflatten_dict(labels, sep="/")


def part_numbers(params: Any, *, patterns: tuple[str, ...]) -> dict[str, int | None]:
    """Our name of every parameter -> number of the first pattern that takes it, as `part_labels`.

    Args:
        params: nested dict with the names of the dense parameters.
        patterns: regular expressions, one per part.
    """
    found = {}
    for path in traverse_util.flatten_dict(params, sep="/"):
        names = {path, reference_weights.path_to_name(path)}
        hits = [i for i, p in enumerate(patterns) if any(re.fullmatch(p, name) for name in names)]
        found[path] = hits[0] if hits else None
    return found


def _optimizer(
    config: train_schema.OptimizerConfig,
    schedule: train_schema.LearningRateConfig,
    run: schedules.RunLength,
) -> optax.GradientTransformation:
    def rate(count):
        return schedules.learning_rate(schedule, base=config.lr, run=run, step=jnp.asarray(count))

    decay = (
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity()
    )
    steps = (_direction(config), decay) if config.kind == "adamw" else (decay, _direction(config))
    return optax.chain(*steps, optax.scale_by_learning_rate(rate))


def _direction(config: train_schema.OptimizerConfig) -> optax.GradientTransformation:
    """What the learning rate is multiplied with, from the gradient."""
    eps = config.eps_in_use
    if config.kind == "sgd":
        if config.momentum == 0:
            return optax.identity()
        if config.dampening == 0:
            return optax.trace(decay=config.momentum, nesterov=config.nesterov)
        return damped_momentum(momentum=config.momentum, dampening=config.dampening)
    if config.kind == "adagrad":
        return adagrad(initial_accumulator_value=config.initial_accumulator_value, eps=eps)
    if config.kind == "adadelta":
        return optax.scale_by_adadelta(rho=config.rho, eps=eps)
    if config.kind == "rmsprop":
        return optax.scale_by_rms(decay=config.alpha, eps=eps, eps_in_sqrt=False)
    if config.amsgrad:
        return amsgrad(b1=config.beta1, b2=config.beta2, eps=eps)
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=eps)


class _Momentum(NamedTuple):
    is_first: Any
    velocity: Any


def damped_momentum(*, momentum: float, dampening: float) -> optax.GradientTransformation:
    """v <- momentum * v + (1 - dampening) * g, but v = g at the first step.

    Source: torch.optim.SGD 2.13; `optax.trace` has no dampening.
    """

    def init(params):
        return _Momentum(jnp.ones((), bool), jax.tree.map(jnp.zeros_like, params))

    def update(gradients, state, params=None):
        share = jnp.where(state.is_first, 1.0, 1.0 - dampening)
        velocity = jax.tree.map(
            lambda v, g: momentum * v + share.astype(g.dtype) * g, state.velocity, gradients
        )
        return velocity, _Momentum(jnp.zeros((), bool), velocity)

    return optax.GradientTransformation(init, update)


class _SumOfSquares(NamedTuple):
    total: Any


def adagrad(*, initial_accumulator_value: float, eps: float) -> optax.GradientTransformation:
    """s <- s + g^2; g / (sqrt(s) + eps).

    Source: torch.optim.Adagrad 2.13; `optax.scale_by_rss` adds eps inside the root.
    """

    def init(params):
        return _SumOfSquares(
            jax.tree.map(lambda p: jnp.full_like(p, initial_accumulator_value), params)
        )

    def update(gradients, state, params=None):
        total = jax.tree.map(lambda s, g: s + jnp.square(g), state.total, gradients)
        updates = jax.tree.map(lambda s, g: g / (jnp.sqrt(s) + eps), total, gradients)
        return updates, _SumOfSquares(total)

    return optax.GradientTransformation(init, update)


class _AmsGrad(NamedTuple):
    count: Any
    mean: Any
    square: Any
    largest: Any


def amsgrad(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam whose second moment never falls: its largest value so far, before the bias correction.

    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; w <- max(w, v);
    (m / (1 - b1^n)) / (sqrt(w) / sqrt(1 - b2^n) + eps) at the n-th step.

    Source: torch.optim.Adam(amsgrad=True) 2.13; `optax.scale_by_amsgrad` takes the maximum of the
        corrected moment.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return _AmsGrad(jnp.zeros((), jnp.int32), zeros, zeros, zeros)

    def update(gradients, state, params=None):
        count = state.count + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, gradients)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.square, gradients)
        largest = jax.tree.map(jnp.maximum, state.largest, square)
        mean_share, square_share = 1 - b1**count, jnp.sqrt(1 - b2**count)
        updates = jax.tree.map(
            lambda m, w: m / mean_share / (jnp.sqrt(w) / square_share + eps), mean, largest
        )
        return updates, _AmsGrad(count, mean, square, largest)

    return optax.GradientTransformation(init, update)
