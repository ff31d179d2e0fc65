"""`fit`: a stopped run goes on bit for bit, refuses what does not fit, and stops on a bad loss."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from hstu_jax.training import checkpoint, loop
from tests.training.small_config import small_config


def fit(config, store):
    lines = []
    result = loop.fit(config, store, devices=jax.devices()[:1], echo=lines.append)
    return result, "\n".join(lines)


def with_steps(config, num_steps):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=num_steps))


def metric_lines(config):
    with open(f"{config.workdir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def logged(config):
    lines = metric_lines(config)
    rates = ("per_s", "data_wait_share")
    return [{k: v for k, v in line.items() if not k.endswith(rates)} for line in lines]


@pytest.fixture(scope="module")
def straight(small_store, tmp_path_factory):
    config = small_config(small_store, tmp_path_factory.mktemp("straight"))
    return config, *fit(config, small_store)


def test_resuming_gives_the_run_that_was_never_stopped(straight, small_store, tmp_path):
    config, result, text = straight
    assert result.num_compilations == 1
    assert "step      6/6" in text
    stopped = dataclasses.replace(config, workdir=str(tmp_path))

    class Killed(Exception):
        pass

    def echo(line):
        # The log line of step 4: step 3 is saved, step 4 is not.
        if "step      4/6" in line:
            raise Killed

    with pytest.raises(Killed):
        loop.fit(stopped, small_store, devices=jax.devices()[:1], echo=echo)
    resumed, text = fit(stopped, small_store)
    assert f"resumed   from {tmp_path}/checkpoints/3" in text
    for got, want in zip(*map(jax.tree.leaves, (resumed.state, result.state)), strict=True):
        np.testing.assert_array_equal(got, want)
    # The log too, but for the rates: step 4's line spans the stop.
    assert logged(stopped) == logged(config)


def test_a_finished_run_trains_no_further(straight, small_store):
    config, result, _ = straight
    again, text = fit(config, small_store)
    assert "nothing to train" in text
    for got, want in zip(*map(jax.tree.leaves, (again.state, result.state)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_another_configuration_is_refused(straight, small_store):
    config, _, _ = straight
    model = dataclasses.replace(config.model, temperature=0.2)
    expected = r"another configuration \(model\.temperature: 0\.15 -> 0\.2\); use another workdir"
    with pytest.raises(ValueError, match=expected):
        fit(dataclasses.replace(config, model=model), small_store)


def test_other_data_is_refused(straight):
    config, result, _ = straight
    record = result.run.record()
    other = dataclasses.replace(record, data_fingerprint="another")
    with pytest.raises(ValueError, match="was trained on other data"):
        checkpoint.check_resumable(record, other, where="here")


def test_restore_gives_the_trained_state(straight, small_store):
    config, result, _ = straight
    restored = loop.restore(config, small_store, devices=jax.devices()[:1])
    for got, want in zip(*map(jax.tree.leaves, (restored.state, result.state)), strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5; there are \[3, 6\]"):
        loop.restore(config, small_store, step=5, devices=jax.devices()[:1])


def test_restore_without_a_run_names_the_command(small_store, tmp_path):
    config = small_config(small_store, tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"train first with `python -m hstu_jax\.train"):
        loop.restore(config, small_store, devices=jax.devices()[:1])


def test_a_checkpoint_restores_onto_more_devices(small_store, tmp_path):
    config = with_steps(small_config(small_store, tmp_path, data__num_groups=2), 2)
    result, _ = fit(config, small_store)
    restored = loop.restore(config, small_store, devices=jax.devices()[:2])
    assert restored.run.mesh.size == 2
    for got, want in zip(*map(jax.tree.leaves, (restored.state, result.state)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_loss_that_is_not_finite_stops_the_run(small_store, tmp_path):
    config = small_config(
        small_store, tmp_path, train__dense_optimizer__lr=1e30, train__sparse_optimizer__lr=1e30
    )
    with pytest.raises(
        FloatingPointError, match=r"step \d: the loss sum is .* not finite; .*Lower"
    ):
        fit(config, small_store)


def test_a_mismatched_array_is_named(straight, small_store):
    config, result, _ = straight
    checkpointer = result.run.checkpointer(read_only=True)
    params = {**result.state.params, "extra": np.zeros(3, np.float32)}
    other = dataclasses.replace(result.state, params=jax.device_put(params))
    with pytest.raises(ValueError, match="the checkpoint has no array 'params/extra'"):
        checkpointer.restore(6, other)
    checkpointer.close()
