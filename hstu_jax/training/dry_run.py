"""What a run would take on its devices and send between them, before anything is allocated.

    python -m hstu_jax.train --config=configs/kuairand.py --config.train.dry_run

The training step is compiled from shapes alone, for the largest batch; memory and collectives are
read from the compiled program. With `train.dry_run_devices` the devices are simulated on the CPU.
Nothing is written. Not here: times (`scaling.py` models them).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import flax.traverse_util
import jax

from hstu_jax.config import schema
from hstu_jax.data import event_store
from hstu_jax.training import collectives, partition
from hstu_jax.training import run as run_lib
from hstu_jax.training.inspection import size_text


@dataclasses.dataclass(frozen=True)
class DryRun:
    """A compiled step and what it takes, in bytes on each device.

    Attributes:
        state: shapes and shardings of the run's state.
        batch: of what a step takes: a batch, or a tuple of them.
        arguments: state and batch together, as the compiled step has them.
        results: of the step; those that reuse an argument's memory included.
        reused: results that lie in the memory of the state they replace.
        temporaries: activations, gradients and buffers of the exchange.
        collectives: of a step; one in a loop of unknown length counts as one run.
    """

    state: Any
    batch: Any
    arguments: int
    results: int
    reused: int
    temporaries: int
    collectives: tuple[collectives.Collective, ...]

    @property
    def total(self) -> int:
        """All memory of a step."""
        return self.arguments + self.results - self.reused + self.temporaries

    @property
    def exchange(self) -> int:
        """Room for what arrives by all-to-all, in all tables together.

        As much is laid out to be sent, unless the exchange sends filled places only. Memory: the
        batches of an accumulating step use it one after the other.
        """
        return sum(each.result_bytes for each in self.collectives if "all-to-all" in each.kind)


def compile_step(run: run_lib.Run) -> DryRun:
    """Compiles a run's step for the largest of its batches; allocates no state."""
    state = run_lib.abstract_state(run)
    batch = run_lib.abstract_batch(
        run.pipeline,
        num_groups=run.config.data.num_groups,
        sharding=partition.split_sharding(run.mesh),
    )
    per_step = run.config.train.gradient_accumulation_steps
    batch = batch if per_step == 1 else (batch,) * per_step
    compiled = run.train_step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    return DryRun(
        state=state,
        batch=batch,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        reused=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        collectives=collectives.read(compiled.as_text()),
    )


def report(
    config: schema.Config,
    store: event_store.EventStore,
    *,
    devices: list[jax.Device] | None = None,
) -> str:
    """The text of a dry run: mesh, what lies where, bytes on each device, collectives of a step.

    Args:
        config: the configuration.
        store: the opened data that `config.data` names.
        devices: devices of the mesh; None takes all.

    Raises:
        ValueError: the configuration does not fit the data or the devices.
    """
    run = run_lib.build_run(config, store, devices=devices)
    wanted = config.train.dry_run_devices
    if wanted not in (0, run.mesh.size):
        raise ValueError(
            f"train.dry_run_devices={wanted}: JAX has {run.mesh.size} devices already; simulate "
            "them before its first use, as `python -m hstu_jax.train` does."
        )
    found = compile_step(run)
    notes = []
    if wanted:
        notes.append(
            "          simulated: compiled for CPUs, whose attention and temporaries are others "
            "than a GPU's or TPU's"
        )
    if len(run.pipeline.shapes) > 1:
        notes.append(f"          the largest of {len(run.pipeline.shapes)} batch shapes")
    if config.train.gradient_accumulation_steps > 1:
        notes.append(
            f"          a step takes {config.train.gradient_accumulation_steps} batches in a loop: "
            "memory holds the rows that one of them fetches, what is sent is of all"
        )
    lines = [
        run_lib.describe(run, found.state),
        f"dry run   {per_device_bytes(found.state):,} bytes of state on each device; nothing is "
        "allocated or written",
        *notes,
        "",
        *_placement(found.state),
        "",
        *_memory(found),
        "",
        *_traffic(found.collectives),
    ]
    return "\n".join(lines)


def per_device_bytes(tree: Any) -> int:
    """Memory that a tree of arrays or of shapes with shardings takes on each device."""
    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _shard_bytes(leaf) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return leaf.dtype.itemsize * jax.ShapeDtypeStruct(shape, leaf.dtype).size


def _placement(state) -> list[str]:
    """A line for every parameter and every table: shape, how it is split, bytes on each device."""
    arrays = flax.traverse_util.flatten_dict(state.params, sep="/")
    tables = {name: table.weights for name, table in state.tables.items()}
    width = max(map(len, [*arrays, *tables]))

    def lines(leaves):
        for name, leaf in sorted(leaves.items()):
            shape = " x ".join(f"{size:,}" for size in leaf.shape)
            yield f"  {name:{width}}  {shape}, {_where(leaf)}: {size_text(_shard_bytes(leaf))}"

    return [
        "dense parameters, their optimizer's state beside them",
        *lines(arrays),
        "embedding tables, their optimizer's state beside their rows",
        *lines(tables),
    ]


def _where(leaf) -> str:
    num_devices = leaf.sharding.num_devices
    if num_devices == 1:
        return "on the one device"
    if leaf.sharding.is_fully_replicated:
        return f"whole on each of {num_devices} devices"
    rows, *_ = leaf.sharding.shard_shape(leaf.shape)
    return f"split over {num_devices} devices, {rows:,} rows on each"


def _memory(found: DryRun) -> list[str]:
    state = found.state
    weights = {name: table.weights for name, table in state.tables.items()}
    slots = {name: table.slots for name, table in state.tables.items()}
    parts = [
        ("dense parameters", per_device_bytes(state.params)),
        ("their optimizer state, average, statistics", _beside_parameters(state)),
        ("embedding tables", per_device_bytes(weights)),
        ("their optimizer state", per_device_bytes(slots)),
        ("batch", per_device_bytes(found.batch)),
        ("temporaries of the compiled step: activations, gradients, exchange", found.temporaries),
        (_received(found.collectives), found.exchange),
        ("results beside the state (metrics)", found.results - found.reused),
        ("all of a step", found.total),
    ]
    width = max(len(name) for name, _ in parts)
    return [
        "bytes on each device",
        *(f"  {n:{width}}  {b:>17,}  {size_text(b)}" for n, b in parts),
    ]


def _is_ragged(found: Iterable[collectives.Collective]) -> bool:
    return any(each.kind == "ragged-all-to-all" for each in found)


def _received(found: Iterable[collectives.Collective]) -> str:
    if _is_ragged(found):
        return "  room for what all-to-all brings; it is sent from where it lies"
    return "  received by all-to-all; as much lies ready to be sent"


def _beside_parameters(state) -> int:
    return per_device_bytes((state.opt_state, state.ema, state.batch_stats, state.step))


def _bound(found: Iterable[collectives.Collective]) -> str:
    # How many places are filled is known by the data alone, and one device may have the rows that
    # all ask for; but what all send arrives somewhere, and fits the room there.
    return "on average at most " if _is_ragged(found) else ""


def _traffic(found: Sequence[collectives.Collective]) -> list[str]:
    """A line for every kind of collective and number of devices in a group."""
    by_kind: dict[tuple[str, int], list[collectives.Collective]] = {}
    for each in found:
        if each.group_size > 1:
            by_kind.setdefault((each.kind, each.group_size), []).append(each)
    if not by_kind:
        return ["collectives of a step: none, there is one device"]
    lines = ["collectives of a step, from the compiled program (an exchange counts one round)"]
    for (kind, group_size), members in sorted(by_kind.items()):
        sent = sum(each.sent_bytes for each in members)
        largest = max(each.result_bytes for each in members)
        runs = sum(each.times for each in members)
        lines.append(
            f"  {runs:3} {kind} among {group_size} devices: each sends {_bound(members)}"
            f"{sent:,.0f} bytes ({size_text(sent)}); the largest brings {size_text(largest)}"
        )
    total = sum(each.sent_bytes for members in by_kind.values() for each in members)
    bound = _bound(found)
    lines.append(f"  each device sends {bound}{total:,.0f} bytes in all ({size_text(total)})")
    return lines
