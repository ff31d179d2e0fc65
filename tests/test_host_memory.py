"""Freed host memory stays with the process: steps of one size touch no fresh pages."""

import os
import platform
import subprocess
import sys

import pytest

from hstu_jax import host_memory

_NUM_PAGES = 100 * 2**20 // 4096
# Ten blocks of 100 MiB, each freed before the next one, as the temporaries of steps are.
_PROGRAM = """
import resource, sys
import numpy as np
from hstu_jax import host_memory

print(host_memory.keep_freed_memory() if sys.argv[1] == "keep" else None)
np.ones(100 * 2**20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(100 * 2**20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _run(word, **environment):
    # Pages of 2 MiB, which numpy asks for where it may, would hide most faults of the plain run.
    names = {name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    environment = {**kept, "NUMPY_MADVISE_HUGEPAGE": "0", **environment}
    command = [sys.executable, "-c", _PROGRAM, word]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told, faults = done.stdout.split()
    return told, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_blocks_of_one_size_take_the_same_pages():
    told, faults = _run("keep")
    plain_told, plain_faults = _run("plain")
    assert (told, plain_told) == ("True", "None")
    assert faults < _NUM_PAGES / 10
    assert plain_faults > 9 * _NUM_PAGES


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_settings_of_the_environment_stand(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: pytest.fail("told the library"))
    assert not host_memory.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: object())
    assert not host_memory.keep_freed_memory()
