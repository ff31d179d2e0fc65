"""Host arrays to the devices of a mesh and back, where other processes hold part of the mesh.

Where one process holds all devices these are `jax.device_put` and `jax.device_get`. Which axis of
what is split is in `partition.py`; values that are no arrays go through `processes.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def own_rows(num_rows: int, sharding: NamedSharding) -> tuple[int, ...] | None:
    """Rows of an array, split along its first axis, that this process's devices hold.

    Returns:
        Their numbers, ascending; None if all devices are this process's own.
    """
    if sharding.is_fully_addressable:
        return None
    slices = _own_slices(num_rows, sharding)
    return tuple(row for each in slices for row in range(each.start, each.stop))


def put_own(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that are split along their first axis, each process giving what its devices hold.

    Args:
        tree: arrays on the host, with the rows of `own_rows` in their order.
        sharding: splits the first axis evenly over all devices.

    Returns:
        The whole arrays.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    # Not `device_put`, which compares the processes' arrays by collectives: this may run in a
    # thread of its own, at another time in every process.
    def put(own):
        num_rows = own.shape[0] * sharding.num_devices // len(sharding.addressable_devices)
        slices = _own_slices(num_rows, sharding)
        size = num_rows // sharding.num_devices
        place = {each.start: number * size for number, each in enumerate(slices)}

        def part(index):
            first = place[index[0].indices(num_rows)[0]]
            return own[first : first + size]

        return jax.make_array_from_callback((num_rows, *own.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)


def _own_slices(num_rows: int, sharding: NamedSharding) -> list[slice]:
    indices = sharding.addressable_devices_indices_map((num_rows,)).values()
    return [
        slice(*bounds) for bounds in sorted(index[0].indices(num_rows)[:2] for index in indices)
    ]


def replicate(tree: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """Arrays that every process has alike, whole on all devices.

    Args:
        tree: arrays on the host or on this process's devices; equal in all processes.
        sharding: replicates; None = the default device.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf):
        return jax.make_array_from_callback(leaf.shape, sharding, np.asarray(leaf).__getitem__)

    return jax.tree.map(put, tree)


def to_host(tree: Any) -> Any:
    """Arrays of a mesh, whole, on the host of every process; all processes must call it."""
    leaves = jax.tree.leaves(tree)
    if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves):
        return jax.device_get(tree)
    return jax.device_get(_replicating(leaves[0].sharding.mesh)(tree))


@functools.lru_cache(maxsize=4)
def _replicating(mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
