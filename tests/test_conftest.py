"""What the tests run with: CPU flags by default, those of real runs where a GPU is asked for."""

import os

import jax
import pytest

from tests import conftest

DEFAULT = "not long and not gpu"


@pytest.mark.parametrize("selected", [DEFAULT, "long", ""])
def test_tests_run_on_the_cpu_with_fast_compilation(selected):
    found = conftest.environment({"XLA_FLAGS": "--own=1"}, selected)
    assert found["JAX_PLATFORMS"] == "cpu"
    assert found["XLA_FLAGS"].startswith("--own=1 --xla_force_host_platform_device_count=2 ")
    assert "--xla_backend_optimization_level=0" in found["XLA_FLAGS"]
    # Workers get the same, once.
    assert conftest.environment(found, selected) == found


@pytest.mark.parametrize("selected", ["gpu", "gpu and not long", "long or gpu"])
def test_gpu_tests_run_with_the_flags_of_real_runs(selected):
    assert conftest.environment({}, selected) == {}
    assert conftest.environment({"JAX_PLATFORMS": "cuda"}, selected) == {}
    assert conftest.environment({"JAX_PLATFORMS": "cuda"}, DEFAULT) == {}


def test_this_session_has_them():
    if os.environ["JAX_PLATFORMS"] == "cpu":
        assert jax.default_backend() == "cpu" and jax.device_count() == 2
        assert "--xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"]
