"""Windows -> rows of segments -> `Batch`: the values, gathered by position without a token loop.

Here: slots, ids, actions, time gaps, positives, negatives and the attention schedule of a global
batch. Not here: which windows come together (`windows.py`) and when a batch is made
(`pipeline.py`, the next file on the path).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int, Num

from hstu_jax.data import event_store
from hstu_jax.features import ages, next_item, sequence_rules, time_phases
from hstu_jax.features.batch import Batch, BatchShape
from hstu_jax.features.columns import BatchColumns
from hstu_jax.features.hard_negatives import HardNegativeSampler
from hstu_jax.features.negatives import NegativeSampler
from hstu_jax.features.windows import GroupPlan
from pallas_kernels.hstu_attention import layout as attention_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSource:
    """Everything a batch is made from, but the windows.

    Attributes:
        store: windows and events.
        columns: which columns go where.
        sampler: negatives and log probabilities.
        num_contextual: C, contextual slots in front of every history.
        max_seq_len: history items kept, the newest.
        rule: the attention mask, for the block schedule.
        hard_sampler: hard negatives of users; None = there are none.
        sample_weight: weight of each window; None = all alike.
        tail_len: history items that layers behind the truncation see; 0 = no truncation.
        periods: of the output postprocessor, as for `time_phases`.
        rows: training rows of the next-item objective; None = the windows' histories.
        step_time: the gap that tokens read besides `time_gap_s`; None = none.
        has_ages: tokens also read `age_s`.
        excludes_group: negatives are no positives of the group; False: the loss leaves out, query
            by query, what is the query's own positive.
    """

    store: event_store.EventStore
    columns: BatchColumns
    sampler: NegativeSampler
    num_contextual: int
    max_seq_len: int
    rule: attention_layout.MaskRule
    hard_sampler: HardNegativeSampler | None = None
    sample_weight: Float[np.ndarray, "windows"] | None = None
    tail_len: int = 0
    periods: tuple[tuple[int, int], ...] = ()
    rows: next_item.TrainingRows | None = None
    step_time: next_item.StepTime | None = None
    has_ages: bool = False
    excludes_group: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Segments:
    """The users of a global batch in slot order, one entry each."""

    window: np.ndarray
    group: np.ndarray
    slot: np.ndarray  # group * U + user slot
    start: np.ndarray  # first token slot within the group
    number: np.ndarray  # group * U + place in the group's list of windows


def build_batch(
    groups: Sequence[GroupPlan],
    *,
    source: BatchSource,
    shape: BatchShape,
    group_rng: Callable[[int], np.random.Generator],
    hard_rng: Callable[[int], np.random.Generator] | None = None,
) -> tuple[Batch, Int[np.ndarray, "G U"]]:
    """Makes a global batch of group plans; a pure function of its arguments.

    User slots of a group are ordered by their segment's start, queries by user slot and then by
    time. `user_index` numbers users by the group's list of windows, so it is the same for packed
    and padded rows.

    Args:
        groups: plans of at most `shape.groups` groups; the missing ones stay empty.
        source: data and rules.
        shape: sizes of the batch; every plan must fit.
        group_rng: generator for the negatives of a group.
        hard_rng: generator for a group's choice of hard negatives, needed where that is random.

    Returns:
        The batch, and the window number of every user slot (-1 = unused).
    """
    segments = _order_segments(groups, shape)
    window = segments.window
    batch_arrays = _segment_arrays(segments, source, shape)
    batch_arrays |= _block_schedule(batch_arrays, source, shape)
    batch_arrays |= _tail(batch_arrays, source, shape)
    batch_arrays |= _history_arrays(segments, source, shape)
    batch_arrays["last_phase"] = _last_phases(segments, source, shape)
    entry = source.columns.contextual_entry[window]
    batch_arrays["contextual"] = {
        name: _scatter(shape.groups, shape.users, _dtype_of(column), segments.slot, column[entry])
        for name, column in source.columns.contextual.items()
    }
    positives, positive_arrays = _positive_arrays(segments, source, shape)
    batch_arrays |= positive_arrays
    batch_arrays |= _negative_arrays(positives, source, shape, group_rng)
    batch_arrays |= _hard_negative_arrays(segments, source, shape, hard_rng)
    weight = 1.0 if source.sample_weight is None else source.sample_weight[window]
    batch_arrays["sample_weight"] = _scatter(
        shape.groups, shape.users, np.float32, segments.slot, weight
    )
    window_index = np.full(shape.groups * shape.users, -1, dtype=np.int64)
    window_index[segments.slot] = window
    batch = Batch(**batch_arrays, block_len=shape.block_len)
    return batch, window_index.reshape(shape.groups, shape.users)


def item_values(
    columns: BatchColumns, item_index: Int[np.ndarray, "*slots"]
) -> dict[str, Num[np.ndarray, "*slots"]]:
    """What the candidate features are of some items."""
    return {
        name: column[item_index].astype(_dtype_of(column))
        for name, column in columns.candidate.items()
    }


def _order_segments(groups: Sequence[GroupPlan], shape: BatchShape) -> _Segments:
    sizes = np.array([len(plan.windows) for plan in groups], dtype=np.int64)
    group = np.repeat(np.arange(len(groups)), sizes)
    window = np.concatenate([np.empty(0, np.int64), *(plan.windows for plan in groups)])
    start = np.concatenate([np.empty(0, np.int64), *(plan.starts for plan in groups)])
    place = _ranges(np.zeros_like(sizes), sizes)
    order = np.lexsort((place, start, group))
    return _Segments(
        window=window[order],
        group=group,
        slot=group * shape.users + place,
        start=start[order],
        number=group * shape.users + place[order],
    )


def _segment_arrays(segments: _Segments, source: BatchSource, shape: BatchShape) -> dict:
    lengths = _history_lengths(segments, source) + source.num_contextual
    size = (shape.groups, shape.users)
    starts = np.full(size, shape.rows * shape.row_len, dtype=np.int32)
    starts.reshape(-1)[segments.slot] = segments.start
    return {
        "segment_starts": starts,
        "segment_lengths": _scatter(*size, np.int32, segments.slot, lengths),
        "user_index": _scatter(*size, np.int32, segments.slot, segments.number),
        "user_mask": _scatter(*size, np.bool_, segments.slot, True),
    }


def _block_schedule(segment_arrays: dict, source: BatchSource, shape: BatchShape) -> dict:
    capacity = shape.block_pairs
    pairs = np.zeros((shape.groups, capacity, 3), dtype=np.int32)
    counts = np.zeros(shape.groups, dtype=np.int32)
    for group in range(shape.groups):
        pairs[group], counts[group] = attention_layout.build_block_pairs(
            segment_arrays["segment_starts"][group],
            segment_arrays["segment_lengths"][group],
            num_rows=shape.rows,
            row_len=shape.row_len,
            block_len=shape.block_len,
            rule=source.rule,
            max_pairs=capacity,
        )
    return {"block_pairs": pairs, "num_block_pairs": counts}


def _tail(segment_arrays: dict, source: BatchSource, shape: BatchShape) -> dict:
    if not source.tail_len:
        return {}
    tail = sequence_rules.plan_tail(
        segment_arrays["segment_lengths"],
        num_contextual=source.num_contextual,
        tail_len=source.tail_len,
        row_len=shape.tail_row_len,
        block_len=shape.tail_block_len,
        max_pairs=shape.tail_block_pairs,
        rule=source.rule,
    )
    return {"tail": tail}


def _history_arrays(segments: _Segments, source: BatchSource, shape: BatchShape) -> dict:
    columns = source.columns
    lengths = _history_lengths(segments, source)
    end = _history_end(segments, source)
    first_slot = segments.group * (shape.rows * shape.row_len) + segments.start
    token_slot = _ranges(first_slot + source.num_contextual, lengths)
    event = _ranges(end - lengths, lengths)
    size = (shape.groups, shape.rows * shape.row_len)

    def fill(column: np.ndarray | None, dtype: type) -> np.ndarray:
        values = 0 if column is None else column[event]
        return _scatter(*size, dtype, token_slot, values).reshape(
            shape.groups, shape.rows, shape.row_len
        )

    if columns.request_time_s is not None:
        requests = columns.request_time_s if source.rows is None else source.rows.request_time_s
        anchor = requests[segments.window]
    else:
        # The newest event is the anchor (docs/model.md), and 0 where the history is empty.
        anchor = np.zeros(len(end), dtype=np.int64)
        has_history = lengths > 0
        anchor[has_history] = columns.timestamp_s[end[has_history] - 1]
    # int64 until the difference is taken: float32 holds Unix seconds to 128 s only.
    gap = np.zeros(size, dtype=np.float32)
    gap.reshape(-1)[token_slot] = np.repeat(anchor, lengths) - columns.timestamp_s[event]
    contextual_slot = first_slot[:, None] + np.arange(source.num_contextual)
    gap.reshape(-1)[contextual_slot] = anchor[:, None]
    age = None
    if source.has_ages:
        age = np.zeros(size, dtype=np.int32)
        event_request = np.repeat(anchor, lengths)
        age.reshape(-1)[token_slot] = ages.ages(event_request, columns.timestamp_s[event])
        age = age.reshape(shape.groups, shape.rows, shape.row_len)
    step_gap = None
    if source.step_time is not None:
        step_gap = np.zeros(size, dtype=np.float32)
        step_gap.reshape(-1)[token_slot] = next_item.step_gaps(
            columns.timestamp_s[event], lengths, anchor, kind=source.step_time
        )
        step_gap.reshape(-1)[contextual_slot] = next_item.NO_GAP_S
        step_gap = step_gap.reshape(shape.groups, shape.rows, shape.row_len)
    return {
        "step_gap_s": step_gap,
        "age_s": age,
        "history": {
            name: fill(column, _dtype_of(column)) for name, column in columns.history.items()
        },
        "action": fill(columns.action, np.int32),
        "watch_time_s": fill(columns.watch_time_s, np.float32),
        "time_gap_s": gap.reshape(shape.groups, shape.rows, shape.row_len),
    }


def _last_phases(segments: _Segments, source: BatchSource, shape: BatchShape) -> np.ndarray:
    """Phases of the newest event; of time 0, which contextual tokens have, without history."""
    has_history = _history_lengths(segments, source) > 0
    newest = _history_end(segments, source)[has_history] - 1
    time_s = np.zeros(len(segments.window), dtype=np.int64)
    if source.periods:
        time_s[has_history] = source.columns.timestamp_s[newest]
    phases = np.zeros((shape.groups * shape.users, len(source.periods)), dtype=np.float32)
    phases[segments.slot] = time_phases.time_phases(time_s, source.periods)
    return phases.reshape(shape.groups, shape.users, -1)


def _positive_arrays(
    segments: _Segments, source: BatchSource, shape: BatchShape
) -> tuple[list[np.ndarray], dict]:
    """Positives of each group as item indices, and the arrays of a batch about them."""
    windows = source.store.windows
    first = windows.positive_offsets[segments.window]
    counts = windows.positive_offsets[segments.window + 1] - first
    positive = _ranges(first, counts)
    if source.rows is not None:
        positive = positive[source.rows.is_kept[positive]]
        counts = source.rows.num_queries[segments.window]
    item = source.store.events.item_index[windows.positive_events[positive]]
    group = np.repeat(segments.group, counts)
    group_counts = np.bincount(group, minlength=shape.groups)
    slot = _ranges(np.arange(shape.groups) * shape.queries, group_counts)
    size = (shape.groups, shape.queries)
    user = np.repeat(segments.slot - segments.group * shape.users, counts)
    positives = np.split(item, np.cumsum(group_counts)[:-1])
    query_slot = None
    if source.rows is not None:
        query_slot = np.full(size, shape.rows * shape.row_len, dtype=np.int32)
        # 0 or less, for the last contextual token, where `query_end` is the user's first event.
        rows, window = source.rows, np.repeat(segments.window, counts)
        place = rows.query_end[positive] - rows.row_start[window]
        place = np.maximum(place, 0) + source.num_contextual - 1
        query_slot.reshape(-1)[slot] = np.repeat(segments.start, counts) + place
    return positives, {
        "query_slot": query_slot,
        "positive": {
            name: _scatter(*size, _dtype_of(column), slot, column[item])
            for name, column in source.columns.candidate.items()
        },
        "positive_user": _scatter(*size, np.int32, slot, user),
        "query_mask": _scatter(*size, np.bool_, slot, True),
        "positive_log_q": _scatter(*size, np.float32, slot, source.sampler.log_q(item)),
    }


def _negative_arrays(
    positives: list[np.ndarray],
    source: BatchSource,
    shape: BatchShape,
    group_rng: Callable[[int], np.random.Generator],
) -> dict:
    drawn = np.empty((shape.groups, shape.negatives), dtype=np.int32)
    for group, excluded in enumerate(positives):
        excluded = excluded if source.excludes_group else excluded[:0]
        drawn[group] = source.sampler.draw(group_rng(group), num=shape.negatives, excluded=excluded)
    log_q = source.sampler.log_q(drawn.reshape(-1)).reshape(drawn.shape)
    return {
        "negative": item_values(source.columns, drawn),
        "negative_log_q": log_q,
    }


def _hard_negative_arrays(
    segments: _Segments,
    source: BatchSource,
    shape: BatchShape,
    hard_rng: Callable[[int], np.random.Generator] | None,
) -> dict:
    size = (shape.groups * shape.users, shape.hard_negatives)
    item, mask = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=bool)
    sampler = source.hard_sampler
    if sampler is not None:
        salt = np.zeros(shape.groups, dtype=np.int64)
        if sampler.is_random:
            assert hard_rng is not None, "a random choice needs its generators"
            salt = np.array([hard_rng(g).integers(2**63 - 1) for g in range(shape.groups)])
        positive_row, positive_item = positives_of(source.store, segments.window)
        drawn = sampler.draw(
            segments.window,
            salt=salt[segments.group],
            positive_row=positive_row,
            positive_item=positive_item,
        )
        item[segments.slot], mask[segments.slot] = drawn.item_index, drawn.mask
    shaped = (shape.groups, shape.users, shape.hard_negatives)
    log_q = np.where(mask, source.sampler.log_q(item.reshape(-1)).reshape(size), 0)
    return {
        "hard_negative": item_values(source.columns, item.reshape(shaped)),
        "hard_negative_mask": mask.reshape(shaped),
        "hard_negative_log_q": log_q.astype(np.float32).reshape(shaped),
    }


def positives_of(
    store: event_store.EventStore, window: Int[np.ndarray, "n"]
) -> tuple[Int[np.ndarray, "p"], Int[np.ndarray, "p"]]:
    """(place in `window`, item_index) of every positive of the given windows."""
    first = store.windows.positive_offsets[window]
    counts = store.windows.positive_offsets[window + 1] - first
    events = store.windows.positive_events[_ranges(first, counts)]
    return np.repeat(np.arange(len(window)), counts), store.events.item_index[events]


def _history_end(segments: _Segments, source: BatchSource) -> np.ndarray:
    """One past the last event of every segment."""
    ends = source.store.windows.history_end if source.rows is None else source.rows.row_end
    return ends[segments.window]


def _history_lengths(segments: _Segments, source: BatchSource) -> np.ndarray:
    start = source.store.windows.history_start[segments.window]
    return np.minimum(_history_end(segments, source) - start, source.max_seq_len)


def _scatter(rows: int, width: int, dtype: type, slot: np.ndarray, values) -> np.ndarray:
    """Zeros [rows, width, ...] with `values` [slots, ...] at flat positions `slot`."""
    further = np.shape(values)[1:]
    array = np.zeros((rows, width, *further), dtype=dtype)
    array.reshape(rows * width, *further)[slot] = values
    return array


def _dtype_of(column: np.ndarray) -> type:
    """What a batch holds of a feature: ids, or the numbers of a raw feature."""
    return np.float32 if column.dtype == np.float32 else np.int32


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[i], first[i] + 1, ... counts[i] numbers, for every i, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(first - ends + counts, counts)
