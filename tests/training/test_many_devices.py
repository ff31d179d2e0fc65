"""Two, four and eight devices train like one; ids wait in the exchange and nothing else changes."""

import json

import pytest

from tests import devices

# Largest differences from one device: losses relative, parameters and tables absolute. Adam divides
# by the root of squares: where a gradient is near zero, rounding moves its step.
TOLERANCE = {"sgd": (1e-6, 1e-5), "adam": (1e-6, 5e-4)}


def check(store, workdir, tasks, *, num_devices):
    """Trains the tasks of `train_on_devices` and compares; returns the ids that waited in each."""
    printed = devices.run_on_devices(
        "tests.training.train_on_devices",
        store.path,
        workdir,
        *tasks,
        num_devices=num_devices,
        timeout_s=300 * len(tasks),
    )
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["task"] for line in lines] == list(tasks)
    for line in lines:
        loss, values = TOLERANCE[line["task"].partition(":")[0]]
        assert line["loss"] < loss
        assert line["params"] < values and line["tables"] < values
        assert line["last"] < line["first"] - 0.05  # something was learned
    return [line["waited"] for line in lines]


def test_two_and_four_devices_train_like_one(small_store, tmp_path):
    waited = check(small_store, tmp_path, ["sgd:2x2:0.02:0", "sgd:1x2:1.25:100000"], num_devices=4)
    assert waited[0] > 100 and waited[1] == 0


@pytest.mark.long
def test_eight_devices_train_like_one(small_store, tmp_path):
    meshes = ("1x8:1.25:0", "2x4:1.25:0", "2x4:0.02:0", "8x1:1.25:100000")
    tasks = [f"{kind}:{mesh}" for kind in ("sgd", "adam") for mesh in meshes]
    waited = check(small_store, tmp_path, tasks, num_devices=8)
    assert [count > 0 for count in waited] == [False, False, True, False] * 2
