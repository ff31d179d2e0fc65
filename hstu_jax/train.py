"""Trains HSTU Match and prints the closing table.

    python -m hstu_jax.train --config=configs/kuairand.py

The same command again goes on where the workdir stopped. It runs in several processes where it is
started so (`process_flags.py`). With `--config.train.dry_run` it prints what the run would take and
send between devices, and writes nothing. `hstu_jax/training/loop.py` has the loop.
"""

from hstu_jax import cli, process_flags
from hstu_jax.config import schema
from hstu_jax.training import closing, dry_run, loop, processes


def main(config: schema.Config) -> None:
    """Trains, then evaluates beside the baselines; with `train.dry_run` only describes the run."""
    store = cli.open_data(config)
    if config.train.dry_run:
        processes.say(dry_run.report(config, store))
        return
    result = loop.fit(config, store)
    processes.say(result.summary())
    table = closing.evaluate_beside_baselines(
        result.run, result.state, train_mean=True, beside_best=True
    )
    if not processes.is_first():
        return
    path = result.run.workdir / f"closing_{table.split}.json"
    table.write(path)
    ranks = table.write_ranks(result.run.workdir)
    print(f"{table.text()}\nfigures   {path}\nranks     {ranks}")


if __name__ == "__main__":
    cli.run_main(main, start_processes=process_flags.start, has_dry_run=True)
