"""Settings shared by all tests: two CPU devices, strict ranks, checked annotations, one cache.

The jaxtyping import hook checks every annotated array shape in both packages at run time. Folder
fixtures for the recorded reference numbers and the real data sets live here too; nothing else does.
"""

import gc
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping

import pytest

# Most of the suite's time is compilation of small programs: LLVM without optimization takes a third
# off it, XLA's older emitters of fused loops another third, and compiling a program in one part
# some more. XLA's passes over whole programs, which decide the order of sums, run as in production.
_CPU_FLAGS = (
    " --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1"
)

# Many tests, and commands that they start, compile the same program: a cache that lives as long as
# the session. Workers of pytest-xdist inherit the controller's.
_OWN_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _OWN_CACHE = tempfile.mkdtemp(prefix="hstu_jax_compilations_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _OWN_CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def environment(given: Mapping[str, str], selected: str) -> dict[str, str]:
    """Variables to set before JAX is imported.

    Tests run on the CPU with the flags above, unless `JAX_PLATFORMS` says otherwise. With `-m gpu`
    JAX takes the best device there is, and the flags are those of real runs.

    Args:
        given: the environment.
        selected: the expression of `-m`.
    """
    wants_gpu = re.search(r"(?<!not )\bgpu\b", selected) is not None
    platforms = given.get("JAX_PLATFORMS", "" if wants_gpu else "cpu")
    if platforms != "cpu":
        return {}
    flags = given.get("XLA_FLAGS", "")
    # Workers of pytest-xdist inherit what the controller has set.
    flags += "" if _CPU_FLAGS in flags else _CPU_FLAGS
    return {"JAX_PLATFORMS": platforms, "XLA_FLAGS": flags}


def pytest_configure(config):
    """Sets up JAX, before any test module is imported."""
    os.environ.update(environment(os.environ, config.option.markexpr))

    import jax
    from jaxtyping import install_import_hook

    # The hook stays on for the whole session: modules are imported as the tests ask for them.
    install_import_hook(["hstu_jax", "pallas_kernels"], "beartype.beartype")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish(session):
    """Leaves what lives as long as the session, modules mostly, out of garbage collection.

    The rest is collected less often: passes over millions of objects cost a twentieth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_runtest_setup(item):
    """Skips what needs a GPU where JAX finds none."""
    if item.get_closest_marker("gpu") is None:
        return
    import jax

    if jax.default_backend() != "gpu":
        pytest.skip(f"needs an NVIDIA GPU; JAX has {jax.default_backend()}")


def pytest_unconfigure(config):
    """Removes the cache of compilations, in the process that made it."""
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """Folder of the reference's recorded numbers: `HSTU_GOLDEN_DIR`, or the copies in `tests`."""
    if "HSTU_GOLDEN_DIR" in os.environ:
        return pathlib.Path(os.environ["HSTU_GOLDEN_DIR"])
    shared = _ROOT.parent / "shared" / "golden"
    return shared if shared.is_dir() else _ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def real_data_dir() -> pathlib.Path:
    """Folder of the real data sets (`HSTU_DATA_DIR`)."""
    folder = pathlib.Path(os.environ.get("HSTU_DATA_DIR", _ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set HSTU_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    """A generated sample of 150 users and 1,000 items over 4 days, written once a session."""
    from hstu_jax.data import sample, sample_world

    options = sample_world.SampleOptions(num_users=150, num_items=1_000, num_days=4)
    return sample.prepare(tmp_path_factory.mktemp("data") / "small", options=options)
