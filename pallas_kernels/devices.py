"""The device that a program under trace is for: platform, kind, compute capability.

Asked while tracing, never at import. Kernels decide by it whether they can run and with which
tiles; what they decide is in each op's folder.
"""

import dataclasses
import re

import jax

# Kinds of NVIDIA devices by a whole word of the name that drivers give (an "RTX A3000" is no A30):
# what is compiled for a device that is only described (`jax.sharding.AbstractDevice`) has nothing
# else to go by. A device that is present tells its compute capability itself.
_CAPABILITIES = (
    ("GB200", (10, 0)),
    ("B200", (10, 0)),
    ("GH200", (9, 0)),
    ("H200", (9, 0)),
    ("H100", (9, 0)),
    ("H20", (9, 0)),
    ("H800", (9, 0)),
    ("L40S?", (8, 9)),
    ("L4", (8, 9)),
    (r"RTX 40\d\d", (8, 9)),
    ("A100", (8, 0)),
    ("A800", (8, 0)),
    ("A30", (8, 0)),
    ("A10G?", (8, 6)),
    ("A40", (8, 6)),
    (r"RTX 30\d\d", (8, 6)),
    ("T4", (7, 5)),
    ("V100", (7, 0)),
)


@dataclasses.dataclass(frozen=True)
class Device:
    """What is known of a device.

    Args:
        platform: "cpu", "gpu" or "tpu".
        kind: name of the model, as the driver gives it.
        capability: CUDA compute capability (major, minor); None if it is not an NVIDIA GPU, or
            one whose name is not known.
        is_present: the program can run here; false if it is only compiled for such a device.
    """

    platform: str
    kind: str
    capability: tuple[int, int] | None
    is_present: bool


def current_device() -> Device:
    """Returns the device that the program under trace is for.

    A mesh in context (`jax.set_mesh`, `shard_map`, `jax.sharding.use_abstract_mesh`) comes first,
    then `jax.default_device`, then JAX's first device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is None:
        return _describe(_default_device())
    for device in _local_devices(described.platform):
        if device.device_kind == described.device_kind:
            return _describe(device)
    kind = described.device_kind
    return Device(described.platform, kind, capability_of_kind(kind), is_present=False)


def capability_of_kind(kind: str) -> tuple[int, int] | None:
    """Compute capability by the name of an NVIDIA device; None for other names."""
    found = (capability for name, capability in _CAPABILITIES if re.search(rf"\b{name}\b", kind))
    return next(found, None)


def _describe(device):
    text, kind = str(getattr(device, "compute_capability", "")), device.device_kind
    major, _, minor = text.partition(".")
    # AMD devices give names like gfx942 here.
    told = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    capability = told if text else capability_of_kind(kind)
    return Device(device.platform, kind, capability, is_present=True)


def _default_device():
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen


def _local_devices(platform):
    try:
        return jax.local_devices(backend=platform)
    except RuntimeError:  # no such backend here
        return []
