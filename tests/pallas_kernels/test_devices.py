"""The device a program is traced for: a mesh in context, then the default device."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import devices
from pallas_kernels.hstu_attention import compile_check, tiles


def test_the_default_device_is_this_cpu():
    found = devices.current_device()
    assert (found.platform, found.capability, found.is_present) == ("cpu", None, True)
    with jax.default_device(jax.devices()[1]):
        assert devices.current_device().platform == "cpu"
    with jax.default_device("cpu"):
        assert devices.current_device().platform == "cpu"


def test_a_described_device_is_not_present():
    with jax.sharding.use_abstract_mesh(compile_check.abstract_gpu("NVIDIA A100-SXM4-80GB")):
        found = devices.current_device()
    assert found == devices.Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), is_present=False)


@dataclasses.dataclass(frozen=True)
class _Driver:
    """A device as JAX's client of a GPU gives it."""

    device_kind: str
    compute_capability: str
    platform: str = "gpu"


@pytest.mark.parametrize(
    ("told", "capability"),
    [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", None)],
)
def test_what_the_driver_tells_goes_before_the_name(told, capability, monkeypatch):
    """A model that no table here knows, and a name that would say something else."""
    for kind in ("NVIDIA Something New", "NVIDIA A100-SXM4-80GB"):
        device = _Driver(kind, told)
        monkeypatch.setattr(jax, "local_devices", lambda *_, device=device, **__: [device])
        found = devices.current_device()
        assert (found.kind, found.capability, found.is_present) == (kind, capability, True)
    if capability == (9, 0):
        sizes = dict(qk_dim=128, v_dim=128, row_len=4096)
        chosen = tiles.choose_tiles(found.capability, jnp.dtype("bfloat16"), **sizes)
        assert chosen == tiles.choose_tiles((9, 0), jnp.dtype("bfloat16"), **sizes)
        assert chosen != tiles.choose_tiles((8, 0), jnp.dtype("bfloat16"), **sizes)


def test_the_name_decides_where_the_driver_tells_nothing(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [_Driver("NVIDIA A100-SXM4-80GB", "")])
    assert devices.current_device().capability == (8, 0)
    monkeypatch.setattr(jax, "local_devices", lambda: [_Driver("NVIDIA Something New", "")])
    assert devices.current_device().capability is None


def test_inside_shard_map_the_mesh_decides():
    mesh = jax.make_mesh((2,), ("chip",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = []

    def run(x):
        seen.append(devices.current_device())
        return x

    spec = jax.P("chip")
    jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(
        jnp.ones(2)
    )
    assert {device.platform for device in seen} == {"cpu"}
    assert all(device.is_present for device in seen)


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA H200", (9, 0)),
        ("NVIDIA GH200 480GB", (9, 0)),
        ("NVIDIA B200", (10, 0)),
        ("NVIDIA L40S", (8, 9)),
        ("NVIDIA A10G", (8, 6)),
        ("NVIDIA A100 80GB PCIe", (8, 0)),
        ("NVIDIA GeForce RTX 4090", (8, 9)),
        ("Tesla V100-SXM2-16GB", (7, 0)),
        ("NVIDIA RTX A3000 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("AMD Instinct MI300X", None),
        ("cpu", None),
    ],
)
def test_capability_by_name(kind, capability):
    assert devices.capability_of_kind(kind) == capability
