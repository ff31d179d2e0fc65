"""SASRec: causal softmax attention over the same tokens, the baseline that HSTU is compared with.

Tokens, positions and the postprocessor are those of `encoder.py`; formulas are in docs/model.md.
Attention here is for rows of a few hundred slots: scores of a whole row are made at once, [L, L]
for each row and head, and made again in the backward pass.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hstu_jax.features import batch as features_batch
from hstu_jax.model import dropout, encoder, linear, normalization, stu
from pallas_kernels.hstu_attention import layout as attention_layout

_NORM_EPS = 1e-8


def causal_attention(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H K"],
    *,
    segment: Int[Array, "R L"],
) -> Float[Array, "R L H K"]:
    """softmax over j <= i of the same segment of <q_i, k_j> / sqrt(K), times v_j, per head.

    Args:
        q: queries; finite everywhere, here and below. A value that is not may spread over its row.
        k: keys.
        v: values.
        segment: of each slot, -1 in padding.

    Returns:
        Outputs in the dtype of v; finite in padding and meaningless there.
    """
    slot = jnp.arange(q.shape[1], dtype=jnp.int32)
    # A padding slot sees padding, so every softmax is over one key or more.
    is_seen = segment[:, :, None] == segment[:, None, :]
    is_seen = is_seen & (slot[None, None, :] <= slot[None, :, None])

    @jax.checkpoint
    def attend(q, k, v):
        precision = linear.product_precision(v.dtype)
        logits = jnp.einsum(
            "rihk,rjhk->rhij", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        logits = jnp.where(is_seen[:, None], logits * q.shape[-1] ** -0.5, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return jnp.einsum("rhij,rjhk->rihk", weights, v, precision=precision)

    return attend(q, k, v)


class SasrecBlock(nn.Module):
    """x + W_o attention(LN(x)), then that plus FFN(LN(of that)), FFN(y) = W_2 relu(W_1 y).

    Every product has a bias but that of the keys, which softmax would cancel. Dropout of the
    attention's output, of the FFN's hidden values and of its output; not of attention weights.

    Attributes:
        num_heads: H, a divisor of the width.
        ffn_dim: width of the hidden values.
        dropout_ratio: of all three.

    Source: Kang and McAuley 2018, "Self-Attentive Sequential Recommendation", section 3. Its text
    is followed, where the residual is the unnormalised x; its code adds the normalised queries
    instead, has no W_o and drops attention weights too.
    """

    num_heads: int
    ffn_dim: int
    dropout_ratio: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L D"],
        sequence: stu.Sequence,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R L D"]:
        """The block at every position; position i reads positions up to i of its segment."""
        width = x.shape[-1]

        def drop(y, use):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, use)
            return dropout.dropout(
                y, rate=self.dropout_ratio, key=key, identity=sequence.tokens
            ).astype(y.dtype)

        def project(y, features, name):
            use_bias = name != "key"
            return linear.Linear(features, init="xavier", use_bias=use_bias, name=name)(y)

        normed = normalization.LayerNorm(eps=_NORM_EPS, name="attention_norm")(x)
        q, k, v = (
            project(normed, width, name).reshape(*x.shape[:-1], self.num_heads, -1)
            for name in ("query", "key", "value")
        )
        segment = attention_layout.token_segments(sequence.layout)
        attended = causal_attention(q, k, v, segment=segment).reshape(x.shape)
        x = x + drop(project(attended, width, "attention_output"), 0)
        normed = normalization.LayerNorm(eps=_NORM_EPS, name="ffn_norm")(x)
        hidden = drop(jax.nn.relu(project(normed, self.ffn_dim, "ffn_in")), 1)
        return x + drop(project(hidden, width, "ffn_output"), 2)


class SasrecEncoder(encoder.Encoder):
    """SASRec blocks and a last layer norm, read at each user's last token.

    Attributes:
        blocks: at least one.
    """

    blocks: tuple[SasrecBlock, ...]

    def setup(self):
        super().setup()
        self.last_norm = normalization.LayerNorm(eps=_NORM_EPS)

    def __call__(
        self,
        history: Float[Array, "G R L F"],
        contextual: Float[Array, "G U C Cf"],
        batch: features_batch.Batch,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "S D"]:
        """One vector per user slot, or per query if the batch names their tokens; groups flat."""
        x, sequence, _ = self.embed(history, contextual, batch, dropout_key=dropout_key)
        x = self.all_positions(x, sequence, dropout_key=dropout_key)
        if batch.query_slot is not None:
            return self.finish_queries(x, batch)
        return self.finish(stu.take_last(x, sequence), sequence, batch)

    def all_positions(
        self,
        x: Float[Array, "R L D"],
        sequence: stu.Sequence,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R L D"]:
        """What every position knows, from the encoded tokens, before the postprocessor."""
        key = encoder.stack_key(dropout_key)
        for index, block in enumerate(self.blocks):
            block_key = None if key is None else jax.random.fold_in(key, index)
            x = block(x, sequence, dropout_key=block_key)
        return self.last_norm(x)
