"""Batches against a plain loop over the store: packed and padded rows, every edge of a history."""

import dataclasses

import numpy as np
import pytest

from hstu_jax.config import tower_schema
from hstu_jax.features import packing, pipeline, windows
from pallas_kernels.hstu_attention import layout as attention_layout

HISTORY_LENS = [0, 1, 2, 19, 20, 21, 57, 5, 8, 0, 13, 7, 3, 20, 4, 11]  # max_seq_len is 20
ID, POSITIVE = "uih_seq__video_id", "cand_seq__video_id"


def _window_content(store, window, *, max_seq_len, contextual, has_query_time=True):
    """What the batch must hold about one window, by loops over its events."""
    rows, events = store.windows, store.events
    start, end = int(rows.history_start[window]), int(rows.history_end[window])
    history = list(range(start, end))[-max_seq_len:]
    newest = int(events.timestamp_s[end - 1]) if history else 0
    anchor = int(rows.request_time_s[window]) if has_query_time else newest
    positives = [int(events.item_index[e]) for e in rows.positives(window)]
    user = int(rows.user_index[window])
    return {
        "ids": [0] * len(contextual) + [int(events.item_index[e]) for e in history],
        "action": [0] * len(contextual) + [int(events.action[e]) for e in history],
        "watch": [0.0] * len(contextual) + [float(events.watch_time_s[e]) for e in history],
        "gap": [float(np.float32(anchor))] * len(contextual)
        + [float(anchor - int(events.timestamp_s[e])) for e in history],
        "contextual": [user if n == "user_id" else int(store.users[n][user]) for n in contextual],
        "positives": positives,
    }


def _slot_content(batch, group, slot, contextual):
    """What the batch does hold in one user slot."""
    first, length = batch.segment_starts[group, slot], batch.segment_lengths[group, slot]
    tokens = slice(first, first + length)
    queries = batch.query_mask[group] & (batch.positive_user[group] == slot)
    return {
        "ids": batch.history[ID][group].reshape(-1)[tokens].tolist(),
        "action": batch.action[group].reshape(-1)[tokens].tolist(),
        "watch": batch.watch_time_s[group].reshape(-1)[tokens].tolist(),
        "gap": batch.time_gap_s[group].reshape(-1)[tokens].tolist(),
        "contextual": [int(batch.contextual[name][group, slot]) for name in contextual],
        "positives": batch.positive[POSITIVE][group, queries].tolist(),
    }


def _check_batch(host_batch, config, store):
    """Compares every slot of a batch with the store, and all that is unused with zero."""
    batch, shape = host_batch.batch, host_batch.shape
    contextual = config.feature_groups.get("contextual", ())
    has_query_time = "query_time" in config.feature_groups
    used_tokens = np.zeros((shape.groups, shape.rows * shape.row_len), dtype=int)
    num_queries = 0
    for group, slot in np.ndindex(shape.groups, shape.users):
        window = int(host_batch.window_index[group, slot])
        assert batch.user_mask[group, slot] == (window >= 0)
        first, length = batch.segment_starts[group, slot], batch.segment_lengths[group, slot]
        if window < 0:
            assert (first, length) == (shape.rows * shape.row_len, 0)
            continue
        expected = _window_content(
            store,
            window,
            max_seq_len=config.model.user_tower.max_seq_len,
            contextual=contextual,
            has_query_time=has_query_time,
        )
        assert _slot_content(batch, group, slot, contextual) == expected
        assert length == len(expected["ids"])
        used_tokens[group, first : first + length] += 1
        num_queries += len(expected["positives"])
    assert used_tokens.max(initial=0) <= 1
    padding = (used_tokens == 0).reshape(batch.action.shape)
    for values in (batch.history[ID], batch.action, batch.watch_time_s, batch.time_gap_s):
        assert not values[padding].any()
    assert batch.query_mask.sum() == num_queries == host_batch.num_queries
    assert not batch.positive[POSITIVE][~batch.query_mask].any()
    assert host_batch.num_tokens == used_tokens.sum()
    assert host_batch.num_users == (host_batch.window_index >= 0).sum()
    assert (np.diff(batch.segment_starts, axis=1) >= 0).all()


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("contextual", [0, 3])
@pytest.mark.parametrize("query_time", [True, False])
def test_batches_hold_what_the_store_says(make_store, make_config, layout, contextual, query_time):
    store = make_store(HISTORY_LENS)
    row_lens = (8, 20 + contextual) if layout == "padded" else ()
    config = make_config(
        layout=layout, contextual=contextual, query_time=query_time, num_groups=2, row_lens=row_lens
    )
    pipe = pipeline.Pipeline(config, store)
    seen = []
    for step in range(pipe.num_steps(0)):
        host_batch = pipe.batch_at(step)
        _check_batch(host_batch, config, store)
        seen += host_batch.window_index[host_batch.window_index >= 0].tolist()
    assert sorted(seen) == list(range(len(HISTORY_LENS)))


def _oldest_kept(batch):
    return {"history": {ID: np.roll(batch.history[ID], 1, axis=-1)}}


def _time_through_float32(batch):
    anchor = np.float32(1_650_000_000)
    return {"time_gap_s": (anchor + batch.time_gap_s) - anchor}


def _queries_of_the_next_user(batch):
    return {"positive_user": (batch.positive_user + 1) % batch.user_mask.shape[1]}


@pytest.mark.parametrize("wrong", [_oldest_kept, _time_through_float32, _queries_of_the_next_user])
def test_wrong_variant_is_caught(make_store, make_config, wrong):
    store, config = make_store(HISTORY_LENS), make_config()
    host_batch = pipeline.Pipeline(config, store).batch_at(0)
    _check_batch(host_batch, config, store)
    bad = dataclasses.replace(host_batch.batch, **wrong(host_batch.batch))
    with pytest.raises(AssertionError):
        _check_batch(dataclasses.replace(host_batch, batch=bad), config, store)


def test_history_is_strictly_before_the_request(make_store, make_config):
    # Every positive carries the second of its request; none may show up in the history.
    store, config = make_store(HISTORY_LENS), make_config(contextual=0)
    host_batch = pipeline.Pipeline(config, store).batch_at(0)
    batch = host_batch.batch
    lengths = batch.segment_lengths[batch.user_mask]
    starts = batch.segment_starts[batch.user_mask]
    gaps = [batch.time_gap_s.reshape(-1)[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    assert sum(map(len, gaps)) > 20 and all((gap > 0).all() for gap in gaps)
    assert all((np.diff(gap) < 0).all() for gap in gaps)  # oldest first


def _as_padded(shape):
    return dataclasses.replace(shape, rows=shape.users, row_len=32, block_len=16)


def test_packed_and_padded_rows_hold_the_same(make_store, make_config):
    """One list of windows, built both ways: equal by user number, negatives included."""
    store, config = make_store(HISTORY_LENS), make_config(batch_size=16, tokens_per_group=352)
    pipe = pipeline.Pipeline(config, store)
    packed_shape = pipe.shapes[0]
    chosen = np.random.default_rng(3).permutation(len(HISTORY_LENS))
    lengths = np.minimum(np.array(HISTORY_LENS), 20)[chosen] + 2
    built = []
    for shape, one_user_per_row in ((packed_shape, False), (_as_padded(packed_shape), True)):
        starts = windows.place_windows(lengths, shape=shape, one_user_per_row=one_user_per_row)
        plan = windows.GroupPlan(windows=chosen, starts=starts)
        batch, window_index = packing.build_batch(
            [plan],
            source=pipe.source,
            shape=shape,
            group_rng=lambda group: np.random.default_rng(group),
        )
        by_user = np.argsort(batch.user_index[0])
        content = [_slot_content(batch, 0, s, ("user_id", "user_active_degree")) for s in by_user]
        built.append((content, window_index[0][by_user].tolist(), batch))
    (packed, packed_windows, packed_batch), (padded, padded_windows, padded_batch) = built
    assert packed == padded
    assert packed_windows == padded_windows == chosen.tolist()
    assert (packed_batch.user_index != padded_batch.user_index).any()
    np.testing.assert_array_equal(packed_batch.negative[POSITIVE], padded_batch.negative[POSITIVE])


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_block_schedule_is_that_of_the_segments(make_store, make_config, layout):
    config = make_config(layout=layout, num_groups=2)
    host_batch = pipeline.Pipeline(config, make_store(HISTORY_LENS)).batch_at(0)
    batch, shape = host_batch.batch, host_batch.shape
    merged = attention_layout.merge_groups(
        batch.segment_starts,
        batch.segment_lengths,
        batch.block_pairs,
        batch.num_block_pairs,
        num_rows_per_group=shape.rows,
        row_len=shape.row_len,
        block_len=shape.block_len,
    )
    segment = np.asarray(attention_layout.token_segments(merged))
    listed = {
        tuple(merged.block_pairs[g, p].tolist())
        for g in range(shape.groups)
        for p in range(batch.num_block_pairs[g])
    }
    # Causal pairs inside a segment and, for the contextual prefix, all of its own segment.
    needed, position = set(), np.asarray(attention_layout.token_positions(merged))
    for row, i, j in np.ndindex(*segment.shape, shape.row_len):
        is_visible = j <= i or position[row, i] < 2
        if segment[row, i] >= 0 and segment[row, i] == segment[row, j] and is_visible:
            needed.add((row, i // shape.block_len, j // shape.block_len))
    assert listed == needed


def test_shapes_and_dtypes_are_those_of_the_shape(make_store, make_config):
    config = make_config(num_groups=4, batch_size=32, sampler_num_sample=9)
    host_batch = pipeline.Pipeline(config, make_store(HISTORY_LENS)).batch_at(0)
    shape, batch = host_batch.shape, host_batch.batch
    grid = (shape.groups, shape.rows, shape.row_len)
    assert batch.history[ID].shape == batch.time_gap_s.shape == grid
    assert batch.user_mask.shape == (4, 8) and batch.query_mask.shape == (4, shape.queries)
    assert batch.negative[POSITIVE].shape == batch.negative_log_q.shape == (4, 9)
    assert batch.block_pairs.shape == (4, shape.block_pairs, 3)
    assert batch.block_len == shape.block_len
    integers = [batch.history[ID], batch.action, batch.contextual["user_id"], batch.positive_user]
    integers += [
        batch.segment_starts,
        batch.user_index,
        batch.positive[POSITIVE],
        batch.block_pairs,
    ]
    assert {values.dtype for values in integers} == {np.dtype(np.int32)}
    floats = [batch.watch_time_s, batch.time_gap_s, batch.positive_log_q, batch.negative_log_q]
    assert {values.dtype for values in floats} == {np.dtype(np.float32)}


def test_a_batch_without_windows_is_all_padding(make_store, make_config):
    pipe = pipeline.Pipeline(make_config(), make_store(HISTORY_LENS))
    batch, window_index = packing.build_batch(
        [],
        source=pipe.source,
        shape=pipe.shapes[0],
        group_rng=lambda group: np.random.default_rng(group),
    )
    assert (window_index == -1).all() and not batch.user_mask.any() and not batch.query_mask.any()
    assert batch.num_block_pairs.sum() == 0 and not batch.action.any()


def test_negatives_avoid_the_positives_of_their_group_only(make_store, make_config):
    store = make_store(HISTORY_LENS, [3] * len(HISTORY_LENS))
    config = make_config(num_groups=2, sampler_num_sample=400, sampler_weight_exponent=0.7)
    batch = pipeline.Pipeline(config, store).batch_at(0).batch
    weights = np.where(store.items.train_count > 0, store.items.train_count**0.7, 0)
    log_q = np.log(np.maximum(weights, 1) / weights.sum())  # a count of 1 has the least weight, 1
    positives = [batch.positive[POSITIVE][g][batch.query_mask[g]] for g in range(2)]
    for group in range(2):
        negative = batch.negative[POSITIVE][group]
        assert not np.isin(negative, positives[group]).any()
        np.testing.assert_allclose(batch.negative_log_q[group], log_q[negative], rtol=1e-6)
        np.testing.assert_allclose(
            batch.positive_log_q[group][batch.query_mask[group]],
            log_q[positives[group]],
            rtol=1e-6,
        )
    only_second = np.setdiff1d(positives[1], positives[0])
    assert np.isin(batch.negative[POSITIVE][0], only_second).any()


@pytest.mark.parametrize("contextual", [0, 2])
def test_phases_are_those_of_the_newest_event(make_store, make_config, contextual):
    store = make_store(HISTORY_LENS, gap_s=5_000)
    config = make_config(contextual=contextual, num_groups=2)
    plain = pipeline.Pipeline(config, store).batch_at(0).batch
    assert plain.last_phase.shape == (*plain.user_mask.shape, 0)
    periods = tower_schema.TimestampLayerNormConfig(
        time_duration_period_units=(3600, 86400), time_duration_units_per_period=(24, 7)
    )
    model = config.model
    hstu = dataclasses.replace(
        model.user_tower.hstu,
        output_postprocessor="timestamp_layernorm",
        timestamp_layernorm=periods,
    )
    user_tower = dataclasses.replace(model.user_tower, hstu=hstu)
    config = dataclasses.replace(config, model=dataclasses.replace(model, user_tower=user_tower))
    host_batch = pipeline.Pipeline(config, store).batch_at(0)
    seen_empty = False
    for group, slot in np.ndindex(*host_batch.window_index.shape):
        window, time_s = int(host_batch.window_index[group, slot]), 0
        if window >= 0:
            start, end = store.windows.history_start[window], store.windows.history_end[window]
            seen_empty |= bool(start == end)
            time_s = int(store.events.timestamp_s[end - 1]) if end > start else 0
        expected = [time_s // 3600 % 24 / 24 * 6.28, time_s // 86400 % 7 / 7 * 6.28]
        found = host_batch.batch.last_phase[group, slot]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert seen_empty
