"""Looked-up history, actions and contextual features -> one token sequence (docs/model.md).

Every history item becomes a token of the model width; C contextual tokens are put in front of each
user's history. Positions and times are added by `positional_encoder.py`.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from hstu_jax.model import action_encoder, contextual_mlp, dropout, linear
from pallas_kernels.hstu_attention import layout as attention_layout


class UihPreprocessor(nn.Module):
    """history -> Linear (+ MLP of the action encoding), contextual feature c -> its own Linear.

    Attributes:
        output_dim: D, width of the tokens.
        contextual_len: C, contextual tokens of a user.
        actions: the action encoder, or None.
        action_mlp: the MLP behind it, or None.

    Source: TorchEasyRec 1.3.16, UIH input preprocessor; docs/model.md.
    """

    output_dim: int
    contextual_len: int
    actions: action_encoder.SimpleActionEncoder | None
    action_mlp: contextual_mlp.SimpleMlp | contextual_mlp.ParameterizedMlp | None

    @nn.compact
    def __call__(
        self,
        history: Float[Array, "R L F"],
        contextual: Float[Array, "S C Cf"],
        *,
        action: Int[Array, "R L"],
        watch_time_s: Float[Array, "R L"],
        layout: attention_layout.SequenceLayout,
        history_mask: Bool[Array, "R L"],
        users: dropout.TokenIdentity | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R L D"]:
        """Makes the tokens.

        Args:
            history: item embeddings; contextual slots and padding may hold anything, also NaN.
            contextual: embeddings per user; users with an empty segment may hold anything.
            action: bitmask per slot.
            watch_time_s: seconds per slot.
            layout: where the segments lie; each starts with C contextual slots.
            history_mask: slots that hold a history item.
            users: identity of every user slot; read with a key only.
            dropout_key: key of this training step; None = evaluation.

        Returns:
            Tokens; padding holds finite values that nothing reads.
        """
        # The one place where padding is cleaned: a NaN times a zero cotangent would reach weights.
        history = jnp.where(history_mask[..., None], history, 0.0)
        is_used = jnp.asarray(layout.lengths) > 0
        contextual = jnp.where(is_used[:, None, None], contextual, 0.0)
        tokens = linear.Linear(self.output_dim, name="input_projection")(history)
        if self.actions is not None:
            encoded = self.actions(action, watch_time_s).astype(tokens.dtype)
            if isinstance(self.action_mlp, contextual_mlp.ParameterizedMlp):
                tokens = tokens + self.action_mlp(
                    encoded,
                    contextual.reshape(contextual.shape[0], -1),
                    layout=layout,
                    skip=self.contextual_len,
                    users=users,
                    dropout_key=dropout_key,
                )
            else:
                tokens = tokens + self.action_mlp(encoded)
        if self.contextual_len == 0:
            return tokens
        return self._put_contextual(tokens, contextual, layout)

    def _put_contextual(self, tokens, contextual, layout):
        """Overwrites the first C slots of every non-empty segment."""
        num_users, num_contextual, width = contextual.shape
        kernel = self.param(
            "contextual_kernel",
            nn.initializers.normal((2 / (width + self.output_dim)) ** 0.5),
            (num_contextual, width, self.output_dim),
        )
        bias = self.param(
            "contextual_bias", nn.initializers.zeros, (num_contextual, self.output_dim)
        )
        starts, lengths = jnp.asarray(layout.starts), jnp.asarray(layout.lengths)
        is_used = lengths > 0
        kernel = kernel.astype(contextual.dtype)
        precision = linear.product_precision(kernel.dtype)
        projected = jnp.einsum("scf,cfd->scd", contextual, kernel, precision=precision)
        projected = projected + bias[None]
        # Indices are unique, also those past the end, which are dropped: the transpose is a gather.
        flat = tokens.reshape(-1, self.output_dim)
        count = num_users * num_contextual
        past_end = flat.shape[0] + jnp.arange(count, dtype=jnp.int32).reshape(num_users, -1)
        slot = starts[:, None] + jnp.arange(num_contextual, dtype=jnp.int32)[None]
        slot = jnp.where(is_used[:, None], slot, past_end)
        flat = flat.at[slot].set(projected.astype(flat.dtype), mode="drop", unique_indices=True)
        return flat.reshape(tokens.shape)
