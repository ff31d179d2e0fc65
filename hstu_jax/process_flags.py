"""Flags of the commands that run in several processes, and how such a command meets the others.

python -m hstu_jax.train --config=... --coordinator_address=HOST:PORT --num_processes=N
    --process_id=I

Under a launcher that is known (`--launcher`, in `cli.py`) none of them is needed.
"""

import os
import sys
from collections.abc import Mapping

from absl import flags

from hstu_jax import cli, launchers
from hstu_jax.config import resolve, schema
from hstu_jax.training import processes

_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of the first process, with a port that is free there; the same for all processes.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_INITIALIZATION_TIMEOUT_S = flags.DEFINE_integer(
    "initialization_timeout_s",
    300,
    "Seconds in which all processes of a run must have come.",
    lower_bound=1,
)
_HEARTBEAT_TIMEOUT_S = flags.DEFINE_integer(
    "heartbeat_timeout_s",
    60,
    "A process that gives no sign of life for so many seconds is lost, and the others end.",
    lower_bound=4,
)


def start(config: schema.Config, *, options: Mapping[str, object] | None = None) -> None:
    """Meets the other processes of this run, if there are any, and checks that all are alike.

    Args:
        config: this process's; must be the same in all.
        options: flag -> value of the command's own flags; must be the same in all too.

    Raises:
        ValueError: flags that do not fit together, processes that cannot meet, or that differ.
    """
    given = {
        "--coordinator_address": _ADDRESS.value,
        "--num_processes": _NUM_PROCESSES.value,
        "--process_id": _PROCESS_ID.value,
    }
    timeouts = dict(
        initialization_timeout_s=_INITIALIZATION_TIMEOUT_S.value,
        heartbeat_timeout_s=_HEARTBEAT_TIMEOUT_S.value,
    )
    if any(value is not None for value in given.values()):
        _check_flags(given)
        if _NUM_PROCESSES.value == 1:
            return
        _refuse_simulated_devices(config)
        processes.start(
            coordinator_address=_ADDRESS.value,
            num_processes=_NUM_PROCESSES.value,
            process_id=_PROCESS_ID.value,
            **timeouts,
        )
    elif not _start_by_launcher(config, timeouts):
        return
    # Hosts may have their copies of the data in different places; its contents are compared later.
    lines = resolve.to_text(config).splitlines()
    text = "\n".join(line for line in lines if not line.startswith("data.path = "))
    own = {name: str(value) for name, value in (options or {}).items()}
    processes.agree("start", {**processes.versions(), **own, "configuration": text})


def _check_flags(given: dict[str, str | int | None]) -> None:
    missing = [name for name, value in given.items() if value is None]
    if missing:
        there = [name for name in given if name not in missing]
        raise ValueError(
            f"{there[0]}={given[there[0]]}: needs {' and '.join(missing)} too; give all three, or "
            "none and let the launcher tell."
        )
    address, num_processes, process_id = given.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"--coordinator_address={address}: must be host:port, with a port that is free on the "
            "first process's host."
        )
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id}: must be from 0 to --num_processes={num_processes} less 1."
        )


def _refuse_simulated_devices(config: schema.Config) -> None:
    count = config.train.dry_run_devices
    if count:
        raise ValueError(
            f"train.dry_run_devices={count}: simulates all devices in one process; start one, "
            "without --num_processes, and with --launcher=none under a launcher of several."
        )


def _start_by_launcher(config: schema.Config, timeouts: dict[str, int]) -> bool:
    """Lets JAX ask the launcher, if there is one; returns whether it did."""
    if cli.LAUNCHER.value == "none":
        return False
    launcher = launchers.find(os.environ)
    if cli.LAUNCHER.value == "auto" and launcher is None:
        return False
    _refuse_simulated_devices(config)
    if launcher is None:
        processes.start(local_device_ids=None, **timeouts)
        return True
    if cli.LAUNCHER.value == "auto" and not launcher.is_found_by_jax:
        raise ValueError(
            f"--launcher=auto: {launcher.name} started {launcher.num_processes} processes and does "
            "not say where the first one is (it is version 5 or later); start them with `mpirun "
            "... sh -c 'exec python -m hstu_jax.train ... --coordinator_address=HOST:PORT "
            f"--num_processes={launcher.num_processes} --process_id=$OMPI_COMM_WORLD_RANK'`, where "
            "HOST is that of rank 0 with a free port, or give --launcher=none for runs of their "
            "own."
        )
    processes.start(local_device_ids=launcher.local_device_ids, **timeouts)
    if launcher.unused_gpus and processes.is_first():
        print(
            f"WARNING: {launcher.unused_gpus} GPUs of this host are UNUSED: every process takes "
            "one. Start one process a host, which takes all, or one process a GPU, or let each see "
            "its own by CUDA_VISIBLE_DEVICES (srun --gpus-per-task).",
            file=sys.stderr,
            flush=True,
        )
    return True
