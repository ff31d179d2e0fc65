"""Batches of the attention benchmark: full rows, spread lengths, ragged users padded and packed.

Host only, and the same numbers in every run. Small cases for correctness are in `cases.py`; the
benchmark itself is `benchmark.py`.
"""

import dataclasses
import math
import statistics

import numpy as np
from jaxtyping import Int

from pallas_kernels.hstu_attention import layout as layout_lib
from pallas_kernels.hstu_attention.layout import SequenceLayout
from pallas_kernels.hstu_attention.mask import MaskRule

KINDS = ("dense", "spread", "ragged_padded", "ragged_packed")
# 41,828 interactions of 664 KuaiRand-27K users (a subset filtered to active raters): 63.0 a user
# on average, 44 in the middle. The mean of a log-normal is exp(sigma^2 / 2) times its median. (The
# logarithms of those counts spread by 0.70: the longer tail of the two is taken.)
RAGGED_SIGMA = math.sqrt(2 * math.log(63.0 / 44.0))
_RAGGED_MEAN = 0.25


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch.

    Args:
        layout: of the tokens, with numpy arrays.
        lengths: tokens of each user, contextual tokens included, in the order of the layout.
    """

    layout: SequenceLayout
    lengths: Int[np.ndarray, "B"]


def ragged_lengths(num_users: int, longest: int) -> Int[np.ndarray, "B"]:
    """Returns KuaiRand-like history lengths: a log-normal cut at `longest`, mean a quarter of it.

    `n_i = clip(longest c exp(sigma z_i), 1, longest)`, where z_i are the num_users midpoint
    quantiles of a normal distribution and c makes the mean of the cut shares a quarter; in a mixed
    order that is always the same.

    Args:
        num_users: B.
        longest: the maximum N.
    """
    normal = statistics.NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / num_users) for i in range(num_users)]
    spread = np.exp(RAGGED_SIGMA * np.array(quantiles))
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        is_low = np.minimum(middle * spread, 1).mean() < _RAGGED_MEAN
        low, high = (middle, high) if is_low else (low, middle)
    lengths = np.clip(np.rint(longest * np.minimum(low * spread, 1)), 1, longest)
    return np.random.default_rng(0).permutation(lengths).astype(np.int32)


def first_fit(lengths: Int[np.ndarray, "B"], row_len: int) -> list[list[int]]:
    """Returns rows of lengths: each user goes to the first row that still has room.

    Args:
        lengths: tokens of each user, at most `row_len`.
        row_len: slots of a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for length in lengths.tolist():
        row = next((i for i, room in enumerate(free) if length <= room), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(row_len)
        rows[row].append(length)
        free[row] -= length
    return rows


def build_batch(
    kind: str, *, num_users: int, longest: int, rule: MaskRule, block_len: int
) -> Batch:
    """Returns a batch of the given kind.

    Args:
        kind: "dense" (every history has `longest` tokens), "spread" (`longest` / 8 .. `longest`,
            evenly spaced, one user a row), "ragged_padded" (`ragged_lengths`, one user a row),
            "ragged_packed" (the same users, several in a row of the same length, first fit).
        num_users: B.
        longest: history tokens of a row; contextual tokens come on top.
        rule: the mask.
        block_len: tokens of a block of the layout's schedule.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"batches={kind!r}: unknown kind; use {', '.join(KINDS)}.")
    if kind == "dense":
        lengths = np.full(num_users, longest, np.int32)
    elif kind == "spread":
        lengths = np.linspace(longest / 8, longest, num_users).astype(np.int32)
    else:
        lengths = ragged_lengths(num_users, longest)
    lengths = lengths + np.int32(rule.contextual_len)
    row_len = longest + rule.contextual_len
    if kind != "ragged_packed":
        built = layout_lib.from_lengths(lengths, row_len=row_len, block_len=block_len, rule=rule)
        return Batch(built, lengths)
    return _packed(first_fit(lengths, row_len), row_len, rule, min(block_len, row_len))


def _packed(rows, row_len, rule, block_len):
    first_slots = [
        row * row_len + sum(lengths[:i])
        for row, lengths in enumerate(rows)
        for i in range(len(lengths))
    ]
    starts = np.array(first_slots, np.int32)
    lengths = np.array([length for row in rows for length in row], np.int32)
    pairs, count = layout_lib.build_block_pairs(
        starts,
        lengths,
        num_rows=len(rows),
        row_len=row_len,
        block_len=block_len,
        rule=rule,
        max_pairs=layout_lib.max_block_pairs(len(rows), row_len, block_len, rule),
    )
    built = SequenceLayout(
        starts=starts,
        lengths=lengths,
        block_pairs=pairs[None],
        num_block_pairs=np.array([count], np.int32),
        num_rows=len(rows),
        row_len=row_len,
        block_len=block_len,
    )
    return Batch(built, lengths)
