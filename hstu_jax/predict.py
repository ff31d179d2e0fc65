"""Vectors of users or items: `python -m hstu_jax.predict --export_dir D --tower user ...`.

Rows are parquet, users as list columns, items with bare names (`video_id`). The work is in
`serving/prediction.py`; docs/serving.md says how a run goes on after a stop.
"""

import argparse
from collections.abc import Sequence

from hstu_jax import launchers
from hstu_jax.serving import command_line, prediction


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, computes and prints what was counted.

    Args:
        argv: flags; None for the command line's.
    """
    defaults = prediction.PredictOptions()
    parser = argparse.ArgumentParser(prog="python -m hstu_jax.predict", description=__doc__)
    command_line.add_export_flags(parser)
    parser.add_argument("--input", required=True, help="parquet files, as a pattern")
    parser.add_argument("--tower", default=defaults.tower, help=" or ".join(prediction.TOWERS))
    command_line.add_parts_flags(
        parser, part_rows=defaults.part_rows, batch_rows=defaults.batch_rows
    )
    flags = launchers.parse_alone(parser, argv)
    options = prediction.PredictOptions(
        tower=flags.tower,
        reserved_columns=flags.reserved_columns,
        part_rows=flags.part_rows,
        batch_rows=flags.batch_rows,
    )
    artifact = command_line.open_export(flags)
    summary = prediction.predict(
        artifact, input_path=flags.input, output_path=flags.output, options=options
    )
    print(command_line.counts_line(artifact))
    print(f"wrote     {flags.output}: {summary.rows:,} rows")


if __name__ == "__main__":
    command_line.run(main)
