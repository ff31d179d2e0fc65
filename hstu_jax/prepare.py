"""Command line that makes data: `python -m hstu_jax.prepare COMMAND ...`.

`sample`, `kuairand` and `interactions` make an event store; `list_columns` writes one as parquet
files with a training row a line; `hard_negatives` writes the files of a HardNegativeSampler. Here:
flags to options to one call. The work is in `data/sample.py`, `data/kuairand.py`,
`data/interactions.py`, `data/list_export.py` and `data/hard_edges.py`. jax is not
imported, so the command starts at once.
"""

import argparse
from collections.abc import Sequence

from hstu_jax import launchers
from hstu_jax.data import (
    event_store,
    hard_edges,
    interactions,
    kuairand,
    list_export,
    raw_interactions,
    sample,
    sample_world,
    summary,
    windowing,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, prepares the data and prints a summary.

    Args:
      argv: flags; None for the command line's.

    Raises:
      SystemExit: wrong flags or refused input; the message says what to do.
    """
    parser = argparse.ArgumentParser(prog="python -m hstu_jax.prepare", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = sample_world.SampleOptions()
    from_seed = commands.add_parser("sample", help="the generated sample in KuaiRand's shape")
    from_raw = commands.add_parser("kuairand", help="KuaiRand's official CSV files")
    for size in ("seed", "num_users", "num_items", "num_days"):
        from_seed.add_argument(f"--{size}", type=int, default=getattr(defaults, size))
    from_raw.add_argument("--raw_dir", required=True, help="folder of the CSV files")
    from_raw.add_argument("--include_random", action="store_true", help="read log_random_* too")
    share = kuairand.KuaiRandOptions().max_bad_watch_share
    from_raw.add_argument("--max_bad_watch_share", type=float, default=share)
    _add_common_flags(from_seed, defaults.windows)
    from_seed.add_argument("--out_dir", default=sample.DEFAULT_DIR, help="folder to make")
    _add_common_flags(from_raw, windowing.WindowOptions())
    from_raw.add_argument("--out_dir", required=True, help="folder to make")
    _add_interactions(commands)
    _add_hard_negatives(commands)
    from_store = commands.add_parser("list_columns", help="an event store as list columns")
    from_store.add_argument("--from", dest="store", required=True, help="folder of the event store")
    from_store.add_argument("--out_dir", required=True, help="folder to make")
    from_store.add_argument("--delimited", action="store_true", help="strings in place of lists")
    from_store.add_argument("--max_history", type=int, default=0, help="newest entries; 0 = all")
    flags = launchers.parse_alone(parser, argv)
    try:
        if flags.command in _OWN_FLAGS:
            _OWN_FLAGS[flags.command](flags)
            return
        if flags.window_events is not None and flags.window_mode == "day":
            raise ValueError(
                f"--window_events={flags.window_events}: is not read with --window_mode=day; "
                "choose another mode or leave it out."
            )
        window_events = flags.window_events
        if window_events is None:
            window_events = flags.default_window_events
        windows = windowing.WindowOptions(
            mode=flags.window_mode,
            window_events=window_events,
            positive_actions=tuple(flags.positive_actions),
            max_positives=flags.max_positives,
            min_history=flags.min_history,
        )
        common = {"item_weight_exponent": flags.item_weight_exponent, "windows": windows}
        if flags.command == "sample":
            sizes = {n: getattr(flags, n) for n in ("seed", "num_users", "num_items", "num_days")}
            options = sample_world.SampleOptions(**sizes, **common)
            store = sample.prepare(flags.out_dir, options=options, overwrite=flags.overwrite)
        else:
            raw_options = kuairand.KuaiRandOptions(
                include_random=flags.include_random,
                max_bad_watch_share=flags.max_bad_watch_share,
                **common,
            )
            store = kuairand.prepare(
                flags.raw_dir, flags.out_dir, options=raw_options, overwrite=flags.overwrite
            )
    except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
        raise SystemExit(f"error: {error}") from error
    print(summary.describe(store))


def _add_interactions(commands) -> None:
    help_text = "MovieLens, Amazon ratings or `user item` lines, with leave-one-out windows"
    command = commands.add_parser("interactions", help=help_text)
    defaults = interactions.InteractionOptions(raw_format="sequences")
    command.add_argument("--raw_file", required=True, help="plain or .gz")
    command.add_argument("--format", required=True, choices=tuple(raw_interactions.FORMATS))
    command.add_argument("--out_dir", required=True, help="folder to make")
    for name in ("min_user_events", "min_item_events", "window_events"):
        command.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    command.add_argument("--core", choices=interactions.CORES, default=defaults.core)
    command.add_argument("--item_weight_exponent", type=float, default=0.0)
    command.add_argument("--overwrite", action="store_true", help="replace an event store there")


def _interactions(flags: argparse.Namespace) -> None:
    """Writes an event store of a file of interactions."""
    options = interactions.InteractionOptions(
        raw_format=flags.format,
        min_user_events=flags.min_user_events,
        min_item_events=flags.min_item_events,
        core=flags.core,
        window_events=flags.window_events,
        item_weight_exponent=flags.item_weight_exponent,
    )
    store = interactions.prepare(
        flags.raw_file, flags.out_dir, options=options, overwrite=flags.overwrite
    )
    print(summary.describe(store))


def _add_hard_negatives(commands) -> None:
    help_text = "files of a HardNegativeSampler, from the training events of an event store"
    command = commands.add_parser("hard_negatives", help=help_text)
    defaults = hard_edges.HardEdgeOptions()
    command.add_argument("--store", required=True, help="folder of the event store")
    command.add_argument("--out_dir", help=f"folder to make; default STORE/{hard_edges.FOLDER}")
    command.add_argument("--kind", choices=hard_edges.EDGE_KINDS, default=defaults.kind)
    command.add_argument("--max_per_user", type=int, default=defaults.max_per_user)
    ids_help = "index: for list columns made from the store"
    command.add_argument("--ids", choices=hard_edges.ID_KINDS, default=defaults.ids, help=ids_help)
    command.add_argument("--item_weight_exponent", type=float, default=0.0)
    command.add_argument("--overwrite", action="store_true", help="replace files there")


def _hard_negatives(flags: argparse.Namespace) -> None:
    """Writes the files of a HardNegativeSampler."""
    options = hard_edges.HardEdgeOptions(
        kind=flags.kind,
        max_per_user=flags.max_per_user,
        item_weight_exponent=flags.item_weight_exponent,
        ids=flags.ids,
    )
    store = event_store.open_store(flags.store)
    files = hard_edges.write_hard_edges(
        store, flags.out_dir, options=options, overwrite=flags.overwrite
    )
    print(files.describe())


def _export(flags: argparse.Namespace) -> None:
    """Writes list columns, and the flags that read them."""
    options = list_export.ExportOptions(delimited=flags.delimited, max_history=flags.max_history)
    store = event_store.open_store(flags.store)
    settings = list_export.export(store, flags.out_dir, options=options)
    print(f"{flags.out_dir}: list columns of {store.path}; train on them with")
    print("\n".join(settings))


# Commands that do not share the flags about windows.
_OWN_FLAGS = {
    "hard_negatives": _hard_negatives,
    "interactions": _interactions,
    "list_columns": _export,
}


def _add_common_flags(command: argparse.ArgumentParser, rules: windowing.WindowOptions) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace an event store there")
    command.add_argument("--window_mode", choices=windowing.WINDOW_MODES, default=rules.mode)
    command.add_argument(
        "--window_events", type=int, help=f"not with day; default {rules.window_events}"
    )
    command.set_defaults(default_window_events=rules.window_events)
    command.add_argument("--positive_actions", nargs="+", default=rules.positive_actions)
    command.add_argument("--max_positives", type=int, default=rules.max_positives)
    command.add_argument("--min_history", type=int, default=rules.min_history)
    command.add_argument("--item_weight_exponent", type=float, default=0.0)


if __name__ == "__main__":
    main()
