"""The best items of every user: `python -m hstu_jax.retrieve --export_dir D --input U --output T`.

Users are parquet rows of list columns, as in training. The work is in `serving/retrieval.py`;
docs/serving.md says what is in the output, how a run goes on after a stop, and how ties are broken.
"""

import argparse
from collections.abc import Sequence

from hstu_jax import launchers
from hstu_jax.serving import command_line, retrieval


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, retrieves and prints what was counted.

    Args:
        argv: flags; None for the command line's.
    """
    defaults = retrieval.RetrieveOptions()
    parser = argparse.ArgumentParser(prog="python -m hstu_jax.retrieve", description=__doc__)
    command_line.add_export_flags(parser)
    parser.add_argument("--input", required=True, help="parquet files of users, as a pattern")
    parser.add_argument("--k", type=int, default=defaults.k, help="items a user")
    parser.add_argument("--exclude_seen", action="store_true", help="leave out the history")
    parser.add_argument("--exclude_cold", action="store_true", help="only items seen in training")
    parser.add_argument("--index", default=defaults.index, help=" or ".join(retrieval.INDEXES))
    command_line.add_parts_flags(
        parser, part_rows=defaults.part_rows, batch_rows=defaults.batch_rows
    )
    flags = launchers.parse_alone(parser, argv)
    options = retrieval.RetrieveOptions(
        k=flags.k,
        exclude_seen=flags.exclude_seen,
        exclude_cold=flags.exclude_cold,
        index=flags.index,
        reserved_columns=flags.reserved_columns,
        part_rows=flags.part_rows,
        batch_rows=flags.batch_rows,
    )
    artifact = command_line.open_export(flags)
    summary = retrieval.retrieve(
        artifact, input_path=flags.input, output_path=flags.output, options=options
    )
    print(command_line.counts_line(artifact))
    if line := summary.short_line(options):
        print(line)
    print(f"wrote     {flags.output}: {summary.parts.rows:,} rows")


if __name__ == "__main__":
    command_line.run(main)
