"""Assembles a run from its configuration: data, mesh, compiled steps, state.

Everything that training, evaluation and benchmarks share before their first step. The loop that
drives it is `loop.py`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from hstu_jax.config import resolve, schema
from hstu_jax.data import event_store
from hstu_jax.features import packing
from hstu_jax.features import pipeline as pipeline_lib
from hstu_jax.model import initialization, match
from hstu_jax.training import checkpoint, partition, processes, schedules, step
from hstu_jax.training import state as state_lib
from pallas_kernels.hstu_attention import api as attention

# Dropout of step t draws from fold_in(key, t); first values draw from a number no step reaches.
_INIT_FOLD = 2**31


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
    def state_spec(self) -> state_lib.TrainState:
        """How the state is split over the devices."""
        return _state_spec(self.config.mesh, self.program, self.mesh)

    @property
    def workdir(self) -> pathlib.Path:
        """Folder of checkpoints and metrics."""
        return pathlib.Path(self.config.workdir)

    def record(
        self,
        *,
        log_sums: tuple[float, ...] = (),
        train_metrics: tuple[float, ...] = (),
        metric_value: float | None = None,
    ) -> checkpoint.Record:
        """What a checkpoint of this run says of itself; see `checkpoint.Record`."""
        schedules = self.config.train.schedules
        return checkpoint.Record(
            config=resolve.to_text(self.config),
            data_fingerprint=self.pipeline.fingerprint(),
            num_steps=self.num_steps,
            log_sums=log_sums,
            train_metrics=train_metrics,
            metric_value=metric_value,
            is_bound_to_length=any(each.depends_on_run_length for each in schedules),
        )

    def put(self, batch: Any) -> Any:
        """A host batch of this process's groups on the devices."""
        return partition.put_batch(batch, self.mesh)

    def checkpointer(
        self,
        *,
        read_only: bool = False,
        folder: Literal["checkpoints", "best"] = "checkpoints",
    ) -> checkpoint.Checkpointer:
        """The run's newest checkpoints, or its best one."""
        keep_max = {"checkpoints": self.config.train.keep_checkpoint_max, "best": 1}[folder]
        return checkpoint.Checkpointer(
            self.workdir / folder, keep_max=None if read_only else keep_max
        )


def build_run(
    config: schema.Config,
    store: event_store.EventStore,
    *,
    devices: list[jax.Device] | None = None,
) -> Run:
    """Builds a run; compiles nothing yet.

    Args:
        config: the configuration.
        store: the opened data that `config.data` names.
        devices: devices of the mesh; None takes all.

    Raises:
        ValueError: the configuration does not fit the data or the devices.
    """
    mesh = partition.make_mesh(config.mesh, devices)
    partition.check_groups(config.data.num_groups, mesh)
    groups = partition.own_groups(config.data.num_groups, mesh)
    pipeline = pipeline_lib.Pipeline(config, store, split="train", groups=groups)
    _check_accumulation(config.train, pipeline)
    num_steps = _num_steps(config.train, pipeline)
    ends = _epoch_ends(config.train, pipeline, num_steps)
    program = step.make_program(
        config,
        run_length=schedules.RunLength(num_steps=num_steps, epoch_ends=ends),
        is_ragged=partition.is_ragged(config.mesh, mesh),
    )

    def bind(function):
        return functools.partial(function, program=program)

    state_spec = _state_spec(config.mesh, program, mesh)

    return Run(
        config=config,
        store=store,
        mesh=mesh,
        pipeline=pipeline,
        program=program,
        train_step=partition.place_train_step(bind(step.train_step), mesh, state_spec=state_spec),
        eval_step=partition.place_eval(
            bind(step.eval_step),
            mesh,
            out_specs=(partition.REPLICATED, partition.SPLIT),
            state_spec=state_spec,
        ),
        item_step=partition.place_eval(bind(step.item_step), mesh, state_spec=state_spec),
        num_steps=num_steps,
    )


def check_same_data(run: Run) -> None:
    """Raises ValueError, which names them, if the processes of a run have different data."""
    processes.agree("data", {"data (fingerprint)": run.pipeline.fingerprint()})


def _state_spec(
    config: schema.MeshConfig, program: step.Program, mesh: jax.sharding.Mesh
) -> state_lib.TrainState:
    return partition.spec_of_state(
        program.specs, mesh, replicated_bytes=config.replicated_table_bytes
    )


def init_state(run: Run) -> state_lib.TrainState:
    """The state before the first step, from the run's seed."""
    return _first_state(
        run.program,
        replicated=partition.replicated_sharding(run.mesh),
        tables={
            name: jax.sharding.NamedSharding(run.mesh, spec)
            for name, spec in run.state_spec.tables.items()
        },
        is_aligned=run.config.model.initialization == "aligned",
    )


def untrained_state(config: schema.Config) -> state_lib.TrainState:
    """The same on one device; needs no data."""
    mesh = partition.make_mesh(schema.MeshConfig(), jax.devices()[:1])
    program = step.make_program(config, run_length=schedules.RunLength(num_steps=1))
    spec = _state_spec(config.mesh, program, mesh)
    return _first_state(
        program,
        replicated=partition.replicated_sharding(mesh),
        tables={name: jax.sharding.NamedSharding(mesh, one) for name, one in spec.tables.items()},
        is_aligned=config.model.initialization == "aligned",
    )


def state_shapes(config: schema.Config) -> state_lib.TrainState:
    """Shapes and types of a configuration's state; needs no data and allocates nothing."""
    # No array of the state has a size that depends on the run's length.
    program = step.make_program(config, run_length=schedules.RunLength(num_steps=1))
    return _shapes_of(program)


def abstract_state(run: Run) -> state_lib.TrainState:
    """Shapes, types and shardings of a run's state: what a checkpoint is restored to."""
    return partition.with_shardings(_shapes_of(run.program), run.mesh, state_spec=run.state_spec)


def abstract_batch(
    pipeline: pipeline_lib.Pipeline,
    *,
    num_groups: int,
    sharding: jax.sharding.Sharding | None = None,
) -> Any:
    """Shapes and types of a pipeline's largest batch; allocates no more than one group of it.

    Args:
        pipeline: the batches.
        num_groups: groups of the batch; the pipeline's own number, or another.
        sharding: where its arrays are to be; None = nowhere.
    """
    largest = max(pipeline.shapes, key=lambda shape: shape.rows * shape.row_len)

    def generator(group):
        return np.random.default_rng(group)

    # No window at all: its values are of no interest.
    one, _ = packing.build_batch(
        [],
        source=pipeline.source,
        shape=dataclasses.replace(largest, groups=1),
        group_rng=generator,
        hard_rng=generator,
    )

    def describe(leaf):
        return jax.ShapeDtypeStruct((num_groups, *leaf.shape[1:]), leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, one)


def _shapes_of(program: step.Program) -> state_lib.TrainState:
    # Alignment changes values, never shapes, and computes some of them on the host.
    options = dict(replicated=None, tables=None, is_aligned=False)
    return jax.eval_shape(functools.partial(_first_state, program, **options))


def _first_state(
    program: step.Program,
    *,
    replicated: jax.sharding.Sharding | None,
    tables: dict[str, jax.sharding.Sharding] | None,
    is_aligned: bool,
) -> state_lib.TrainState:
    config = program.config
    key = jax.random.fold_in(jax.random.key(config.seed), _INIT_FOLD)
    param_key, table_key = jax.random.split(key)
    variables = match.init_variables(program.model, param_key)
    model = config.model
    if is_aligned:
        stu = model.user_tower.hstu.stu
        variables["params"] = initialization.align(
            variables["params"],
            value_width=stu.num_heads * stu.hidden_dim,
            has_gate=stu.use_gate,
        )
    return state_lib.init_state(
        variables,
        optimizer=program.optimizer,
        tables=state_lib.init_tables(program.specs, table_key, tables, rule=program.table_rule),
        replicated=replicated,
        has_ema=config.train.dense_optimizer.ema.decay > 0,
    )


def _attention(config) -> str:
    tower = config.user_tower
    if tower.encoder != "hstu":
        return {"sasrec": "softmax", "mean": "none"}[tower.encoder]
    stu, name = tower.hstu.stu, config.kernel
    if name == "auto":
        has_bias = stu.use_position_bias or stu.use_time_bias
        name = f"{attention.auto_implementation(has_bias=has_bias)} (auto)"
    if tower.hstu.last_layer == "all_positions" or config.objective == "next_item":
        return name
    last = "one query a user, by xla"
    return last if tower.hstu.attn_num_layers == 1 else f"{name}; last layer: {last}"


def _where(run: Run, table: str) -> str:
    if run.mesh.size == 1:
        return ""
    return " split" if _is_split(run, table) else " on every device"


def _is_split(run: Run, table: str) -> bool:
    return run.state_spec.tables[table] == partition.SPLIT


def _exchange(run: Run) -> str:
    split = [spec.name for spec in run.program.specs if _is_split(run, spec.name)]
    filled = [table for table in split if run.program.sends_filled(table)]
    how = "filled places only (ragged)" if filled else "whole buckets (padded)"
    if filled and filled != split:
        how = f"filled places only (ragged) for {', '.join(filled)}, whole buckets for others"
    return f"exchange of ids and rows: sends {how}; mesh.exchange={run.config.mesh.exchange!r}"


def describe(run: Run, state: state_lib.TrainState) -> str:
    """The banner of a run: devices, data, parameters, shapes.

    Args:
        run: the run.
        state: its state, or one of `abstract_state`.
    """
    stats = run.store.stats
    num_params = state_lib.count(state.params)
    tables = ", ".join(
        f"{spec.name} {spec.num_rows:,} x {spec.dim}{_where(run, spec.name)}"
        for spec in run.program.specs
    )
    table_bytes = state_lib.size_bytes(state.tables)
    device = run.mesh.devices.flat[0]
    epoch = run.pipeline.stats()
    shapes = "; ".join(str(shape) for shape in run.pipeline.shapes)
    hard = run.pipeline.hard_negatives_summary()
    evenness = run.pipeline.balance_summary(run.mesh.size)
    return "\n".join(
        [
            f"devices   {run.mesh.size} x {device.device_kind} ({device.platform}), "
            f"mesh {dict(run.mesh.shape)}; attention: {_attention(run.config.model)}",
            f"data      {run.store.path} ({stats['source']}): {run.store.num_users:,} users, "
            f"{run.store.num_items:,} items, {len(run.store.events):,} events, "
            f"{len(run.store.windows):,} windows",
            f"model     {num_params:,} dense parameters; tables {tables} "
            f"({table_bytes / 2**20:,.0f} MiB with optimizer state)",
            f"batches   {run.num_steps:,} steps of {run.config.data.num_groups} group(s); {shapes}",
            f"          an epoch: {epoch.windows:,} windows, {epoch.tokens / epoch.slots:.0%} of "
            f"the slots used; {epoch.truncated_windows:,} windows lost their oldest items "
            f"({epoch.dropped_tokens:,}), {epoch.empty_histories:,} have no history",
            *([f"          {_exchange(run)}"] if run.mesh.size > 1 else []),
            *([f"          {evenness}"] if evenness else []),
            *([f"          {hard}"] if hard else []),
            *(f"          {note}" for note in run.pipeline.notes),
        ]
    )


def _check_accumulation(config: schema.TrainConfig, pipeline: pipeline_lib.Pipeline) -> None:
    if config.gradient_accumulation_steps > 1 and len(pipeline.shapes) > 1:
        raise ValueError(
            f"train.gradient_accumulation_steps={config.gradient_accumulation_steps}: the batches "
            f"of a step must have one shape, and this run has {len(pipeline.shapes)}; give "
            "data.row_lens one length, or use data.layout='packed'."
        )


def _num_steps(config: schema.TrainConfig, pipeline: pipeline_lib.Pipeline) -> int:
    """Optimizer steps; batches at the end of the last epoch that do not fill one are left out."""
    if config.num_epochs == 0:
        return config.num_steps
    batches = pipeline.first_step(config.num_epochs)
    in_epochs = batches // config.gradient_accumulation_steps
    if in_epochs == 0:
        raise ValueError(
            f"train.gradient_accumulation_steps={config.gradient_accumulation_steps}: must not be "
            f"more than the {batches} batches of train.num_epochs={config.num_epochs}."
        )
    return min(in_epochs, config.num_steps) if config.num_steps else in_epochs


def _epoch_ends(
    config: schema.TrainConfig, pipeline: pipeline_lib.Pipeline, num_steps: int
) -> tuple[int, ...]:
    """First step after every epoch, for schedules that count epochs; () where none does."""
    if not any(schedule.by_epoch for schedule in config.schedules):
        return ()
    ends, per_step = [], config.gradient_accumulation_steps
    while not ends or ends[-1] < num_steps:
        ends.append(-(-pipeline.first_step(len(ends) + 1) // per_step))
    return tuple(ends)
