"""What a configuration's parameters, tables and optimizer state take, from shapes alone.

Here: the text of `python -m hstu_jax.inspect`. Not here: the shapes (`run.state_shapes`), and the
banner of a run that has data and devices (`run.describe`).
"""

from typing import Any

import flax.traverse_util

from hstu_jax.config import schema
from hstu_jax.training import run as run_lib
from hstu_jax.training import state as state_lib


def describe_state(config: schema.Config) -> str:
    """A line for every dense parameter and every table, and the totals.

    Nothing is allocated, and neither data nor an accelerator is needed.
    """
    state = run_lib.state_shapes(config)
    parameters = flax.traverse_util.flatten_dict(state.params, sep="/")
    width = max(map(len, [*parameters, *state.tables]))
    lines = ["dense parameters"]
    for name, leaf in sorted(parameters.items()):
        lines.append(f"  {name:{width}}  {' x '.join(f'{size:,}' for size in leaf.shape)}")
    # Averaged parameters are a copy beside the parameters, as optimizer state is.
    lines.append(f"  {'all':{width}}  {_sizes(state.params, (state.opt_state, state.ema))}")
    lines.append("embedding tables, rows padded to whole stripes")
    for name, table in sorted(state.tables.items()):
        rows, dim = table.weights.shape
        lines.append(f"  {name:{width}}  {rows:,} x {dim}: {_sizes(table.weights, table.slots)}")
    weights = {name: table.weights for name, table in state.tables.items()}
    slots = {name: table.slots for name, table in state.tables.items()}
    lines.append(f"  {'all':{width}}  {_sizes(weights, slots)}")
    num_bytes = state_lib.size_bytes(state)
    lines.append(f"state: {size_text(num_bytes)} ({num_bytes:,} bytes), without activations")
    return "\n".join(lines)


def _sizes(weights: Any, beside: Any) -> str:
    own, more = state_lib.size_bytes(weights), state_lib.size_bytes(beside)
    return (
        f"{state_lib.count(weights):,} parameters, {size_text(own)}, and {size_text(more)} of "
        f"optimizer state: {own + more:,} bytes"
    )


def size_text(num_bytes: float | int) -> str:
    """Bytes in the unit that leaves the fewest digits, as 19.1 GiB."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.1f} {unit}"
