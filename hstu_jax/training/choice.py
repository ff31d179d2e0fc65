"""Which checkpoint a run goes on from or reads: one choice, the first process's, for all of them.

Each process would list the folder itself, but network file systems show new files late, and a run
that trains meanwhile saves and removes checkpoints. What is in a checkpoint is in `checkpoint.py`.
"""

import json
import pathlib
import socket
from typing import Any, Literal

from hstu_jax.training import checkpoint, processes
from hstu_jax.training import run as run_lib


class NoCheckpoint(FileNotFoundError):
    """There is no such checkpoint; raised in all processes alike."""


def newest(checkpointer: checkpoint.Checkpointer) -> int | None:
    """Step of the newest checkpoint, to go on from; None if there is none.

    With several processes all must call it; later saves are of steps after it in all of them.

    Raises:
        ValueError: this process does not see it, or sees a later one.
    """
    step = _of_the_first("newest checkpoint", checkpointer.latest_step())
    if processes.is_first():
        return step
    if step is not None:
        _wait_for(checkpointer.folder / str(step))
    checkpointer.reload()
    own = checkpointer.latest_step()
    if own != step:
        raise ValueError(
            f"{checkpointer.folder}: process {processes.index()} ({socket.gethostname()}) sees "
            f"step {own} as the newest, the first process {step}; see that no other run writes "
            "there and that all hosts share the folder, and start again."
        )
    return step


def to_read(
    run: run_lib.Run, *, kind: Literal["checkpoints", "best"], step: int | None = None
) -> int:
    """Step of a checkpoint to read.

    With several processes all must call it.

    Args:
        run: the run.
        kind: folder of its workdir.
        step: which; None is the newest.

    Raises:
        NoCheckpoint: the first process does not find it.
        ValueError: this process does not see what the first one found.
    """
    folder = run.workdir / kind
    if not _of_the_first(f"{kind} folder", folder.is_dir()):
        how = ", with train.keep_best.metric set" if kind == "best" else ""
        raise NoCheckpoint(
            f"{folder}: no such folder; train first with `python -m hstu_jax.train "
            f"--config=...`{how}."
        )
    if not processes.is_first():
        _wait_for(folder)
    # All processes open it: Orbax meets the others there.
    checkpointer = run.checkpointer(read_only=True, folder=kind)
    try:
        steps = _of_the_first(f"{kind} to read", list(checkpointer.all_steps()))
    finally:
        checkpointer.close()
    step = max(steps, default=None) if step is None else step
    if step not in steps:
        raise NoCheckpoint(f"{folder}: no checkpoint of step {step}; there are {steps}.")
    if not processes.is_first():
        _wait_for(folder / str(step))
    return step


def _of_the_first(name: str, value: Any) -> Any:
    """The first process's value, which JSON can write."""
    return json.loads(processes.exchange(name, json.dumps(value))[0])


def _wait_for(path: pathlib.Path) -> None:
    """Orbax names a checkpoint by its step once it is whole."""
    if not processes.comes_into_sight(path):
        raise ValueError(
            f"{path}: process {processes.index()} ({socket.gethostname()}) does not see this "
            "checkpoint, which the first process found; use a workdir that all hosts share, and "
            "start again if a run that trains meanwhile has removed it."
        )
