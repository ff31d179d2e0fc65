"""Timing of compiled functions for benchmarks: warm-up, minimum and median, memory, machine.

For benchmarks only: it reads clocks and files of the operating system, which nothing else in this
package does. The benchmark of an op lies in the op's folder.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Result of `time_function`.

    Args:
        min_ms: fastest run; on a shared machine the fairest figure.
        median_ms: median run.
        compile_s: lowering and compilation.
        temp_bytes: temporary memory that the compiled program asks for, arguments and results not
            counted; -1 if the backend does not tell.
        num_runs: timed runs.
    """

    min_ms: float
    median_ms: float
    compile_s: float
    temp_bytes: int
    num_runs: int


def time_function(function: Callable[..., Any], *args: Any, num_runs: int = 5) -> Timing:
    """Compiles a function for these arguments, runs it once for warm-up, then times it.

    Args:
        function: a function of arrays (pytrees), not yet jitted.
        *args: its arguments.
        num_runs: timed runs.

    Raises:
        ValueError: `num_runs` below 1.
    """
    if num_runs < 1:
        raise ValueError(f"num_runs={num_runs}: must be at least 1; use 5.")
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_s = time.perf_counter() - begin
    jax.block_until_ready(compiled(*args))
    runs_ms = []
    for _ in range(num_runs):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        runs_ms.append((time.perf_counter() - begin) * 1e3)
    memory = compiled.memory_analysis()
    return Timing(
        min_ms=min(runs_ms),
        median_ms=statistics.median(runs_ms),
        compile_s=compile_s,
        temp_bytes=-1 if memory is None else int(memory.temp_size_in_bytes),
        num_runs=num_runs,
    )


def machine_line() -> str:
    """Versions and machine in one line, to stand above every printed figure."""
    device = jax.devices()[0]
    cpu = _cpu_model() or platform.processor() or "unknown CPU"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"jax {jax.__version__}, python {platform.python_version()}, {device.platform} "
        f"{device.device_kind}, {os.cpu_count()} CPU cores ({cpu}), load {load:.1f}"
    )


def _cpu_model():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                None,
            )
    except OSError:
        return None
