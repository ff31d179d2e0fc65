"""What happens to gradients between the loss and the optimizer, and to parameters after it.

Sums over several batches, clipping, and the moving average of the parameters. The gradients
themselves are computed in `step.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hstu_jax.config import train_schema
from hstu_jax.tables import lookup

_NORM_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchGradients:
    """What one or several batches say. Fields are `Any`: such trees are also loop carries.

    Attributes:
        params: gradients of this shard's loss, the tree of the dense parameters.
        rows: table -> (`lookup.UniqueRows`, gradients of those rows).
        metrics: `step.StepMetrics`, sums over the mesh.
        batch_stats: running statistics of batch norm after the batch; {} without it.
    """

    params: Any
    rows: Any
    metrics: Any
    batch_stats: Any


def accumulate(
    gradients_of: Callable[[Any, Any, Any, Int[Array, ""]], BatchGradients],
    batches: tuple[Any, ...],
    tables: Any,
    batch_stats: Any,
    *,
    update_tables: Callable[[Any, Any, Int[Array, ""]], Any] | None,
) -> tuple[BatchGradients, Any]:
    """Sums of several batches, one in memory at a time.

    Gradients of table rows are kept batch by batch, `[n, capacity, dim]`, and merged at the end by
    row: memory follows the ids of the batches, never a table.

    Args:
        gradients_of: (tables, running statistics, batch, number) -> the batch's gradients.
        batches: n batches of one shape.
        tables: state of the tables before the step.
        batch_stats: running statistics before the step; each batch moves them on.
        update_tables: (tables, rows, number) -> tables with a batch's gradients applied at once,
            which later batches see; None leaves them to the caller.

    Returns:
        The sums, with the rows of all batches (nothing if they were applied), and the tables.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    first = jax.eval_shape(gradients_of, tables, batch_stats, batches[0], jnp.int32(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (first.params, first.metrics))

    def add(carry, item):
        (sums, tables, batch_stats), (number, batch) = carry, item
        found = gradients_of(tables, batch_stats, batch, number)
        sums = jax.tree.map(jnp.add, sums, (found.params, found.metrics))
        kept = {}
        if update_tables is not None:
            tables = update_tables(tables, found.rows, number)
        else:
            kept = {t: (unique.rows, values) for t, (unique, values) in found.rows.items()}
        return (sums, tables, found.batch_stats), kept

    numbers = jnp.arange(len(batches), dtype=jnp.int32)
    (sums, tables, batch_stats), kept = jax.lax.scan(
        add, (zeros, tables, batch_stats), (numbers, stacked)
    )
    rows = {}
    for table, (unique, _) in first.rows.items():
        if table in kept:
            all_rows, values = (part.reshape(-1, *part.shape[2:]) for part in kept[table])
            capacity = min(all_rows.shape[0], unique.sentinel)
            rows[table] = lookup.merge_rows(
                all_rows, values, capacity=capacity, sentinel=unique.sentinel
            )
    return BatchGradients(sums[0], rows, sums[1], batch_stats), tables


def clip(gradients: Any, config: train_schema.GradClippingConfig) -> Any:
    """Dense gradients, clipped.

    "norm": g * min(1, max_gradient / (|g| + 1e-6)), |g| the norm of all gradients together, of
    power `norm_type`. "value": every element within +- max_gradient.

    Args:
        gradients: already summed over devices and batches.
        config: the section `train.grad_clipping`.

    Source: torch.nn.utils.clip_grad_norm_ and clip_grad_value_ 2.13.
    """
    if config.clipping_type == "norm":
        norm = global_norm(gradients, power=config.norm_type)
        factor = jnp.minimum(config.max_gradient / (norm + _NORM_EPS), 1.0)
        return jax.tree.map(lambda g: g * factor, gradients)
    if config.clipping_type == "value":
        limit = config.max_gradient
        return jax.tree.map(lambda g: jnp.clip(g, -limit, limit), gradients)
    return gradients


def global_norm(gradients: Any, *, power: float) -> Float[Array, ""]:
    """(sum of |g|^power over every element)^(1 / power); the largest |g| for infinity."""
    leaves = jax.tree.leaves(gradients)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
    if power == float("inf"):
        return largest
    # Powers of shares of the largest: of the elements themselves they may leave float32's range.
    unit = jnp.where(largest > 0, largest, 1.0)
    total = sum(jnp.sum((jnp.abs(leaf) / unit) ** power) for leaf in leaves)
    return unit * total ** (1.0 / power)


def average(
    averaged: Any, params: Any, config: train_schema.EmaConfig, *, step: Int[Array, ""]
) -> Any:
    """The moving average after a step: decay * average + (1 - decay) * params.

    The first step copies the parameters. None stays None: the run keeps no average.

    Args:
        averaged: the average before, or None.
        params: the parameters after the step.
        config: the section `train.dense_optimizer.ema`.
        step: steps completed before this one.

    Source: torch.optim.swa_utils.AveragedModel with get_ema_avg_fn 2.13, as TorchEasyRec 1.3.16
        uses it.
    """
    if averaged is None:
        return None

    def blend(old, new):
        return jnp.where(step == 0, new, config.decay * old + (1.0 - config.decay) * new)

    return jax.tree.map(blend, averaged, params)
