"""Sums of the steps since the last log line, and the rates of the loop."""

import time

import jax
import numpy as np

from hstu_jax.training import step as step_lib
from hstu_jax.training import train_metrics


class LogWindow:
    """Sums of the steps since the last log line.

    Args:
        step: number of completed steps.
        top_k: cutoffs of recall.
        smoothed: the train metrics, which see the same steps.
        sums: `sums` of the window that a stopped run had open; () starts an empty one.
    """

    def __init__(
        self,
        step: int,
        top_k: tuple[int, ...],
        *,
        smoothed: train_metrics.SmoothedRecall,
        sums: tuple[float, ...] = (),
    ):
        self._top_k, self.smoothed = top_k, smoothed
        self._clock_step = step
        self._data_wait_s = 0.0
        self._restart()
        if sums:
            num_cutoffs = len(top_k)
            self._sums, self._hits = np.array(sums[:4]), np.array(sums[4 : 4 + num_cutoffs])
            # Checkpoints from before the last two were kept lack them.
            self._num_steps, self._waited = sums[4 + num_cutoffs :] or (0.0, 0.0)

    def _restart(self) -> None:
        self._sums = np.zeros(4)  # loss, queries, users, tokens
        self._hits = np.zeros(len(self._top_k))
        self._num_steps, self._waited = 0.0, 0.0
        self._timed = np.zeros(4)  # the same sums, since the clock was started
        self._started = time.perf_counter()

    @property
    def sums(self) -> tuple[float, ...]:
        """The open window, to go on from after a stop."""
        counts = (self._num_steps, self._waited)
        return (*self._sums.tolist(), *self._hits.tolist(), *counts)

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
        self._num_steps += 1
        self._waited += float(metrics.exchange_overflow)
        self.smoothed.add(metrics.recall_hits, float(metrics.num_queries))

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
        values |= self.smoothed.values()
        values["exchange_overflow"] = self._waited / max(self._num_steps, 1)
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
