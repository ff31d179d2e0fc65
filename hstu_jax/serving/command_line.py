"""What the command lines over an export share: its flag, JAX's cache, errors as messages.

`hstu_jax/{retrieve,predict,hitrate}.py` use the standard library's flags and import what the loader
imports (`hitrate` reads `hstu_jax.metrics` too), so that they run where the training's packages are
not installed.
"""

import argparse
import os
import sys
from collections.abc import Callable

import jax

from hstu_jax.serving import artifact as artifact_lib

_CACHE = os.path.join("~", ".cache", "hstu_jax", "xla")


def add_export_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `open_export`."""
    parser.add_argument("--export_dir", required=True, help="folder of `hstu_jax.export`")
    parser.add_argument(
        "--on_unknown",
        choices=("count", "refuse"),
        default="count",
        help="history items without a training event",
    )
    cache_help = "folder of compiled programs; '' keeps none"
    parser.add_argument("--compilation_cache", default=_CACHE, help=cache_help)


def add_parts_flags(parser: argparse.ArgumentParser, *, part_rows: int, batch_rows: int) -> None:
    """Adds the flags of a command that writes parquet for parquet; the numbers are defaults."""
    parser.add_argument("--output", required=True, help="parquet file to make")
    parser.add_argument("--reserved_columns", type=names, default=())
    parser.add_argument("--part_rows", type=int, default=part_rows)
    parser.add_argument("--batch_rows", type=int, default=batch_rows)


def open_export(flags: argparse.Namespace) -> artifact_lib.Artifact:
    """Opens the export of the flags and says what it is."""
    if flags.compilation_cache:
        folder = os.path.expanduser(flags.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    artifact = artifact_lib.load(flags.export_dir, on_unknown=flags.on_unknown)
    manifest = artifact.manifest
    print(
        f"export    {flags.export_dir}: model {manifest.model_version[:12]}, step "
        f"{manifest.source_step:,}, width {manifest.dim}, {manifest.similarity}"
    )
    print(f"devices   {len(jax.devices())} {jax.devices()[0].platform}")
    return artifact


def counts_line(artifact: artifact_lib.Artifact) -> str:
    """What the towers counted, without zeros."""
    counted = [f"{count:,} {name}" for name, count in artifact.counts.items() if count]
    return "counted   " + (", ".join(counted) or "nothing")


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them, as a tuple; a type for `add_argument`."""
    return tuple(name for name in text.split(",") if name)


def run(main: Callable[[], None]) -> None:
    """Calls `main`; an error that is the user's to mend ends the program as a message, status 2."""
    try:
        main()
    except (ImportError, OSError, TypeError, ValueError) as error:
        if os.environ.get("HSTU_JAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        print("(set HSTU_JAX_TRACEBACK=1 to see where it was raised)", file=sys.stderr)
        sys.exit(2)
