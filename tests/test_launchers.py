"""What a launcher's variables say, and that a plain run is seen as one."""

import argparse
import sys

import pytest

from hstu_jax import launchers, predict, prepare, report
from hstu_jax.model import benchmark as stack_benchmark
from hstu_jax.serving import benchmark as serving_benchmark
from hstu_jax.serving import benchmark_report
from hstu_jax.tables import benchmark as tables_benchmark

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
OLD_MPI = {**MPI, "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34911"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.fixture(autouse=True)
def no_gpu_files(monkeypatch):
    monkeypatch.setattr(launchers, "installed_gpus", lambda: 0)


def without(names, variables=SLURM):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # A batch script knows the job, but is in no step; a shell of salloc is a step of one task.
        without(["SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"]),
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        # One rank, in a process of the step with which mpirun starts its daemons.
        {**SLURM, "OMPI_COMM_WORLD_SIZE": "1"},
        # Pods of an indexed Job may be runs of their own.
        KUBERNETES,
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
)
def test_a_plain_run_has_no_launcher(variables):
    assert launchers.find(variables) is None


@pytest.mark.parametrize(
    ("variables", "name", "num_processes", "is_found"),
    [
        (SLURM, "SLURM", 16, True),
        (without(["SLURM_STEP_NUM_TASKS"]), "SLURM", 16, True),
        (OLD_MPI, "Open MPI", 4, True),
        (MPI, "Open MPI", 4, False),
        # mpirun in a shell of salloc, and on hosts where srun has started its daemons.
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", **OLD_MPI}, "Open MPI", 4, True),
        ({**SLURM, **MPI}, "Open MPI", 4, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE", 2, True),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, "GKE", 2, True),
    ],
)
def test_launchers(variables, name, num_processes, is_found):
    found = launchers.find(variables)
    assert (found.name, found.num_processes) == (name, num_processes)
    assert found.is_found_by_jax == is_found
    assert found.local_device_ids is None and found.unused_gpus == 0


def here(tasks, **variables):
    names = {"visible": "CUDA_VISIBLE_DEVICES", "on_node": "SLURM_GPUS_ON_NODE"}
    names |= {"per_task": "SLURM_GPUS_PER_TASK", "node": "SLURM_NODEID"}
    named = {names[name]: value for name, value in variables.items()}
    return {**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks, **named}


@pytest.mark.parametrize(
    ("variables", "devices", "unused"),
    [
        # One task on every host of eight GPUs: all are its own.
        (here("1(x2)", on_node="8"), tuple(range(8)), 0),
        (here("1", visible="4,5"), (0, 1), 0),
        # A task sees one GPU alone, whatever its number on the host.
        (here("8(x2)", visible="5"), (0,), 0),
        # A GPU for each task, which see all of them: as JAX chooses.
        (here("8(x2)", on_node="8"), None, 0),
        # A task sees the four that are its own, of eight.
        (here("2(x2)", visible="0,1,2,3", on_node="8", per_task="4"), (0, 1, 2, 3), 0),
        (here("2", visible="0,1,2,3", per_task="a100:4"), (0, 1, 2, 3), 0),
        # Nothing says whose the others are.
        (here("2(x2)", visible="0,1,2,3,4,5,6,7", per_task="4"), None, 6),
        (here("2(x2)", on_node="8"), None, 6),
        ({**here("2(x2)", on_node="8"), "JAX_PLATFORMS": "cpu"}, None, 0),
        # Hosts with other numbers of tasks.
        (here("2(x3),1", on_node="8", node="3"), tuple(range(8)), 0),
        (here("2(x3),1", on_node="8", node="2"), None, 6),
        (here("2(x3),1", on_node="8"), None, 0),
        # None for this process, whatever the host has.
        (here("1(x2)", visible="", on_node="8"), None, 0),
        (here("1(x2)", visible="NoDevFiles", on_node="8"), None, 0),
    ],
)
def test_devices_of_a_process(variables, devices, unused):
    found = launchers.find(variables)
    assert (found.local_device_ids, found.unused_gpus) == (devices, unused)


def test_gpus_are_counted_where_the_environment_does_not_say(monkeypatch):
    monkeypatch.setattr(launchers, "installed_gpus", lambda: 8)
    alone = launchers.find({**OLD_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert alone.local_device_ids == tuple(range(8))
    two = launchers.find(OLD_MPI)
    assert (two.local_device_ids, two.unused_gpus) == (None, 6)


def test_commands_of_one_process_refuse_a_launcher_of_many(monkeypatch, capsys, tmp_path):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    commands = {
        predict.main: ["--export_dir=e", "--input=i", "--output=o", "--tower=user"],
        prepare.main: ["sample", f"--out_dir={tmp_path}/made"],
        report.main: ["--runs", "a"],
        stack_benchmark.main: [],
        serving_benchmark.main: ["search"],
        benchmark_report.main: [],
    }
    monkeypatch.setattr(sys, "argv", ["benchmark"])  # the tables' takes them from there alone
    commands[lambda flags: tables_benchmark.main()] = []
    for main, flags in commands.items():
        with pytest.raises(SystemExit, match="2"):
            main(flags)
        message = capsys.readouterr().err
        assert "SLURM started 16 processes of this command, which runs in one; start it with" in (
            message
        )
    assert not (tmp_path / "made").exists()
    parser = argparse.ArgumentParser()
    assert launchers.parse_alone(parser, ["--launcher=none"]).launcher == "none"
