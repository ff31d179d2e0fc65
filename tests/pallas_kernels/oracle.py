"""Slow float64 oracle of HSTU attention: scalar rules, one pair of tokens after the other.

Written from the formulas alone (docs/model.md), not from any code of the package.
"""

import numpy as np

from pallas_kernels.hstu_attention import cases
from pallas_kernels.hstu_attention.mask import MaskRule


def sees(query: int, key: int, length: int, num_targets: int, rule: MaskRule) -> bool:
    """True if the token at position `query` of a segment sees the one at position `key`."""
    contextual = rule.contextual_len
    if rule.sla_k1 or rule.sla_k2:
        prefix, history_end = max(rule.sla_k2, contextual), max(length - num_targets, 0)
        if query >= history_end:
            return key < history_end
        is_prefix = key < min(query + 1, prefix)
        return is_prefix or max(prefix, query - rule.sla_k1 + 1) <= key <= query

    top = length - num_targets - contextual + 1 if contextual else length - num_targets

    def token_id(position):
        return min(max(position - contextual + 1, 0) if contextual else position, top)

    distance = token_id(query) - token_id(key)
    visible = query == key or distance > 0
    if rule.max_attn_len:
        is_full = rule.min_full_attn_len > 0 and token_id(query) >= top - rule.min_full_attn_len
        visible = visible and (distance <= rule.max_attn_len or is_full)
    return visible or (contextual > 0 and token_id(query) == 0 and token_id(key) < top)


def dense_mask(starts, lengths, num_targets, num_rows, row_len, rule) -> np.ndarray:
    """Mask [R, L, L] of a layout, pair by pair."""
    mask = np.zeros((num_rows, row_len, row_len), bool)
    targets = np.zeros(len(starts), int) if num_targets is None else num_targets
    for start, length, num in zip(starts, lengths, targets, strict=True):
        row, slot = divmod(int(start), row_len)
        for query in range(length):
            for key in range(length):
                mask[row, slot + query, slot + key] = sees(query, key, length, int(num), rule)
    return mask


def case_mask(case: cases.Case) -> np.ndarray:
    """Mask [R, L, L] of a named case."""
    layout = cases.build_layout(case)
    return dense_mask(
        layout.starts,
        layout.lengths,
        cases.targets_of(case),
        layout.num_rows,
        layout.row_len,
        case.rule,
    )


def attention(q, k, v, g, mask, alpha, divisor):
    """Output and gradients (o, dq, dk, dv) of sum(o * g) in float64, one pair at a time."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    output, dq, dk, dv = np.zeros(v.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for row, i, j in np.argwhere(mask):
        logit = alpha * (q[row, i] * k[row, j]).sum(-1)  # [H]
        gate = 1 / (1 + np.exp(-logit))
        score = (logit * gate / divisor)[:, None]
        output[row, i] += score * v[row, j]
        dv[row, j] += score * g[row, i]
        slope = (gate * (1 + logit * (1 - gate))) * alpha / divisor
        dlogit = ((g[row, i] * v[row, j]).sum(-1) * slope)[:, None]
        dq[row, i] += dlogit * k[row, j]
        dk[row, j] += dlogit * q[row, i]
    return output, dq, dk, dv


def random_inputs(num_rows, row_len, *, heads=2, qk_dim=4, v_dim=6, seed=0):
    """q, k, v and a cotangent in float32; with alpha 0.5 logits spread by about 2."""
    rng = np.random.default_rng(seed)
    widths = (qk_dim, qk_dim, v_dim, v_dim)
    return [
        (1.4 * rng.standard_normal((num_rows, row_len, heads, width))).astype(np.float32)
        for width in widths
    ]
