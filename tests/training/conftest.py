"""Runs that the training tests share: compiling a step takes longer than all of its tests."""

import jax
import pytest

from hstu_jax.training import run as run_lib
from tests.training.small_config import small_config


@pytest.fixture(scope="package", autouse=True)
def _compilation_cache(tmp_path_factory):
    """Equal programs of different runs are compiled once."""
    folder = tmp_path_factory.mktemp("xla")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="package")
def run(small_store, tmp_path_factory):
    """Two groups on one device."""
    config = small_config(small_store, tmp_path_factory.mktemp("run"), data__num_groups=2)
    return run_lib.build_run(config, small_store, devices=jax.devices()[:1])
