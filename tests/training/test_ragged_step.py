"""A training step whose exchange sends filled places alone: what it holds, and what is said of it.

CPUs have no such exchange, so the step is traced and lowered for GPUs. What it gives is in
`tests/tables/test_exchange_ragged.py` and, over many steps, in `test_many_devices.py`.
"""

import dataclasses
import re

import jax
import pytest

from hstu_jax.training import collectives, dry_run, partition, scaling, traced
from hstu_jax.training import run as run_lib
from tests.training.small_config import one_table_split


def with_exchange(config, exchange):
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, exchange=exchange))


@pytest.fixture(scope="module")
def config(small_store, tmp_path_factory):
    return one_table_split(small_store, tmp_path_factory.mktemp("ragged") / "workdir")


@pytest.fixture(scope="module")
def run(config, small_store):
    """A run that asks for it, as on GPUs or TPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "is_ragged", lambda config, mesh: True)
        return run_lib.build_run(with_exchange(config, "ragged"), small_store)


@pytest.fixture(scope="module")
def lowered(run):
    """Collectives of its step, lowered for GPUs."""
    batch = run_lib.abstract_batch(
        run.pipeline, num_groups=2, sharding=partition.split_sharding(run.mesh)
    )
    step = run.train_step.trace(run_lib.abstract_state(run), batch)
    text = step.lower(lowering_platforms=("cuda",)).as_text("hlo")
    return collectives.read(text.replace("\n", ", num_partitions=2\n", 1))


def of_kind(kind, found):
    """Bytes of what all collectives of a kind bring, one by one."""
    return sorted(each.result_bytes for each in found if each.kind == kind)


def test_the_mesh_decides_what_a_runs_steps_send(run, config, small_store):
    assert run.program.is_ragged
    banner = run_lib.describe(run, run_lib.abstract_state(run))
    said = "exchange of ids and rows: sends {}; mesh.exchange="
    assert said.format("filled places only (ragged)") + "'ragged'" in banner
    padded = run_lib.build_run(config, small_store)
    assert not padded.program.is_ragged
    banner = run_lib.describe(padded, run_lib.abstract_state(padded))
    assert said.format("whole buckets (padded)") + "'auto'" in banner
    with pytest.raises(ValueError, match=r"mesh\.exchange='ragged': CPUs, simulated ones too"):
        run_lib.build_run(with_exchange(config, "ragged"), small_store)


@pytest.mark.parametrize(("exchange", "widths"), [("auto", {128, 256}), ("ragged", {64, 128, 256})])
def test_auto_takes_widths_of_whole_tpu_lanes(run, exchange, widths):
    program = dataclasses.replace(run.program, config=with_exchange(run.config, exchange))
    specs = [
        dataclasses.replace(program.specs[0], name=str(dim), dim=dim) for dim in (64, 128, 256)
    ]
    program = dataclasses.replace(program, specs=tuple(specs))
    assert {spec.dim for spec in specs if program.sends_filled(spec.name)} == widths
    padded = dataclasses.replace(program, is_ragged=False)
    assert not any(padded.sends_filled(spec.name) for spec in specs)


def test_one_device_says_nothing_of_an_exchange(config, small_store):
    run = run_lib.build_run(config, small_store, devices=jax.devices()[:1])
    assert "exchange" not in run_lib.describe(run, run_lib.abstract_state(run))


def test_traced_and_lowered_steps_send_the_same(run, lowered):
    mesh = jax.sharding.AbstractMesh((1, 2), run.mesh.axis_names, axis_types=run.mesh.axis_types)
    found = traced.trace_step(run.program, run.pipeline, mesh=mesh, groups_per_device=1)
    rooms = of_kind("ragged-all-to-all", lowered)
    assert rooms == of_kind("ragged-all-to-all", found.collectives)
    assert len(rooms) == 2  # rows to fetch, gradients to update
    whole = of_kind("all-to-all", lowered)
    assert whole == of_kind("all-to-all", found.collectives)
    # Where a round's part begins and how long it is, for two devices; and the ids.
    assert whole[:2] == [16, 16] and len(whole) == 4


def test_a_dry_run_says_at_most(run, lowered, config, small_store, monkeypatch):
    batch = run_lib.abstract_batch(
        run.pipeline, num_groups=2, sharding=partition.split_sharding(run.mesh)
    )
    sizes = dict(arguments=0, results=0, reused=0, temporaries=0)
    step = dry_run.DryRun(run_lib.abstract_state(run), batch, **sizes, collectives=lowered)
    monkeypatch.setattr(dry_run, "compile_step", lambda run: step)
    text = dry_run.report(config, small_store)
    assert re.search(
        r"2 ragged-all-to-all among 2 devices: each sends on average at most [\d,]+ bytes", text
    )
    assert re.search(r" 4 all-to-all among 2 devices: each sends [\d,]+ bytes", text)
    assert re.search(r"each device sends on average at most [\d,]+ bytes in all", text)
    assert "room for what all-to-all brings; it is sent from where it lies" in text


@pytest.mark.long
def test_the_model_of_many_devices_counts_the_room(config, small_store, monkeypatch):
    one = dataclasses.replace(config, data=dataclasses.replace(config.data, num_groups=1))
    tower = dataclasses.replace(one.model.user_tower, encoder="hstu")
    one = dataclasses.replace(one, model=dataclasses.replace(one.model, user_tower=tower))
    seen, trace_step = [], traced.trace_step

    def remember(*arguments, **options):
        seen.append(trace_step(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(traced, "trace_step", remember)
    text = scaling.report(with_exchange(one, "ragged"), small_store, devices=(2,))
    assert "mesh.exchange='ragged': filled places only are sent, on average over the dev" in text
    assert len(of_kind("ragged-all-to-all", seen[0].collectives)) >= 2
