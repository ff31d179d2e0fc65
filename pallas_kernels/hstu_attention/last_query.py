"""HSTU attention for one query per segment, at the segment's last position, in linear time.

The last layer of a user tower is read only there, so its queries, attention and output are needed
for one token per user. Same mask and formula as the full op in `xla_blockwise.py`; signature and
checks are in `api.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hstu_attention.layout import SequenceLayout, token_positions, token_segments
from pallas_kernels.hstu_attention.mask import MaskRule, key_intervals
from pallas_kernels.hstu_attention.poison import finite_or_zero, poisoned_segments


def hstu_attention_last(
    q: Float[Array, "S H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    *,
    layout: SequenceLayout,
    rule: MaskRule,
    alpha: float,
    divisor: float,
) -> Float[Array, "S H V"]:
    """Returns what `api.hstu_attention_last` promises; differentiable by JAX itself.

    Each token meets exactly one query, so scores are [R, L, H] and the sum over keys is a sum over
    the tokens of a segment. Sums are float32. A segment that holds a value that is not finite gets
    NaN, others are not touched.
    """
    lengths = jnp.asarray(layout.lengths)
    num_segments = lengths.shape[0]
    segment = token_segments(layout)
    is_token, owner = segment >= 0, jnp.maximum(segment, 0)
    is_bad = poisoned_segments(segment, k, v, num_segments=num_segments)
    is_bad = is_bad | ~jnp.isfinite(q).all(axis=(1, 2))
    query = jnp.where(jnp.isfinite(q), q, 0).astype(jnp.float32)
    key, value = (finite_or_zero(x, is_token).astype(jnp.float32) for x in (k, v))
    logits = alpha * jnp.sum(query[owner] * key, axis=-1)  # [R, L, H]
    is_seen = _seen_by_last(segment, layout, rule)
    scores = jnp.where(is_seen[:, :, None], jax.nn.silu(logits) / divisor, 0)
    output = jax.ops.segment_sum(
        (scores[..., None] * value).reshape(-1, *value.shape[2:]),
        jnp.where(is_token, segment, num_segments).reshape(-1),
        num_segments=num_segments + 1,
    )[:num_segments]
    # A factor rather than a replaced value: it makes the gradients of such a segment NaN as well.
    factor = jnp.where(is_bad & (lengths > 0), jnp.nan, 1.0)[:, None, None]
    return (output * factor).astype(v.dtype)


def _seen_by_last(segment, layout, rule):
    """True for the slots that the last position of their segment sees."""
    owner, position = jnp.maximum(segment, 0), token_positions(layout)
    lengths = jnp.asarray(layout.lengths)
    last = jnp.maximum(lengths - 1, 0)
    is_seen = jnp.zeros(segment.shape, bool)
    for interval in key_intervals(last, lengths, None, rule=rule, xp=jnp):
        is_seen |= (position >= interval.start[owner]) & (position < interval.end[owner])
    return is_seen & (segment >= 0)
