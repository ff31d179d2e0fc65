"""What the user did with an item, as a vector: one learned block per action bit (docs/model.md).

The action is an integer bitmask; watch time can set further bits. The projection to the model width
is `contextual_mlp.py`; both are used by `preprocessor.py`.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

# The reference reads an `embedding_init_std` field but always draws with this one.
_INIT_STD = 0.1


class SimpleActionEncoder(nn.Module):
    """Concatenation over bits k of table[k] where the action has any of weight k's bits, else 0.

    Attributes:
        action_embedding_dim: width of a block.
        action_weights: bitmask of each block.
        watchtime_to_action_thresholds: seconds from which the weight of the same index is set.
        watchtime_to_action_weights: bitmasks set by watch time; they have blocks of their own,
            after those of `action_weights`.

    Source: TorchEasyRec 1.3.16, simple action encoder; docs/model.md. Its row for target
    positions is left out: HSTU Match has no targets.
    """

    action_embedding_dim: int
    action_weights: tuple[int, ...]
    watchtime_to_action_thresholds: tuple[float, ...] = ()
    watchtime_to_action_weights: tuple[int, ...] = ()

    @property
    def output_dim(self) -> int:
        """Width of the encoding."""
        num_blocks = len(self.action_weights) + len(self.watchtime_to_action_weights)
        return num_blocks * self.action_embedding_dim

    @nn.compact
    def __call__(
        self, action: Int[Array, "R L"], watch_time_s: Float[Array, "R L"]
    ) -> Float[Array, "R L A"]:
        """Encodes every slot; NaN watch time reaches no threshold."""
        thresholds = zip(
            self.watchtime_to_action_thresholds, self.watchtime_to_action_weights, strict=True
        )
        for threshold_s, weight in thresholds:
            action = action | jnp.where(watch_time_s >= threshold_s, weight, 0)
        weights = self.action_weights + self.watchtime_to_action_weights
        table = self.param(
            "embedding",
            nn.initializers.normal(_INIT_STD),
            (len(weights), self.action_embedding_dim),
        )
        bits = jnp.asarray(np.asarray(weights, dtype=np.int32))[None, None]
        has_action = (action[..., None] & bits) > 0  # [R, L, blocks]
        blocks = jnp.where(has_action[..., None], table[None, None], 0.0)
        return blocks.reshape(*action.shape, self.output_dim)
