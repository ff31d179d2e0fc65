"""Smoothed recall by hand, and over a stop."""

import numpy as np
import pytest

from hstu_jax.config import train_schema
from hstu_jax.training import train_metrics

CONFIG = train_schema.TrainMetricsConfig(recall_at_k=(5, 1), decay_rate=0.75, decay_step=2)
STEPS = [([1, 4], 10), ([3, 4], 10), ([2, 9], 10), ([4, 9], 20), ([0, 0], 10)]


def feed(metric, steps):
    for hits, queries in steps:
        metric.add(np.array(hits, np.float32), float(queries))
    return metric


def test_windows_by_hand():
    metric = train_metrics.SmoothedRecall(CONFIG, (1, 5))
    assert metric.values() == {"smoothed_recall@5": 0.0, "smoothed_recall@1": 0.0}
    feed(metric, STEPS[:1])
    assert metric.values()["smoothed_recall@5"] == 0.0  # no window is over
    feed(metric, STEPS[1:2])
    assert metric.values() == {"smoothed_recall@5": 8 / 20, "smoothed_recall@1": 4 / 20}
    feed(metric, STEPS[2:])
    # Over the window's queries, not the mean of its steps; the fifth step's window is open.
    assert metric.values()["smoothed_recall@5"] == pytest.approx(0.75 * 0.4 + 0.25 * 18 / 30)
    assert metric.values()["smoothed_recall@1"] == pytest.approx(0.75 * 0.2 + 0.25 * 6 / 30)


@pytest.mark.parametrize("stop", range(6))
def test_going_on_from_any_step_gives_the_same(stop):
    straight = feed(train_metrics.SmoothedRecall(CONFIG, (1, 5)), STEPS)
    first = feed(train_metrics.SmoothedRecall(CONFIG, (1, 5)), STEPS[:stop])
    second = train_metrics.SmoothedRecall(CONFIG, (1, 5), sums=first.sums)
    assert feed(second, STEPS[stop:]).sums == straight.sums


def test_without_cutoffs_there_is_nothing_to_log():
    metric = train_metrics.SmoothedRecall(train_schema.TrainMetricsConfig(), (1, 5))
    assert feed(metric, STEPS).values() == {}
