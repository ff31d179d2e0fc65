"""Whether a launcher started this process as one of several, and which GPUs are its own.

Read from environment variables, so that a plain run asks nobody and waits for nobody. Here: Open
MPI, SLURM, TPU hosts of GKE, and the refusal of commands that run in one process. Not here: how the
processes find each other, which is JAX's part (`hstu_jax/training/processes.py`). Needs nothing but
the standard library, as the commands over an export do.
"""

import argparse
import dataclasses
import glob
import os
import re
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Launcher:
    """A launcher that started several processes.

    Attributes:
        name: for messages.
        num_processes: how many.
        one_process: how it starts a single process, for messages.
        local_device_ids: GPUs, of those visible, that are this process's own; None = as JAX
            chooses, which is one for each process of a host, by its number there.
        unused_gpus: GPUs of the host that no process takes.
        is_found_by_jax: JAX learns from it where the first process is.
    """

    name: str
    num_processes: int
    one_process: str
    local_device_ids: tuple[int, ...] | None = None
    unused_gpus: int = 0
    is_found_by_jax: bool = True

    def alone(self) -> str:
        """Why a command that runs in one process refuses this launcher."""
        return (
            f"--launcher=auto: {self.name} started {self.num_processes} processes of this "
            f"command, which runs in one; start it with {self.one_process}, or give "
            "--launcher=none, before any subcommand, if each writes files of its own."
        )


def find(environment: Mapping[str, str]) -> Launcher | None:
    """The launcher of this process, or None where it was started alone.

    Asked in JAX's order. Open MPI: `mpirun` of more than one, also within a job of SLURM. SLURM:
    inside a step (`srun`) of more than one task. A batch script and a shell of `salloc` know the
    job's number of tasks too, but run once. GKE: more than one TPU host. An indexed Job of
    Kubernetes is none: its pods may be runs of their own.
    """
    num_ranks = _count(environment, "OMPI_COMM_WORLD_SIZE")
    num_tasks = _count(environment, "SLURM_STEP_NUM_TASKS") or _count(environment, "SLURM_NTASKS")
    is_step = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environment.keys()
    if num_ranks > 1:
        here = _count(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
        devices, unused = _own_devices(environment, here, per_process=0)
        # Open MPI 5 has no such variable any more, and JAX looks for nothing else.
        is_found = "OMPI_MCA_orte_hnp_uri" in environment
        return Launcher("Open MPI", num_ranks, "mpirun -n 1", devices, unused, is_found)
    if num_ranks == 0 and is_step and num_tasks > 1:
        per_task = re.fullmatch(r"(?:.*:)?(\d+)", environment.get("SLURM_GPUS_PER_TASK", ""))
        devices, unused = _own_devices(
            environment, _tasks_here(environment), per_process=int(per_task[1]) if per_task else 0
        )
        return Launcher("SLURM", num_tasks, "srun --ntasks=1", devices, unused)
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts:
        return Launcher("GKE", len(hosts.split(",")), "one TPU host")
    return None


def parse_alone(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parses the flags of a command that runs in one process, and refuses a launcher of several.

    All of them would do the same, and write the same files at once.

    Args:
        parser: of the command; gets `--launcher`.
        argv: flags; None for the command line's.

    Raises:
        SystemExit: wrong flags, or a launcher started several processes; says what to do.
    """
    parser.add_argument(
        "--launcher",
        choices=("auto", "none"),
        default="auto",
        help="auto: refuse to run as one of several processes of SLURM, Open MPI or GKE; none: "
        "run alone, whatever started it",
    )
    found = parser.parse_args(argv)
    launcher = find(os.environ) if found.launcher == "auto" else None
    if launcher is not None:
        parser.error(launcher.alone())
    return found


def installed_gpus() -> int:
    """NVIDIA GPUs of this host or container."""
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _count(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of a SLURM step on this host, e.g. 2 of "4(x3),2" on its fourth; 0 = not said."""
    per_node = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        number = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if number is None:
            return 0
        per_node += [int(number[1])] * int(number[2] or 1)
    if len(set(per_node)) == 1:
        return per_node[0]
    node = _count(environment, "SLURM_NODEID")
    return per_node[node] if "SLURM_NODEID" in environment and node < len(per_node) else 0


def _visible_gpus(environment: Mapping[str, str]) -> int:
    if "CUDA_VISIBLE_DEVICES" in environment:
        names = environment["CUDA_VISIBLE_DEVICES"].split(",")
        return sum(name not in ("", "-1", "NoDevFiles") for name in names)
    return _count(environment, "SLURM_GPUS_ON_NODE") or installed_gpus()


def _own_devices(
    environment: Mapping[str, str], processes_here: int, *, per_process: int
) -> tuple[tuple[int, ...] | None, int]:
    """A process's devices where JAX's "one by the number on this host" is wrong; unused ones.

    With one GPU visible (`--gpus-per-task=1`) it has the number 0 for every process. All that are
    visible are a process's own if it is alone on the host, or if they are as many as the launcher
    gives to each (`--gpus-per-task=4`).
    """
    num_gpus = _visible_gpus(environment)
    if num_gpus and (num_gpus == 1 or processes_here == 1 or num_gpus == per_process):
        return tuple(range(num_gpus)), 0
    is_used = environment.get("JAX_PLATFORMS", "") != "cpu"
    unused = num_gpus - processes_here if is_used and processes_here else 0
    return None, max(unused, 0)
