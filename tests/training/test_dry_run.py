"""A dry run's figures are those of a real state and batch, and nothing is made or written."""

import contextlib
import dataclasses
import io
import os
import re
import subprocess
import sys
import types

import jax
import pytest

from configs import kuairand
from hstu_jax import cli, train
from hstu_jax.training import dry_run, loop, traced
from hstu_jax.training import run as run_lib
from tests.training.small_config import one_table_split


@pytest.fixture(scope="module")
def config(small_store, tmp_path_factory):
    return one_table_split(
        small_store, tmp_path_factory.mktemp("dry") / "workdir", train__dry_run=True
    )


@pytest.fixture(scope="module")
def run(config, small_store):
    return run_lib.build_run(config, small_store)


@pytest.fixture(scope="module")
def described(config, small_store):
    """What the command prints, and what it compiled; it makes no state and writes nothing."""
    found, compile_step = [], dry_run.compile_step

    def remember(run):
        found.append(compile_step(run))
        return found[0]

    def refuse(*arguments, **options):
        raise AssertionError("a dry run made a state")

    files, printed = sorted(small_store.path.rglob("*")), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(dry_run, "compile_step", remember)
        patch.setattr(run_lib, "init_state", refuse)
        patch.setattr(loop, "fit", refuse)
        train.main(config)
    assert sorted(small_store.path.rglob("*")) == files
    assert not os.path.exists(config.workdir)
    return printed.getvalue(), found[0]


@pytest.fixture
def compiled(described):
    return described[1]


def bytes_on_first_device(tree):
    """What arrays really take there."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def test_bytes_are_those_of_a_real_state_and_batch(run, compiled):
    state, batch = run_lib.init_state(run), run.put(run.pipeline.batch_at(0).batch)
    have, want = (jax.tree_util.tree_leaves_with_path(x) for x in (compiled.batch, batch))
    for (path, one), (other, real) in zip(have, want, strict=True):
        assert path == other and (one.shape, one.dtype) == (real.shape, real.dtype)
        assert one.sharding == real.sharding
    assert dry_run.per_device_bytes(compiled.state) == bytes_on_first_device(state)
    assert dry_run.per_device_bytes(compiled.batch) == bytes_on_first_device(batch)
    state_bytes = bytes_on_first_device(state)
    # XLA leaves out arrays of the batch that this configuration does not read.
    unread = state_bytes + bytes_on_first_device(batch) - compiled.arguments
    assert 0 <= unread < bytes_on_first_device(batch)
    assert compiled.reused == state_bytes  # the state is donated
    assert compiled.temporaries > 0
    assert compiled.total == compiled.arguments + compiled.temporaries + (
        compiled.results - compiled.reused
    )


def test_traced_and_compiled_programs_send_the_same(run, compiled):
    mesh = jax.sharding.AbstractMesh((1, 2), run.mesh.axis_names, axis_types=run.mesh.axis_types)
    found = traced.trace_step(run.program, run.pipeline, mesh=mesh, groups_per_device=1)
    for kind, tolerance in (("all-to-all", 0), ("all-reduce", 2e-3)):  # equal sums are joined
        sums = [
            sum(each.result_bytes for each in program.collectives if each.kind == kind)
            for program in (found, compiled)
        ]
        assert sums[0] == pytest.approx(sums[1], rel=tolerance) and sums[0] > 0
    assert sum(found.products.values()) > 0


@pytest.mark.long
def test_an_accumulating_step_sends_once_for_every_batch(config, small_store, compiled):
    """With updates batch by batch all of the exchange is in the loop; its trace says the same."""
    train = dict(gradient_accumulation_steps=3, gradient_accumulation_mode="sum")
    accumulating = with_train(config, **train, table_updates="batch")
    run = run_lib.build_run(accumulating, small_store)
    mesh = jax.sharding.AbstractMesh((1, 2), run.mesh.axis_names, axis_types=run.mesh.axis_types)
    one, found = exchanged(compiled), dry_run.compile_step(run)
    assert exchanged(found) == 3 * one > 0
    traced_step = traced.trace_step(run.program, run.pipeline, mesh=mesh, groups_per_device=1)
    assert exchanged(traced_step) == 3 * one
    assert found.exchange == compiled.exchange  # memory is used again


def exchanged(program):
    """Bytes that a device sends by all-to-all."""
    return sum(each.sent_bytes for each in program.collectives if each.kind == "all-to-all")


def test_the_trace_of_an_accumulating_step_sends_once_for_every_batch(config, small_store):
    sent = []
    for steps in (1, 3):
        options = dict(gradient_accumulation_steps=steps)
        if steps > 1:
            options |= dict(gradient_accumulation_mode="sum", table_updates="batch")
        run = run_lib.build_run(with_train(config, **options), small_store)
        axes = dict(axis_types=run.mesh.axis_types)
        mesh = jax.sharding.AbstractMesh((1, 2), run.mesh.axis_names, **axes)
        sent.append(
            exchanged(traced.trace_step(run.program, run.pipeline, mesh=mesh, groups_per_device=1))
        )
    assert sent[1] == 3 * sent[0] > 0


def test_the_command_prints_and_neither_allocates_nor_writes(described):
    text, _ = described
    assert "mesh {'host': 1, 'chip': 2}" in text
    assert re.search(r"video_id_emb +1,024 x 16, split over 2 devices, 512 rows on each: 32", text)
    assert re.search(r"user_id_emb +1,024 x 8, whole on each of 2 devices: 32.0 KiB", text)
    assert re.search(r"mlp/layers_0/kernel +16 x 16, whole on each of 2 devices: 1.0 KiB", text)
    assert re.search(r"\d all-to-all among 2 devices: each sends [\d,]+ bytes", text)
    assert re.search(r"\d all-reduce among 2 devices: each sends [\d,]+ bytes", text)
    for part in ("dense parameters", "optimizer state", "embedding tables", "batch", "temporaries"):
        assert re.search(rf"^ .*{part}.* [\d,]+  [\d.]+ (B|KiB|MiB)$", text, re.MULTILINE), part


@pytest.mark.long
def test_simulated_devices(small_store, tmp_path):
    """As a user asks for devices that are not there, with the encoder that compiles fastest."""
    command = [sys.executable, "-m", "hstu_jax.train", "--config=configs/kuairand.py"]
    command += [
        f"--config.data.path={small_store.path}",
        "--config.data.source=event_store",
        "--config.model.user_tower.encoder=mean",
        "--config.data.num_groups=4",
        "--config.mesh.replicated_table_bytes=1000000",
        "--config.train.dry_run",
        "--config.train.dry_run_devices=4",
        f"--workdir={tmp_path / 'workdir'}",
        f"--compilation_cache={tmp_path / 'cache'}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    assert "devices   4 x cpu (cpu), mesh {'host': 1, 'chip': 4}" in result.stdout
    assert "split over 4 devices, 4,096 rows on each" in result.stdout
    assert re.search(r"all-to-all among 4 devices", result.stdout)
    assert "simulated: compiled for CPUs" in result.stdout


def test_devices_are_simulated_before_jax_is_set_up(monkeypatch):
    raw, calls = kuairand.get_config("sample"), []
    raw.train.dry_run, raw.train.dry_run_devices = True, 4
    monkeypatch.setattr(cli, "CONFIG", types.SimpleNamespace(value=raw))
    monkeypatch.setattr(cli, "WORKDIR", types.SimpleNamespace(value=None))
    monkeypatch.setattr(cli.flags, "mark_flag_as_required", lambda name: None)
    monkeypatch.setattr(cli.app, "run", lambda program: program(["train"]))
    monkeypatch.setattr(cli, "simulate_devices", lambda count: calls.append(count))
    monkeypatch.setattr(cli, "refuse_launcher", lambda: None)
    monkeypatch.setattr(cli, "set_up_jax", lambda keeps_programs: calls.append(keeps_programs))
    cli.run_main(lambda config: calls.append("main"), has_dry_run=True)
    assert calls == [4, False, "main"]


def with_train(config, **options):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **options))


def test_refused(config, small_store, tmp_path):
    with pytest.raises(ValueError, match=r"dry_run_devices=8: JAX has 2 devices already; simulat"):
        dry_run.report(with_train(config, dry_run_devices=8), small_store)
    with pytest.raises(ValueError, match=r"dry_run_devices=8: must be .* read by a dry run only"):
        with_train(config, dry_run=False, dry_run_devices=8)
    with pytest.raises(ValueError, match=r"dry_run_devices=-1: must be a positive number"):
        with_train(config, dry_run_devices=-1)
    with pytest.raises(ValueError, match=r"train\.dry_run=True: does not train"):
        loop.fit(config, small_store)
    data = dataclasses.replace(config.data, source="sample", path=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"a dry run writes nothing; make it with `python"):
        cli.open_data(dataclasses.replace(config, data=data))
    assert not (tmp_path / "none").exists()


def test_only_training_has_one(monkeypatch, capsys):
    raw = kuairand.get_config("sample")
    raw.train.dry_run = True
    monkeypatch.setattr(cli, "CONFIG", types.SimpleNamespace(value=raw))
    monkeypatch.setattr(cli, "WORKDIR", types.SimpleNamespace(value=None))
    monkeypatch.setattr(cli.flags, "mark_flag_as_required", lambda name: None)
    monkeypatch.setattr(cli.app, "run", lambda program: program(["evaluate"]))
    monkeypatch.delenv("HSTU_JAX_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.run_main(lambda config: None)
    assert stopped.value.code == 2
    expected = "train.dry_run=True: only `python -m hstu_jax.train` has a dry run; leave it out."
    assert expected in capsys.readouterr().err
