"""Times the training step of a configuration, part by part.

    python -m hstu_jax.benchmark step --config=configs/kuairand.py [--repeats=10]

Works on CPU and GPU; nothing is written. Kernels have their own benchmark:
`python -m pallas_kernels.hstu_attention.benchmark`; so do the tables and the STU stack:
`python -m hstu_jax.tables.benchmark`, `python -m hstu_jax.model.benchmark`.
"""

import platform

import jax
from absl import flags

from hstu_jax import cli
from hstu_jax.config import schema
from hstu_jax.training import run as run_lib
from hstu_jax.training import step_benchmark

_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed calls of each part.", lower_bound=1)


def main(config: schema.Config) -> None:
    """Prints the table."""
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
    cli.run_main(main, command="step")
