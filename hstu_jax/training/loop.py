"""`fit`: trains a run from its configuration, or goes on where its workdir stopped.

The one file that mixes steps with time and files: pipeline, step, log, checkpoint, evaluation.
Read it top to bottom; the arithmetic is in `step.py`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from hstu_jax.config import schema
from hstu_jax.data import event_store
from hstu_jax.training import checkpoint, counting, evaluation, metric_log
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
    echo: Print = print,
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
        ValueError: the workdir holds a run with another configuration or other data.
        FloatingPointError: the loss stopped being finite; names the step.
    """
    run = run_lib.build_run(config, store, devices=devices)
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(contextlib.closing(run.checkpointer()))
        state = run_lib.init_state(run)
        echo(run_lib.describe(run, state))
        latest = checkpointer.latest_step()
        log_sums: tuple[float, ...] = ()
        if latest is not None:
            where = f"{run.workdir}/checkpoints/{latest}"
            saved = checkpointer.read_record(latest)
            checkpoint.check_resumable(saved, run.record(), where=where)
            state = checkpointer.restore(latest, state)
            log_sums = saved.log_sums
            echo(f"resumed   from {where}")
        log = metric_log.MetricLog(
            run.workdir, start_step=latest or 0, use_tensorboard=config.train.use_tensorboard
        )
        stack.enter_context(contextlib.closing(log))
        started = time.perf_counter()
        state = _train(run, state, checkpointer, log, log_sums, echo)
        if checkpointer.latest_step() != int(state.step):
            checkpointer.save(state, run.record())
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
    step: int | None = None,
    devices: list[jax.Device] | None = None,
) -> FitResult:
    """A trained run from its workdir, for evaluation; nothing is written.

    Args:
        config: the configuration that it was trained with.
        store: opened event store.
        step: checkpoint; None is the newest.
        devices: devices of the mesh; None takes all.

    Raises:
        FileNotFoundError: the workdir holds no such checkpoint.
        ValueError: it was written with another configuration or other data.
    """
    run = run_lib.build_run(config, store, devices=devices)
    folder = run.workdir / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; train first with `python -m hstu_jax.train --config=...`."
        )
    checkpointer = run.checkpointer(read_only=True)
    try:
        steps = checkpointer.all_steps()
        step = max(steps, default=None) if step is None else step
        if step not in steps:
            raise FileNotFoundError(f"{folder}: no checkpoint of step {step}; there are {steps}.")
        saved = checkpointer.read_record(step)
        checkpoint.check_resumable(saved, run.record(), where=str(folder / str(step)))
        state = checkpointer.restore(step, run_lib.init_state(run))
    finally:
        checkpointer.close()
    return FitResult(run=run, state=state, train_s=0.0, num_compilations=0)


def _train(
    run: run_lib.Run,
    state: state_lib.TrainState,
    checkpointer: checkpoint.Checkpointer,
    log: metric_log.MetricLog,
    log_sums: tuple[float, ...],
    echo: Print,
) -> state_lib.TrainState:
    """The steps, from the state's own to the run's last."""
    config = run.config.train
    first = int(state.step)
    if first >= run.num_steps:
        echo(f"done      the workdir is at step {first} of {run.num_steps}; nothing to train")
        return state
    window = LogWindow(first, run.config.metrics.recall_at_k, sums=log_sums)
    pending: tuple[int, step_lib.StepMetrics] | None = None
    validate = _Validation(run, log, echo) if run.config.eval.every_num_steps else None
    with run.pipeline.iterate(
        start_step=first, stop_step=run.num_steps, device_put=run.put
    ) as batches:
        for host_batch in batches:
            step = host_batch.step + 1
            state, metrics = run.train_step(state, host_batch.batch)
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
            is_save = step % config.save_checkpoints_steps == 0 and not is_last
            is_validation = validate is not None and step % validate.every == 0 and not is_last
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
                checkpointer.save(state, run.record(window.sums))
    return state


class _Validation:
    """Whole-catalogue evaluation on the validation split while training.

    Args:
        run: the run.
        log: where the figures go.
        echo: where they are shown.
    """

    def __init__(self, run: run_lib.Run, log: metric_log.MetricLog, echo: Print):
        self._run, self._log, self._echo = run, log, echo
        self.every = run.config.eval.every_num_steps
        config = run.config.eval
        self._eval_set = evaluation.make_eval_set(
            run.store, split="validation", exclude_seen=config.exclude_seen
        )
        self._baselines: dict[str, evaluation.Evaluation] = {}
        if config.baselines:
            self._baselines, _ = counting.counting_baselines(run.store, self._eval_set, config)

    def __call__(self, step: int, state: state_lib.TrainState) -> None:
        """Evaluates a state, and shows the counted baselines, which do not change, beside it."""
        result = evaluation.evaluate(self._run, state, self._eval_set)
        self._log.write(step, "validation", result.scalars())
        self._echo(f"valid     step {step}: {result.line()}")
        for name, baseline in self._baselines.items():
            self._echo(f"          {name}: {baseline.line()}")


class LogWindow:
    """Sums of the steps since the last log line.

    Args:
        step: number of completed steps.
        top_k: cutoffs of recall.
        sums: `sums` of the window that a stopped run had open; () starts an empty one.
    """

    def __init__(self, step: int, top_k: tuple[int, ...], *, sums: tuple[float, ...] = ()):
        self._top_k = top_k
        self._clock_step = step
        self._data_wait_s = 0.0
        self._restart()
        if sums:
            self._sums, self._hits = np.array(sums[:4]), np.array(sums[4:])

    def _restart(self) -> None:
        self._sums = np.zeros(4)  # loss, queries, users, tokens
        self._hits = np.zeros(len(self._top_k))
        self._timed = np.zeros(4)  # the same sums, since the clock was started
        self._started = time.perf_counter()

    @property
    def sums(self) -> tuple[float, ...]:
        """The open window, to go on from after a stop."""
        return (*self._sums.tolist(), *self._hits.tolist())

    def restart_clock(self, step: int, *, data_wait_s: float) -> float:
        """Leaves what came before (a compilation, an evaluation) out of the rates.

        Args:
            step: number of completed steps.
            data_wait_s: seconds spent waiting for batches since the run's start.

        Returns:
            Seconds since the clock was started before.
        """
        now = time.perf_counter()
        elapsed, self._started = now - self._started, now
        self._timed[:] = 0
        self._clock_step, self._data_wait_s = step, data_wait_s
        return elapsed

    def add(self, step: int, metrics: step_lib.StepMetrics) -> None:
        """Adds one step's sums; raises FloatingPointError if it is not finite."""
        metrics = jax.device_get(metrics)
        if not np.isfinite(metrics.loss_sum) or metrics.num_not_finite > 0:
            raise FloatingPointError(
                f"step {step}: the loss sum is {metrics.loss_sum} and {metrics.num_not_finite:.0f} "
                "values of its gradients are not finite; the last checkpoint is intact. Lower "
                "train.*.lr, or look at the batch of this step: batches are a function of (seed, "
                "step)."
            )
        step_sums = np.array(
            [metrics.loss_sum, metrics.num_queries, metrics.num_users, metrics.num_tokens],
            dtype=np.float64,
        )
        self._sums += step_sums
        if step > self._clock_step:  # the first step's time is not in the clock, nor is its work
            self._timed += step_sums
        self._hits += metrics.recall_hits

    def close(self, step: int, *, data_wait_s: float) -> dict[str, float]:
        """The window's means and rates; starts the next window.

        Args:
            step: the window's last step.
            data_wait_s: seconds spent waiting for batches since the run's start.
        """
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        loss_sum, queries, _, _ = self._sums
        _, _, users, tokens = self._timed
        values = {"loss": loss_sum / max(queries, 1)}
        for k, hits in zip(self._top_k, self._hits, strict=True):
            values[f"recall@{k}"] = hits / max(queries, 1)
        values |= {
            "users_per_s": users / elapsed,
            "tokens_per_s": tokens / elapsed,
            "steps_per_s": max(step - self._clock_step, 1) / elapsed,
            "data_wait_share": min((data_wait_s - self._data_wait_s) / elapsed, 1.0),
        }
        self._data_wait_s = data_wait_s
        self._clock_step = step
        self._restart()
        return {name: float(value) for name, value in values.items()}
