"""Two real processes on this machine train, evaluate and save like one, and stop together."""

import json
import pathlib
import signal

import jax
import numpy as np
import pytest

from hstu_jax.config import resolve
from hstu_jax.data import sample, sample_world
from hstu_jax.training import closing, loop
from hstu_jax.training import processes as processes_lib
from tests import devices, processes
from tests.training import processes_config

CONFIG = "tests/training/processes_config.py"
START_S = 400  # for imports and compilations on a machine that does other things too
TIMING = ("_s", "_share")  # figures of the clock


def config_of(store, workdir, **changes):
    """The configuration of the processes, as this process resolves it."""
    raw = processes_config.get_config(str(store.path))
    raw.workdir = str(workdir)
    for path, value in changes.items():
        raw.update_from_flattened_dict({path.replace("__", "."): value})
    return resolve.resolve(raw)


def command(store, workdir, *arguments):
    return ("hstu_jax.train", f"--config={CONFIG}:{store.path}", f"--workdir={workdir}", *arguments)


def logged(workdir, kind="train"):
    """Lines of the metric log: (step, figures without those of the clock)."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    found = []
    for line in map(json.loads, lines):
        step, name = line.pop("step"), line.pop("kind")
        if name == kind:
            found.append((step, {k: v for k, v in line.items() if not k.endswith(TIMING)}))
    return found


def assert_same_figures(got, wanted, *, rtol=1e-6):
    assert [step for step, _ in got] == [step for step, _ in wanted]
    for (_, one), (_, other) in zip(got, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=rtol, err_msg=name)


def kill_in_the_middle(store, workdir, folder, *, num_devices=1):
    """Two processes that are killed when five steps are logged; the last step logged and saved."""
    endless = ("--config.train.num_steps=100000",)
    with processes.running(
        *command(store, workdir, *endless),
        folder=folder,
        num_processes=2,
        num_devices=num_devices,
    ) as two:
        log = pathlib.Path(workdir) / "metrics.jsonl"
        two.wait_until(lambda: log.exists() and log.read_text().count("\n") >= 5, START_S)
        for one in two.running:
            one.send_signal(signal.SIGKILL)
        assert two.wait(10) == [-signal.SIGKILL] * 2
        first, second = two.texts()
    assert "step      3/" in first and "step      3/" not in second  # printed once
    saved = [
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()
    ]
    assert saved
    return logged(workdir)[-1][0], max(saved)


def closing_figures(result):
    """The table of evaluation of a run, as `train` writes it."""
    table = closing.evaluate_beside_baselines(result.run, result.state, train_mean=False, echo=str)
    return table.figures()


def assert_same_tables(got, wanted):
    assert list(got) == list(wanted) != []
    for name, figures in wanted.items():
        assert got[name].keys() == figures.keys()
        for metric, value in figures.items():
            np.testing.assert_allclose(got[name][metric], value, rtol=1e-5, err_msg=metric)


def test_two_killed_processes_go_on_in_one(small_store, tmp_path):
    last, saved = kill_in_the_middle(small_store, tmp_path / "stopped", tmp_path / "printed")
    steps = {"train__num_steps": last + 4}
    one = dict(devices=jax.devices()[:1], echo=str)
    config = config_of(small_store, tmp_path / "stopped", **steps)
    lines = []
    resumed = loop.fit(config, small_store, devices=jax.devices()[:1], echo=lines.append)
    assert f"resumed   from {config.workdir}/checkpoints/{saved}" in lines
    straight = config_of(small_store, tmp_path / "straight", **steps)
    straight_result = loop.fit(straight, small_store, **one)
    # Every step is logged once, whoever took it.
    assert [step for step, _ in logged(config.workdir)] == list(range(1, last + 5))
    assert_same_figures(logged(config.workdir), logged(straight.workdir))
    assert_same_tables(closing_figures(resumed), closing_figures(straight_result))


@pytest.mark.long
def test_two_processes_of_two_devices_train_and_evaluate_like_one(small_store, tmp_path):
    options = ("--config.eval.every_num_steps=4", "--config.train.keep_best.metric=recall@50")
    options += ("--config.model.user_tower.encoder=hstu", "--config.mesh.host=-1")
    changes = {
        "eval__every_num_steps": 4,
        "train__keep_best__metric": "recall@50",
        "model__user_tower__encoder": "hstu",
    }
    with processes.running(
        *command(small_store, tmp_path / "two", *options, "--config.eval.baselines=True"),
        folder=tmp_path / "printed",
        num_processes=2,
        num_devices=2,
    ) as two:
        assert two.wait(2 * START_S) == [0, 0], two.texts()
        first, second = two.texts()
    assert "mesh {'host': 2, 'chip': 2}" in first
    assert second.count("step ") == second.count("recall") == 0
    straight = config_of(small_store, tmp_path / "one", eval__baselines=True, **changes)
    result = loop.fit(straight, small_store, devices=jax.devices()[:1], echo=str)
    for kind, count in (("train", 6), ("validation", 2)):
        assert len(logged(straight.workdir, kind)) == count
        assert_same_figures(
            logged(tmp_path / "two", kind), logged(straight.workdir, kind), rtol=1e-5
        )
    table = closing.evaluate_beside_baselines(
        result.run, result.state, train_mean=True, beside_best=True, echo=str
    )
    written = json.loads((tmp_path / "two" / "closing_test.json").read_text())
    assert list(written["figures"]) == list(table.rows)
    for name, figures in table.figures().items():
        for metric, value in figures.items():
            np.testing.assert_allclose(written["figures"][name][metric], value, rtol=1e-5)
    assert (tmp_path / "two" / "closing_ranks_test.npz").is_file()
    # `evaluate` of the same checkpoint, in two processes again.
    arguments = command(small_store, tmp_path / "two", *options, f"--output={tmp_path}/again.json")
    with processes.running(
        "hstu_jax.evaluate", *arguments[1:], folder=tmp_path / "again", num_processes=2
    ) as two:
        assert two.wait(2 * START_S) == [0, 0], two.texts()
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["figures"]["hstu"] == pytest.approx(written["figures"]["hstu"], rel=1e-6)


@pytest.mark.long
def test_two_killed_processes_go_on_with_four_devices(small_store, tmp_path):
    workdir = tmp_path / "stopped"
    last, saved = kill_in_the_middle(small_store, workdir, tmp_path / "printed", num_devices=2)
    steps = f"--config.train.num_steps={last + 4}"
    text = devices.run_on_devices(
        *command(small_store, workdir, steps), num_devices=4, timeout_s=START_S
    )
    assert f"resumed   from {workdir}/checkpoints/{saved}\n" in text
    straight = config_of(small_store, tmp_path / "straight", train__num_steps=last + 4)
    result = loop.fit(straight, small_store, devices=jax.devices()[:1], echo=str)
    assert_same_figures(logged(workdir), logged(straight.workdir))
    written = json.loads((workdir / "closing_test.json").read_text())
    assert_same_tables(written["figures"], closing_figures(result))


@pytest.mark.long
def test_tables_and_groups_without_rows_do_not_hang(tmp_path):
    # One window in the last batch of an epoch: of four groups in four processes three are empty.
    options = sample_world.SampleOptions(num_users=32, num_items=1_000, num_days=3)
    store = sample.prepare(tmp_path / "tiny", options=options)
    steps = ("--config.train.num_steps=0", "--config.train.num_epochs=3")
    with processes.running(
        *command(store, tmp_path / "four", *steps, "--config.data.batch_size=16"),
        folder=tmp_path / "printed",
        num_processes=4,
    ) as four:
        assert four.wait(2 * START_S) == [0] * 4, four.texts()
    changes = {"train__num_steps": 0, "train__num_epochs": 3, "data__batch_size": 16}
    straight = config_of(store, tmp_path / "one", **changes)
    result = loop.fit(straight, store, devices=jax.devices()[:1], echo=str)
    batches = [result.run.pipeline.batch_at(step).batch for step in range(result.run.num_steps)]
    used = np.array([batch.user_mask.any(axis=1) for batch in batches])
    assert (~used).any() and used.any(axis=1).all()
    assert_same_figures(logged(tmp_path / "four"), logged(straight.workdir))


@pytest.mark.long
def test_processes_that_differ_are_named(small_store, tmp_path):
    other = sample_world.SampleOptions(num_users=150, num_items=1_000, num_days=4, seed=7)
    other_store = sample.prepare(tmp_path / "other", options=other)
    apart = {
        "--config.seed=5": r"configuration of process 1 (",
        f"--config.data.path={other_store.path}": "data (fingerprint) of process 1 (",
        # Only one of them fails; the other one would wait for it.
        "--config.data.path=no/where": "data.path='no/where': no such folder; make it with",
    }
    for number, (argument, message) in enumerate(apart.items()):
        with processes.running(
            *command(small_store, tmp_path / "run"),
            folder=tmp_path / f"printed{number}",
            num_processes=2,
            only_in=[(), (argument,)],
        ) as two:
            assert two.wait(START_S) == [2, 2], two.texts()
            assert all(message in text for text in two.texts()), two.texts()
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_other_in_bounded_time(small_store, tmp_path, victim):
    options = ("--config.train.num_steps=100000", "--heartbeat_timeout_s=5")
    with processes.running(
        *command(small_store, tmp_path / "run", *options),
        folder=tmp_path / "printed",
        num_processes=2,
    ) as two:
        log = tmp_path / "run" / "metrics.jsonl"
        two.wait_until(lambda: log.exists() and log.read_text().count("\n") >= 3, START_S)
        two.running[victim].kill()
        other = two.running[1 - victim]
        assert other.wait(30) != 0
        text = two.texts()[1 - victim]
    # By JAX's own thread, or by the collective that fails.
    assert "another task died" in text or "another process is lost" in text
    named = "tasks are unhealthy (stopped sending heartbeats):\n1" if victim else "leader task"
    assert named in text
    # The stacks of some hundred threads would bury it; Orbax may add its own trace of a checkpoint.
    assert "most recent call first" not in text


@pytest.mark.long
def test_processes_that_do_not_come_are_waited_for_in_bounded_time(small_store, tmp_path):
    with processes.running(
        *command(small_store, tmp_path / "run", "--initialization_timeout_s=3"),
        folder=tmp_path / "printed",
        num_processes=3,
        only_in=[(), ()],
    ) as two:
        assert two.wait(START_S) == [2, 2]
        for text in two.texts():
            assert "not all processes came within 3 s; see that every one is started" in text
    assert not (tmp_path / "run").exists()


def test_what_differs_is_shown_beside_the_first_process():
    texts = ["seed = 0\nworkdir = 'a'", "seed = 0\nworkdir = 'a'", "seed = 1\nworkdir = 'a'"]
    (line,) = processes_lib.difference("configuration", texts, ["x", "y", "z"])
    assert line == (
        "configuration of process 2 (z) differs from that of process 0 (x): seed=1, not 0"
    )
    (line,) = processes_lib.difference("version of jax", ["1", "2", "2"], ["x", "y", "z"])
    assert line.endswith("process 1 (y), 2 (z) differs from that of process 0 (x): '2', not '1'")
    assert processes_lib.difference("seed", ["0", "0"], ["x", "y"]) == []


def test_one_process_waits_for_nobody(tmp_path):
    assert (processes_lib.count(), processes_lib.index()) == (1, 0)
    assert processes_lib.exchange("anything", "mine") == ("mine",)
    processes_lib.agree("start", {"configuration": "x"})
    processes_lib.check_shared(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
