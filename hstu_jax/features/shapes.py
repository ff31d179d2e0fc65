"""The short list of batch shapes that a run compiles, known before it starts.

Here: configuration and store statistics -> `BatchShape`s, each large enough for any window (the
configuration's own checks see to the lengths). Not here: which windows go into which batch
(`windows.py`, the next file on the path).
"""

import math

import numpy as np

from hstu_jax.config import data_schema, schema
from hstu_jax.data import event_store
from hstu_jax.features import next_item, sequence_rules
from hstu_jax.features.batch import BatchShape

_QUERIES_PER_USER = 12
_MIN_QUERIES = 100  # positives of one window, at most, as preparation by days cuts them
# Groups close when either their slots or their queries are full; queries should rarely be first.
_QUERY_MARGIN = 1.2


def run_shapes(
    config: schema.Config,
    store: event_store.EventStore,
    rows: next_item.TrainingRows | None,
    *,
    is_evaluation: bool,
) -> tuple[BatchShape, ...]:
    """`batch_shapes` of a configuration and its data.

    Sized by the training windows also for evaluation, so that it has the shapes of training.

    Args:
        config: the configuration.
        store: the event store.
        rows: training rows of the next-item objective; None = the windows' histories.
        is_evaluation: draws `num_eval_sample` negatives where that is set.

    Raises:
        ValueError: as `batch_shapes`.
    """
    windows, max_seq_len = store.windows, config.model.user_tower.max_seq_len
    num_positives, end = np.diff(windows.positive_offsets), np.asarray(windows.history_end)
    is_train = np.asarray(windows.split) == 0
    if rows is not None:
        end, num_positives = rows.row_end, np.where(is_train, rows.num_queries, num_positives)
        is_train &= rows.num_queries > 0
    used = np.minimum(end - np.asarray(windows.history_start), max_seq_len)
    chosen = is_train if is_train.any() else slice(None)
    sampler = config.data.negative_sampler
    return batch_shapes(
        config.data,
        num_contextual=config.num_contextual,
        max_seq_len=max_seq_len,
        mean_history_len=float(used[chosen].mean()),
        max_positives=int(num_positives.max()),
        num_negatives=(is_evaluation and sampler.num_eval_sample) or sampler.num_sample,
        num_hard_negatives=sampler.num_hard_sample,
        tail_len=sequence_rules.tail_len(config.model.user_tower),
        mean_queries=None if rows is None else float(num_positives[chosen].mean()),
    )


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
    mean_queries: float | None = None,
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
        mean_queries: mean number of queries of a training window, which sizes `queries` when
            `data.queries_per_group` is 0; None = 12 are assumed, which windows of a day stay below.

    Raises:
        ValueError: the positives of a window do not fit `data.queries_per_group`.
    """
    users = data.batch_size // data.num_groups
    longest = num_contextual + max_seq_len
    per_user = _QUERIES_PER_USER if mean_queries is None else _QUERY_MARGIN * mean_queries
    queries = data.queries_per_group or max(
        math.ceil(per_user * users), _MIN_QUERIES, max_positives
    )
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
