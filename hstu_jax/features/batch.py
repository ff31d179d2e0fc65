"""`Batch` and `BatchShape`: the only types that cross from the host to the device.

Every size and dtype of a batch is written here once. A batch is G groups (docs/design.md) of R rows
of L token slots; a row holds one or several users. `segment_starts` and `segment_lengths` are the
only source of what a slot holds: nothing infers padding from a value. Made by `packing.py`, read by
`hstu_jax.model`.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

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
        hard_negatives: Hn, hard negatives of a user, at most; 0 without a hard sampler.
        block_len: tokens in a block of the attention schedule.
        tail_segment_len: contextual and history tokens of a user, at most, behind
            `attn_truncation_split_layer`; 0 = no truncation.
    """

    groups: int
    rows: int
    row_len: int
    users: int
    queries: int
    negatives: int
    block_len: int
    hard_negatives: int = 0
    tail_segment_len: int = 0

    @property
    def block_pairs(self) -> int:
        """P: capacity of a group's attention schedule."""
        return attention_layout.max_block_pairs(
            num_rows=self.rows, row_len=self.row_len, block_len=self.block_len
        )

    @property
    def tail_row_len(self) -> int:
        """Slots of the one row that holds all of a group's users after the truncation."""
        return min(self.rows * self.row_len, self.users * self.tail_segment_len)

    @property
    def tail_block_len(self) -> int:
        """Tokens in a block of the schedule after the truncation."""
        return min(self.block_len, self.tail_row_len)

    @property
    def tail_block_pairs(self) -> int:
        """Capacity of a group's attention schedule after the truncation.

        A user of n tokens lies in at most ceil((n - 1) / block_len) + 1 blocks and needs at most
        their square; the users' blocks add up to those of the row and one more for each user.
        """
        if not self.tail_segment_len:
            return 0
        num_blocks = -(-self.tail_row_len // self.tail_block_len)
        longest = -(-(self.tail_segment_len - 1) // self.tail_block_len) + 1
        return min(num_blocks * num_blocks, longest * (num_blocks + self.users))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tail:
    """The second sequence layout of a batch, for the layers behind a truncation.

    All users of a group lie end to end in one row: contextual tokens, then the newest history
    items. Which tokens of the first layout they are follows from both layouts' lengths.

    Attributes:
        segment_starts: first slot of each user in its group's row, in the order of user slots;
            users without tokens start where the next one does.
        segment_lengths: slots of each user; 0 for unused users.
        block_pairs: as in `Batch`, of this layout.
        num_block_pairs: how many of them count.
        row_len: slots of a row (static).
        block_len: tokens in a block of the schedule (static).
    """

    segment_starts: Int[AnyArray, "G U"]
    segment_lengths: Int[AnyArray, "G U"]
    block_pairs: Int[AnyArray, "G P2 3"]
    num_block_pairs: Int[AnyArray, "G"]
    row_len: int
    block_len: int

    def sequence_layout(self) -> attention_layout.SequenceLayout:
        """Where every user's tokens lie, one group after the other."""
        return attention_layout.merge_groups(
            self.segment_starts,
            self.segment_lengths,
            self.block_pairs,
            self.num_block_pairs,
            num_rows_per_group=1,
            row_len=self.row_len,
            block_len=self.block_len,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One global batch, or a shard of it along the group axis.

    Slots outside every segment, unused users and masked queries hold zeros that nothing reads.
    A segment holds a user's C contextual slots, then the history from oldest to newest. A feature
    is an id, -1 for none, or the float32 number of a raw feature without boundaries. In training
    batches of the next-item objective the events go on to the user's last query, and every query
    asks from a token of its own (`next_item.py`).

    Attributes:
        segment_starts: first slot of each user, row * L + slot within the group; ascending; unused
            users start at R * L.
        segment_lengths: slots of each user, contextual ones included; 0 for unused users.
        block_pairs: (row, query block, key block) triples of the group's attention schedule.
        num_block_pairs: how many of them count.
        history: feature -> values in the history slots; contextual slots hold 0.
        action: bitmask of what the user did with the item.
        watch_time_s: seconds watched.
        time_gap_s: query time minus event time in seconds, from int64 (docs/design.md); contextual
            slots hold the query time itself, since their time is 0. The time of the last query in
            training batches of the next-item objective.
        last_phase: where the user's last token lies in every period that the output postprocessor
            reads, in radians (`time_phases.py`); often there is none.
        contextual: feature -> the user's value, or V of them (ids: -1 behind the last).
        user_index: number of the user in the global batch, independent of packing; keys dropout.
        user_mask: user slots in use (a user may have an empty segment).
        sample_weight: weight of the losses of each user's queries, at least 0; 1 where no weights
            are configured.
        positive: feature -> values of the positives.
        positive_user: user slot of each query.
        query_mask: queries in use.
        positive_log_q: log sampling probability of the positive under the negative sampler.
        negative: feature -> values of the negatives that the group's queries share.
        negative_log_q: log sampling probability of each negative.
        hard_negative: feature -> values of each user's own negatives, shared by the user's queries.
        hard_negative_mask: hard negatives that are there; the first slots of a user.
        hard_negative_log_q: log probability with which the negative sampler draws the item.
        block_len: tokens in a block of the schedule (static).
        tail: the users after the truncation; None where no layer truncates.
        query_slot: the token that each query asks from, row * L + slot within the group; R * L
            where masked. None = every query asks from its user's last token.
        step_gap_s: seconds to the user's next event or from the one before, which the tokens read
            with the next-item objective; contextual slots hold `next_item.NO_GAP_S`. None = the
            configuration reads none.
        age_s: query time minus event time in whole seconds (`ages.py`), which a bias by time reads;
            contextual slots hold 0. None = the configuration reads none.
    """

    segment_starts: Int[AnyArray, "G U"]
    segment_lengths: Int[AnyArray, "G U"]
    block_pairs: Int[AnyArray, "G P 3"]
    num_block_pairs: Int[AnyArray, "G"]
    history: dict[str, Num[AnyArray, "G R L"]]
    action: Int[AnyArray, "G R L"]
    watch_time_s: Float[AnyArray, "G R L"]
    time_gap_s: Float[AnyArray, "G R L"]
    last_phase: Float[AnyArray, "G U num_periods"]
    contextual: dict[str, Num[AnyArray, "G U ..."]]
    user_index: Int[AnyArray, "G U"]
    user_mask: Bool[AnyArray, "G U"]
    sample_weight: Float[AnyArray, "G U"]
    positive: dict[str, Num[AnyArray, "G Q"]]
    positive_user: Int[AnyArray, "G Q"]
    query_mask: Bool[AnyArray, "G Q"]
    positive_log_q: Float[AnyArray, "G Q"]
    negative: dict[str, Num[AnyArray, "G M"]]
    negative_log_q: Float[AnyArray, "G M"]
    hard_negative: dict[str, Num[AnyArray, "G U Hn"]]
    hard_negative_mask: Bool[AnyArray, "G U Hn"]
    hard_negative_log_q: Float[AnyArray, "G U Hn"]
    block_len: int
    tail: Tail | None = None
    query_slot: Int[AnyArray, "G Q"] | None = None
    step_gap_s: Float[AnyArray, "G R L"] | None = None
    age_s: Int[AnyArray, "G R L"] | None = None

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


def _register(cls: type, static_fields: tuple[str, ...]) -> None:
    """Makes a dataclass a tree of its arrays."""
    names = tuple(f.name for f in dataclasses.fields(cls) if f.name not in static_fields)

    def flatten(value):
        children = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names]
        return children, tuple(getattr(value, name) for name in static_fields)

    def unflatten(static, children):
        # Without __init__: JAX also rebuilds trees with leaves that are no arrays, which the
        # annotation checks of the tests would refuse.
        value = object.__new__(cls)
        for name, child in zip((*static_fields, *names), (*static, *children), strict=True):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)


_register(Tail, ("row_len", "block_len"))
_register(Batch, ("block_len",))
