"""`TrainState`: everything a run needs to go on, and how it is made from a seed.

Dense parameters and optimizer state are replicated; the rows of large tables are split over the
devices of the mesh (`partition.py`). There is no data position apart from `step`: batches are a
pure function of (seed, step, group).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hstu_jax.tables import optimizers, update
from hstu_jax.tables import spec as table_spec
from hstu_jax.training import placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State after `step` optimizer steps. Fields are `Any`: such trees also hold shardings.

    Attributes:
        step: [] int32, number of completed steps.
        params: dense parameters, the tree of the Linen modules.
        opt_state: optax state of the dense parameters.
        tables: table name -> `update.TableState`.
        batch_stats: running statistics of batch norm; {} without it.
        ema: moving average of `params`, or None.
    """

    step: Any
    params: Any
    opt_state: Any
    tables: Any
    batch_stats: Any
    ema: Any

    def variables(self, params: Any = None) -> dict[str, Any]:
        """What the model is applied to; `params` stands in for the state's own."""
        params = self.params if params is None else params
        return {"params": params, "batch_stats": self.batch_stats}


def for_evaluation(state: TrainState, *, use_ema: bool) -> TrainState:
    """The state to evaluate or export: with the averaged parameters where they are kept."""
    if state.ema is None or not use_ema:
        return state
    return dataclasses.replace(state, params=state.ema)


def count(tree: Any) -> int:
    """Numbers in a tree of arrays or of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def size_bytes(tree: Any) -> int:
    """Memory of a tree of arrays or of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def init_tables(
    specs: tuple[table_spec.TableSpec, ...],
    key: jax.Array,
    shardings: Mapping[str, jax.sharding.Sharding] | None,
    *,
    rule: optimizers.Rule,
) -> dict[str, update.TableState]:
    """Every table at its first values, drawn on the devices that keep it.

    A table's values depend on the key and its name's place in sorted order, not on the devices.
    """
    ordered = sorted(specs, key=lambda spec: spec.name)
    return {
        spec.name: update.init_state(
            spec,
            jax.random.fold_in(key, number),
            rule=rule,
            sharding=shardings[spec.name] if shardings else None,
        )
        for number, spec in enumerate(ordered)
    }


def init_state(
    variables: dict[str, Any],
    *,
    optimizer: optax.GradientTransformation,
    tables: dict[str, update.TableState],
    replicated: jax.sharding.Sharding | None,
    has_ema: bool,
) -> TrainState:
    """The state before the first step, on the mesh.

    Args:
        variables: from `match.init_variables`.
        optimizer: of the dense parameters.
        tables: from `init_tables`.
        replicated: where everything but the tables lives; None = the default device.
        has_ema: keep an average of the parameters.
    """
    params, batch_stats = placement.replicate(
        (variables["params"], variables["batch_stats"]), replicated
    )
    opt_state = jax.jit(optimizer.init, out_shardings=replicated)(params)
    step = placement.replicate(jnp.zeros((), jnp.int32), replicated)
    # A copy: the step may not be given one buffer twice to reuse.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=replicated)
    ema = copy(params) if has_ema else None
    return TrainState(
        step=step,
        params=params,
        opt_state=opt_state,
        tables=tables,
        batch_stats=batch_stats,
        ema=ema,
    )
