"""An export against known answers: `python -m hstu_jax.hitrate --export_dir D --ground_truth G`.

Prints hit rate, recall and NDCG, by history length and popularity too; `--output` writes all as
JSON, `--picture` as SVG. The work is in `serving/hitrate.py`; the rules are in docs/serving.md.
"""

import argparse
import pathlib
from collections.abc import Sequence

from hstu_jax import launchers
from hstu_jax.serving import command_line, hitrate


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, measures and prints the table.

    Args:
        argv: flags; None for the command line's.
    """
    defaults = hitrate.HitrateOptions()
    parser = argparse.ArgumentParser(prog="python -m hstu_jax.hitrate", description=__doc__)
    command_line.add_export_flags(parser)
    parser.add_argument("--ground_truth", required=True, help="parquet rows, as a pattern")
    parser.add_argument("--positives_column", default="", help="default: cand_seq__ + item id")
    cutoffs_help = "numbers with commas between them"
    parser.add_argument("--cutoffs", type=command_line.names, help=cutoffs_help)
    parser.add_argument("--show_seen", action="store_true", help="history items may be shown")
    parser.add_argument("--show_cold", action="store_true", help="items without a training event")
    parser.add_argument("--index", default=defaults.index, help="exact, or faiss beside it")
    parser.add_argument("--batch_rows", type=int, default=defaults.batch_rows)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--picture", help="SVG file to write")
    flags = launchers.parse_alone(parser, argv)
    options = hitrate.HitrateOptions(
        cutoffs=_numbers(flags.cutoffs) or defaults.cutoffs,
        positives_column=flags.positives_column,
        exclude_seen=not flags.show_seen,
        exclude_cold=not flags.show_cold,
        index=flags.index,
        batch_rows=flags.batch_rows,
    )
    artifact = command_line.open_export(flags)
    found = hitrate.hitrate(artifact, ground_truth=flags.ground_truth, options=options)
    print(found.text())
    for path, text in ((flags.output, found.to_json), (flags.picture, found.picture)):
        if path:
            pathlib.Path(path).write_text(text())
            print(f"wrote     {path}")


def _numbers(words: tuple[str, ...] | None) -> tuple[int, ...]:
    if not all(word.isdecimal() for word in words or ()):
        raise ValueError(f"--cutoffs={','.join(words)}: must be whole numbers, as in 10,100.")
    return tuple(map(int, words or ()))


if __name__ == "__main__":
    command_line.run(main)
