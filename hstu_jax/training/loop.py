"""`fit`: trains a run from its configuration, or goes on where its workdir stopped.

The one file that mixes steps with time and files: pipeline, step, log, checkpoint, evaluation.
Read it top to bottom; the arithmetic is in `step.py`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import jax

from hstu_jax.config import schema
from hstu_jax.data import event_store
from hstu_jax.features import prefetch
from hstu_jax.training import (
    best,
    checkpoint,
    choice,
    counting,
    evaluation,
    log_window,
    metric_log,
    processes,
    train_metrics,
)
from hstu_jax.training import run as run_lib
from hstu_jax.training import state as state_lib
from hstu_jax.training import step as step_lib

Print = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What `fit` leaves behind.

    Attributes:
        run: the assembled run.
        state: after the last step.
        train_s: seconds of this call's steps, compilation included.
        num_compilations: times that the training step was compiled.
    """

    run: run_lib.Run
    state: state_lib.TrainState
    train_s: float
    num_compilations: int

    def summary(self) -> str:
        """Time and compilations in one line."""
        return (
            f"trained   to step {int(self.state.step):,} in {self.train_s:.0f} s; "
            f"{self.num_compilations} compilation(s) of the step for "
            f"{len(self.run.pipeline.shapes)} batch shape(s)"
        )


def fit(
    config: schema.Config,
    store: event_store.EventStore,
    *,
    devices: list[jax.Device] | None = None,
    echo: Print = processes.say,
) -> FitResult:
    """Trains until the configured number of steps.

    With a checkpoint in the workdir the run goes on from it, and gives bit for bit what it would
    have given without the stop.

    Args:
        config: the configuration.
        store: opened event store.
        devices: devices of the mesh; None takes all.
        echo: where progress goes.

    Raises:
        ValueError: the workdir holds a run with another configuration or other data, or the
            configuration asks for a dry run.
        FloatingPointError: the loss stopped being finite; names the step.
    """
    if config.train.dry_run:
        raise ValueError("train.dry_run=True: does not train; use `dry_run.report`, or leave it.")
    run = run_lib.build_run(config, store, devices=devices)
    run_lib.check_same_data(run)
    processes.check_shared(run.workdir)
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(contextlib.closing(run.checkpointer()))
        latest = choice.newest(checkpointer)
        # To go on takes shapes only: a first state beside the restored one would double the memory.
        state = run_lib.init_state(run) if latest is None else run_lib.abstract_state(run)
        echo(run_lib.describe(run, state))
        saved: checkpoint.Record | None = None
        if latest is not None:
            where = f"{run.workdir}/checkpoints/{latest}"
            saved = checkpointer.read_record(latest)
            checkpoint.check_resumable(saved, run.record(), where=where)
            state = checkpointer.restore(latest, state)
            echo(f"resumed   from {where}")
        keeper = None  # before the log, which cuts its file where the run goes on: this may refuse
        if config.train.keep_best.metric:
            keeper = stack.enter_context(contextlib.closing(best.BestCheckpoint(run)))
        log = metric_log.MetricLog(
            run.workdir,
            start_step=latest or 0,
            use_tensorboard=config.train.use_tensorboard,
            is_writer=processes.is_first(),
        )
        stack.enter_context(contextlib.closing(log))
        started = time.perf_counter()
        state = _train(run, state, checkpointer, log, saved, keeper, echo)
        checkpointer.wait()
    return FitResult(
        run=run,
        state=state,
        train_s=time.perf_counter() - started,
        num_compilations=run.train_step._cache_size(),
    )


def restore(
    config: schema.Config,
    store: event_store.EventStore,
    *,
    step: int | Literal["best"] | None = None,
    devices: list[jax.Device] | None = None,
) -> FitResult:
    """A trained run from its workdir, for evaluation; nothing is written.

    Args:
        config: the configuration that it was trained with.
        store: opened event store.
        step: checkpoint; None is the newest, "best" that of `train.keep_best`.
        devices: devices of the mesh; None takes all.

    Raises:
        choice.NoCheckpoint: the workdir holds no such checkpoint; a FileNotFoundError.
        ValueError: it was written with another configuration or other data.
    """
    run = run_lib.build_run(config, store, devices=devices)
    run_lib.check_same_data(run)
    state = restore_state(run, step=step)
    return FitResult(run=run, state=state, train_s=0.0, num_compilations=0)


def restore_state(
    run: run_lib.Run, *, step: int | Literal["best"] | None = None
) -> state_lib.TrainState:
    """A state of a run from its workdir; `restore` without assembling the run.

    Args:
        run: the run.
        step: as for `restore`.

    Raises:
        choice.NoCheckpoint: as for `restore`.
        ValueError: same.
    """
    kind = "best" if step == "best" else "checkpoints"
    step = choice.to_read(run, kind=kind, step=None if step == "best" else step)
    checkpointer = run.checkpointer(read_only=True, folder=kind)
    try:
        saved = checkpointer.read_record(step)
        where = str(run.workdir / kind / str(step))
        checkpoint.check_resumable(saved, run.record(), where=where)
        return checkpointer.restore(step, run_lib.abstract_state(run))
    finally:
        checkpointer.close()


def _train(
    run: run_lib.Run,
    state: state_lib.TrainState,
    checkpointer: checkpoint.Checkpointer,
    log: metric_log.MetricLog,
    saved: checkpoint.Record | None,
    keeper: best.BestCheckpoint | None,
    echo: Print,
) -> state_lib.TrainState:
    """The steps, from the state's own to the run's last, which is saved too."""
    config, cutoffs = run.config.train, run.config.metrics.recall_at_k
    first = int(state.step)
    if first >= run.num_steps:
        echo(f"done      the workdir is at step {first} of {run.num_steps}; nothing to train")
        return state
    smoothed = train_metrics.SmoothedRecall(
        run.config.train_metrics, cutoffs, sums=saved.train_metrics if saved else ()
    )
    window = log_window.LogWindow(
        first, cutoffs, smoothed=smoothed, sums=saved.log_sums if saved else ()
    )
    pending: tuple[int, step_lib.StepMetrics] | None = None
    validate = _Validation(run, log, keeper, echo) if run.config.eval.every_num_steps else None
    per_step = config.gradient_accumulation_steps
    with run.pipeline.iterate(
        start_step=first * per_step, stop_step=run.num_steps * per_step, device_put=run.put
    ) as batches:
        for step, batch in enumerate(_step_batches(batches, per_step), start=first + 1):
            state, metrics = run.train_step(state, batch)
            if step == first + 1:
                jax.block_until_ready(metrics)
                elapsed = window.restart_clock(step, data_wait_s=batches.wait_s)
                echo(f"compiled  the first step took {elapsed:.1f} s, its compilation included")
            # Look at a step's numbers while the next one runs, not before it may start.
            if pending is not None:
                window.add(*pending)
            pending = (step, metrics)
            is_last = step == run.num_steps
            is_log = is_last or step % config.log_step_count_steps == 0
            is_save = is_last or step % config.save_checkpoints_steps == 0
            is_validation = validate is not None and validate.is_due(step, is_last=is_last)
            if is_log or is_save or is_validation:  # a state is saved only after a look at its loss
                window.add(*pending)
                pending = None
            if is_log:
                values = window.close(step, data_wait_s=batches.wait_s)
                log.write(step, "train", values)
                remaining = (run.num_steps - step) / values["steps_per_s"]
                echo(metric_log.progress_line(step, run.num_steps, values, remaining_s=remaining))
            if is_validation:  # before saving: a stop between the two must not lose its line
                validate(step, state)
                window.restart_clock(step, data_wait_s=batches.wait_s)
            if is_save:
                record = run.record(log_sums=window.sums, train_metrics=smoothed.sums)
                checkpointer.save(state, record)
    return state


def _step_batches(batches: Iterable[prefetch.HostBatch], per_step: int) -> Iterator:
    """What `train_step` takes: a batch, or with accumulation a tuple of them."""
    if per_step == 1:
        for item in batches:
            yield item.batch
        return
    group = []
    for item in batches:
        group.append(item.batch)
        if len(group) == per_step:
            yield tuple(group)
            group = []


class _Validation:
    """Whole-catalogue evaluation on the validation split while training.

    Args:
        run: the run.
        log: where the figures go.
        keeper: is offered every validated state; None keeps none.
        echo: where they are shown.
    """

    def __init__(
        self,
        run: run_lib.Run,
        log: metric_log.MetricLog,
        keeper: best.BestCheckpoint | None,
        echo: Print,
    ):
        self._run, self._log, self._keeper, self._echo = run, log, keeper, echo
        self._every = run.config.eval.every_num_steps
        config = run.config.eval
        self._eval_set = evaluation.make_eval_set(
            run.store,
            split="validation",
            exclude_seen=config.exclude_seen,
            catalogue=config.catalogue,
        )
        self._baselines: dict[str, evaluation.Evaluation] = {}
        # Only shown: the first process counts them, while the others wait here and not on a device.
        if config.baselines and processes.is_first():
            self._baselines, _ = counting.counting_baselines(run.store, self._eval_set, config)
        processes.wait_for_all("validation")

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether a step is validated; the last one only where the best state is kept."""
        if is_last:
            return self._keeper is not None
        return step % self._every == 0

    def __call__(self, step: int, state: state_lib.TrainState) -> None:
        """Evaluates a state, and shows the counted baselines, which do not change, beside it."""
        result = evaluation.evaluate(self._run, state, self._eval_set)
        self._log.write(step, "validation", result.scalars())
        self._echo(f"valid     step {step}: {result.line()}")
        for name, baseline in self._baselines.items():
            self._echo(f"          {name}: {baseline.line()}")
        if self._keeper is not None:
            line = self._keeper.offer(state, result.scalars())
            if line:
                self._echo(line)
