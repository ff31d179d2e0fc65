"""HSTU attention for the last query, or the last few, of each segment, in linear time.

The last layer of a user tower is read at one token per user, and a decoder asks for the tokens that
are new: queries, attention and output are needed there only. Same mask and formula as the full op
in `xla_blockwise.py`; signatures and checks are in `api.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.hstu_attention import bias as bias_lib
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
    bias: bias_lib.AttentionBias | None = None,
) -> Float[Array, "S H V"]:
    """Returns what `api.hstu_attention_last` promises; differentiable by JAX itself.

    Each token meets exactly one query, so scores are [R, L, H] and the sum over keys is a sum over
    the tokens of a segment. Sums are float32. A segment that holds a value that is not finite gets
    NaN, others are not touched.
    """
    last = jnp.maximum(jnp.asarray(layout.lengths) - 1, 0)
    return _attend_at(last, q, k, v, layout, None, rule, alpha, divisor, bias)


def hstu_attention_delta(
    q: Float[Array, "S T H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    *,
    layout: SequenceLayout,
    rule: MaskRule,
    alpha: float,
    divisor: float,
    num_targets: Int[Array, "S"] | None = None,
) -> Float[Array, "S T H V"]:
    """Returns what `api.hstu_attention_delta` promises: one query per segment after the other.

    The memory is that of one query per segment, in the backward pass too.
    """
    num_new = q.shape[1]
    first = jnp.asarray(layout.lengths) - num_new

    @jax.checkpoint
    def one_query(index, query):
        return _attend_at(first + index, query, k, v, layout, num_targets, rule, alpha, divisor)

    steps = jnp.arange(num_new, dtype=first.dtype), jnp.swapaxes(q, 0, 1)  # [T, S, H, K]
    _, output = jax.lax.scan(lambda carry, step: (carry, one_query(*step)), None, steps)
    # Every query of a segment that holds a value that is not finite is lost, not only its own.
    is_lost = ~jnp.isfinite(q).all(axis=(1, 2, 3)) & (first + num_new > 0)
    factor = jnp.where(is_lost, jnp.nan, 1.0).astype(v.dtype)[:, None, None, None]
    return jnp.swapaxes(output, 0, 1) * factor


def _attend_at(position, q, k, v, layout, num_targets, rule, alpha, divisor, bias=None):
    """One query per segment at a position of it; zeros where the segment has no such position."""
    lengths = jnp.asarray(layout.lengths)
    num_segments = lengths.shape[0]
    segment = token_segments(layout)
    is_token, owner = segment >= 0, jnp.maximum(segment, 0)
    is_bad = poisoned_segments(segment, k, v, num_segments=num_segments)
    is_bad = is_bad | ~jnp.isfinite(q).all(axis=(1, 2))
    query = jnp.where(jnp.isfinite(q), q, 0).astype(jnp.float32)
    key, value = (finite_or_zero(x, is_token).astype(jnp.float32) for x in (k, v))
    logits = alpha * jnp.sum(query[owner] * key, axis=-1)  # [R, L, H]
    if bias is not None:
        logits = logits + bias_lib.query_bias(bias, position, layout)[..., None]
    is_seen = _seen_by(position, segment, layout, num_targets, rule)
    scores = jnp.where(is_seen[:, :, None], jax.nn.silu(logits) / divisor, 0)
    output = jax.ops.segment_sum(
        (scores[..., None] * value).reshape(-1, *value.shape[2:]),
        jnp.where(is_token, segment, num_segments).reshape(-1),
        num_segments=num_segments + 1,
    )[:num_segments]
    # A factor rather than a replaced value: it makes the gradients of such a segment NaN as well.
    factor = jnp.where(is_bad & (lengths > 0), jnp.nan, 1.0)[:, None, None]
    return (output * factor).astype(v.dtype)


def _seen_by(position, segment, layout, num_targets, rule):
    """True for the slots that the query at `position` of their segment sees."""
    owner, slot_position = jnp.maximum(segment, 0), token_positions(layout)
    lengths = jnp.asarray(layout.lengths)
    is_seen = jnp.zeros(segment.shape, bool)
    for interval in key_intervals(position, lengths, num_targets, rule=rule, xp=jnp):
        is_seen |= (slot_position >= interval.start[owner]) & (slot_position < interval.end[owner])
    return is_seen & (segment >= 0) & (position >= 0)[owner]
