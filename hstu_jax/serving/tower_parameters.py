"""Parameters of an exported tower: read with Orbax and compared with the manifest.

Part of the loader (`artifact.py`): jax, numpy and orbax-checkpoint, no code of the training.
"""

import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hstu_jax.serving import manifest as manifest_lib


def read(
    path: pathlib.Path, tower: str, described: tuple[manifest_lib.Array, ...]
) -> dict[str, Any]:
    """A tower's variables on the device.

    Args:
        path: of the export.
        tower: "user" or "item".
        described: the manifest's list of arrays, of both towers.

    Raises:
        ValueError: other parameters than the manifest's; names them.
    """
    wanted = {array.name: array for array in described if array.tower == tower}
    if not wanted:
        return {}
    folder = path / f"{tower}_tower"
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder.absolute())
    found = {
        "/".join(key.key for key in keys): np.asarray(leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if set(found) != set(wanted):
        changed = sorted(set(found) ^ set(wanted))
        raise ValueError(
            f"{folder}: other parameters than the manifest's: {changed}; export again."
        )
    for name, array in found.items():
        if array_sha256(array) != wanted[name].sha256:
            raise ValueError(f"{folder}: the parameter {name} is not the manifest's; export again.")
    return jax.device_put(tree)


def array_sha256(array: np.ndarray) -> str:
    """SHA-256 of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
