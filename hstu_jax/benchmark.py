"""Times the training step of a configuration, part by part, or models it on many GPUs.

    python -m hstu_jax.benchmark step --config=configs/kuairand.py [--repeats=10]
    python -m hstu_jax.benchmark scaling --config=configs/kuairand.py:seed [--devices=8,64,512]

The first works on CPU and GPU; the second needs no device and times nothing: it divides what a
step computes and sends by stated rates (`training/scaling.py`). Nothing is written. Kernels have
their own benchmark: `python -m pallas_kernels.hstu_attention.benchmark`; so do the tables and the
STU stack: `python -m hstu_jax.tables.benchmark`, `python -m hstu_jax.model.benchmark`.
"""

import platform

import jax
from absl import flags

from hstu_jax import cli
from hstu_jax.config import schema
from hstu_jax.training import run as run_lib
from hstu_jax.training import scaling, step_benchmark

_DEVICES = flags.DEFINE_list("devices", ["8", "64", "512"], "Numbers of devices of `scaling`.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed calls of each part.", lower_bound=1)


def model_many_devices(config: schema.Config) -> None:
    """Prints the table of `scaling`."""
    for text in _DEVICES.value:
        if not text.isdigit() or int(text) < 1:
            raise ValueError(f"--devices={text}: must be positive numbers, as 8,64,512.")
    devices = [int(text) for text in _DEVICES.value]
    print(scaling.report(config, cli.open_data(config), devices=devices))


def main(config: schema.Config) -> None:
    """Prints the table of `step`."""
    store = cli.open_data(config)
    run = run_lib.build_run(config, store)
    device = run.mesh.devices.flat[0]
    print(
        f"{run.mesh.size} x {device.device_kind} ({platform.processor() or platform.machine()}), "
        f"jax {jax.__version__}, Python {platform.python_version()}"
    )
    print("\n".join(str(shape) for shape in run.pipeline.shapes))
    print(step_benchmark.benchmark_step(run, num_repeats=_REPEATS.value).table())


if __name__ == "__main__":
    cli.run_main({"step": main, "scaling": model_many_devices})
