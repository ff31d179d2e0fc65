"""Another starting point than the reference's: both towers in the item embedding's coordinates.

With the reference's initialisers a history item reaches the user vector through three unrelated
random matrices, and the action encoding is an order of magnitude larger than the item. On small
data that start costs more than the training has (measured in `docs/results.md`). `align` changes
values, never shapes: the model, its parameters and its exports stay the reference's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The action MLP ends in a layer norm, whose output is sqrt(D) long: small beside items at first.
_ACTION_SCALE = 0.1
# Attention's share of the first user vectors; 3 to 10 learned alike on the generated sample.
_VALUE_GAIN = 5.0


def align(params: dict[str, Any], *, value_width: int, has_gate: bool = True) -> dict[str, Any]:
    """Parameters with the item's path through both towers set to identities.

    - The input projection, the item tower's linear layers and the postprocessor's Linear of vector
      and times start as identities without bias.
    - In every STU layer W_v is made orthonormal, and the rows of W_out that read the attention
      output start as 5 W_v^T: the layer first adds a mean of the normalised tokens it attends to
      (with `use_silu_qkv`, of their SiLU in those coordinates). Without a gate W_out reads that
      output normalised, which is as large as the tokens are, and starts as W_v^T.
    - The action MLP's last layer norm, or the norm of the users' matrices, starts at 0.1.

    Everything else keeps its value. Where widths differ an identity is cut or padded with zeros.

    Args:
        params: tree of `match.init_params`, of any encoder.
        value_width: H * V, the columns of u and of v in `uvqk_kernel`; 0 without STU layers.
        has_gate: `stu.use_gate`; False = there is no u.

    Returns:
        A new tree of the same shapes.
    """

    def value(path: tuple[Any, ...], leaf: Array) -> Array:
        names = [str(getattr(key, "key", key)) for key in path]
        is_plain = {"input_projection", "time_combiner"} & set(names) or names[:2] == [
            "item_tower",
            "mlp",
        ]
        if is_plain:
            return jnp.zeros_like(leaf) if names[-1] == "bias" else jnp.eye(*leaf.shape)
        if names[-3:] in (
            ["action_mlp", "norm", "scale"],
            ["action_mlp", "weights_norm", "scale"],
        ):
            return jnp.full_like(leaf, _ACTION_SCALE)
        return leaf

    params = jax.tree_util.tree_map_with_path(value, params)
    return _align_values(params, value_width, has_gate)


def _align_values(tree: Any, value_width: int, has_gate: bool) -> Any:
    """Every STU layer of a tree with its value path aligned."""
    if not isinstance(tree, dict):
        return tree
    tree = {name: _align_values(branch, value_width, has_gate) for name, branch in tree.items()}
    if "uvqk_kernel" not in tree:
        return tree
    first = value_width if has_gate else 0
    columns, gain = slice(first, first + value_width), _VALUE_GAIN if has_gate else 1.0
    values = orthonormal(np.asarray(tree["uvqk_kernel"])[:, columns])
    return {
        **tree,
        "uvqk_kernel": tree["uvqk_kernel"].at[:, columns].set(values),
        "output_kernel": tree["output_kernel"].at[columns].set(gain * values.T),
    }


def orthonormal(matrix: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
    """Orthonormal columns that span those of a tall matrix; orthonormal rows of a wide one."""
    rows, columns = matrix.shape
    if rows < columns:
        return orthonormal(matrix.T).T
    return np.linalg.qr(matrix)[0].astype(matrix.dtype)
