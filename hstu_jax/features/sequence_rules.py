"""How the configuration masks and cuts a user's sequence: one place for the host and the model.

Here: `StuConfig` -> mask rule, and the plan of the second sequence layout, which layers behind
`attn_truncation_split_layer` read. `packing.py` calls it for every batch, `hstu_jax.model` builds
its layers with the same rule.
"""

import numpy as np
from jaxtyping import Int

from hstu_jax.config import model_schema
from hstu_jax.features.batch import Tail
from pallas_kernels.hstu_attention import layout as attention_layout
from pallas_kernels.hstu_attention import mask as attention_mask


def mask_rule(
    stu: model_schema.StuConfig,
    *,
    num_contextual: int,
    objective: model_schema.Objective = "window",
) -> attention_mask.MaskRule:
    """The attention mask of every layer.

    Args:
        stu: `stu` section.
        num_contextual: C, contextual tokens in front of every history.
        objective: with "next_item" contextual tokens are masked like history: if they saw what
            comes after them, every token would see its own answer through them. Semi-local
            attention still shows every token those before it: its prefix holds at least C.
    """
    is_local = stu.sla_k1 > 0 or stu.sla_k2 > 0
    if objective == "next_item":
        return attention_mask.MaskRule(
            contextual_len=0,
            max_attn_len=stu.max_attn_len,
            sla_k1=stu.sla_k1,
            sla_k2=max(stu.sla_k2, num_contextual) if is_local else 0,
        )
    contextual_len = num_contextual if stu.contextual_seq_len < 0 else stu.contextual_seq_len
    return attention_mask.MaskRule(
        contextual_len=contextual_len,
        max_attn_len=stu.max_attn_len,
        sla_k1=stu.sla_k1,
        sla_k2=stu.sla_k2,
    )


def tail_len(user_tower: model_schema.UserTowerConfig) -> int:
    """History items that the layers from the split on see; 0 = no truncation."""
    is_stack = user_tower.encoder == "hstu"
    return user_tower.hstu.attn_truncation_tail_len if is_stack else 0


def tail_lengths(
    lengths: Int[np.ndarray, "..."],
    *,
    num_contextual: int,
    tail_len: int,
    num_targets: Int[np.ndarray, "..."] | None = None,
) -> Int[np.ndarray, "..."]:
    """Tokens of each segment after the cut: C contextual, the last min(U, t) items, the targets.

    Args:
        lengths: C + U + targets tokens of each segment; 0 = unused or empty.
        num_contextual: C.
        tail_len: t.
        num_targets: targets at the end of each segment; None = none.
    """
    targets = 0 if num_targets is None else num_targets
    return np.minimum(lengths, num_contextual + tail_len + targets)


def plan_tail(
    lengths: Int[np.ndarray, "G U"],
    *,
    num_contextual: int,
    tail_len: int,
    row_len: int,
    block_len: int,
    max_pairs: int,
    rule: attention_mask.MaskRule,
    num_targets: Int[np.ndarray, "G U"] | None = None,
) -> Tail:
    """Lays the cut segments of each group out in one row, end to end in the order of user slots.

    One row, because then nothing is lost between segments and any batch fits: the schedule visits
    only blocks that hold something, so a long row costs no more than many short ones.

    Args:
        lengths: tokens of each segment before the cut.
        num_contextual: C.
        tail_len: t, history items kept.
        row_len: slots of a group's row; must hold all cut segments.
        block_len: tokens in a block of the schedule, at most `row_len`.
        max_pairs: capacity of a group's schedule.
        rule: the mask, which counts in tokens of the cut segment.
        num_targets: targets at the end of each segment; None = none.

    Raises:
        ValueError: a group's segments do not fit its row, or its schedule does not fit `max_pairs`.
    """
    cut = tail_lengths(
        lengths, num_contextual=num_contextual, tail_len=tail_len, num_targets=num_targets
    ).astype(np.int32)
    starts = (np.cumsum(cut, axis=1) - cut).astype(np.int32)
    num_groups = len(cut)
    pairs = np.zeros((num_groups, max_pairs, 3), dtype=np.int32)
    counts = np.zeros(num_groups, dtype=np.int32)
    for group in range(num_groups):
        pairs[group], counts[group] = attention_layout.build_block_pairs(
            starts[group],
            cut[group],
            num_rows=1,
            row_len=row_len,
            block_len=block_len,
            rule=rule,
            max_pairs=max_pairs,
            num_targets=None if num_targets is None else num_targets[group],
        )
    return Tail(
        segment_starts=starts,
        segment_lengths=cut,
        block_pairs=pairs,
        num_block_pairs=counts,
        row_len=row_len,
        block_len=block_len,
    )
