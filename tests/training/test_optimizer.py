"""Schedules by hand, and Adam against a float64 loop."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hstu_jax.config import schema
from hstu_jax.training import optimizer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.4, 0.4, 0.4, 0.4]),
        ({"warmup_size": 4, "warmup_learning_rate": 0.2}, [0.2, 0.25, 0.3, 0.35, 0.4]),
        ({"schedule": "cosine"}, [0.4, 0.4 * 0.5 * (1 + np.cos(np.pi / 8)), None, None, 0.2]),
        (
            {"schedule": "cosine", "warmup_size": 2, "min_learning_rate": 0.1},
            [0.0, 0.2, 0.4, 0.1 + 0.15 * (1 + np.cos(np.pi / 6)), None],
        ),
    ],
)
def test_schedule_by_hand(options, expected):
    config = schema.LearningRateConfig(**options)
    for step, want in enumerate(expected):
        if want is not None:
            got = optimizer.learning_rate(config, base=0.4, num_steps=8, step=jnp.int32(step))
            assert float(got) == pytest.approx(want, rel=1e-6)


def test_cosine_stays_at_its_minimum_and_zero_stays_zero():
    config = schema.LearningRateConfig(schedule="cosine", min_learning_rate=0.1)
    assert float(
        optimizer.learning_rate(config, base=0.4, num_steps=8, step=jnp.int32(20))
    ) == pytest.approx(0.1)
    assert float(optimizer.learning_rate(config, base=0.0, num_steps=8, step=jnp.int32(3))) == 0.0


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adam_equals_a_float64_loop(weight_decay):
    config = schema.DenseOptimizerConfig(lr=0.01, beta2=0.98, weight_decay=weight_decay)
    transform = optimizer.dense_optimizer(config, num_steps=20)
    rng = np.random.default_rng(0)
    want = rng.normal(size=5)
    params = jnp.asarray(want, jnp.float32)
    state = transform.init(params)
    mean, square = np.zeros(5), np.zeros(5)
    for step in range(1, 21):
        gradient = rng.normal(size=5)
        updates, state = transform.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        gradient = gradient + weight_decay * want  # L2: added to the gradient, not decoupled
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.98 * square + 0.02 * gradient**2
        scale = np.sqrt(square / (1 - 0.98**step)) + 1e-8
        want = want - 0.01 * mean / (1 - 0.9**step) / scale
    np.testing.assert_allclose(params, want, rtol=1e-5, atol=1e-6)
