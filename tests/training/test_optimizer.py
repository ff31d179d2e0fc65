"""Dense optimizers against torch's recorded 20 steps, and which part takes which parameter."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hstu_jax.config import train_schema
from hstu_jax.training import optimizer, schedules

RECORD = json.loads((pathlib.Path(__file__).parent / "torch_optimizers.json").read_text())
RUN = schedules.RunLength(num_steps=20)


def arrays(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), tree, is_leaf=lambda x: isinstance(x, list)
    )


def config_of(case):
    options = {k: v for k, v in case["options"].items() if k != "betas"}
    if "betas" in case["options"]:
        options["beta1"], options["beta2"] = case["options"]["betas"]
    return train_schema.DenseOptimizerConfig(kind=case["kind"].lower(), **options)


def train(config, start, gradients):
    """Parameters after every step."""
    transform = optimizer.dense_optimizer(config, run=RUN)
    params = start
    state = transform.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
        yield params


@pytest.mark.parametrize("name", RECORD["cases"])
def test_twenty_steps_equal_torch(name):
    case = RECORD["cases"][name]
    gradients = [arrays(step) for step in RECORD["gradients"]]
    steps = enumerate(train(config_of(case), arrays(RECORD["start"]), gradients), start=1)
    checked = 0
    for number, params in steps:
        if str(number) in case["snapshots"]:
            want = case["snapshots"][str(number)]
            for key, value in params.items():
                np.testing.assert_allclose(value, want[key], rtol=1e-5, atol=1e-6, err_msg=key)
            checked += 1
    assert checked == 4


def test_the_cases_tell_the_options_apart():
    """No two cases end alike, so an option that is not read cannot pass."""
    ends = [np.ravel(case["snapshots"]["20"]["vector"]) for case in RECORD["cases"].values()]
    for number, end in enumerate(ends):
        for other in ends[:number]:
            assert np.abs(end - other).max() > 1e-3
    kinds = {case["kind"].lower() for case in RECORD["cases"].values()}
    assert kinds == set(train_schema.OptimizerConfig.__annotations__["kind"].__args__)


PARAMS = {
    "user_tower": {
        "encoder": {"stack": {"layers_0": {"uvqk_kernel": jnp.ones(2), "uvqk_bias": jnp.ones(1)}}}
    },
    "item_tower": {"output": {"kernel": jnp.ones(3)}},
}


def part(pattern, **options):
    return train_schema.PartOptimizerConfig(regex_pattern=pattern, **options)


def test_the_first_pattern_that_matches_the_whole_name_takes_a_parameter():
    labels = optimizer.part_labels(
        PARAMS,
        patterns=(
            r"user_tower\._hstu_encoder\._stu_module\._stu_layers\.0\._uvqk_weight",
            r"user_tower/.*",
            r"item_tower\.output\.weight",
        ),
    )
    layer = labels["user_tower"]["encoder"]["stack"]["layers_0"]
    assert layer == {"uvqk_kernel": "part0", "uvqk_bias": "part1"}
    assert labels["item_tower"]["output"]["kernel"] == "part2"
    # A pattern that matches the beginning only takes nothing.
    with pytest.raises(ValueError, match=r"takes no parameter .* item_tower/output/kernel, user"):
        optimizer.part_labels(PARAMS, patterns=(r"item_tower/output/k",))


def test_a_part_that_others_leave_nothing_is_an_error():
    config = train_schema.DenseOptimizerConfig(
        part_optimizers=(part(".*"), part("item_tower/.*", kind="sgd"))
    )
    expected = r"part_optimizers\[1\]\.regex_pattern='item_tower/\.\*': takes no parameter"
    with pytest.raises(ValueError, match=expected):
        optimizer.dense_optimizer(config, run=RUN).init(PARAMS)


def test_parts_have_their_own_optimizer_and_schedule():
    decay = train_schema.LearningRateConfig(schedule="exponential_decay", decay_size=1)
    halve = train_schema.LearningRateConfig(
        schedule="exponential_decay", decay_size=1, decay_factor=0.5
    )
    config = train_schema.DenseOptimizerConfig(
        kind="sgd",
        lr=1.0,
        momentum=0.0,
        learning_rate=decay,
        part_optimizers=(
            part("item_tower/.*", kind="sgd", lr=0.1, momentum=0.0),
            part(".*bias", kind="sgd", lr=0.1, momentum=0.0, learning_rate=halve),
        ),
    )
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    *_, after = train(config, PARAMS, [ones] * 3)
    layer = after["user_tower"]["encoder"]["stack"]["layers_0"]
    decayed = 1 + 0.95 + 0.95**2
    np.testing.assert_allclose(layer["uvqk_kernel"], 1 - decayed, rtol=1e-5)
    np.testing.assert_allclose(layer["uvqk_bias"], 1 - 0.1 * 1.75, rtol=1e-6)
    # Without a schedule of its own a part follows the others', from its own base rate.
    np.testing.assert_allclose(
        after["item_tower"]["output"]["kernel"], 1 - 0.1 * decayed, rtol=1e-6
    )
