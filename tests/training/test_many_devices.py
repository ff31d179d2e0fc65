"""Two, four and eight devices train like one; ids wait in the exchange and nothing else changes."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

from hstu_jax.model import feature_lookup
from hstu_jax.training import partition, schedules, step
from hstu_jax.training import run as run_lib
from tests import devices
from tests.training.small_config import small_config, with_two_tables

# Largest differences from one device: losses relative, parameters and tables absolute. Adam divides
# by the root of squares: where a gradient is near zero, rounding moves its step.
TOLERANCE = {"sgd": (1e-6, 1e-5), "adam": (1e-6, 5e-4)}


def run_tasks(store, workdir, tasks, *, num_devices):
    """What `train_on_devices` prints of its tasks."""
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
    return lines


def check(store, workdir, tasks, *, num_devices):
    """Trains the tasks of `train_on_devices` and compares; returns the ids that waited in each."""
    lines = run_tasks(store, workdir, tasks, num_devices=num_devices)
    for line in lines:
        loss, values = TOLERANCE[line["task"].partition(":")[0]]
        assert line["loss"] < loss
        assert line["params"] < values and line["tables"] < values
        assert line["moved"] > 5 * values  # so that being close to one device says something
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


@pytest.mark.long
def test_filled_places_alone_train_to_the_same_bits(small_store, tmp_path):
    tasks = ["ragged:2x2:0.02", "ragged:1x4:1.25"]
    tight, wide = run_tasks(small_store, tmp_path, tasks, num_devices=4)
    for line in (tight, wide):
        assert line["loss"] == line["params"] == line["tables"] == 0.0 < line["moved"]
    assert tight["waited"] > 100 and wide["waited"] == 0


@pytest.mark.long
def test_compiled_steps_move_no_table_and_grow_with_nothing_but_the_batch(small_store, tmp_path):
    meshes = ("1x2:2000000", "1x2:4000000", "1x4:2000000", "1x8:2000000", "2x4:2000000")
    tasks = [*(f"compiled:{mesh}" for mesh in meshes), "shared:1x4:2000000"]
    *lines, shared = run_tasks(small_store, tmp_path, tasks, num_devices=8)
    assert list(shared["sent"]) == ["all-gather", "all-reduce", "all-to-all", "reduce-scatter"]
    # Vectors of 16 float32, one id and log q of the 900 negatives of four groups.
    assert shared["gathered_bytes"] == 4 * 900 * (16 + 2) * 4
    for line in lines:
        assert list(line["sent"]) == ["all-reduce", "all-to-all"]
        assert line["alias_bytes"] > line["table_bytes"] > 40e6
        assert line["temp_bytes"] < 0.05 * line["table_bytes"]
        assert line["largest_bytes"] < 0.01 * line["table_bytes"]
        # What `benchmark scaling` counts; XLA joins sums that are equal.
        assert line["traced"]["all-to-all"] == line["sent"]["all-to-all"]
        assert line["traced"]["all-reduce"] == pytest.approx(line["sent"]["all-reduce"], rel=2e-3)
    two, of_more_rows, *more = lines
    assert of_more_rows["table_bytes"] > 1.9 * two["table_bytes"]
    assert of_more_rows["temp_bytes"] < 1.001 * two["temp_bytes"]
    assert of_more_rows["sent"] == two["sent"]
    for line, share in zip(more, (3 / 4, 7 / 8, 3 / 4 + 1 / 2), strict=True):
        assert line["temp_bytes"] < 1.25 * two["temp_bytes"]
        # (n - 1) / n of all buckets leave a device, in two levels once in each.
        assert line["sent"]["all-to-all"] / share <= 1.01 * two["sent"]["all-to-all"] / (1 / 2)
        assert line["sent"]["all-reduce"] < 2 * two["sent"]["all-reduce"]


def sent_shapes(config):
    """Shapes of what a step's exchange sends on 2 hosts of 2 chips, by mesh axis, as traced."""
    program = step.make_program(config, run_length=schedules.RunLength(num_steps=1))

    def local(state, ids):
        table_ids = {
            spec.name: feature_lookup.TableIds(ids=ids, valid=ids >= 0) for spec in program.specs
        }
        unique, picked, _ = step.fetch(program, state, table_ids)
        rows = {table: (unique[table], picked[table]) for table in unique}
        zero = jnp.int32(0)
        return step.update_tables(program, state.tables, rows, step=zero, iteration=zero)

    auto = (jax.sharding.AxisType.Auto,) * 2
    mapped = jax.shard_map(
        local,
        mesh=jax.sharding.AbstractMesh((2, 2), partition.AXES, axis_types=auto),
        in_specs=(partition.STATE_SPEC, partition.SPLIT),
        out_specs=partition.SPLIT,
        check_vma=False,
    )
    ids = jax.ShapeDtypeStruct((4 * 2000,), jnp.int32)
    text = str(jax.make_jaxpr(mapped)(run_lib.state_shapes(config), ids))
    found = {axis: set() for axis in partition.AXES}
    for shape, axis in re.findall(r":(\S+) = all_to_all\[[^\]]*?axis_name=\('(\w+)',\)", text):
        found[axis].add(shape)
    return found


def test_room_within_and_between_hosts_sets_what_is_sent(small_store, tmp_path):
    config = with_two_tables(small_config(small_store, tmp_path))
    shapes = {}
    for name, within, between in (("wide", 1.25, 1.25), ("within", 0.1, 1.25), ("b", 1.25, 0.1)):
        mesh = dataclasses.replace(
            config.mesh, host=2, chip=2, exchange_slack=within, host_exchange_slack=between
        )
        shapes[name] = sent_shapes(dataclasses.replace(config, mesh=mesh))
    # Of 1,024 rows a column of owners has 512, an owner 256; half of a tenth of 1,024 ids is 52.
    assert shapes["wide"]["chip"] >= {"i32[2,512]", "f32[2,512,16]", "f32[2,512,8]"}
    assert shapes["wide"]["host"] >= {"i32[2,256]", "f32[2,256,16]", "f32[2,256,8]"}
    assert "i32[2,52]" in shapes["within"]["chip"] & shapes["b"]["host"]
    assert shapes["b"]["chip"] == shapes["wide"]["chip"] != shapes["within"]["chip"]
    assert shapes["b"]["host"] != shapes["wide"]["host"]
