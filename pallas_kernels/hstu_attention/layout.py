"""Where each user's tokens lie in the `[R, L]` token grid, and which tile pairs attention visits.

`SequenceLayout` is the single source of masks, positions and gathers. The first half runs on the
host (numpy: schedule of block pairs, checks), the second on the device (jnp: segment and position
of each slot). Which keys a query sees is decided in `mask.py`; `xla_blockwise.py` is the next file.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.hstu_attention.mask import (
    KeyInterval,
    MaskRule,
    interval_breakpoints,
    key_intervals,
)

# Forward and backward of the `xla` path with 4 heads of 32 (2 CPU cores, AVX-512): 128 takes 13 %
# more time than 64 at N = 1024 and 20 to 30 % more at 2048 (waste on the diagonal), 32 takes 40 %
# more at 2048 (cost per tile); 48 and 96 are equal to 64.
DEFAULT_BLOCK_LEN = 64
_CAUSAL = MaskRule()


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Segments of a token grid of R rows and L slots, with the block schedule of attention.

    A segment is one user's tokens inside one row: contextual tokens first, then the history,
    oldest to newest. Segments never cross rows, do not overlap and are sorted by start.

    Args:
        starts: flat index (row * L + slot) of each segment's first token, ascending. Unused
            entries stand at the end of the grid or of their row group.
        lengths: tokens of each segment, contextual tokens included; 0 = unused or an empty user.
        block_pairs: (row, query block, key block) triples per group of rows; entries past the
            group's count are ignored.
        num_block_pairs: valid triples per group.
        num_rows: R.
        row_len: L.
        block_len: tokens in a query block and in a key block; the last block of a row may be cut.
    """

    starts: Int[Array | np.ndarray, "S"]
    lengths: Int[Array | np.ndarray, "S"]
    block_pairs: Int[Array | np.ndarray, "G P 3"]
    num_block_pairs: Int[Array | np.ndarray, "G"]
    num_rows: int
    row_len: int
    block_len: int


_DATA_FIELDS = ("starts", "lengths", "block_pairs", "num_block_pairs")
_META_FIELDS = ("num_rows", "row_len", "block_len")


def _flatten_layout(layout):
    children = [(jax.tree_util.GetAttrKey(name), getattr(layout, name)) for name in _DATA_FIELDS]
    return children, tuple(getattr(layout, name) for name in _META_FIELDS)


def _unflatten_layout(meta, children):
    # Without __init__: JAX also rebuilds trees with leaves that are no arrays (specs, None), which
    # the annotation checks of the tests would refuse.
    layout = object.__new__(SequenceLayout)
    for name, value in zip(_DATA_FIELDS + _META_FIELDS, (*children, *meta), strict=True):
        object.__setattr__(layout, name, value)
    return layout


jax.tree_util.register_pytree_with_keys(SequenceLayout, _flatten_layout, _unflatten_layout)


def check_segments(
    starts: Int[np.ndarray, "S"],
    lengths: Int[np.ndarray, "S"],
    *,
    num_rows: int,
    row_len: int,
    rule: MaskRule = _CAUSAL,
) -> None:
    """Refuses segments that overlap, cross a row, are unsorted or shorter than their prefix.

    Args:
        starts: flat index of each segment's first token; `num_rows * row_len` when unused.
        lengths: tokens of each segment; 0 = unused or empty.
        num_rows: rows of the grid.
        row_len: slots of a row.
        rule: mask whose contextual tokens each non-empty segment must hold.

    Raises:
        ValueError: naming the first offending segment.
    """
    starts, lengths = starts.astype(np.int64), lengths.astype(np.int64)
    capacity = num_rows * row_len
    is_outside = (starts < 0) | (starts > capacity) | (lengths < 0)
    is_outside |= (lengths > 0) & (starts % row_len + lengths > row_len)
    _refuse(is_outside, starts, lengths, f"leaves its row of {row_len} slots", "cut the segment")
    is_short = (lengths > 0) & (lengths < rule.contextual_len)
    _refuse(
        is_short,
        starts,
        lengths,
        f"is shorter than contextual_len={rule.contextual_len}",
        "count contextual tokens in lengths",
    )
    is_overlapping = np.zeros_like(is_outside)
    is_overlapping[1:] = starts[1:] < starts[:-1] + lengths[:-1]
    _refuse(
        is_overlapping,
        starts,
        lengths,
        "begins before the end of the segment listed before it",
        "sort segments by start and leave no overlap",
    )


def _refuse(is_bad, starts, lengths, rule_broken, remedy):
    if is_bad.any():
        first = int(np.argmax(is_bad))
        raise ValueError(
            f"starts[{first}]={starts[first]}, lengths[{first}]={lengths[first]}: the segment "
            f"{rule_broken} ({int(is_bad.sum())} in all); {remedy}."
        )


def max_block_pairs(
    num_rows: int, row_len: int, block_len: int, rule: MaskRule | None = None
) -> int:
    """Returns a capacity that no schedule exceeds.

    Args:
        num_rows: rows of one group.
        row_len: slots of a row.
        block_len: tokens of a block.
        rule: the mask, if known: most masks are causal up to the contextual rows, which halves
            the capacity. Without it every pair of blocks of a row is counted.
    """
    num_blocks = -(-row_len // min(block_len, row_len))
    if rule is None:
        return num_rows * num_blocks * num_blocks
    triangle = num_blocks * (num_blocks + 1) // 2
    if rule.is_semi_local or rule.contextual_len == 0:
        return num_rows * triangle
    # Contextual rows look ahead: C tokens touch at most this many blocks of their segment, and the
    # spans of all segments of a row add up to at most num_blocks - 1 steps from block to block.
    contextual_blocks = (rule.contextual_len + block_len - 2) // block_len + 1
    ahead = min(contextual_blocks * (num_blocks - 1), num_blocks * num_blocks - triangle)
    return num_rows * (triangle + ahead)


def build_block_pairs(
    starts: Int[np.ndarray, "S"],
    lengths: Int[np.ndarray, "S"],
    *,
    num_rows: int,
    row_len: int,
    block_len: int,
    rule: MaskRule,
    max_pairs: int,
    num_targets: Int[np.ndarray, "S"] | None = None,
) -> tuple[Int[np.ndarray, "P 3"], int]:
    """Lists the pairs of blocks that the mask touches, for one group of rows.

    The schedule is also right for every rule whose mask is part of `rule`'s; a mask with a window
    depends on the targets, so those must be the ones given to attention.

    Args:
        starts: flat index of each segment's first token in this group.
        lengths: tokens of each segment.
        num_rows: rows of the group.
        row_len: slots of a row.
        block_len: tokens of a block, at most `row_len`.
        rule: the mask.
        max_pairs: capacity P of the result; see `max_block_pairs`.
        num_targets: targets at the end of each segment, if there are any.

    Returns:
        Triples (row, query block, key block) in that sorting order, zeros past the count, and the
        count.

    Raises:
        ValueError: bad segments (see `check_segments`), `block_len` out of range, or more than
            `max_pairs` pairs.
    """
    if not 0 < block_len <= row_len:
        raise ValueError(
            f"block_len={block_len}: must be between 1 and row_len={row_len}; "
            "use min(block_len, row_len)."
        )
    check_segments(starts, lengths, num_rows=num_rows, row_len=row_len, rule=rule)
    num_blocks = -(-row_len // block_len)
    is_used = lengths > 0
    start, length = starts[is_used].astype(np.int64), lengths[is_used].astype(np.int64)
    targets = None if num_targets is None else num_targets[is_used].astype(np.int64)
    if targets is not None:
        is_bad = (targets < 0) | (targets > length - rule.contextual_len)
        _refuse(is_bad, start, length, "has negative or too many num_targets", "count them again")
    offset = start % row_len
    first_block = offset // block_len
    num_query_blocks = (offset + length - 1) // block_len - first_block + 1
    # One entry per (segment, query block) from here on.
    segment = np.repeat(np.arange(len(start)), num_query_blocks)
    query_block = _ranges(first_block, num_query_blocks)
    row = start[segment] // row_len
    is_visited = np.zeros((num_rows, num_blocks, num_blocks), dtype=bool)
    for first_key, end_key in _visible_keys(
        query_block, offset[segment], length[segment], targets, segment, block_len, rule
    ):
        has_keys = end_key > first_key
        key_start = first_key[has_keys] // block_len
        num_key_blocks = (end_key[has_keys] - 1) // block_len - key_start + 1
        is_visited[
            np.repeat(row[has_keys], num_key_blocks),
            np.repeat(query_block[has_keys], num_key_blocks),
            _ranges(key_start, num_key_blocks),
        ] = True
    pairs = np.argwhere(is_visited)
    if len(pairs) > max_pairs:
        raise ValueError(
            f"max_pairs={max_pairs}: the mask touches {len(pairs)} block pairs; "
            "take the capacity from max_block_pairs()."
        )
    padded = np.zeros((max_pairs, 3), dtype=np.int32)
    padded[: len(pairs)] = pairs
    return padded, len(pairs)


def _ranges(first, count):
    """Concatenates `first[i], first[i] + 1, ..., first[i] + count[i] - 1` over i."""
    ends = np.cumsum(count)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + count, count)


def _visible_keys(query_block, offset, length, targets, segment, block_len, rule):
    """Row slots [first, end) seen by any query of a (segment, query block), per mask interval."""
    first = np.maximum(query_block * block_len - offset, 0)
    last = np.minimum((query_block + 1) * block_len - offset, length) - 1
    targets = None if targets is None else targets[segment]
    history_end = length if targets is None else np.maximum(length - targets, 0)
    edges = interval_breakpoints(history_end, rule=rule)
    candidates = [first, last]
    for edge in edges:
        candidates += [np.clip(edge - 1, first, last), np.clip(edge, first, last)]
    for interval in key_intervals(np.stack(candidates), length, targets, rule=rule, xp=np):
        is_empty = interval.end <= interval.start
        nowhere = offset + length
        start = np.where(is_empty, nowhere, interval.start + offset).min(axis=0)
        yield start, np.where(is_empty, 0, interval.end + offset).max(axis=0)


def from_lengths(
    lengths: Int[np.ndarray, "B"],
    *,
    row_len: int,
    block_len: int = DEFAULT_BLOCK_LEN,
    rule: MaskRule = _CAUSAL,
    num_targets: Int[np.ndarray, "B"] | None = None,
) -> SequenceLayout:
    """Plain padding: user b owns row b and its tokens begin at slot 0 (numpy, for tests and sizes).

    Args:
        lengths: tokens of each user, contextual tokens included, at most `row_len`.
        row_len: slots of a row.
        block_len: tokens of a block; cut to `row_len`.
        rule: the mask that the schedule serves.
        num_targets: targets at the end of each segment, if there are any.

    Raises:
        ValueError: a length does not fit (see `check_segments`).
    """
    num_rows, block_len = len(lengths), min(block_len, row_len)
    starts = (np.arange(num_rows) * row_len).astype(np.int32)
    pairs, count = build_block_pairs(
        starts,
        lengths,
        num_rows=num_rows,
        row_len=row_len,
        block_len=block_len,
        rule=rule,
        max_pairs=max_block_pairs(num_rows, row_len, block_len, rule),
        num_targets=num_targets,
    )
    return SequenceLayout(
        starts=starts,
        lengths=lengths.astype(np.int32),
        block_pairs=pairs[None],
        num_block_pairs=np.array([count], dtype=np.int32),
        num_rows=num_rows,
        row_len=row_len,
        block_len=block_len,
    )


def merge_groups(
    starts: Int[Array | np.ndarray, "G S"],
    lengths: Int[Array | np.ndarray, "G S"],
    block_pairs: Int[Array | np.ndarray, "G P 3"],
    num_block_pairs: Int[Array | np.ndarray, "G"],
    *,
    num_rows_per_group: int,
    row_len: int,
    block_len: int,
) -> SequenceLayout:
    """Joins row groups, each in its own coordinates, into one layout (numpy in, numpy out).

    Args:
        starts: flat index inside the group's own rows.
        lengths: tokens of each segment.
        block_pairs: schedule of each group, rows counted from the group's first row.
        num_block_pairs: valid entries of each schedule.
        num_rows_per_group: rows of a group.
        row_len: slots of a row.
        block_len: tokens of a block.
    """
    num_groups = starts.shape[0]
    group = np.arange(num_groups, dtype=np.int32)
    first_token = (group * (num_rows_per_group * row_len))[:, None]
    first_row = (group * num_rows_per_group)[:, None, None] * np.array([1, 0, 0], dtype=np.int32)
    return SequenceLayout(
        starts=(starts + first_token).reshape(-1),
        lengths=lengths.reshape(-1),
        block_pairs=block_pairs + first_row,
        num_block_pairs=num_block_pairs,
        num_rows=num_groups * num_rows_per_group,
        row_len=row_len,
        block_len=min(block_len, row_len),
    )


def token_segments(layout: SequenceLayout) -> Int[Array, "R L"]:
    """Segment index of each slot, -1 in padding.

    Of several segments with one start (all but the last are empty) the last one owns the slot.
    """
    slots = jnp.arange(layout.num_rows * layout.row_len, dtype=jnp.int32)
    starts, lengths = jnp.asarray(layout.starts), jnp.asarray(layout.lengths)
    segment = jnp.searchsorted(starts, slots, side="right").astype(jnp.int32) - 1
    owner = jnp.maximum(segment, 0)
    is_inside = (segment >= 0) & (slots < starts[owner] + lengths[owner])
    return jnp.where(is_inside, segment, -1).reshape(layout.num_rows, layout.row_len)


def token_positions(layout: SequenceLayout) -> Int[Array, "R L"]:
    """Position of each slot inside its segment, from 0; 0 in padding."""
    segment = token_segments(layout)
    slots = jnp.arange(layout.num_rows * layout.row_len, dtype=jnp.int32)
    start = jnp.asarray(layout.starts)[jnp.maximum(segment, 0)]
    position = slots.reshape(layout.num_rows, layout.row_len) - start
    return jnp.where(segment >= 0, position, 0)


def slot_intervals(
    layout: SequenceLayout,
    num_targets: Int[Array | np.ndarray, "S"] | None,
    *,
    rule: MaskRule,
    padded_len: int,
) -> list[KeyInterval]:
    """Mask of each slot's query as intervals [R, padded_len] of slots of its row, empty in padding.

    Args:
        layout: where the segments lie.
        num_targets: targets at the end of each segment, if there are any.
        rule: the mask.
        padded_len: slots that a row has after padding to whole tiles, at least `layout.row_len`.
    """
    segment, position = token_segments(layout), token_positions(layout)
    owner, is_token = jnp.maximum(segment, 0), segment >= 0
    targets = None if num_targets is None else jnp.asarray(num_targets)[owner]
    length = jnp.asarray(layout.lengths)[owner]
    first_slot = jnp.arange(layout.row_len, dtype=jnp.int32)[None] - position
    width = (0, padded_len - layout.row_len)
    return [
        KeyInterval(
            jnp.pad(jnp.where(is_token, interval.start + first_slot, 0), ((0, 0), width)),
            jnp.pad(jnp.where(is_token, interval.end + first_slot, 0), ((0, 0), width)),
        )
        for interval in key_intervals(position, length, targets, rule=rule, xp=jnp)
    ]
