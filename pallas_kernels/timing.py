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
import jaxlib


@dataclasses.dataclass(frozen=True)
class Timing:
    """Result of `time_function`.

    Args:
        min_ms: fastest run; on a shared machine the fairest figure.
        median_ms: median run.
        compile_s: lowering and compilation.
        temp_bytes: temporary memory that the compiled program asks for, arguments and results not
            counted; -1 if the backend does not tell.
        num_runs: timed runs that were made.
    """

    min_ms: float
    median_ms: float
    compile_s: float
    temp_bytes: int
    num_runs: int


def time_function(
    function: Callable[..., Any],
    *args: Any,
    num_runs: int = 5,
    queue_ms: float = 0.0,
    max_s: float = float("inf"),
) -> Timing:
    """Compiles a function for these arguments, runs it twice for warm-up, then times it.

    Args:
        function: a function of arrays (pytrees), not yet jitted.
        *args: its arguments.
        num_runs: timed runs.
        queue_ms: a run that is shorter is a queue of calls of about this length, and its time the
            mean of them: then the host's time to start a call is hidden, as it is in a step. For
            devices that take calls in order (GPUs, TPUs). 0 = each run is one call.
        max_s: no further run begins after so many seconds of timed runs; one is always made.

    Raises:
        ValueError: `num_runs` below 1.
    """
    if num_runs < 1:
        raise ValueError(f"num_runs={num_runs}: must be at least 1; use 5.")
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_s = time.perf_counter() - begin
    jax.block_until_ready(compiled(*args))
    num_calls = _calls_per_run(_run_ms(compiled, args, 1), queue_ms)
    runs_ms = []
    begin = time.perf_counter()
    while len(runs_ms) < num_runs and (not runs_ms or time.perf_counter() - begin < max_s):
        runs_ms.append(_run_ms(compiled, args, num_calls))
    memory = compiled.memory_analysis()
    return Timing(
        min_ms=min(runs_ms),
        median_ms=statistics.median(runs_ms),
        compile_s=compile_s,
        temp_bytes=-1 if memory is None else int(memory.temp_size_in_bytes),
        num_runs=len(runs_ms),
    )


# So that a call of a few microseconds does not fill the device's queue.
_MAX_CALLS = 200


def _calls_per_run(one_ms, queue_ms):
    return min(max(1, round(queue_ms / one_ms)), _MAX_CALLS)


def _run_ms(compiled, args, num_calls):
    """Mean time of calls that are started without waiting for each other."""
    begin = time.perf_counter()
    for _ in range(num_calls):
        # Earlier results are dropped, so that a queue needs little more memory than a call.
        result = compiled(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) * 1e3 / num_calls


def device_memory(name: str) -> int | None:
    """What the device says of its memory: "bytes_limit", or "peak_bytes_in_use" of the process.

    Returns:
        Bytes, or None where the backend does not tell.
    """
    return (jax.local_devices()[0].memory_stats() or {}).get(name)


def machine() -> dict[str, str | int]:
    """Hardware and versions by name, to be written beside stored figures."""
    device = jax.local_devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cpu": _cpu_model() or platform.processor() or "unknown",
        "cpu_cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "compiler": " ".join(device.client.platform_version.split()),
    }


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
