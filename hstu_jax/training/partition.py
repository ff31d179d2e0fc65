"""The mesh, and how one shard's functions are placed on it with `jax.shard_map`.

The batch (along its group axis) and the rows of large tables are split over all devices; dense
parameters and small tables are replicated. `step.py` is written for one shard and names the axes of
`AXES`; a single device is a mesh of one.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hstu_jax.config import schema
from hstu_jax.tables import spec as table_spec
from hstu_jax.training import placement
from hstu_jax.training import state as state_lib

AXES = ("host", "chip")
SPLIT = P(AXES)  # first axis over all devices: batch groups, table rows
REPLICATED = P()


def make_mesh(config: schema.MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of `host` x `chip` devices; -1 takes what is left.

    With both at -1 `host` is the number of processes, and `chip` the devices of each.

    Raises:
        ValueError: the sizes do not make up the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.host, config.chip]
    if sizes == [-1, -1]:
        sizes[0] = len({device.process_index for device in devices})
    if -1 in sizes:
        known = -sizes[0] * sizes[1]
        sizes[sizes.index(-1)] = len(devices) // max(known, 1)
    if sizes[0] * sizes[1] != len(devices):
        raise ValueError(
            f"mesh.host={config.host}, mesh.chip={config.chip}: must make up the "
            f"{len(devices)} devices; set one of them to -1."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def is_ragged(config: schema.MeshConfig, mesh: Mesh) -> bool:
    """Whether the exchange of a mesh sends filled places only, or whole buckets.

    By "auto" it does on TPUs, for the tables of `step.Program.sends_filled`. XLA's CPU backend has
    no ragged all-to-all. GPUs have one that users report to be slow, so there it is for those who
    measure; we have not. Within a host of 8 B200 it had some 2 % of the bandwidth, by what seems to
    be the kernel that writes into the peers' memory, where XLA takes that. Else offsets are copied
    to the host, which waits for them, and every pair of devices has a message of its own, some 12
    us even if empty.

    Source: openxla/xla, issues 33386 and 46982 (both open), and
        xla/backends/gpu/runtime/ragged_all_to_all_thunk.cc at 02b6a78.

    Raises:
        ValueError: "ragged" on CPUs.
    """
    platform = mesh.devices.flat[0].platform
    if mesh.size == 1:
        return False  # nothing is sent
    if config.exchange == "ragged" and platform == "cpu":
        raise ValueError(
            "mesh.exchange='ragged': CPUs, simulated ones too, have no ragged all-to-all; use "
            "'auto' or 'padded', whose results are the same."
        )
    return config.exchange == "ragged" or (config.exchange == "auto" and platform == "tpu")


def split_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of batches and tables."""
    return NamedSharding(mesh, SPLIT)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of dense parameters and metrics."""
    return NamedSharding(mesh, REPLICATED)


def check_groups(num_groups: int, mesh: Mesh | jax.sharding.AbstractMesh) -> None:
    """Raises ValueError unless groups and table rows can be split evenly over the mesh."""
    if table_spec.VIRTUAL_SHARDS % mesh.size != 0:
        raise ValueError(
            f"mesh={mesh.size} devices: must divide the {table_spec.VIRTUAL_SHARDS} stripes of the "
            "embedding tables; use a power of two."
        )
    if num_groups % mesh.size != 0:
        raise ValueError(
            f"data.num_groups={num_groups}: must be a multiple of the {mesh.size} devices of the "
            f"mesh; use {mesh.size}, or fewer devices."
        )


# Where every table is split.
STATE_SPEC = state_lib.TrainState(
    step=P(), params=P(), opt_state=P(), tables=SPLIT, batch_stats=P(), ema=P()
)


def table_specs(
    specs: Iterable[table_spec.TableSpec],
    mesh: Mesh | jax.sharding.AbstractMesh,
    *,
    replicated_bytes: int,
) -> dict[str, P]:
    """Where the rows of every table are: on all devices in parts, or whole on each if small.

    Args:
        specs: the tables.
        mesh: one device has all tables whole; they count as split.
        replicated_bytes: largest size of the weights of a table that is not split.
    """

    def place(spec):
        is_small = 4 * spec.padded_rows * spec.dim <= replicated_bytes
        return REPLICATED if is_small and mesh.size > 1 else SPLIT

    return {spec.name: place(spec) for spec in specs}


def spec_of_state(
    specs: Iterable[table_spec.TableSpec],
    mesh: Mesh | jax.sharding.AbstractMesh,
    *,
    replicated_bytes: int,
) -> state_lib.TrainState:
    """Where every part of a state is; arguments as for `table_specs`."""
    tables = table_specs(specs, mesh, replicated_bytes=replicated_bytes)
    return dataclasses.replace(STATE_SPEC, tables=tables)


def with_shardings(
    shapes: state_lib.TrainState, mesh: Mesh, *, state_spec: state_lib.TrainState
) -> state_lib.TrainState:
    """Shapes of a state -> the same with the shardings that its arrays have on a mesh."""

    def place(spec, tree):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    return jax.tree.map(place, state_spec, shapes)


def place_train_step(
    function: Callable[..., Any], mesh: Mesh, *, state_spec: state_lib.TrainState = STATE_SPEC
) -> Callable[..., Any]:
    """Compiles (state, batch) -> (state, metrics) for the mesh; the state's buffers are reused."""
    specs = dict(in_specs=(state_spec, SPLIT), out_specs=(state_spec, REPLICATED))
    return _place(function, mesh, **specs, donate_argnums=(0,))


def place_eval(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    out_specs: Any = SPLIT,
    state_spec: Any = STATE_SPEC,
) -> Callable[..., Any]:
    """Compiles (state, split arrays) -> arrays for the mesh; nothing is donated.

    Args:
        function: what each device runs.
        mesh: the devices.
        out_specs: of the results.
        state_spec: of the state, or of whatever tree stands in its place.
    """
    return _place(function, mesh, in_specs=(state_spec, SPLIT), out_specs=out_specs)


def split_zeros(shape: tuple[int, ...], mesh: Mesh) -> jax.Array:
    """Zeros whose rows are split over all devices."""
    return jnp.zeros(shape, device=split_sharding(mesh))


@functools.lru_cache(maxsize=4)  # every validation asks for it
def place_block_write(mesh: Mesh) -> Callable[..., jax.Array]:
    """Compiles (rows, block, valid, number) -> rows with every device's block as its number-th.

    All but the number are split over the devices; rows are reused; where not valid 0 is written.
    """

    def write(rows, block, valid, number):
        block = jnp.where(valid[:, None], block, 0)
        return jax.lax.dynamic_update_slice_in_dim(rows, block, number * block.shape[0], axis=0)

    specs = dict(in_specs=(SPLIT, SPLIT, SPLIT, REPLICATED), out_specs=SPLIT)
    return _place(write, mesh, **specs, donate_argnums=(0,))


def _place(function, mesh, *, in_specs, out_specs, **jit_options):
    def shardings(specs):
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    # Custom gradients and kernels do not carry varying-axes types: check_vma is off.
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    # Named on both sides: on a mesh of one device JAX would give the outputs another (equal)
    # sharding than the inputs, and the second step would compile again.
    return jax.jit(
        mapped,
        in_shardings=shardings(in_specs),
        out_shardings=shardings(out_specs),
        **jit_options,
    )


def own_groups(num_groups: int, mesh: Mesh) -> tuple[int, ...] | None:
    """Numbers of the batch groups that lie on this process's devices; None = all of them."""
    return placement.own_rows(num_groups, split_sharding(mesh))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """A host batch on the mesh, split along its groups.

    Args:
        batch: arrays of this process's groups (`own_groups`), in their order.
        mesh: the devices.
    """
    return placement.put_own(batch, split_sharding(mesh))
