"""A checkpoint's model, read for export: configuration, parameters and tables, without its data.

Only the exporter reads this file.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax

from hstu_jax.config import config_text, schema
from hstu_jax.tables import spec as table_spec
from hstu_jax.training import checkpoint, schedules, step
from hstu_jax.training import run as run_lib
from hstu_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Trained:
    """What an export freezes.

    Attributes:
        config: of the run.
        config_text: as the checkpoint recorded it.
        step: optimizer steps.
        variables: dense parameters as evaluation takes them, and statistics of batch norm.
        uses_average: whether the parameters are the averaged ones.
        weights: table -> its array, in row order.
        specs: the tables.
    """

    config: schema.Config
    config_text: str
    step: int
    variables: dict[str, Any]
    uses_average: bool
    weights: Mapping[str, jax.Array]
    specs: tuple[table_spec.TableSpec, ...]


def read_checkpoint(
    workdir: pathlib.Path, *, step_number: int | Literal["latest", "best"] = "latest"
) -> Trained:
    """Reads a checkpoint; neither the data nor a configuration file is needed.

    Args:
        workdir: of the run.
        step_number: of a checkpoint, the newest one, or that of `train.keep_best`.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: this version cannot read it.
    """
    kind = "best" if step_number == "best" else "checkpoints"
    folder = workdir / kind
    if not folder.is_dir():
        how = ", with train.keep_best.metric set" if kind == "best" else ""
        raise FileNotFoundError(
            f"{folder}: no such folder; train first with `python -m hstu_jax.train "
            f"--config=... --workdir={workdir}`{how}."
        )
    checkpointer = checkpoint.Checkpointer(folder, keep_max=None)
    try:
        steps = checkpointer.all_steps()
        wanted = step_number if isinstance(step_number, int) else max(steps, default=None)
        if wanted is None or wanted not in steps:
            raise FileNotFoundError(f"{folder}: no checkpoint of step {wanted}; there are {steps}.")
        record = checkpointer.read_record(wanted)
        config = config_text.parse(record.config, where=str(folder / str(wanted)))
        state = checkpointer.restore(wanted, _shapes(config))
    finally:
        checkpointer.close()
    return from_state(config, state, recorded=record.config)


def from_state(config: schema.Config, state: state_lib.TrainState, *, recorded: str) -> Trained:
    """The same from a state in memory.

    Args:
        config: of the run.
        state: on one device.
        recorded: the configuration's text.
    """
    use_average = config.eval.use_dense_ema
    chosen = state_lib.for_evaluation(state, use_ema=use_average)
    program = step.make_program(config, run_length=schedules.RunLength(num_steps=1))
    return Trained(
        config=config,
        config_text=recorded,
        step=int(state.step),
        variables=chosen.variables(),
        uses_average=use_average and state.ema is not None,
        weights={name: table.weights for name, table in state.tables.items()},
        specs=program.specs,
    )


def _shapes(config: schema.Config) -> state_lib.TrainState:
    """The state's shapes on one device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        run_lib.state_shapes(config),
    )
