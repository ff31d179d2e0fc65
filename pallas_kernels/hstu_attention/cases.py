"""Named small cases of HSTU attention that tests of every implementation share.

They cover the mask rules, plain and packed rows, empty users and rows, and lengths 0, 1, L - 1 and
L with a block length that does not divide L. Sizes to measure speed at are in `benchmark.py`.
"""

import dataclasses

import numpy as np

from pallas_kernels.hstu_attention import layout as layout_lib
from pallas_kernels.hstu_attention.layout import SequenceLayout
from pallas_kernels.hstu_attention.mask import MaskRule


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one case.

    Args:
        name: for test ids.
        rows: segment lengths of each row, packed without gaps from slot 0.
        rule: the mask.
        num_targets: targets of each segment in the order of `rows`, or None.
        row_len: L.
        block_len: tokens of a block.
        num_unused: unused segment entries at the end of the layout.
    """

    name: str
    rows: tuple[tuple[int, ...], ...]
    rule: MaskRule = MaskRule()
    num_targets: tuple[int, ...] | None = None
    row_len: int = 21
    block_len: int = 8
    num_unused: int = 0


_PADDED = ((21,), (0,), (4,), (20,), (13,))
_PACKED = ((9, 4, 8), (21,), (), (5, 0, 15))

CASES = (
    Case("plain", ((21,), (0,), (1,), (20,), (13,))),
    Case("nothing", ((), (0,), ()), MaskRule(contextual_len=2), num_unused=2),
    Case("context", _PADDED, MaskRule(contextual_len=3)),
    Case("context_only", ((3,), (21,), (4,)), MaskRule(contextual_len=3), block_len=2),
    Case("packed", ((9, 1, 11), (21,), (), (1, 0, 19)), num_unused=3),
    Case("packed_context", _PACKED, MaskRule(contextual_len=4), num_unused=1),
    Case("one_block", _PACKED, MaskRule(contextual_len=2), block_len=21),
    Case("window", _PACKED, MaskRule(contextual_len=3, max_attn_len=4)),
    Case("window_full_tail", _PADDED, MaskRule(max_attn_len=3, min_full_attn_len=4)),
    Case("targets", _PADDED, MaskRule(contextual_len=2), num_targets=(5, 0, 2, 0, 11)),
    Case(
        "window_full_tail_targets",
        _PACKED,
        MaskRule(contextual_len=2, max_attn_len=3, min_full_attn_len=2),
        num_targets=(3, 2, 0, 6, 1, 0, 4),
    ),
    Case("semi_local", _PACKED, MaskRule(contextual_len=3, sla_k1=3, sla_k2=4)),
    Case("semi_local_prefix_only", _PADDED, MaskRule(sla_k2=5)),
    Case(
        "semi_local_targets",
        _PADDED,
        MaskRule(contextual_len=2, sla_k1=4, sla_k2=1),
        num_targets=(5, 0, 2, 0, 11),
    ),
)


def build_layout(case: Case) -> SequenceLayout:
    """Layout of a case, with numpy arrays."""
    capacity = len(case.rows) * case.row_len
    starts, lengths = [], []
    for row, segments in enumerate(case.rows):
        slot = row * case.row_len
        for length in segments:
            starts.append(slot)
            lengths.append(length)
            slot += length
    starts += [capacity] * case.num_unused
    lengths += [0] * case.num_unused
    starts, lengths = np.array(starts, np.int32), np.array(lengths, np.int32)
    pairs, count = layout_lib.build_block_pairs(
        starts,
        lengths,
        num_rows=len(case.rows),
        row_len=case.row_len,
        block_len=case.block_len,
        rule=case.rule,
        max_pairs=layout_lib.max_block_pairs(
            len(case.rows), case.row_len, case.block_len, case.rule
        ),
        num_targets=targets_of(case),
    )
    return SequenceLayout(
        starts=starts,
        lengths=lengths,
        block_pairs=pairs[None],
        num_block_pairs=np.array([count], np.int32),
        num_rows=len(case.rows),
        row_len=case.row_len,
        block_len=case.block_len,
    )


def targets_of(case: Case) -> np.ndarray | None:
    """Targets per segment of the layout, unused entries included."""
    if case.num_targets is None:
        return None
    return np.array(case.num_targets + (0,) * case.num_unused, np.int32)
