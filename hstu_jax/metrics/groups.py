"""Figures of a ranking apart for short and long histories, and for rare and popular items.

From ranks to rows of a table. Ranks are made in `catalogue.py`; the metrics' formulas are in
`ranking.py`.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from hstu_jax.metrics import ranking

# Smallest number of each group; the last one has no end.
HISTORY_FROM = (0, 1, 10, 20, 50, 100, 200, 500)  # events before the request
POPULARITY_FROM = (0, 1, 10, 30, 100, 300, 1000, 3000)  # training events of the item


@dataclasses.dataclass(frozen=True)
class Group:
    """One row.

    Attributes:
        kind: "history" (means over query-users) or "popularity" (means over positives, each as if
            it were the only one of its user).
        name: from-to of the numbers that belong to it.
        count: query-users or positives with a rank.
        means: every metric.
    """

    kind: str
    name: str
    count: int
    means: dict[str, float]


def group_table(
    ranks: Int[np.ndarray, "positives"],
    offsets: Int[np.ndarray, "users_and_one"],
    *,
    history_len: Int[np.ndarray, "users"],
    popularity: Int[np.ndarray, "positives"],
    cutoffs: tuple[int, ...],
) -> list[Group]:
    """Metrics by length of the history and by popularity of the positive; empty groups left out.

    Args:
        ranks: as for `ranking.user_metrics`.
        offsets: same.
        history_len: events before the request, of every query-user.
        popularity: training events of the item of every positive.
        cutoffs: as for `ranking.user_metrics`.
    """
    by_user = ranking.user_metrics(ranks, offsets, cutoffs=cutoffs)
    single = np.arange(ranks.size + 1)
    by_positive = ranking.user_metrics(ranks, single, cutoffs=cutoffs)
    return [
        *_groups("history", by_user, history_len, HISTORY_FROM),
        *_groups("popularity", by_positive, popularity, POPULARITY_FROM),
    ]


def _groups(
    kind: str,
    metrics: ranking.UserMetrics,
    numbers: Int[np.ndarray, "_"],
    starts: tuple[int, ...],
) -> list[Group]:
    group_of = np.searchsorted(starts, numbers[metrics.users], side="right") - 1
    found = []
    for place, start in enumerate(starts):
        chosen = group_of == place
        if not chosen.any():
            continue
        last = f"-{starts[place + 1] - 1}" if place + 1 < len(starts) else "+"
        name = str(start) if last == f"-{start}" else f"{start}{last}"
        means = {metric: float(values[chosen].mean()) for metric, values in metrics.values.items()}
        found.append(Group(kind, name, int(chosen.sum()), means))
    return found
