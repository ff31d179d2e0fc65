"""Batches for the model's tests: the same users laid out in one row each, or several to a row.

Per-user content is kept as one jagged array (users one after the other) and scattered into any
layout, so that a test can compare layouts. Imports nothing of the pipeline that is being built on
top of the model.
"""

import dataclasses

import numpy as np

from hstu_jax.features import batch as features_batch
from hstu_jax.features import sequence_rules
from pallas_kernels.hstu_attention import layout as attention_layout
from pallas_kernels.hstu_attention import mask as attention_mask

ANY_RULE = attention_mask.MaskRule()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the tokens of a list of users lie in a grid of rows."""

    starts: np.ndarray
    lengths: np.ndarray
    num_rows: int
    row_len: int
    block_len: int
    rule: attention_mask.MaskRule

    @property
    def slots(self) -> np.ndarray:
        """Flat grid index of every token, users one after the other."""
        pieces = [start + np.arange(n) for start, n in zip(self.starts, self.lengths, strict=True)]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def to_grid(self, jagged: np.ndarray, *, fill: float = 0) -> np.ndarray:
        """[sum of lengths, ...] -> [R, L, ...], with `fill` in padding."""
        grid = np.full((self.num_rows * self.row_len, *jagged.shape[1:]), fill, jagged.dtype)
        grid[self.slots] = jagged
        return grid.reshape(self.num_rows, self.row_len, *jagged.shape[1:])

    def from_grid(self, grid: np.ndarray) -> np.ndarray:
        """[R, L, ...] -> [sum of lengths, ...]."""
        return np.asarray(grid).reshape(-1, *grid.shape[2:])[self.slots]

    def block_pairs(self, num_targets: np.ndarray | None = None) -> tuple[np.ndarray, int]:
        """The attention schedule and its length."""
        return attention_layout.build_block_pairs(
            self.starts,
            self.lengths,
            num_rows=self.num_rows,
            row_len=self.row_len,
            block_len=self.block_len,
            rule=self.rule,
            max_pairs=attention_layout.max_block_pairs(self.num_rows, self.row_len, self.block_len),
            num_targets=num_targets,
        )

    def layout(self, num_targets: np.ndarray | None = None) -> attention_layout.SequenceLayout:
        """The attention layout."""
        pairs, count = self.block_pairs(num_targets)
        return attention_layout.SequenceLayout(
            starts=self.starts,
            lengths=self.lengths,
            block_pairs=pairs[None],
            num_block_pairs=np.array([count], np.int32),
            num_rows=self.num_rows,
            row_len=self.row_len,
            block_len=self.block_len,
        )

    def tail(
        self, *, num_contextual: int, tail_len: int, num_targets: np.ndarray | None = None
    ) -> features_batch.Tail:
        """The layout behind a truncation, as one group, with a few slots of padding."""
        targets = None if num_targets is None else num_targets[None].astype(np.int32)
        options = dict(num_contextual=num_contextual, tail_len=tail_len, num_targets=targets)
        cut = sequence_rules.tail_lengths(self.lengths[None], **options)
        row_len = int(cut.sum()) + 3
        block_len = min(self.block_len, row_len)
        return sequence_rules.plan_tail(
            self.lengths[None],
            **options,
            row_len=row_len,
            block_len=block_len,
            max_pairs=attention_layout.max_block_pairs(1, row_len, block_len),
            rule=self.rule,
        )


def place(
    lengths,
    *,
    row_len: int,
    packed: bool,
    block_len: int = 8,
    rule: attention_mask.MaskRule = ANY_RULE,
    num_rows: int = 0,
    num_users: int = 0,
) -> Placement:
    """Lays users out in order, each in the first row that is not behind and has room (packed),
    or each in a row of its own.

    Args:
        lengths: tokens of each user, contextual ones included.
        row_len: slots of a row.
        packed: several users to a row.
        block_len: of the attention schedule.
        rule: mask that the schedule serves.
        num_rows: rows of the grid; 0 = as many as needed.
        num_users: user slots; unused ones follow the users. 0 = as many as users.
    """
    starts, cursor = [], 0
    for length in lengths:
        in_row = cursor % row_len
        if in_row and (not packed or in_row + length > row_len):
            cursor += row_len - in_row
        starts.append(cursor)
        # An empty user of a padded batch owns an empty row.
        cursor += max(length, 1) if not packed else length
    rows = max(-(-cursor // row_len), num_rows, 1)
    unused = max(num_users - len(starts), 0)
    return Placement(
        starts=np.array(starts + [rows * row_len] * unused, np.int32),
        lengths=np.array([*lengths] + [0] * unused, np.int32),
        num_rows=rows,
        row_len=row_len,
        block_len=min(block_len, row_len),
        rule=rule,
    )


def make_batch(
    placement: Placement,
    *,
    action: np.ndarray,
    watch_time_s: np.ndarray,
    time_gap_s: np.ndarray,
    num_users: int,
    num_queries: int = 1,
    num_negatives: int = 1,
    num_hard: int = 0,
    fill: float = 0.0,
    tail: features_batch.Tail | None = None,
    last_phase: np.ndarray | None = None,
) -> features_batch.Batch:
    """One group. Jagged content per token; queries belong to user 0, lookups are not filled in.

    Args:
        placement: where the tokens lie.
        action: bitmask per token.
        watch_time_s: per token.
        time_gap_s: per token.
        num_users: users in use, the first of the placement's user slots.
        num_queries: Q, all in use.
        num_negatives: M.
        num_hard: Hn, all there.
        fill: what padding holds in float arrays.
        tail: the layout behind a truncation.
        last_phase: [user slots, periods] of the output postprocessor; None = no periods.
    """
    pairs, count = placement.block_pairs()
    slots = len(placement.starts)
    return features_batch.Batch(
        segment_starts=placement.starts[None],
        segment_lengths=placement.lengths[None],
        block_pairs=pairs[None],
        num_block_pairs=np.array([count], np.int32),
        history={},
        action=placement.to_grid(action.astype(np.int32))[None],
        watch_time_s=placement.to_grid(watch_time_s.astype(np.float32), fill=fill)[None],
        time_gap_s=placement.to_grid(time_gap_s.astype(np.float32), fill=fill)[None],
        last_phase=(np.zeros((slots, 0), np.float32) if last_phase is None else last_phase)[None],
        contextual={},
        user_index=np.arange(slots, dtype=np.int32)[None],
        user_mask=(np.arange(slots) < num_users)[None],
        sample_weight=np.ones((1, slots), np.float32),
        positive={},
        positive_user=np.zeros((1, num_queries), np.int32),
        query_mask=np.ones((1, num_queries), bool),
        positive_log_q=np.zeros((1, num_queries), np.float32),
        negative={},
        negative_log_q=np.zeros((1, num_negatives), np.float32),
        hard_negative={},
        hard_negative_mask=np.ones((1, slots, num_hard), bool),
        hard_negative_log_q=np.zeros((1, slots, num_hard), np.float32),
        block_len=placement.block_len,
        tail=tail,
        # Whole seconds; in padding, an age that would show.
        age_s=placement.to_grid(
            np.clip(time_gap_s, -(2**24), 2**31 - 2**25).astype(np.int32),
            fill=-12345 if np.isnan(fill) else 0,
        )[None],
    )
