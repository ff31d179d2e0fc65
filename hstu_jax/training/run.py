"""Assembles a run from its configuration: data, mesh, compiled steps, state.

Everything that training, evaluation and benchmarks share before their first step. The loop that
drives it is `loop.py`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from hstu_jax.config import resolve, schema
from hstu_jax.data import event_store
from hstu_jax.features import pipeline as pipeline_lib
from hstu_jax.model import initialization, match
from hstu_jax.training import checkpoint, partition, step
from hstu_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration with everything built that does not change while training.

    Attributes:
        config: the configuration.
        store: the event store.
        mesh: devices.
        pipeline: training batches.
        program: static parts of the steps.
        train_step: compiled (state, batch) -> (state, metrics); donates the state.
        eval_step: compiled (state, batch) -> (metrics, user vectors).
        item_step: compiled (state, items) -> item vectors.
        num_steps: length of the run.
    """

    config: schema.Config
    store: event_store.EventStore
    mesh: jax.sharding.Mesh
    pipeline: pipeline_lib.Pipeline
    program: step.Program
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    item_step: Callable[..., Any]
    num_steps: int

    @property
    def workdir(self) -> pathlib.Path:
        """Folder of checkpoints and metrics."""
        return pathlib.Path(self.config.workdir)

    def record(self, log_sums: tuple[float, ...] = ()) -> checkpoint.Record:
        """What a checkpoint of this run says of itself."""
        return checkpoint.Record(
            log_sums=log_sums,
            config=resolve.to_text(self.config),
            data_fingerprint=self.store.fingerprint(),
            num_steps=self.num_steps,
        )

    def put(self, batch: Any) -> Any:
        """A host batch on the devices."""
        return partition.put_batch(batch, self.mesh)

    def checkpointer(self, *, read_only: bool = False) -> checkpoint.Checkpointer:
        """The run's checkpoints."""
        keep_max = None if read_only else self.config.train.keep_checkpoint_max
        return checkpoint.Checkpointer(self.workdir / "checkpoints", keep_max=keep_max)


def build_run(
    config: schema.Config,
    store: event_store.EventStore,
    *,
    devices: list[jax.Device] | None = None,
) -> Run:
    """Builds a run; compiles nothing yet.

    Args:
        config: the configuration.
        store: the opened event store that `config.data.path` names.
        devices: devices of the mesh; None takes all.

    Raises:
        ValueError: the configuration does not fit the data or the devices.
    """
    mesh = partition.make_mesh(config.mesh, devices)
    partition.check_groups(config.data.num_groups, mesh)
    pipeline = pipeline_lib.Pipeline(config, store, split="train")
    num_steps = _num_steps(config.train, pipeline)
    program = step.make_program(config, num_steps=num_steps)

    def bind(function):
        return functools.partial(function, program=program)

    return Run(
        config=config,
        store=store,
        mesh=mesh,
        pipeline=pipeline,
        program=program,
        train_step=partition.place_train_step(bind(step.train_step), mesh),
        eval_step=partition.place_eval(
            bind(step.eval_step), mesh, out_specs=(partition.REPLICATED, partition.SPLIT)
        ),
        item_step=partition.place_eval(bind(step.item_step), mesh),
        num_steps=num_steps,
    )


def init_state(run: Run) -> state_lib.TrainState:
    """The state before the first step, from the run's seed."""
    key = jax.random.key(run.config.seed)
    param_key, table_key = jax.random.split(key)
    replicated = partition.replicated_sharding(run.mesh)
    variables = match.init_variables(run.program.model, param_key)
    model = run.config.model
    if model.initialization == "aligned":
        stu = model.user_tower.hstu.stu
        variables["params"] = initialization.align(
            variables["params"], value_width=stu.num_heads * stu.hidden_dim
        )
    return state_lib.init_state(
        variables,
        optimizer=run.program.optimizer,
        tables=state_lib.init_tables(
            run.program.specs, table_key, partition.split_sharding(run.mesh)
        ),
        replicated=replicated,
    )


def describe(run: Run, state: state_lib.TrainState) -> str:
    """The banner of a run: devices, data, parameters, shapes."""
    stats = run.store.stats
    num_params = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    tables = ", ".join(f"{spec.name} {spec.num_rows:,} x {spec.dim}" for spec in run.program.specs)
    table_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.tables))
    device = run.mesh.devices.flat[0]
    epoch = run.pipeline.stats()
    shapes = "; ".join(str(shape) for shape in run.pipeline.shapes)
    return "\n".join(
        [
            f"devices   {run.mesh.size} x {device.device_kind} ({device.platform}), "
            f"mesh {dict(run.mesh.shape)}",
            f"data      {run.store.path} ({stats['source']}): {run.store.num_users:,} users, "
            f"{run.store.num_items:,} items, {len(run.store.events):,} events, "
            f"{len(run.store.windows):,} windows",
            f"model     {num_params:,} dense parameters; tables {tables} "
            f"({table_bytes / 2**20:,.0f} MiB with optimizer state)",
            f"batches   {run.num_steps:,} steps of {run.config.data.num_groups} group(s); {shapes}",
            f"          an epoch: {epoch.windows:,} windows, {epoch.tokens / epoch.slots:.0%} of "
            f"the slots used; {epoch.truncated_windows:,} windows lost their oldest items "
            f"({epoch.dropped_tokens:,}), {epoch.empty_histories:,} have no history",
        ]
    )


def _num_steps(config: schema.TrainConfig, pipeline: pipeline_lib.Pipeline) -> int:
    if config.num_epochs == 0:
        return config.num_steps
    in_epochs = pipeline.first_step(config.num_epochs)
    return min(in_epochs, config.num_steps) if config.num_steps else in_epochs
