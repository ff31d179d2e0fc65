"""The exchange on eight simulated devices; run by `test_exchange_many.py` as its own process.

    python -m tests.tables.exchange_on_many exact:2x2:20 joined:2x4 compiled:1x8:400000

`exact` draws ids by hypothesis, so many times, and compares with the dense step; `joined` has all
chips of a host ask for the same ids through buckets that hold them only if they go once; `ragged`
compares whole buckets with filled places alone; `compiled` prints a line of JSON about the step of
a table with so many rows. The number of CPU devices is fixed when JAX starts, and the test session
has two.
"""

import functools
import json
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies
from jaxtyping import install_import_hook

if __name__ == "__main__":  # a session of pytest has the hook already
    install_import_hook(["hstu_jax", "pallas_kernels"], "beartype.beartype")

from hstu_jax.tables import optimizers, spec, update  # noqa: E402
from hstu_jax.training import collectives  # noqa: E402
from tests.tables import exchange_steps as steps  # noqa: E402

TABLE = spec.TableSpec("video", 9000, 2)
NUM_IDS = 12
DIM, IDS_PER_DEVICE = 64, 4096


def check_exact(mesh_shape, *, num_examples):
    """Hypothesis: rows of every device, skewed and padded, against the dense step; every bit."""
    num_devices = int(np.prod(mesh_shape))
    places = strategies.one_of(
        strategies.integers(0, 15),  # one owner
        strategies.integers(0, TABLE.padded_rows),  # the last is no row
        strategies.sampled_from([TABLE.padded_rows - 1, TABLE.padded_rows]),
    )
    count = num_devices * NUM_IDS

    @hypothesis.settings(max_examples=num_examples, deadline=None, derandomize=True, database=None)
    @hypothesis.given(strategies.lists(places, min_size=count, max_size=count))
    def check(rows):
        rows = np.array(rows, np.int32).reshape(num_devices, NUM_IDS)
        cotangent = np.arange(rows.size * TABLE.dim, dtype=np.float32) % 17 - 8
        cotangent = cotangent.reshape(*rows.shape, TABLE.dim)
        for slack in (steps.TIGHT, steps.WIDE):
            steps.check_against_dense(mesh_shape, TABLE, rows, cotangent, slack=slack)

    check()


def check_joined(mesh_shape):
    """Ids that all devices share go between hosts once; others wait in the same small buckets."""
    num_devices, num_ids = int(np.prod(mesh_shape)), 512
    # Of each owner about 64 ids; room for 103 of them, and for 256 within a host.
    options = dict(slack=steps.WIDE, host_slack=0.2)
    rng = np.random.default_rng(0)
    rows = rng.permutation(TABLE.padded_rows)[: num_devices * num_ids].astype(np.int32)
    rows = rows.reshape(num_devices, num_ids)
    cotangent = np.ones((*rows.shape, TABLE.dim), np.float32)
    shared = np.tile(rows[:1], (num_devices, 1))
    waiting = steps.check_against_dense(mesh_shape, TABLE, shared, cotangent, **options)
    assert not waiting.any()
    waiting = steps.check_against_dense(mesh_shape, TABLE, rows, cotangent, **options)
    assert waiting.all()


def check_ragged(mesh_shape):
    """Filled places alone and whole buckets: the same bits, also where ids wait at both levels."""
    num_devices = int(np.prod(mesh_shape))
    rows = np.random.default_rng(0).integers(0, TABLE.padded_rows, (num_devices, NUM_IDS))
    rows = rows.astype(np.int32)
    assert steps.check_ragged(mesh_shape, TABLE, rows, slack=steps.TIGHT).all()
    rows[0], rows[1] = TABLE.padded_rows, np.arange(NUM_IDS)  # no id; ids of one owner
    rows[2] = rows[1]
    waiting = steps.check_ragged(mesh_shape, TABLE, rows, slack=steps.TIGHT)
    assert waiting[1] >= NUM_IDS - 3


def compiled_figures(mesh_shape, num_rows):
    """Memory and traffic of a compiled step of a large table, from shapes alone."""
    table, rule = spec.TableSpec("t", num_rows, DIM), optimizers.RowwiseAdagrad()
    init = functools.partial(update.init_state, table, rule=rule)
    state = jax.eval_shape(init, jax.random.key(0))
    num_devices = int(np.prod(mesh_shape))
    ids = jax.ShapeDtypeStruct((num_devices, IDS_PER_DEVICE), jnp.int32)
    cotangent = jax.ShapeDtypeStruct((*ids.shape, DIM), jnp.float32)
    step = steps.compile_step(mesh_shape, rule=rule)
    compiled = step.lower(state, ids, cotangent).compile()
    memory = compiled.memory_analysis()
    found = collectives.read(compiled.as_text())
    return {
        "mesh": "x".join(map(str, mesh_shape)),
        "rows": num_rows,
        "state_bytes": sum(4 * leaf.size for leaf in jax.tree.leaves(state)) // num_devices,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "kinds": sorted({each.kind for each in found}),
        "sent_bytes": {
            size: sum(each.sent_bytes for each in found if each.group_size == size)
            for size in sorted({each.group_size for each in found})
        },
        "largest_bytes": max(each.result_bytes for each in found),
    }


def main(*tasks: str) -> None:
    """See above."""
    for task in tasks:
        what, mesh, *count = task.split(":")
        shape = tuple(int(size) for size in mesh.split("x"))
        if what == "exact":
            check_exact(shape, num_examples=int(count[0]))
        elif what == "joined":
            check_joined(shape)
        elif what == "ragged":
            check_ragged(shape)
        elif what == "compiled":
            print(json.dumps(compiled_figures(shape, int(count[0]))), flush=True)
        else:
            raise ValueError(
                f"task={task!r}: must begin with 'exact:', 'joined:', 'ragged:' or 'compiled:'."
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
