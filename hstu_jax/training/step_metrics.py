"""What every step tells of itself: sums over the global batch, computed in `step.py`."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Sums of one step over the whole global batch. Fields are `Any`: such trees hold specs too.

    Attributes:
        loss_sum: sum of the queries' losses; with sample weights their weighted mean times the
            number of queries, so that a mean over steps counts queries.
        num_queries: number of queries (positives).
        num_users: number of users.
        num_tokens: token slots in use, contextual ones included.
        recall_hits: [len(recall_at_k)] queries whose positive is among the k best.
        num_not_finite: values of the gradients that are not finite; 0 in evaluation.
        exchange_overflow: ids that had to wait for a second round of the exchange between devices.
    """

    loss_sum: Any
    num_queries: Any
    num_users: Any
    num_tokens: Any
    recall_hits: Any
    num_not_finite: Any
    exchange_overflow: Any
