"""The short list of batch shapes that a run compiles, known before it starts.

Here: configuration and store statistics -> `BatchShape`s, each large enough for any window (the
configuration's own checks see to the lengths). Not here: which windows go into which batch
(`windows.py`, the next file on the path).
"""

import math

from hstu_jax.config import data_schema
from hstu_jax.features.batch import BatchShape

_QUERIES_PER_USER = 12
_MIN_QUERIES = 100  # positives of one window, at most, as preparation cuts them


def batch_shapes(
    data: data_schema.DataConfig,
    *,
    num_contextual: int,
    max_seq_len: int,
    mean_history_len: float,
    max_positives: int,
    num_negatives: int,
    num_hard_negatives: int = 0,
    tail_len: int = 0,
) -> tuple[BatchShape, ...]:
    """Every shape of a run, by ascending row length; packed batches have exactly one.

    Packed rows are `num_contextual + max_seq_len` slots rounded up to whole attention blocks: the
    longest user fits, and the blocks at the end of a row are not ragged. Padded rows are
    `data.row_lens`, or the longest user alone; every row holds one user.

    Args:
        data: the `data` section.
        num_contextual: C, contextual tokens in front of every history.
        max_seq_len: history items of a user, at most.
        mean_history_len: mean number of history items used, over the training windows; sizes the
            packed token budget when `data.tokens_per_group` is 0.
        max_positives: positives of the fullest window.
        num_negatives: M, negatives of a group.
        num_hard_negatives: Hn, hard negatives of a user; 0 without a hard sampler.
        tail_len: history items that layers behind a truncation see; 0 = no truncation.

    Raises:
        ValueError: the positives of a window do not fit `data.queries_per_group`.
    """
    users = data.batch_size // data.num_groups
    longest = num_contextual + max_seq_len
    queries = data.queries_per_group or max(_QUERIES_PER_USER * users, _MIN_QUERIES, max_positives)
    if queries < max_positives:
        raise ValueError(
            f"data.queries_per_group={queries}: one window has {max_positives} positives; "
            f"use at least {max_positives}, or 0."
        )
    if data.layout == "padded":
        sizes = [(users, row_len) for row_len in data.row_lens or (longest,)]
    else:
        row_len = -(-longest // data.block_len) * data.block_len
        tokens = data.tokens_per_group or math.ceil(users * (num_contextual + mean_history_len))
        sizes = [(max(-(-tokens // row_len), 1), row_len)]
    return tuple(
        BatchShape(
            groups=data.num_groups,
            rows=rows,
            row_len=row_len,
            users=users,
            queries=queries,
            negatives=num_negatives,
            hard_negatives=num_hard_negatives,
            block_len=min(data.block_len, row_len),
            tail_segment_len=min(num_contextual + tail_len, row_len) if tail_len else 0,
        )
        for rows, row_len in sizes
    )
