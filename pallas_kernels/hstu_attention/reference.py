"""HSTU attention as the paper writes it: dense scores, dense mask, one einsum each way.

The definition of right for every other implementation, quadratic in memory and never the fast one.
The mask is built here from ids compared for all pairs, on purpose not from the intervals of
`mask.py`, so that each checks the other. The implementation in use is `xla_blockwise.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.hstu_attention import bias as bias_lib
from pallas_kernels.hstu_attention.layout import SequenceLayout, token_positions, token_segments
from pallas_kernels.hstu_attention.mask import MaskRule


def attention_mask(
    layout: SequenceLayout, rule: MaskRule, num_targets: Int[Array, "S"] | None = None
) -> Bool[Array, "R L L"]:
    """True where the query in slot i sees the key in slot j; false in padding.

    Source: TorchEasyRec 1.3.16 (docs/model.md).
    """
    segment, position = token_segments(layout), token_positions(layout)
    owner = jnp.maximum(segment, 0)
    length = jnp.asarray(layout.lengths)[owner]
    targets = jnp.zeros_like(length) if num_targets is None else num_targets[owner]
    is_same = (segment[:, :, None] == segment[:, None, :]) & (segment >= 0)[:, :, None]
    build = _semi_local_mask if rule.is_semi_local else _standard_mask
    return is_same & build(position, length, targets, rule)


def _standard_mask(position, length, targets, rule):
    contextual = rule.contextual_len
    top = length - targets
    token_id = position
    if contextual:
        top = top - contextual + 1
        token_id = jnp.maximum(position - contextual + 1, 0)
    token_id = jnp.minimum(token_id, top)
    query_id, key_id = token_id[:, :, None], token_id[:, None, :]
    distance = query_id - key_id
    mask = (position[:, :, None] == position[:, None, :]) | (distance > 0)
    if rule.max_attn_len:
        is_near = distance <= rule.max_attn_len
        if rule.min_full_attn_len:
            is_near = is_near | (query_id >= (top - rule.min_full_attn_len)[:, :, None])
        mask = mask & is_near
    if contextual:
        mask = mask | ((query_id == 0) & (key_id < top[:, None, :]))
    return mask


def _semi_local_mask(position, length, targets, rule):
    history_end = jnp.maximum(length - targets, 0)[:, :, None]
    query, key = position[:, :, None], position[:, None, :]
    is_prefix = key < jnp.minimum(query + 1, rule.prefix_len)
    is_recent = (key >= jnp.maximum(rule.prefix_len, query - rule.sla_k1 + 1)) & (key <= query)
    return jnp.where(query < history_end, is_prefix | is_recent, key < history_end)


def attention_bias(bias: bias_lib.AttentionBias, layout: SequenceLayout) -> Float[Array, "R L L"]:
    """What is added to the logit of the query in slot i and the key in slot j, for all pairs.

    `by_distance[min(|i - j|, P - 1)] + by_interval[bucket(query_time_i - key_time_j)]`, see
    `AttentionBias`; pairs of different segments hold anything.
    """
    position = token_positions(layout)
    total = jnp.zeros((*position.shape, layout.row_len), jnp.float32)
    if bias.by_distance is not None:
        distance = jnp.abs(position[:, :, None] - position[:, None, :])
        total += bias.by_distance[jnp.minimum(distance, bias.by_distance.shape[0] - 1)]
    if bias.by_interval is not None:
        query, key = bias.query_time_s[:, :, None], bias.key_time_s[:, None, :]
        is_timed = (query != bias_lib.NO_TIME) & (key != bias_lib.NO_TIME)
        interval = jnp.where(is_timed, jnp.abs(query - key), 0).astype(jnp.float32)
        edges = jnp.asarray(bias_lib.interval_edges(bias.by_interval.shape[0] - 1))
        bucket = jnp.searchsorted(edges, interval, side="right") - 1
        total += jnp.where(is_timed, bias.by_interval[bucket], 0)
    return total


def hstu_attention(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    *,
    layout: SequenceLayout,
    rule: MaskRule,
    alpha: float,
    divisor: float,
    num_targets: Int[Array, "S"] | None = None,
    bias: bias_lib.AttentionBias | None = None,
) -> Float[Array, "R L H V"]:
    """Returns `o_i = sum_j M_ij silu(alpha <q_i, k_j> + rab_ij) / divisor v_j`, zeros in padding.

    Padding may hold anything; a NaN inside a segment may spread over its row (the other
    implementations keep it inside the segment).
    """
    q, k, v = (_clear_padding(x, layout) for x in (q, k, v))
    mask = attention_mask(layout, rule, num_targets)
    highest = jax.lax.Precision.HIGHEST
    logits = alpha * jnp.einsum("rihk,rjhk->rhij", q, k, precision=highest)  # [R, H, L, L]
    if bias is not None:
        logits = logits + attention_bias(bias, layout)[:, None]
    scores = jax.nn.silu(logits) / divisor
    scores = jnp.where(mask[:, None], scores, 0)
    output = jnp.einsum("rhij,rjhv->rihv", scores, v, precision=highest)
    # The sum is zero there already; this keeps padding of the cotangent out of the gradients.
    return _clear_padding(output, layout)


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
    """Row of `hstu_attention` at each segment's last position, for queries given per segment.

    An empty segment gives zeros.
    """
    k, v = _clear_padding(k, layout), _clear_padding(v, layout)
    starts, lengths = jnp.asarray(layout.starts), jnp.asarray(layout.lengths)
    has_tokens = lengths > 0
    last = jnp.where(has_tokens, starts + lengths - 1, 0)
    row, slot = last // layout.row_len, last % layout.row_len
    mask = attention_mask(layout, rule)[row, slot] & has_tokens[:, None]  # [S, L]
    q = jnp.where(has_tokens[:, None, None], q, 0)
    highest = jax.lax.Precision.HIGHEST
    logits = alpha * jnp.einsum("shk,sjhk->shj", q, k[row], precision=highest)
    if bias is not None:
        logits = logits + attention_bias(bias, layout)[row, slot][:, None]
    scores = jnp.where(mask[:, None], jax.nn.silu(logits) / divisor, 0)
    return jnp.einsum("shj,sjhv->shv", scores, v[row], precision=highest)


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
    """Rows of `hstu_attention` at each segment's last T positions, for queries given per segment.

    Positions that a segment does not have give zeros.
    """
    k, v = _clear_padding(k, layout), _clear_padding(v, layout)
    starts, lengths = jnp.asarray(layout.starts), jnp.asarray(layout.lengths)
    num_new = q.shape[1]
    position = lengths[:, None] - num_new + jnp.arange(num_new)[None]  # [S, T]
    exists = position >= 0
    token = jnp.where(exists, starts[:, None] + position, 0)
    row, slot = token // layout.row_len, token % layout.row_len
    mask = attention_mask(layout, rule, num_targets)[row, slot] & exists[..., None]  # [S, T, L]
    q = jnp.where(exists[..., None, None], q, 0)
    highest = jax.lax.Precision.HIGHEST
    logits = alpha * jnp.einsum("sthk,stjhk->sthj", q, k[row], precision=highest)
    scores = jnp.where(mask[:, :, None], jax.nn.silu(logits) / divisor, 0)
    return jnp.einsum("sthj,stjhv->sthv", scores, v[row], precision=highest)


def _clear_padding(array, layout):
    return jnp.where((token_segments(layout) >= 0)[:, :, None, None], array, 0)
