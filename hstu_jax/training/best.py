"""The best state so far by a validation metric, in `<workdir>/best` beside the newest ones."""

from hstu_jax.training import checkpoint, choice
from hstu_jax.training import run as run_lib
from hstu_jax.training import state as state_lib

# What a validation's figures depend on besides the model. A run may be continued with other values
# of these, but not compared with a best one that was judged by them.
_JUDGED_BY = ("eval.exclude_seen", "eval.catalogue", "eval.use_dense_ema")


class BestCheckpoint:
    """Keeps one checkpoint: that of the best validation, the first one among equals.

    The value is in the checkpoint's record, so that a resumed run goes on comparing with it.

    Args:
        run: the run; `train.keep_best` names the metric.

    Raises:
        ValueError: the one so far was judged by other rules than this run's validations will be.
    """

    def __init__(self, run: run_lib.Run):
        self._run, self._config = run, run.config.train.keep_best
        self._checkpointer = run.checkpointer(folder="best")
        step = choice.newest(self._checkpointer)
        self._value = None
        if step is not None:
            record = self._checkpointer.read_record(step)
            try:
                self._check_same_rules(record, where=f"{run.workdir}/best/{step}")
            except ValueError:
                self.close()
                raise
            self._value = record.metric_value

    def _check_same_rules(self, record: checkpoint.Record, *, where: str) -> None:
        saved, ours = map(checkpoint.fields_of, (record.config, self._run.record().config))
        for name in _JUDGED_BY:
            was = saved.get(name, ours[name])  # a record may be older than a field
            if was != ours[name]:
                raise ValueError(
                    f"{name}={ours[name]}: the best checkpoint so far, {where}, was chosen with "
                    f"{was}, so its {self._config.metric} cannot be compared with new "
                    "ones; set it back (`python -m hstu_jax.evaluate` gives figures of any "
                    "checkpoint with other values), or move that folder away and choose anew."
                )

    def offer(self, state: state_lib.TrainState, metrics: dict[str, float]) -> str:
        """Saves a state if its validation beats all before.

        On disk before this returns: the run's own next checkpoint means that it is past this
        validation. NaN beats nothing.

        Args:
            state: the validated state.
            metrics: its figures.

        Returns:
            A line to show, or "" if the state is not the best.
        """
        value = metrics[self._config.metric]
        sign = 1 if self._config.larger_is_better else -1
        is_better = value == value and (self._value is None or sign * value > sign * self._value)
        if not is_better:
            return ""
        # A run that was killed and resumed from before its best state meets that step again.
        self._checkpointer.delete_from(int(state.step))
        self._checkpointer.save(state, self._run.record(metric_value=value))
        self._checkpointer.wait()
        self._value = value
        return f"best      {self._config.metric} {value:.4f}, kept in {self._run.workdir}/best"

    def close(self) -> None:
        """Releases the background threads."""
        self._checkpointer.close()
