"""Prints what a bug report needs: versions, devices, and which kernel will run.

python -m hstu_jax.doctor
"""

import importlib.metadata
import platform

import jax

from hstu_jax import cli
from pallas_kernels.hstu_attention import api as attention

_PACKAGES = (
    "hstu_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "pyarrow",
    "ml-collections",
    "jax-cuda13-plugin",
)


def report() -> str:
    """The report as text, one `name: value` per line."""
    lines = [f"python: {platform.python_version()} on {platform.machine()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name}: {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name}: not installed")
    lines.append(f"backend: {jax.default_backend()}, {jax.process_count()} process(es)")
    for device in jax.devices():
        lines.append(f"device {device.id}: {device.device_kind} ({device.platform})")
    lines.append(f"attention kernel for 'auto': {attention.auto_implementation()}")
    warning = cli.unused_accelerator_warning()
    if warning:
        lines.append(warning)
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
