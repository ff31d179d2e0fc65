"""Sums between log lines, and how a stopped run gets them back."""

import numpy as np

from hstu_jax.config import train_schema
from hstu_jax.training import log_window, step, train_metrics


def window(sums=()):
    smoothed = train_metrics.SmoothedRecall(train_schema.TrainMetricsConfig(), (1, 5))
    return log_window.LogWindow(0, (1, 5), smoothed=smoothed, sums=sums)


def metrics(loss_sum, waited):
    return step.StepMetrics(
        loss_sum=np.float32(loss_sum),
        num_queries=np.float32(10),
        num_users=np.float32(4),
        num_tokens=np.float32(50),
        recall_hits=np.array([2.0, 6.0], np.float32),
        num_not_finite=np.float32(0),
        exchange_overflow=np.float32(waited),
    )


def test_ids_that_waited_are_logged_by_step_and_survive_a_stop():
    straight, stopped = window(), window()
    for number, (loss, waited) in enumerate([(30, 0), (10, 6), (20, 3)], start=1):
        straight.add(number, metrics(loss, waited))
        stopped.add(number, metrics(loss, waited))
        stopped = window(stopped.sums)
    for each in (straight, stopped):
        values = each.close(3, data_wait_s=0.0)
        assert values["loss"] == 2 and values["exchange_overflow"] == 3
        assert values["recall@1"] == 0.2 and values["recall@5"] == 0.6
    assert straight.close(4, data_wait_s=0.0)["exchange_overflow"] == 0


def test_sums_of_checkpoints_that_did_not_count_waiting_ids_are_read():
    old = window(window().sums[:-2])
    old.add(1, metrics(10, 4))
    assert old.close(1, data_wait_s=0.0)["exchange_overflow"] == 4
