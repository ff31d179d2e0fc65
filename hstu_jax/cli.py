"""Flags and set-up that the command lines share, defined once.

`python -m hstu_jax.train --config=configs/kuairand.py[:variant] --config.field=value --workdir=DIR`
"""

import os
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from hstu_jax.config import resolve, schema
from hstu_jax.data import event_store, sample

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, e.g. configs/kuairand.py or configs/kuairand.py:subset."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; overrides config.workdir.")
# Compiled programs are kept between runs: the second start of a configuration skips most of it.
_CACHE = os.path.join("~", ".cache", "hstu_jax", "xla")
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", _CACHE, "Folder of compiled programs; '' keeps none."
)


def run_main(main: Callable[[schema.Config], None], *, command: str | None = None) -> None:
    """Parses the flags, sets JAX up, and calls `main` with the resolved configuration.

    Errors in the configuration or the data end the program with their message and status 2.

    Args:
        main: the program.
        command: word that must stand before the flags, if any.
    """

    def absl_main(argv: list[str]) -> None:
        expected = [] if command is None else [command]
        if argv[1:] != expected:
            raise app.UsageError(f"arguments {argv[1:]} before the flags: expected {expected}.")
        try:
            raw = CONFIG.value
            if WORKDIR.value:
                raw.workdir = WORKDIR.value
            config = resolve.resolve(raw)
            set_up_jax()
            main(config)
        except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
            if os.environ.get("HSTU_JAX_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            print("(set HSTU_JAX_TRACEBACK=1 to see where it was raised)", file=sys.stderr)
            sys.exit(2)

    flags.mark_flag_as_required("config")
    app.run(absl_main)


def set_up_jax() -> None:
    """Points JAX at the cache of compiled programs and warns of an accelerator left unused."""
    import jax

    logging.set_verbosity(logging.WARNING)  # Orbax reports every file it touches at INFO
    if COMPILATION_CACHE.value:
        folder = os.path.expanduser(COMPILATION_CACHE.value)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    warning = unused_accelerator_warning()
    if warning:
        print(warning, file=sys.stderr)


def unused_accelerator_warning() -> str:
    """A loud line if an NVIDIA GPU is visible but JAX runs on the CPU; "" otherwise."""
    import jax

    has_gpu = os.path.exists("/dev/nvidia0") or os.path.exists("/dev/nvidiactl")
    if not has_gpu or jax.default_backend() != "cpu":
        return ""
    chosen = os.environ.get("JAX_PLATFORMS")
    reason = f"JAX_PLATFORMS={chosen}" if chosen else "JAX was installed without CUDA"
    return (
        f"WARNING: this machine has an NVIDIA GPU, but JAX runs on the CPU ({reason}). "
        "Install with `pip install -e '.[cuda]'`."
    )


def open_data(config: schema.Config) -> event_store.EventStore:
    """The configuration's event store; a missing generated sample is written first."""
    path = config.data.path
    if config.data.source == "sample" and not os.path.exists(path):
        print(f"data      {path} is missing: generating the sample (not real users)")
        sample.prepare(path)
    store = event_store.open_store(path)
    if config.data.source == "sample":
        print(f"data      {path}: GENERATED sample, no real users or items")
    return store
