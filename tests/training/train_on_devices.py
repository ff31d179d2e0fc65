"""Trains one small run on several meshes of simulated devices and prints how far they end apart.

    python -m tests.training.train_on_devices STORE WORKDIR sgd:2x2:0.05:0 sgd:1x4:1.25:100000

For every task, optimizer : mesh : `mesh.exchange_slack` : `mesh.replicated_table_bytes`, a line of
JSON: differences from one device. `compiled:1x8:2000000` prints figures of the compiled step of a
table of so many rows in place of training, `shared:1x8:2000000` those of one with shared negatives.
`ragged:2x2:0.02` trains with SGD on one mesh twice and sends filled places alone the second time.
The number of CPU devices is fixed when JAX starts, so tests run this as a process of its own.
"""

import dataclasses
import json
import sys
from unittest import mock

import jax
import numpy as np

from hstu_jax.config import schema
from hstu_jax.data import event_store
from hstu_jax.training import dry_run, partition, traced
from hstu_jax.training import run as run_lib
from hstu_jax.training import state as state_lib
from tests.tables import ragged
from tests.training.small_config import small_config, with_two_tables

NUM_STEPS = 20
RATES = {"sgd": 0.01, "adam": 1e-3}


@dataclasses.dataclass(frozen=True)
class End:
    """Losses of the steps, parameters and tables after the last, and ids that waited in all.

    `moved` is the least of the largest changes since the start: of parameters, and of tables.
    """

    losses: np.ndarray
    params: list[np.ndarray]
    tables: list[np.ndarray]
    waited: float
    moved: float


def train(config, store, *, mesh: str) -> End:
    """Trains on a mesh like "2x4"."""
    host, chip = (int(size) for size in mesh.split("x"))
    config = dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, host=host, chip=chip)
    )
    run = run_lib.build_run(config, store, devices=jax.devices()[: host * chip])
    state, losses, waited = run_lib.init_state(run), [], 0.0
    starts = leaves_of(state)
    for number in range(NUM_STEPS):
        state, metrics = run.train_step(state, run.put(run.pipeline.batch_at(number).batch))
        losses.append(float(metrics.loss_sum) / float(metrics.num_queries))
        waited += float(metrics.exchange_overflow)
    ends = leaves_of(state)
    moved = min(largest_difference(*pair) for pair in zip(starts, ends, strict=True))
    return End(np.array(losses), *ends, waited, moved)


def leaves_of(state):
    """The arrays of a state's parameters, and those of its tables, on the host."""
    return tuple(jax.device_get(jax.tree.leaves(part)) for part in (state.params, state.tables))


def largest_difference(one, two) -> float:
    """The largest absolute difference of two lists of arrays."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, two, strict=True))


def config_of(
    kind: str, store, workdir: str, *, num_groups: int = 0, num_negatives: int = 24
) -> schema.Config:
    """A run of one layer and two tables, as many groups as devices, one optimizer for all.

    With "sgd" all groups share their negatives.
    """
    is_shared = kind == "sgd"
    return with_two_tables(
        small_config(
            store,
            workdir,
            data__num_groups=num_groups or jax.device_count(),
            data__negative_sampler__num_sample=num_negatives,
            data__negative_sampler__exclusion="query" if is_shared else "group",
            data__negative_sharing="all" if is_shared else "none",
            model__user_tower__hstu__attn_num_layers=1,
            train__dense_optimizer__kind=kind,
            train__dense_optimizer__lr=RATES[kind],
            train__dense_optimizer__beta2=0.999,
            train__sparse_optimizer__kind=kind,
            train__sparse_optimizer__lr=RATES[kind],
        )
    )


def compiled_figures(store, workdir: str, *, task: str):
    """Memory and collectives of the step of a large table, a group for each device.

    A group has more than the 1,024 ids for which buckets are made at least.
    """
    kind, mesh, num_rows = task.split(":")
    kind = {"compiled": "adam", "shared": "sgd"}[kind]
    host, chip = (int(size) for size in mesh.split("x"))
    config = config_of(kind, store, workdir, num_groups=host * chip, num_negatives=900)
    features = {
        name: dataclasses.replace(each, num_buckets=int(num_rows))
        if each.num_buckets > 1000
        else each
        for name, each in config.features.items()
    }
    options = dataclasses.replace(config.mesh, host=host, chip=chip)
    config = dataclasses.replace(config, features=features, mesh=options)
    run = run_lib.build_run(config, store, devices=jax.devices()[: host * chip])
    step = dry_run.compile_step(run)
    abstract = jax.sharding.AbstractMesh(
        (host, chip), run.mesh.axis_names, axis_types=run.mesh.axis_types
    )
    foreseen = traced.trace_step(run.program, run.pipeline, mesh=abstract, groups_per_device=1)
    return {
        "task": task,
        "table_bytes": state_lib.size_bytes(step.state.tables) // (host * chip),
        "temp_bytes": step.temporaries,
        "alias_bytes": step.reused,
        "largest_bytes": max(each.result_bytes for each in step.collectives),
        "gathered_bytes": sum(
            each.result_bytes for each in step.collectives if each.kind == "all-gather"
        ),
        "sent": sent_bytes(step.collectives),
        "traced": sent_bytes(foreseen.collectives),
    }


def sent_bytes(found) -> dict[str, float]:
    """Kind of collective -> bytes that a device sends in all of them."""
    kinds = sorted({each.kind for each in found})
    return {kind: sum(e.sent_bytes for e in found if e.kind == kind) for kind in kinds}


def compare_ragged(store, workdir: str, *, task: str):
    """How far the ends of both kinds of exchange are apart."""
    _, mesh, slack = task.split(":")
    config = config_of("sgd", store, workdir)
    options = dataclasses.replace(
        config.mesh, exchange_slack=float(slack), replicated_table_bytes=0
    )
    config = dataclasses.replace(config, mesh=options)
    padded = train(config, store, mesh=mesh)
    with ragged.emulated() as calls:
        with mock.patch.object(partition, "is_ragged", lambda *_: True):
            ragged_mesh = dataclasses.replace(config.mesh, exchange="ragged")
            filled = train(dataclasses.replace(config, mesh=ragged_mesh), store, mesh=mesh)
    assert calls.called, "both exchanges were the same one"
    return {
        "task": task,
        "loss": float(np.abs(filled.losses - padded.losses).max()),
        "params": largest_difference(filled.params, padded.params),
        "tables": largest_difference(filled.tables, padded.tables),
        "waited": filled.waited,
        "moved": filled.moved,
    }


def main(store_path: str, workdir: str, *tasks: str) -> None:
    """See above."""
    store, ends = event_store.open_store(store_path), {}
    for task in tasks:
        if task.startswith(("compiled:", "shared:")):
            print(json.dumps(compiled_figures(store, workdir, task=task)), flush=True)
            continue
        if task.startswith("ragged:"):
            print(json.dumps(compare_ragged(store, workdir, task=task)), flush=True)
            continue
        kind, mesh, slack, replicated_bytes = task.split(":")
        config = config_of(kind, store, workdir)
        if kind not in ends:
            ends[kind] = train(config, store, mesh="1x1")
        one = ends[kind]
        options = dataclasses.replace(
            config.mesh,
            exchange_slack=float(slack),
            replicated_table_bytes=int(replicated_bytes),
        )
        many = train(dataclasses.replace(config, mesh=options), store, mesh=mesh)
        line = {
            "task": task,
            "loss": float(np.abs(many.losses / one.losses - 1).max()),
            "params": largest_difference(many.params, one.params),
            "tables": largest_difference(many.tables, one.tables),
            "waited": many.waited,
            "moved": one.moved,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
