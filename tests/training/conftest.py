"""Runs that the training tests share: compiling a step takes longer than all of its tests."""

import jax
import pytest

from hstu_jax.training import run as run_lib
from tests.training.small_config import small_config, with_two_tables


@pytest.fixture(scope="package")
def run(small_store, tmp_path_factory):
    """Two groups on one device, a model of one layer."""
    config = small_config(
        small_store,
        tmp_path_factory.mktemp("run"),
        data__num_groups=2,
        model__user_tower__hstu__attn_num_layers=1,
    )
    return run_lib.build_run(with_two_tables(config), small_store, devices=jax.devices()[:1])
