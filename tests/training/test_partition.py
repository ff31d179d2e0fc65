"""Meshes that do not fit their devices are refused; runs on several devices show the rest."""

from unittest import mock

import jax
import numpy as np
import pytest

from hstu_jax.config import schema
from hstu_jax.training import partition


@pytest.mark.parametrize(
    ("host", "chip", "message"),
    [
        (3, -1, r"mesh\.host=3, mesh\.chip=-1: must make up the 2 devices; set one of them to -1"),
        (1, 4, r"mesh\.host=1, mesh\.chip=4: must make up the 2 devices"),
    ],
)
def test_a_mesh_must_make_up_the_devices(host, chip, message):
    with pytest.raises(ValueError, match=message):
        partition.make_mesh(schema.MeshConfig(host=host, chip=chip), jax.devices()[:2])


@pytest.mark.parametrize(("host", "chip", "want"), [(-1, 1, (2, 1)), (1, -1, (1, 2))])
def test_minus_one_takes_the_rest(host, chip, want):
    mesh = partition.make_mesh(schema.MeshConfig(host=host, chip=chip), jax.devices()[:2])
    assert tuple(mesh.shape.values()) == want


@pytest.mark.parametrize(
    ("num_devices", "num_groups", "message"),
    [
        (3, 3, r"mesh=3 devices: must divide the 1024 stripes of the embedding tables; use a pow"),
        (4, 2, r"data\.num_groups=2: must be a multiple of the 4 devices of the mesh; use 4, or"),
        (4, 6, r"data\.num_groups=6: must be a multiple of the 4 devices"),
    ],
)
def test_groups_and_stripes_must_divide_over_the_devices(num_devices, num_groups, message):
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((1, num_devices), partition.AXES, axis_types=axis_types)
    with pytest.raises(ValueError, match=message):
        partition.check_groups(num_groups, mesh)


def mesh_of(platform, num_devices=2):
    device = mock.Mock(spec=jax.Device, platform=platform)
    devices = np.array([[device] * num_devices])
    return mock.Mock(spec=jax.sharding.Mesh, devices=devices, size=num_devices)


@pytest.mark.parametrize(
    ("exchange", "platform", "want"),
    [
        ("auto", "cpu", False),
        ("auto", "gpu", False),
        ("auto", "tpu", True),
        ("padded", "tpu", False),
        ("padded", "cpu", False),
        ("ragged", "gpu", True),
        ("ragged", "tpu", True),
    ],
)
def test_what_the_exchange_sends(exchange, platform, want):
    config = schema.MeshConfig(exchange=exchange)
    assert partition.is_ragged(config, mesh_of(platform)) == want


def test_cpus_have_no_ragged_exchange():
    with pytest.raises(
        ValueError,
        match=r"mesh\.exchange='ragged': CPUs, simulated ones too, .* use 'auto' or 'pad",
    ):
        partition.is_ragged(schema.MeshConfig(exchange="ragged"), mesh_of("cpu"))
    # One device sends nothing: a run of many GPUs may be evaluated on a laptop.
    one = mesh_of("cpu", num_devices=1)
    assert not partition.is_ragged(schema.MeshConfig(exchange="ragged"), one)
