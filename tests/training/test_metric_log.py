"""The metric log: one line per point, cut back to the checkpoint by a resumed run."""

import json

import pytest

from hstu_jax.training import metric_log


def read(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    log = metric_log.MetricLog(tmp_path, start_step=0, use_tensorboard=False)
    for step in (2, 4, 6):
        log.write(step, "train", {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "ki')  # what a killed run was writing
    log = metric_log.MetricLog(tmp_path, start_step=4, use_tensorboard=False)
    log.write(6, "validation", {"recall@10": 0.5})
    log.close()
    assert read(tmp_path) == [
        {"step": 2, "kind": "train", "loss": 0.5},
        {"step": 4, "kind": "train", "loss": 0.25},
        {"step": 6, "kind": "validation", "recall@10": 0.5},
    ]


@pytest.mark.parametrize("use_tensorboard", [True, False])
def test_tensorboard_events_are_written_if_asked_for(tmp_path, use_tensorboard):
    log = metric_log.MetricLog(tmp_path, start_step=0, use_tensorboard=use_tensorboard)
    log.write(1, "train", {"loss": 1.0})
    log.close()
    events = list((tmp_path / "tensorboard").glob("events.*"))
    assert len(events) == (1 if use_tensorboard else 0)
    assert all(event.stat().st_size > 0 for event in events)
