"""Evaluates the newest checkpoint of a run on the whole catalogue.

python -m hstu_jax.evaluate --config=configs/kuairand.py:subset [--config.eval.split=validation]
"""

import pathlib

from absl import flags

from hstu_jax import cli
from hstu_jax.config import schema
from hstu_jax.training import closing, loop

_STEP = flags.DEFINE_integer("checkpoint_step", None, "Checkpoint to evaluate; default the newest.")
_OUTPUT = flags.DEFINE_string("output", None, "Also write the figures to this JSON file.")


def main(config: schema.Config) -> None:
    """Restores, evaluates, prints the table."""
    store = cli.open_data(config)
    result = loop.restore(config, store, step=_STEP.value)
    table = closing.evaluate_beside_baselines(result.run, result.state, train_mean=False)
    print(table.text())
    if _OUTPUT.value:
        table.write(pathlib.Path(_OUTPUT.value))
        print(f"figures   {_OUTPUT.value}")


if __name__ == "__main__":
    cli.run_main(main)
