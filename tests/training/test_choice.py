"""The first process's choice of a checkpoint is everyone's; the other process here is a fake."""

import dataclasses
import json

import pytest

from configs import kuairand
from hstu_jax.config import resolve
from hstu_jax.training import checkpoint, choice, processes
from hstu_jax.training import run as run_lib
from tests.training.test_checkpoint import state_at

RECORD = checkpoint.Record(config="", data_fingerprint="", num_steps=9)


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 3 and 6."""
    writer = checkpoint.Checkpointer(tmp_path / "checkpoints", keep_max=3)
    for step in (3, 6):
        writer.save(state_at(step), RECORD)
    writer.close()
    return tmp_path / "checkpoints"


@pytest.fixture
def first_says(monkeypatch):
    """Makes this process the second of two, whose first one answers one question after another."""
    monkeypatch.setattr(processes, "_MARK_S", 0.3)
    monkeypatch.setattr(processes, "index", lambda: 1)

    def says(*found):
        answers = iter(found)
        monkeypatch.setattr(
            processes, "exchange", lambda topic, text: (json.dumps(next(answers)), text)
        )

    return says


def run_in(workdir):
    """A run with what a choice asks of it."""
    config = resolve.resolve(kuairand.get_config("sample"))
    run = object.__new__(run_lib.Run)
    object.__setattr__(run, "config", dataclasses.replace(config, workdir=str(workdir)))
    return run


def test_one_process_chooses_for_itself(folder):
    run = run_in(folder.parent)
    assert choice.to_read(run, kind="checkpoints") == 6
    assert choice.to_read(run, kind="checkpoints", step=3) == 3
    with pytest.raises(choice.NoCheckpoint, match=r"no checkpoint of step 4; there are \[3, 6\]"):
        choice.to_read(run, kind="checkpoints", step=4)
    with pytest.raises(choice.NoCheckpoint, match=r"best: no such folder"):
        choice.to_read(run, kind="best")


def test_the_first_process_chooses_what_is_read(folder, first_says):
    run = run_in(folder.parent)
    first_says(True, [3])
    assert choice.to_read(run, kind="checkpoints") == 3
    # The best is there, but not for the first one: nobody reads it, and nobody waits.
    (folder.parent / "best" / "3").mkdir(parents=True)
    first_says(False)
    with pytest.raises(choice.NoCheckpoint, match="best: no such folder"):
        choice.to_read(run, kind="best")
    # Not taken for a checkpoint that is missing everywhere.
    first_says(True, [3, 9])
    with pytest.raises(ValueError, match=r"checkpoints/9: process 1 \(.*\) does not see this"):
        choice.to_read(run, kind="checkpoints")


def test_the_first_process_chooses_where_a_run_goes_on(folder, first_says):
    late = checkpoint.Checkpointer(folder, keep_max=3)
    writer = checkpoint.Checkpointer(folder, keep_max=3)
    writer.save(state_at(9), RECORD)
    writer.close()
    assert late.latest_step() == 6
    first_says(9)
    assert choice.newest(late) == late.latest_step() == 9
    # The first one would save a step that this one takes for saved already.
    for found in (6, None):
        first_says(found)
        with pytest.raises(ValueError, match=rf"sees step 9 as the newest, the first .* {found};"):
            choice.newest(late)
    first_says(12)
    with pytest.raises(ValueError, match=r"checkpoints/12: process 1 \(.*\) does not see this"):
        choice.newest(late)
    late.close()
