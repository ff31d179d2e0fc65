"""Recall among the sampled negatives while training, smoothed over windows of steps.

Kept on the host from the sums that every step returns; its state goes into checkpoints, so that a
resumed run logs the same figures.
"""

import numpy as np
from jaxtyping import Float

from hstu_jax.config import train_schema


class SmoothedRecall:
    """A running value per cutoff.

    After every `decay_step` steps, with r the recall over the queries of those steps:
    value <- r if value = 0, else decay_rate * value + (1 - decay_rate) * r. 0 before that.

    Args:
        config: the section `train_metrics`.
        cutoffs: of the recalls that a step returns (`metrics.recall_at_k`).
        sums: `sums` of a stopped run; () starts anew.

    Source: the train metrics of TorchEasyRec 1.3.16 (tzrec/metrics). A step is an optimizer step
        here, a batch there; they differ with gradient accumulation only.
    """

    def __init__(
        self,
        config: train_schema.TrainMetricsConfig,
        cutoffs: tuple[int, ...],
        *,
        sums: tuple[float, ...] = (),
    ):
        self._config = config
        self._places = [cutoffs.index(k) for k in config.recall_at_k]
        count = len(self._places)
        parts = np.array(sums or [0.0] * (2 + 2 * count))
        self._steps, self._queries = parts[:2]
        self._hits, self._values = parts[2 : 2 + count], parts[2 + count :]

    @property
    def sums(self) -> tuple[float, ...]:
        """The open window and the values, to go on from after a stop."""
        return (
            float(self._steps),
            float(self._queries),
            *self._hits.tolist(),
            *self._values.tolist(),
        )

    def add(self, hits: Float[np.ndarray, "cutoffs"], num_queries: float) -> None:
        """Adds a step's queries, and how many of them had their positive among the k best."""
        self._steps += 1
        self._queries += num_queries
        self._hits = self._hits + np.asarray(hits, np.float64)[self._places]
        if self._steps < self._config.decay_step:
            return
        recall = self._hits / max(self._queries, 1.0)
        rate = self._config.decay_rate
        smoothed = rate * self._values + (1 - rate) * recall
        self._values = np.where(self._values == 0, recall, smoothed)
        self._steps, self._queries, self._hits = 0.0, 0.0, np.zeros_like(self._hits)

    def values(self) -> dict[str, float]:
        """Name -> value, for the log."""
        names = (f"smoothed_recall@{k}" for k in self._config.recall_at_k)
        return dict(zip(names, self._values.tolist(), strict=True))
