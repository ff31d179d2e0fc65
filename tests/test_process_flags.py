"""Flags of several processes: what is refused, and that nothing is started for one."""

import pytest
from absl import flags
from absl.testing import flagsaver

from configs import kuairand
from hstu_jax import cli, evaluate, process_flags
from hstu_jax.config import resolve
from hstu_jax.training import processes
from tests.test_launchers import MPI, SLURM

CONFIG = resolve.resolve(kuairand.get_config("sample"))


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """What `processes.start` was called with; none of the calls starts anything."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    for name in {**SLURM, **MPI}:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(processes, "start", lambda **options: calls.append(options))
    return calls


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_processes": 2},
            r"--num_processes=2: needs --coordinator_address and --process_id too; give all three",
        ),
        (
            {"coordinator_address": "host", "num_processes": 2, "process_id": 0},
            r"--coordinator_address=host: must be host:port",
        ),
        (
            {"coordinator_address": "host:9", "num_processes": 2, "process_id": 2},
            r"--process_id=2: must be from 0 to --num_processes=2 less 1",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(values, message, started):
    with flagsaver.flagsaver(**values), pytest.raises(ValueError, match=message):
        process_flags.start(CONFIG)
    assert started == []


def test_a_plain_run_and_a_run_of_one_start_nothing(started):
    process_flags.start(CONFIG)
    with flagsaver.flagsaver(coordinator_address="host:9", num_processes=1, process_id=0):
        process_flags.start(CONFIG)
    assert started == []


def test_flags_and_launchers_reach_jax(started, monkeypatch):
    values = {"coordinator_address": "host:9", "num_processes": 2, "process_id": 1}
    with flagsaver.flagsaver(**values, heartbeat_timeout_s=7):
        process_flags.start(CONFIG)
    assert started.pop() == {
        **values,
        "initialization_timeout_s": 300,
        "heartbeat_timeout_s": 7,
    }
    for name, value in {**SLURM, "CUDA_VISIBLE_DEVICES": "3"}.items():
        monkeypatch.setenv(name, value)
    process_flags.start(CONFIG)
    assert started.pop()["local_device_ids"] == (0,)
    with flagsaver.flagsaver(launcher="none"):
        process_flags.start(CONFIG)
    assert started == []
    monkeypatch.delenv("SLURM_JOB_ID")
    with flagsaver.flagsaver(launcher="jax"):
        process_flags.start(CONFIG)
    assert started.pop()["local_device_ids"] is None


def test_open_mpi_5_is_given_the_flags(started, monkeypatch):
    for name, value in MPI.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"--num_processes=4 --process_id=\$OMPI_COMM_WORLD_RANK'`, where HOST"
    ):
        process_flags.start(CONFIG)
    assert started == []
    values = {"coordinator_address": "host:9", "num_processes": 4, "process_id": 1}
    with flagsaver.flagsaver(**values):
        process_flags.start(CONFIG)
    assert started.pop()["process_id"] == 1


def test_several_processes_simulate_no_devices(started, monkeypatch):
    raw = kuairand.get_config("sample")
    raw.train.dry_run, raw.train.dry_run_devices = True, 4
    config = resolve.resolve(raw)
    message = r"train\.dry_run_devices=4: simulates all devices in one process; start one"
    values = {"coordinator_address": "host:9", "num_processes": 2, "process_id": 1}
    with flagsaver.flagsaver(**values), pytest.raises(ValueError, match=message):
        process_flags.start(config)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        process_flags.start(config)
    assert started == []


def test_gpus_that_no_process_takes_are_told_of(started, monkeypatch, capsys):
    two_of_eight = {"SLURM_STEP_TASKS_PER_NODE": "2(x8)", "SLURM_GPUS_ON_NODE": "8"}
    for name, value in {**SLURM, **two_of_eight}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    process_flags.start(CONFIG)
    assert started.pop()["local_device_ids"] is None
    assert "WARNING: 6 GPUs of this host are UNUSED" in capsys.readouterr().err


def test_the_processes_of_evaluate_must_have_the_same_flags(started, monkeypatch):
    agreed = {}
    monkeypatch.setattr(processes, "agree", lambda topic, values: agreed.update(values))
    values = {"coordinator_address": "host:9", "num_processes": 2, "process_id": 1}
    with flagsaver.flagsaver(**values, checkpoint="best", groups=True):
        evaluate.start_processes(CONFIG)
    assert len(started) == 1
    assert (agreed["--checkpoint"], agreed["--groups"]) == ("best", "True")
    assert {"--ranks", "--output", "configuration", "version of jax"} <= agreed.keys()


def test_commands_of_one_process_refuse_a_launcher_of_many(monkeypatch):
    cli.refuse_launcher()
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"SLURM started 16 processes of this command, .* srun"):
        cli.refuse_launcher()
    with flagsaver.flagsaver(launcher="none"):
        cli.refuse_launcher()
    with (
        flagsaver.flagsaver(launcher="jax"),
        pytest.raises(ValueError, match=r"--launcher=jax: this command runs in one process"),
    ):
        cli.refuse_launcher()
