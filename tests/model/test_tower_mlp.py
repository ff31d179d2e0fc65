"""A tower's MLP: activations, norms, statistics and dropout against hand-written float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.config import tower_schema
from hstu_jax.model import activations, dropout, match, normalization, tower_mlp
from tests.model import models

_SELU = 1.0507009873554805, 1.6732632423543772
_FORMULAS = {
    "": lambda x: x,
    "nn.ReLU": lambda x: max(x, 0),
    "nn.ReLU6": lambda x: min(max(x, 0), 6),
    "nn.LeakyReLU": lambda x: x if x > 0 else 0.01 * x,
    "nn.LeakyReLU(negative_slope=0.3)": lambda x: x if x > 0 else 0.3 * x,
    "nn.ELU": lambda x: x if x > 0 else math.expm1(x),
    "nn.ELU(alpha=0.5)": lambda x: x if x > 0 else 0.5 * math.expm1(x),
    "nn.SELU": lambda x: _SELU[0] * (x if x > 0 else _SELU[1] * math.expm1(x)),
    "nn.GELU": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "nn.GELU(approximate='tanh')": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "nn.SiLU": lambda x: x / (1 + math.exp(-x)),
    "nn.Mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "nn.Softplus": lambda x: x if x > 20 else math.log1p(math.exp(x)),
    "nn.Softplus(beta=2, threshold=1)": lambda x: (
        x if 2 * x > 1 else math.log1p(math.exp(2 * x)) / 2
    ),
    "nn.Sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "nn.Tanh": math.tanh,
}


@pytest.mark.parametrize("activation", _FORMULAS)
def test_activations_are_their_formulas(activation):
    x = np.array([[-30.0, -2.5, -0.7, 0.0, 0.3, 0.6, 1.9, 7.5, 30.0]], np.float32)
    formula = _FORMULAS[activation]
    expected = [formula(float(value)) for value in x[0]]
    out = activations.activate(jnp.asarray(x), activation)
    np.testing.assert_allclose(out[0], expected, rtol=2e-5, atol=1e-7)
    slope = jax.grad(lambda x: jnp.sum(activations.activate(x, activation)))(jnp.asarray(x))
    assert np.all(np.isfinite(slope))


def test_every_name_of_the_configuration_has_its_formula_here():
    names = {tower_schema.parse_activation(text)[0] for text in _FORMULAS}
    assert names == set(tower_schema.ACTIVATIONS) - {activations.DICE}


def random_variables(module, x, *, seed=0):
    """Random parameters, and statistics that are far from 0 and 1."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    stats = models.random_tree(shapes.get("batch_stats", {}), seed=seed + 1)
    stats = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.5, stats)
    return {"params": models.random_tree(shapes["params"], seed=seed), "batch_stats": stats}


def test_batch_norm_by_hand():
    rng = np.random.default_rng(0)
    x = (3 + 2 * rng.standard_normal((7, 4))).astype(np.float32)
    mask = np.array([1, 1, 0, 1, 0, 1, 1], bool)
    module = normalization.BatchNorm()
    variables = random_variables(module, jnp.asarray(x))
    scale, bias = (np.float64(variables["params"][name]) for name in ("scale", "bias"))
    mean, var = (np.float64(variables["batch_stats"][name]) for name in ("mean", "var"))
    used = x[mask].astype(np.float64)
    poisoned = np.where(mask[:, None], x, 1e6).astype(np.float32)  # rows not in use say nothing
    out, changed = module.apply(
        variables, jnp.asarray(poisoned), jnp.asarray(mask), mutable=["batch_stats"]
    )
    expected = (used - used.mean(0)) / np.sqrt(used.var(0) + 1e-5) * scale + bias
    np.testing.assert_allclose(out[mask], expected, rtol=1e-4, atol=1e-5)
    stats = changed["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.9 * mean + 0.1 * used.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 * var + 0.1 * used.var(0, ddof=1), rtol=1e-5)
    # Evaluation: the running values, whatever the rows.
    out = module.apply(variables, jnp.asarray(x))
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    # A batch without rows in use changes nothing, and is finite.
    out, changed = module.apply(
        variables, jnp.asarray(x), jnp.zeros(7, bool), mutable=["batch_stats"]
    )
    jax.tree.map(np.testing.assert_array_equal, changed["batch_stats"], variables["batch_stats"])
    assert np.all(np.isfinite(out))


def test_gradient_of_batch_norm_goes_through_its_statistics():
    rng = np.random.default_rng(1)
    x, cotangent = rng.standard_normal((2, 6, 3))
    mask = np.array([1, 1, 1, 0, 1, 1], bool)
    module = normalization.BatchNorm(use_affine=False)
    stats = {"batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}

    def total(x):
        out = module.apply(stats, x, jnp.asarray(mask))
        return jnp.sum(jnp.where(mask[:, None], out, 0.0) * cotangent.astype(np.float32))

    gradient = jax.grad(total)(jnp.asarray(x, jnp.float32))

    def total64(x):
        used = x[mask]
        out = (used - used.mean(0)) / np.sqrt(used.var(0) + 1e-5)
        return np.sum(out * cotangent[mask])

    step, expected = 1e-6, np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        moved = x.copy()
        moved[index] += step
        expected[index] = (total64(moved) - total64(x)) / step
    np.testing.assert_allclose(gradient, expected, atol=2e-5)
    np.testing.assert_array_equal(gradient[3], 0)


def test_dice_by_hand():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, 3)).astype(np.float32)
    module = activations.Dice()
    variables = random_variables(module, jnp.asarray(x))
    alpha = np.float64(variables["params"]["alpha"])

    def expected(mean, var):
        share = 1 / (1 + np.exp(-(x - mean) / np.sqrt(var + 1e-5)))
        return x * share + alpha * x * (1 - share)

    out, _ = module.apply(variables, jnp.asarray(x), jnp.ones(5, bool), mutable=["batch_stats"])
    np.testing.assert_allclose(out, expected(x.mean(0), x.var(0)), rtol=1e-4, atol=1e-6)
    stats = jax.tree.map(np.asarray, variables["batch_stats"]["norm"])
    np.testing.assert_allclose(
        module.apply(variables, jnp.asarray(x)),
        expected(stats["mean"], stats["var"]),
        rtol=1e-4,
        atol=1e-6,
    )


def mlp(**fields):
    """An MLP of two layers through the configuration."""
    fields = {"hidden_units": (6, 4), "activation": "nn.Tanh", **fields}
    return match.build_mlp(tower_schema.MlpConfig(**fields))


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "layer norm": {"use_ln": True},
    "batch norm": {"use_bn": True},
    "Dice": {"activation": "Dice"},
    "batch norm and Dice": {"use_bn": True, "activation": "Dice"},
}


def test_parameters_of_every_option():
    x = jnp.ones((3, 5))
    names = {}
    for option, fields in OPTIONS.items():
        shapes = jax.eval_shape(mlp(**fields).init, jax.random.key(0), x)
        names[option] = {name: set(shapes["params"][name]) for name in shapes["params"]}
    linear = {"kernel", "bias"}
    assert names["plain"] == {"layers_0": linear, "layers_1": linear}
    assert names["no bias"] == {"layers_0": {"kernel"}, "layers_1": {"kernel"}}
    assert names["layer norm"]["norms_1"] == {"scale", "bias"}
    assert names["layer norm"]["layers_1"] == linear
    # Batch norm has a bias of its own, so the layers have none.
    assert names["batch norm"]["layers_1"] == {"kernel"}
    assert names["batch norm"]["norms_1"] == {"scale", "bias"}
    assert names["Dice"]["activations_0"] == {"alpha"}
    assert names["batch norm and Dice"]["normed_activations_0"] == {"alpha"}


@pytest.mark.parametrize("option", OPTIONS)
def test_layers_by_hand_in_evaluation(option):
    module = mlp(**OPTIONS[option])
    x = np.random.default_rng(3).standard_normal((4, 5)).astype(np.float32)
    variables = random_variables(module, jnp.asarray(x))
    params, stats = jax.tree.map(np.float64, (variables["params"], variables["batch_stats"]))
    expected = x.astype(np.float64)
    for index in range(2):
        layer, norm = params[f"layers_{index}"], params.get(f"norms_{index}")
        expected = expected @ layer["kernel"] + layer.get("bias", 0)
        if option == "layer norm":
            centred = expected - expected.mean(1, keepdims=True)
            spread = np.sqrt(expected.var(1, keepdims=True) + 1e-5)
            expected = centred / spread * norm["scale"] + norm["bias"]
        elif norm is not None:
            running = stats[f"norms_{index}"]
            expected = (expected - running["mean"]) / np.sqrt(running["var"] + 1e-5)
            expected = expected * norm["scale"] + norm["bias"]
        if "Dice" in option:
            name = f"activations_{index}" if norm is None else f"normed_activations_{index}"
            running = stats[name]["norm"]
            share = (expected - running["mean"]) / np.sqrt(running["var"] + 1e-5)
            share = 1 / (1 + np.exp(-share))
            expected = expected * share + params[name]["alpha"] * expected * (1 - share)
        else:
            expected = np.tanh(expected)
    np.testing.assert_allclose(
        module.apply(variables, jnp.asarray(x)), expected, rtol=2e-4, atol=2e-5
    )


@functools.partial(jax.jit, static_argnums=0)
def train(module, variables, x, numbers, key):
    """Output of a training batch whose rows have these numbers."""
    identity = dropout.TokenIdentity(user_index=numbers, position=numbers)
    rows = tower_mlp.TrainRows(mask=numbers >= 0, identity=identity, dropout_key=key)
    return module.apply(variables, x, rows)


def test_dropout_of_single_layers():
    x, numbers, key = jnp.ones((40, 5)), jnp.arange(40), jax.random.key(0)
    plain, last = mlp(), mlp(dropout_ratio=(0.0, 0.5))
    variables = random_variables(plain, x)
    kept, dropped = (train(module, variables, x, numbers, key) for module in (plain, last))
    is_zero = np.asarray(dropped == 0)
    assert 0.3 < is_zero.mean() < 0.7
    np.testing.assert_allclose(dropped[~is_zero], 2 * kept[~is_zero], rtol=1e-5)
    np.testing.assert_array_equal(last.apply(variables, x), plain.apply(variables, x))
    # One ratio counts for all layers: the same bits in the last, and others before it.
    both = train(mlp(dropout_ratio=(0.5,)), variables, x, numbers, key)
    np.testing.assert_array_equal(both == 0, is_zero)
    assert np.mean(np.asarray(both != dropped)[~is_zero]) > 0.9
    other = train(last, variables, x, numbers, jax.random.key(1))
    assert np.any(np.asarray(other == 0) != is_zero)
    # Bits belong to the row's identity, not to its place.
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(train(last, variables, x, numbers[order], key), dropped[order])
