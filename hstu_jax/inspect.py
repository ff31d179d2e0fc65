"""Prints what a configuration takes, without training, allocating or (but for batches) data.

    python -m hstu_jax.inspect --config=configs/kuairand.py:seed

Every dense parameter's shape, every table's rows and bytes with its optimizer's, and the totals;
shapes of batches too where the configuration's event store is there already.
"""

import os

from hstu_jax import cli
from hstu_jax.config import schema
from hstu_jax.data import event_store
from hstu_jax.features import pipeline
from hstu_jax.training import inspection


def main(config: schema.Config) -> None:
    """Prints the state's shapes and the batches'."""
    print(inspection.describe_state(config))
    print(batches_line(config))


def batches_line(config: schema.Config) -> str:
    """The shapes of training batches, or why they are not known."""
    if config.data.source == "list_columns":
        return "batches: their shapes are known once the files are read; training prints them"
    path = config.data.path
    if not os.path.exists(path):
        return f"batches: their shapes depend on the data, and {path} is missing"
    shapes = pipeline.Pipeline(config, event_store.open_store(path)).shapes
    return "batches: " + "; ".join(map(str, shapes))


if __name__ == "__main__":
    cli.run_main(main, uses_devices=False)
