"""Runs a module of the tests as a process with a number of simulated CPU devices of its own."""

import os
import pathlib
import re
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_COUNT = re.compile(r"--xla_force_host_platform_device_count=\d+")


def run_on_devices(module: str, *arguments: object, num_devices: int, timeout_s: float) -> str:
    """What `python -m module arguments` prints; fails with its errors if it does."""
    flag = f"--xla_force_host_platform_device_count={num_devices}"
    environment = {**os.environ, "XLA_FLAGS": _COUNT.sub(flag, os.environ["XLA_FLAGS"])}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=_ROOT,
        env=environment,
        timeout=timeout_s,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
