"""Settings shared by all tests: two CPU devices, strict ranks, checked annotations, one cache.

The jaxtyping import hook checks every annotated array shape in both packages at run time. Folder
fixtures for the recorded reference numbers and the real data sets live here too; nothing else does.
"""

import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation of small programs: LLVM without optimization takes a third
# off it, XLA's older emitters of fused loops another third. XLA's passes over whole programs, which
# decide the order of sums, run as they do in production.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    + " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)

# Many tests, and commands that they start, compile the same program: a cache that lives as long as
# the session. Workers of pytest-xdist inherit the controller's.
_OWN_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _OWN_CACHE = tempfile.mkdtemp(prefix="hstu_jax_compilations_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _OWN_CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# The hook stays on for the whole session: modules are imported as the tests ask for them.
install_import_hook(["hstu_jax", "pallas_kernels"], "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")

_ROOT = pathlib.Path(__file__).resolve().parent.parent


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
