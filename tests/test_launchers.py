"""What a launcher's variables say, and that a plain run is seen as one."""

import pytest

from hstu_jax import launchers

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


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
        # A pod that is not one of an indexed Job.
        without(["JOB_COMPLETION_INDEX"], KUBERNETES),
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
)
def test_a_plain_run_has_no_launcher(variables):
    assert launchers.find(variables) is None


@pytest.mark.parametrize(
    ("variables", "name", "num_processes"),
    [
        (SLURM, "SLURM", 16),
        (without(["SLURM_STEP_NUM_TASKS"]), "SLURM", 16),
        (MPI, "Open MPI", 4),
        (KUBERNETES, "Kubernetes", 0),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE", 2),
    ],
)
def test_launchers(variables, name, num_processes):
    found = launchers.find(variables)
    assert (found.name, found.num_processes) == (name, num_processes)
    assert found.local_device_ids is None


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        # One task on every host of eight GPUs: all are its own.
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}, tuple(range(8))),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "4,5"}, (0, 1)),
        # A task sees one GPU alone, whatever its number on the host.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "5"}, (0,)),
        # A GPU for each task, which see all of them: as JAX chooses.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
    ],
)
def test_devices_of_a_process(variables, devices):
    assert launchers.find({**SLURM, **variables}).local_device_ids == devices
