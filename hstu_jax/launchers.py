"""Whether a launcher started this process as one of several, and which devices are its own.

Read from environment variables alone, so that a plain run asks nobody and waits for nobody. Here:
SLURM, Open MPI, an indexed Job of Kubernetes, TPU hosts of GKE. Not here: how the processes find
each other, which is JAX's part (`hstu_jax/training/processes.py`).
"""

import dataclasses
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Launcher:
    """A launcher that started several processes.

    Attributes:
        name: for messages.
        num_processes: how many; 0 = the environment does not say.
        local_device_ids: devices of the host that are this process's own; None = as JAX chooses,
            which is one for each process of a host, by its number there.
        one_process: how it starts a single process, for messages.
    """

    name: str
    num_processes: int
    local_device_ids: tuple[int, ...] | None
    one_process: str


def find(environment: Mapping[str, str]) -> Launcher | None:
    """The launcher of this process, or None where it was started alone.

    SLURM: inside a step (`srun`) of more than one task. A batch script and a shell of `salloc` know
    the job's number of tasks too, but run once. Open MPI: `mpirun` of more than one. Kubernetes: a
    pod of an indexed Job, whose number of pods JAX asks for. GKE: more than one TPU host.
    """
    num_tasks = _count(environment, "SLURM_STEP_NUM_TASKS") or _count(environment, "SLURM_NTASKS")
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environment.keys():
        if num_tasks > 1:
            here = re.fullmatch(
                r"(\d+)(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")
            )
            devices = _own_devices(environment, int(here[1]) if here else 0)
            return Launcher("SLURM", num_tasks, devices, "srun --ntasks=1")
        return None
    num_ranks = _count(environment, "OMPI_COMM_WORLD_SIZE")
    if num_ranks > 1:
        here = _count(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
        return Launcher("Open MPI", num_ranks, _own_devices(environment, here), "mpirun -n 1")
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return Launcher("Kubernetes", 0, None, "a Job of one pod")
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts:
        return Launcher("GKE", len(hosts.split(",")), None, "one TPU host")
    return None


def _count(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0


def _own_devices(environment: Mapping[str, str], processes_here: int) -> tuple[int, ...] | None:
    """Devices of a process where JAX's "one by the number on this host" would be wrong.

    With one GPU visible (`--gpus-per-task=1`) it has the number 0 for every process; with one
    process on the host, all GPUs are its own.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    num_gpus = len(visible.split(",")) if visible else _count(environment, "SLURM_GPUS_ON_NODE")
    if num_gpus == 1 or (num_gpus > 1 and processes_here == 1):
        return tuple(range(num_gpus))
    return None
