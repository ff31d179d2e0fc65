"""`Batch` and `BatchShape`: the only types that cross from the host to the device.

Every size and dtype of a batch is written here once. A batch is G groups (DESIGN 3.4) of R rows of
L token slots; a row holds one or several users. `segment_starts` and `segment_lengths` are the only
source of what a slot holds: nothing infers padding from a value. Made by `packing.py`, read by
`hstu_jax.model`.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.hstu_attention import layout as attention_layout

AnyArray = Array | np.ndarray  # the host writes the one, the device reads the other


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Every static size of a batch. One `BatchShape` compiles once.

    Attributes:
        groups: G, groups in the global batch.
        rows: R, token rows of a group.
        row_len: L, token slots of a row, contextual tokens included.
        users: U, user slots of a group.
        queries: Q, positives of a group, at most.
        negatives: M, sampled negatives of a group.
        block_len: tokens in a block of the attention schedule.
    """

    groups: int
    rows: int
    row_len: int
    users: int
    queries: int
    negatives: int
    block_len: int

    @property
    def block_pairs(self) -> int:
        """P: capacity of a group's attention schedule."""
        return attention_layout.max_block_pairs(
            num_rows=self.rows, row_len=self.row_len, block_len=self.block_len
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One global batch, or a shard of it along the group axis.

    Slots outside every segment, unused users and masked queries hold zeros that nothing reads.
    A segment holds a user's C contextual slots, then the history from oldest to newest.

    Attributes:
        segment_starts: first slot of each user, row * L + slot within the group; ascending; unused
            users start at R * L.
        segment_lengths: slots of each user, contextual ones included; 0 for unused users.
        block_pairs: (row, query block, key block) triples of the group's attention schedule.
        num_block_pairs: how many of them count.
        history: id feature -> ids in the history slots; contextual slots hold 0.
        action: bitmask of what the user did with the item.
        watch_time_s: seconds watched.
        time_gap_s: query time minus event time in seconds, from int64 (DESIGN 3.6); contextual
            slots hold the query time itself, since their time is 0.
        last_phase: where the user's last token lies in every period that the output postprocessor
            reads, in radians (`time_phases.py`); often there is none.
        contextual: id feature -> the user's id.
        user_index: number of the user in the global batch, independent of packing; keys dropout.
        user_mask: user slots in use (a user may have an empty segment).
        positive: id feature -> ids of the positives.
        positive_user: user slot of each query.
        query_mask: queries in use.
        positive_log_q: log sampling probability of the positive under the negative sampler.
        negative: id feature -> ids of the negatives that the group's queries share.
        negative_log_q: log sampling probability of each negative.
        block_len: tokens in a block of the schedule (static).
    """

    segment_starts: Int[AnyArray, "G U"]
    segment_lengths: Int[AnyArray, "G U"]
    block_pairs: Int[AnyArray, "G P 3"]
    num_block_pairs: Int[AnyArray, "G"]
    history: dict[str, Int[AnyArray, "G R L"]]
    action: Int[AnyArray, "G R L"]
    watch_time_s: Float[AnyArray, "G R L"]
    time_gap_s: Float[AnyArray, "G R L"]
    last_phase: Float[AnyArray, "G U num_periods"]
    contextual: dict[str, Int[AnyArray, "G U"]]
    user_index: Int[AnyArray, "G U"]
    user_mask: Bool[AnyArray, "G U"]
    positive: dict[str, Int[AnyArray, "G Q"]]
    positive_user: Int[AnyArray, "G Q"]
    query_mask: Bool[AnyArray, "G Q"]
    positive_log_q: Float[AnyArray, "G Q"]
    negative: dict[str, Int[AnyArray, "G M"]]
    negative_log_q: Float[AnyArray, "G M"]
    block_len: int

    def sequence_layout(self) -> attention_layout.SequenceLayout:
        """Where every user's tokens lie among the rows of all groups, one group after the other."""
        _, rows, row_len = self.time_gap_s.shape
        return attention_layout.merge_groups(
            self.segment_starts,
            self.segment_lengths,
            self.block_pairs,
            self.num_block_pairs,
            num_rows_per_group=rows,
            row_len=row_len,
            block_len=self.block_len,
        )


_STATIC_FIELD = "block_len"
_ARRAY_FIELDS = tuple(f.name for f in dataclasses.fields(Batch) if f.name != _STATIC_FIELD)


def _flatten(batch):
    children = [(jax.tree_util.GetAttrKey(name), getattr(batch, name)) for name in _ARRAY_FIELDS]
    return children, batch.block_len


def _unflatten(block_len, children):
    # Without __init__: JAX also rebuilds trees with leaves that are no arrays, which the annotation
    # checks of the tests would refuse.
    batch = object.__new__(Batch)
    object.__setattr__(batch, _STATIC_FIELD, block_len)
    for name, value in zip(_ARRAY_FIELDS, children, strict=True):
        object.__setattr__(batch, name, value)
    return batch


jax.tree_util.register_pytree_with_keys(Batch, _flatten, _unflatten)
