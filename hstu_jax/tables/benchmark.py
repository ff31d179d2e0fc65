"""Time and memory of one sparse step, against the size of the table.

    python -m hstu_jax.tables.benchmark --rows 10000000 --dim 64 --ids 25600

One step is unique ids, gather, expand, its gradient, and row-wise Adagrad in donated buffers. The
figure that matters is the ratio of a large table's step to a small table's with as many distinct
ids: the cost must follow the batch. What is left of it on CPU is page-table misses: with
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` (huge pages) it falls from about 1.4 to 1.1. Not a test:
`tests/tables` holds the memory bound.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax import launchers
from hstu_jax.tables import lookup, optimizers, spec, update

_RULE = optimizers.RowwiseAdagrad()


def sparse_step(state, ids, cotangent, *, table, rule=_RULE, learning_rate=0.1):
    """One lookup, gradient and update; pure, to be jitted with the state donated."""
    rows = spec.rows_of(table, ids, jnp.ones(ids.shape, bool))
    unique = lookup.unique_rows(rows, capacity=ids.shape[0], sentinel=table.padded_rows)
    picked = lookup.gather(state.weights, unique)

    def loss(picked):
        return jnp.vdot(jnp.tanh(lookup.expand(picked, unique)), cotangent)

    value, gradients = jax.value_and_grad(loss)(picked)
    new = update.apply(state, unique, gradients, rule=rule, learning_rate=learning_rate)
    return new, value


def compile_step(table: spec.TableSpec, num_ids: int, *, rule: optimizers.Rule = _RULE):
    """The compiled step of a table, from shapes alone."""
    init = functools.partial(update.init_state, table, rule=rule)
    state = jax.eval_shape(init, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((num_ids,), jnp.int32)
    cotangent = jax.ShapeDtypeStruct((num_ids, table.dim), jnp.float32)
    step = jax.jit(functools.partial(sparse_step, table=table, rule=rule), donate_argnums=0)
    return step.lower(state, ids, cotangent).compile()


class Runner:
    """A table, its compiled step and prepared ids; keeps the times of the steps it runs."""

    def __init__(self, num_rows: int, *, dim: int, num_ids: int, num_steps: int):
        """Compiles the step and fills the table. Every step has distinct ids of the whole table."""
        self.table = spec.TableSpec("benchmark", num_rows, dim)
        self.compiled = compile_step(self.table, num_ids)
        self.state = update.init_state(self.table, jax.random.key(0), rule=_RULE)
        rng = np.random.default_rng(0)
        self.cotangent = jnp.asarray(rng.normal(size=(num_ids, dim)).astype(np.float32))
        # Drawn before: shuffling a large id range between steps would empty the caches.
        self.ids = [
            jnp.asarray(rng.choice(num_rows, num_ids, replace=False).astype(np.int32))
            for _ in range(num_steps)
        ]
        self.times_ms: list[float] = []

    def run(self):
        """Runs all prepared steps once; the first is not counted (its caches are another's)."""
        for position, ids in enumerate(self.ids):
            start = time.perf_counter()
            self.state, value = self.compiled(self.state, ids, self.cotangent)
            jax.block_until_ready((self.state, value))
            if position:
                self.times_ms.append(1e3 * (time.perf_counter() - start))

    def report(self) -> str:
        """One line: times, and scratch memory as a share of the table."""
        scratch = self.compiled.memory_analysis().temp_size_in_bytes
        table_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        return (
            f"{self.table.num_rows:>12,} rows: min {min(self.times_ms):.2f} ms/step, median "
            f"{np.median(self.times_ms):.2f}; scratch {scratch / 2**20:.1f} MiB = "
            f"{scratch / table_bytes:.2%} of {table_bytes / 2**20:.0f} MiB"
        )


def main():
    """Prints both table sizes and the ratio of their step times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--small_rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ids", type=int, default=25_600, help="distinct ids in a step")
    parser.add_argument("--steps", type=int, default=15, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=6)
    args = launchers.parse_alone(parser)
    print(f"jax {jax.__version__}, {jax.devices()[0]}, width {args.dim}, {args.ids} distinct ids")
    runners = [
        Runner(rows, dim=args.dim, num_ids=args.ids, num_steps=args.steps)
        for rows in (args.small_rows, args.rows)
    ]
    # In turns, so that a machine that slows down for a while slows both.
    for _ in range(args.blocks):
        for runner in runners:
            runner.run()
    for runner in runners:
        print(runner.report())
    small, large = (runner.times_ms for runner in runners)
    print(
        f"large / small: min {min(large) / min(small):.2f}, "
        f"median {np.median(large) / np.median(small):.2f}"
    )


if __name__ == "__main__":
    main()
