"""Flags and set-up that the command lines share, defined once.

`python -m hstu_jax.train --config=configs/kuairand.py[:variant] --config.field=value --workdir=DIR`
"""

import contextlib
import functools
import glob
import os
import re
import sys
from collections.abc import Callable, Mapping

from absl import app, flags, logging
from ml_collections import config_flags

from hstu_jax import host_memory, launchers
from hstu_jax.config import resolve, schema, seed_fields
from hstu_jax.data import event_store, list_columns, sample

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, e.g. configs/kuairand.py or configs/kuairand.py:subset."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; overrides config.workdir.")
# Compiled programs are kept between runs: the second start of a configuration skips most of it.
_CACHE = os.path.join("~", ".cache", "hstu_jax", "xla")
LAUNCHER = flags.DEFINE_enum(
    "launcher",
    "auto",
    ["auto", "none", "jax"],
    "Who started this process among others. auto: SLURM (srun), Open MPI or the TPU hosts of GKE, "
    "where one of them did; none: it runs alone, whatever started it; jax: whatever "
    "jax.distributed.initialize() finds, e.g. a TPU pod of Compute Engine or an indexed Job of "
    "Kubernetes.",
)
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", _CACHE, "Folder of compiled programs; '' keeps none."
)

Program = Callable[[schema.Config], None]


def run_main(
    main: Program | Mapping[str, Program],
    *,
    uses_devices: bool = True,
    start_processes: Callable[[schema.Config], None] | None = None,
    has_dry_run: bool = False,
) -> None:
    """Parses the flags, sets JAX up, and calls `main` with the resolved configuration.

    Errors in the configuration or the data end the program with their message and status 2.

    Args:
        main: the program, or word that must stand before the flags -> program.
        uses_devices: False leaves JAX on the CPU, so that nothing is reserved on an accelerator.
        start_processes: meets the other processes of the run, if there are any; None for programs
            of one process, which refuse a launcher that started several.
        has_dry_run: the program reads `train.dry_run`; any other refuses it.
    """

    def absl_main(argv: list[str]) -> None:
        program = _chosen(main, argv[1:])
        raw = CONFIG.value
        if WORKDIR.value:
            raw.workdir = WORKDIR.value
        config = resolve.resolve(raw)
        is_dry = config.train.dry_run
        if is_dry and not has_dry_run:
            raise ValueError(
                "train.dry_run=True: only `python -m hstu_jax.train` has a dry run; leave it out."
            )
        if config.train.dry_run_devices:
            simulate_devices(config.train.dry_run_devices)
        if uses_devices and _computes_on_the_cpu():
            host_memory.keep_freed_memory()
        if start_processes is None:
            refuse_launcher()
            if uses_devices:
                set_up_jax(keeps_programs=not is_dry)
            else:
                _stay_on_the_cpu()
            program(config)
            return
        from hstu_jax.training import processes

        logging.set_verbosity(logging.WARNING)  # JAX reports how the processes meet at INFO
        with processes.ending_together(_explain):
            start_processes(config)
            set_up_jax(keeps_programs=not is_dry)
            program(config)

    flags.mark_flag_as_required("config")
    # absl reads the configuration file while it parses flags: a wrong variant or a misspelt field
    # is met there, outside of `absl_main`.
    with _errors_as_messages():
        app.run(absl_main)


def _chosen(main, words: list[str]) -> Program:
    if not isinstance(main, Mapping):
        if words:
            raise app.UsageError(f"arguments {words} before the flags: expected [].")
        return main
    if len(words) != 1 or words[0] not in main:
        raise app.UsageError(f"arguments {words} before the flags: expected one of {list(main)}.")
    return main[words[0]]


def run_without_config(main: Callable[[], None], *, uses_devices: bool = True) -> None:
    """Parses the flags, sets JAX up, and calls `main`, which reads its configuration elsewhere.

    Errors end the program as in `run_main`.

    Args:
        main: the program.
        uses_devices: as for `run_main`.
    """

    def absl_main(argv: list[str]) -> None:
        if argv[1:]:
            raise app.UsageError(f"arguments {argv[1:]}: expected flags alone.")
        refuse_launcher()
        set_up_jax(warns=uses_devices)
        if not uses_devices:
            _stay_on_the_cpu()
        main()

    with _errors_as_messages():
        app.run(absl_main)


# What is the user's to mend; other errors show where they were raised.
_USER_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,  # a package that only this command needs
    KeyError,  # ml_collections: a misspelt section on the command line
    OSError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def _errors_as_messages():
    """Ends the program with the message of an error that is the user's to mend."""
    try:
        yield
    except _USER_ERRORS as error:
        message = _explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        print("(set HSTU_JAX_TRACEBACK=1 to see where it was raised)", file=sys.stderr)
        sys.exit(2)


def _explain(error: Exception) -> str | None:
    """The message of an error that is the user's to mend, unless its traceback is asked for."""
    if not isinstance(error, _USER_ERRORS) or os.environ.get("HSTU_JAX_TRACEBACK"):
        return None
    return error_text(error)


def error_text(error: Exception) -> str:
    """The message of an error; a field of the reference that we lack gets its fate."""
    # A KeyError's own text is the quoted representation of its message.
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    # The locked ConfigDict says `Key "name" does not exist ...`, or the quoted name alone.
    unknown = re.match(r"""'?Key "(\w+)" does not|["']+(\w+)["']+$""", text)
    if not isinstance(error, AttributeError) or unknown is None:
        return text
    name = unknown[1] or unknown[2]
    field = seed_fields.find(name)
    if field is None:
        return text
    rule, advice = seed_fields.answer(field)
    return f"{name}: {rule}; {advice}."


def set_up_jax(*, warns: bool = True, keeps_programs: bool = True) -> None:
    """Points JAX at the cache of compiled programs and warns of an accelerator left unused.

    Args:
        warns: of an accelerator.
        keeps_programs: False neither reads nor writes the cache.
    """
    import jax

    logging.set_verbosity(logging.WARNING)  # Orbax reports every file it touches at INFO
    if not keeps_programs:
        jax.config.update("jax_enable_compilation_cache", False)
    elif COMPILATION_CACHE.value:
        folder = os.path.expanduser(COMPILATION_CACHE.value)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    warning = unused_accelerator_warning() if warns else ""
    if warning:
        print(warning, file=sys.stderr)


def refuse_launcher() -> None:
    """Raises ValueError if a launcher started this program, which runs in one process, many times.

    All of them would do the same, and write the same files at once.
    """
    launcher = launchers.find(os.environ) if LAUNCHER.value == "auto" else None
    if LAUNCHER.value == "jax":
        raise ValueError("--launcher=jax: this command runs in one process; leave it out.")
    if launcher is not None:
        raise ValueError(launcher.alone())


def simulate_devices(count: int) -> None:
    """Gives JAX a number of CPU devices in place of those of the machine.

    Must come before anything asks JAX for its devices.
    """
    import jax

    _stay_on_the_cpu()
    jax.config.update("jax_num_cpu_devices", count)


def _stay_on_the_cpu() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")


def _computes_on_the_cpu() -> bool:
    """Whether JAX will take the CPU, told without asking it: that would start its threads."""
    platforms = _platforms()
    if platforms:
        return platforms.split(",")[0] == "cpu"
    tpus = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return not tpus and launchers.installed_gpus() == 0


def _platforms() -> str | None:
    """What JAX was told to use, by its configuration or JAX_PLATFORMS."""
    import jax

    return jax.config.jax_platforms


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


def _write_sample(path: str) -> None:
    if not os.path.exists(path):
        print(f"data      {path} is missing: generating the sample (invented, not real users)")
        sample.prepare(path)


def open_data(config: schema.Config) -> event_store.EventStore:
    """The configuration's data; a missing generated sample is written first, but in a dry run.

    Raises:
        FileNotFoundError: no prepared data; names the command that makes it.
        ValueError: the folder holds an older sample, or the oracle is asked of real data.
    """
    if config.data.source == "list_columns":
        if config.eval.oracle:
            raise ValueError(
                "eval.oracle=True: only the generated sample has true probabilities, not list "
                "columns; leave it out."
            )
        return list_columns.open_list_columns(config)
    from hstu_jax.training import processes

    path = config.data.path
    wants_sample = config.data.source == "sample"
    if wants_sample and not config.train.dry_run:
        processes.first_then_all("sample", functools.partial(_write_sample, path))
    if not os.path.exists(path):
        if not wants_sample:
            raise FileNotFoundError(
                f"data.path={path!r}: no such folder; make it with `python -m hstu_jax.prepare "
                f"kuairand --raw_dir <folder of the CSV files> --out_dir {path}` (KuaiRand), or as "
                "the head of the configuration's file says."
            )
        if config.train.dry_run:
            raise FileNotFoundError(
                f"data.path={path!r}: no such folder, and a dry run writes nothing; make it with "
                f"`python -m hstu_jax.prepare sample --out_dir {path}`."
            )
        raise FileNotFoundError(
            f"data.path={path!r}: the first process wrote the sample, and it is not on this host; "
            "use a folder that all hosts share, or write it on every host before."
        )
    store = event_store.open_store(path)
    is_sample = store.stats["source"] == sample.SOURCE
    if is_sample:
        processes.say(f"data      {path}: GENERATED sample, no real users or items")
    if config.eval.oracle and not is_sample:
        raise ValueError(
            f"eval.oracle=True: only the generated sample has true probabilities, not {path}; "
            "leave it out."
        )
    if wants_sample and store.stats.get("options") != sample.recorded_options():
        raise ValueError(
            f"data.path={path!r}: holds a sample of other options than this version's; remove it, "
            "or set data.source='event_store' to use it as it is."
        )
    return store
