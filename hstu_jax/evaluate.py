"""Evaluates a checkpoint of a run on the whole catalogue: the newest, the best, or a step's.

python -m hstu_jax.evaluate --config=configs/kuairand.py:subset [--config.eval.split=validation]
    [--checkpoint=best] [--groups]
"""

import pathlib
from typing import Literal

from absl import flags

from hstu_jax import cli, process_flags
from hstu_jax.config import schema
from hstu_jax.training import closing, loop, processes

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "latest", "Checkpoint to evaluate: 'latest', 'best' (of train.keep_best), a step."
)
_GROUPS = flags.DEFINE_bool("groups", False, "Also by length of the history and by popularity.")
_RANKS = flags.DEFINE_bool("ranks", False, "Replace the ranks in the workdir, for hstu_jax.report.")
_OUTPUT = flags.DEFINE_string("output", None, "Also write the figures to this JSON file.")


def main(config: schema.Config) -> None:
    """Restores, evaluates, prints the table."""
    store = cli.open_data(config)
    result = loop.restore(config, store, step=checkpoint_step(_CHECKPOINT.value))
    table = closing.evaluate_beside_baselines(
        result.run, result.state, train_mean=False, beside_best=_CHECKPOINT.value == "latest"
    )
    if not processes.is_first():
        return
    print(table.text())
    if _GROUPS.value:
        print(table.groups_text())
    if _RANKS.value:
        print(f"ranks     {table.write_ranks(result.run.workdir)}")
    if _OUTPUT.value:
        table.write(pathlib.Path(_OUTPUT.value))
        print(f"figures   {_OUTPUT.value}")


def start_processes(config: schema.Config) -> None:
    """Meets the other processes, which must evaluate the same checkpoint."""
    flags_here = (_CHECKPOINT, _GROUPS, _RANKS, _OUTPUT)
    options = {f"--{flag.name}": flag.value for flag in flags_here}
    process_flags.start(config, options=options)


def checkpoint_step(text: str) -> int | Literal["best"] | None:
    """What `loop.restore` calls the checkpoint of the flag.

    Raises:
        ValueError: neither a word that it knows nor a step.
    """
    if text in ("latest", "best"):
        return None if text == "latest" else "best"
    if not text.isdecimal():
        raise ValueError(f"--checkpoint={text!r}: must be 'latest', 'best' or a step's number.")
    return int(text)


if __name__ == "__main__":
    cli.run_main(main, start_processes=start_processes)
