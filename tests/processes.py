"""Starts the commands as several processes on this machine, and sees that none is left behind."""

import contextlib
import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_COUNT = re.compile(r"--xla_force_host_platform_device_count=\d+")
_POLL_S = 0.05


@dataclasses.dataclass(frozen=True)
class Processes:
    """Processes of one run and the files with what they print, in their order."""

    running: tuple[subprocess.Popen, ...]
    outputs: tuple[pathlib.Path, ...]

    def texts(self) -> list[str]:
        """What they have printed, errors too."""
        return [path.read_text() for path in self.outputs]

    def wait(self, timeout_s: float) -> list[int]:
        """Statuses of all when they have ended."""
        deadline = time.monotonic() + timeout_s
        return [one.wait(max(deadline - time.monotonic(), 0.1)) for one in self.running]

    def wait_until(self, is_reached: Callable[[], bool], timeout_s: float) -> None:
        """Returns when something is reached; fails if a process ends before."""
        deadline = time.monotonic() + timeout_s
        while not is_reached():
            assert time.monotonic() < deadline, self.texts()
            assert all(one.poll() is None for one in self.running), self.texts()
            time.sleep(_POLL_S)


@contextlib.contextmanager
def running(
    module: str,
    *arguments: object,
    folder: pathlib.Path,
    num_processes: int,
    num_devices: int = 1,
    only_in: Sequence[Sequence[object]] | None = None,
) -> Iterator[Processes]:
    """Starts `python -m module arguments` as processes of one run; kills what is left at the end.

    Args:
        module: the command.
        arguments: of all of them.
        folder: for what they print; is made.
        num_processes: how many; the flags that number them are added.
        num_devices: simulated CPU devices of each.
        only_in: further arguments of each process; a process without an entry is not started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    further = [()] * num_processes if only_in is None else only_in
    flag = f"--xla_force_host_platform_device_count={num_devices}"
    environment = {**os.environ, "XLA_FLAGS": _COUNT.sub(flag, os.environ["XLA_FLAGS"])}
    address = f"localhost:{_free_port()}"
    started, outputs = [], []
    try:
        for number, own in enumerate(further):
            numbered = [f"--num_processes={num_processes}", f"--process_id={number}"]
            outputs.append(folder / f"{number}.txt")
            with outputs[-1].open("w") as file:
                one = subprocess.Popen(
                    [
                        *(sys.executable, "-u", "-m", module),
                        *map(str, arguments),
                        *(f"--coordinator_address={address}", *numbered),
                        *map(str, own),
                    ],
                    cwd=_ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            started.append(one)
        yield Processes(tuple(started), tuple(outputs))
    finally:
        for one in started:
            if one.poll() is None:
                one.kill()
            one.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
