"""Training rows of the next-item objective: every query sees what a request at its time would."""

import dataclasses

import numpy as np
import pytest

from hstu_jax.config import model_schema
from hstu_jax.features import next_item, packing, pipeline, windows
from tests.features import tied_events

ID, POSITIVE = "uih_seq__video_id", "cand_seq__video_id"
MAX_LEN = 20  # of `make_config`


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("next_item") / "store"
    return tied_events.write_store(folder, mode="train_events", window_events=30)


@pytest.fixture
def next_config(make_config):
    """Function: `make_config` with the objective."""

    def make(*, time="next_request", **fields):
        config = make_config(**fields)
        model = dataclasses.replace(
            config.model,
            objective="next_item",
            next_item=model_schema.NextItemConfig(time=time),
        )
        return dataclasses.replace(config, model=model)

    return make


def expected_queries(store, window, *, contextual):
    """(item, events before its second that are in the row, its time) of a window, and the drops."""
    table, events = store.windows, store.events
    times = np.asarray(events.timestamp_s)
    first = int(table.history_start[window])
    positives = [int(e) for e in table.positives(window)]
    before = {e: [j for j in range(first, e) if times[j] < times[e]] for e in positives}
    row_start = max(first, first + len(before[positives[-1]]) - MAX_LEN)
    found, num_cut, num_first = [], 0, 0
    for event in positives:
        kept = [j for j in before[event] if j >= row_start]
        if before[event] and not kept:
            num_cut += 1
        elif not before[event] and not contextual:
            num_first += 1
        else:
            found.append((int(events.item_index[event]), kept, int(times[event])))
    return found, num_cut, num_first


def expected_gaps(times, request, *, kind):
    """What tokens read: from the times of the past and of the request alone."""
    if kind == "next_request":
        return np.diff([*times, request]).astype(np.float32)
    return np.array([next_item.NO_GAP_S, *np.diff(times)], np.float32)[: len(times)]


def check_batch(host_batch, config, store, *, kind="next_request"):
    """Every query's past, from the batch alone, is what a request at its own time would send."""
    batch, contextual = host_batch.batch, config.num_contextual
    num_queries = 0
    for group, slot in np.argwhere(batch.user_mask):
        window = int(host_batch.window_index[group, slot])
        found, *_ = expected_queries(store, window, contextual=contextual)
        queries = np.flatnonzero(batch.query_mask[group] & (batch.positive_user[group] == slot))
        assert len(queries) == len(found)
        start, length = batch.segment_starts[group, slot], batch.segment_lengths[group, slot]
        for query, (item, past, request) in zip(queries, found, strict=True):
            end = int(batch.query_slot[group, query]) + 1
            assert batch.positive[POSITIVE][group, query] == item
            assert start < end <= start + length
            assert end - start == contextual + len(past)
            tokens = slice(start + contextual, end)
            values = batch.history[ID][group].reshape(-1)[tokens]
            np.testing.assert_array_equal(values, store.events.item_index[past])
            actions = batch.action[group].reshape(-1)[tokens]
            np.testing.assert_array_equal(actions, store.events.action[past])
            if batch.step_gap_s is not None:
                gaps = batch.step_gap_s[group].reshape(-1)
                times = np.asarray(store.events.timestamp_s)[past]
                want = expected_gaps(times, request, kind=kind)
                np.testing.assert_array_equal(gaps[tokens], want)
                assert (gaps[start : start + contextual] == next_item.NO_GAP_S).all()
        num_queries += len(found)
        # The row ends with its last query, and its times are counted from that request.
        assert max(batch.query_slot[group, queries]) == start + length - 1
        last_request = found[-1][2]
        tokens = slice(start + contextual, start + length)
        age = batch.time_gap_s[group].reshape(-1)[tokens]
        np.testing.assert_array_equal(
            age, last_request - np.asarray(store.events.timestamp_s)[found[-1][1]]
        )
    assert num_queries == batch.query_mask.sum() == host_batch.num_queries > 0
    _, rows, row_len = batch.time_gap_s.shape
    assert (batch.query_slot[~batch.query_mask] == rows * row_len).all()


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("contextual", [0, 3])
@pytest.mark.parametrize("time", ["next_request", "own"])
def test_queries_see_what_a_request_at_their_time_would(
    store, next_config, layout, contextual, time
):
    row_lens = (8, 20 + contextual) if layout == "padded" else ()
    config = next_config(
        layout=layout, contextual=contextual, row_lens=row_lens, num_groups=2, time=time
    )
    pipe = pipeline.Pipeline(config, store)
    seen = []
    for step in range(pipe.num_steps(0)):
        host_batch = pipe.batch_at(step)
        check_batch(host_batch, config, store, kind=time)
        seen += host_batch.window_index[host_batch.window_index >= 0].tolist()
    counts = {
        int(w): expected_queries(store, w, contextual=contextual)
        for w in store.windows_of_split("train")
    }
    assert sorted(seen) == [window for window, (found, *_) in counts.items() if found]
    rows = pipe.source.rows
    assert rows.num_cut == sum(cut for _, cut, _ in counts.values()) > 0
    assert rows.num_first == sum(first for *_, first in counts.values())
    assert (rows.num_first > 0) == (contextual == 0)
    assert rows.num_empty == sum(not found for found, *_ in counts.values())
    assert pipe.stats().queries == sum(len(found) for found, *_ in counts.values())
    assert f"left out {rows.num_cut:,} positives that ask" in pipe.notes[0]


def _ask_from_the_answer(batch):
    return {"query_slot": np.where(batch.query_mask, batch.query_slot + 1, batch.query_slot)}


def _age_at_the_rows_last_request(batch):
    return {"step_gap_s": batch.time_gap_s}


@pytest.mark.parametrize("wrong", [_ask_from_the_answer, _age_at_the_rows_last_request])
def test_wrong_variant_is_caught(store, next_config, wrong):
    config = next_config()
    host_batch = pipeline.Pipeline(config, store).batch_at(0)
    check_batch(host_batch, config, store)
    bad = dataclasses.replace(host_batch.batch, **wrong(host_batch.batch))
    with pytest.raises((AssertionError, IndexError)):
        check_batch(dataclasses.replace(host_batch, batch=bad), config, store)


def test_asking_from_the_event_before_is_caught_by_ties(store, next_config):
    config = next_config()
    pipe = pipeline.Pipeline(config, store)
    rows = dataclasses.replace(
        pipe.source.rows, query_end=np.asarray(store.windows.positive_events)
    )
    pipe.source = dataclasses.replace(pipe.source, rows=rows)
    with pytest.raises(AssertionError):
        for step in range(pipe.num_steps(0)):
            check_batch(pipe.batch_at(step), config, store)


def test_ties_by_hand(tmp_path):
    day = 86_400
    # user 0: three events of one second, one later, two of a last second; days for the splits.
    seconds = [10, 10, 10, 70, 95, 95, 2 * day, 4 * day]
    base = tied_events.random_events(num_users=1)
    events = dataclasses.replace(
        base,
        user_index=np.zeros(8, np.int32),
        item_index=np.arange(8, dtype=np.int32),
        timestamp_s=np.array(seconds, np.int64) + 1_650_000_000,
        action=np.ones(8, np.int32),
        watch_time_s=np.ones(8, np.float32),
    )
    store = tied_events.write_store(tmp_path / "hand", events=events)
    rows = next_item.training_rows(store, num_contextual=0, max_seq_len=3)
    # The first window: events 0 to 5. Nobody of the first second has an event before it.
    np.testing.assert_array_equal(rows.query_end[:6], [0, 0, 0, 3, 4, 4])
    assert (rows.row_start[0], rows.row_end[0], rows.num_queries[0]) == (1, 4, 3)
    assert (rows.num_first, rows.num_cut, rows.num_empty) == (3, 0, 0)
    rows = next_item.training_rows(store, num_contextual=2, max_seq_len=1)
    # The row is event 3 alone: the last two ask from it, the first three from the prefix.
    np.testing.assert_array_equal(rows.is_kept[:6], [True, True, True, False, True, True])
    assert (rows.num_first, rows.num_cut, rows.num_empty) == (0, 1, 0)
    gaps = next_item.step_gaps(
        events.timestamp_s[:4], np.array([4]), events.timestamp_s[4:5], kind="next_request"
    )
    np.testing.assert_array_equal(gaps, [0, 0, 60, 25])
    gaps = next_item.step_gaps(
        events.timestamp_s[:4], np.array([3, 0, 1]), events.timestamp_s[:3], kind="own"
    )
    np.testing.assert_array_equal(gaps, [next_item.NO_GAP_S, 0, 0, next_item.NO_GAP_S])


def test_packed_and_padded_rows_hold_the_same(store, next_config):
    config = next_config(batch_size=16, tokens_per_group=352)
    pipe = pipeline.Pipeline(config, store)
    (shape,), rows = pipe.shapes, pipe.source.rows
    padded = dataclasses.replace(shape, rows=shape.users, row_len=32, block_len=16)
    chosen = np.flatnonzero(rows.num_queries > 0)[:10][::-1]
    lengths = np.minimum(rows.row_end - store.windows.history_start, MAX_LEN)[chosen] + 2
    seen = []
    for each, one_user_per_row in ((shape, False), (padded, True)):
        starts = windows.place_windows(lengths, shape=each, one_user_per_row=one_user_per_row)
        plan = windows.GroupPlan(windows=chosen, starts=starts)
        batch, window_index = packing.build_batch(
            [plan], source=pipe.source, shape=each, group_rng=np.random.default_rng
        )
        queries = []
        for q in np.flatnonzero(batch.query_mask[0]):
            user = batch.positive_user[0, q]
            place = batch.query_slot[0, q] - batch.segment_starts[0, user]
            item = batch.positive[POSITIVE][0, q]
            number = batch.user_index[0, user]
            queries.append((int(number), int(window_index[0, user]), int(place), int(item)))
        seen.append((sorted(queries), batch.negative[POSITIVE].tolist()))
    assert seen[0] == seen[1]


def test_evaluation_keeps_the_window_form(store, next_config, make_config):
    """One request a window, with the gaps that training's tokens read."""
    config = next_config()
    found = next(iter(pipeline.Pipeline(config, store).eval_batches("test"))).batch
    window = next(iter(pipeline.Pipeline(make_config(), store).eval_batches("test"))).batch
    assert found.query_slot is None and window.step_gap_s is None
    np.testing.assert_array_equal(
        found.segment_lengths[found.user_mask], window.segment_lengths[window.user_mask]
    )
    for group, slot in np.argwhere(found.user_mask):
        start = found.segment_starts[group, slot] + config.num_contextual
        stop = found.segment_starts[group, slot] + found.segment_lengths[group, slot]
        age = found.time_gap_s[group].reshape(-1)[start:stop]
        gaps = found.step_gap_s[group].reshape(-1)[start:stop]
        np.testing.assert_array_equal(gaps, -np.diff([*age, 0]))
        assert not len(gaps) or gaps[-1] > 0


def test_batches_are_functions_of_the_step(store, next_config):
    config = next_config(num_groups=2)
    used = pipeline.Pipeline(config, store)
    used.batch_at(0)
    late, fresh = used.batch_at(3), pipeline.Pipeline(config, store).batch_at(3)
    np.testing.assert_array_equal(late.batch.query_slot, fresh.batch.query_slot)
    np.testing.assert_array_equal(late.batch.step_gap_s, fresh.batch.step_gap_s)


def test_queries_of_a_batch_follow_their_number(store, next_config):
    """Sized by the training rows' mean; a window never fails to fit."""
    config = next_config(batch_size=8)
    pipe = pipeline.Pipeline(config, store)
    assert pipe.shapes[0].queries == 100  # the least
    pipe = pipeline.Pipeline(next_config(batch_size=40), store)
    rows = pipe.source.rows
    mean = rows.num_queries[(np.asarray(store.windows.split) == 0) & (rows.num_queries > 0)].mean()
    assert pipe.shapes[0].queries == int(np.ceil(1.2 * mean * 40)) > 100


def test_no_time_encoding_reads_no_gaps(store, next_config):
    config = next_config()
    hstu = config.model.user_tower.hstu
    positions = dataclasses.replace(hstu.positional_encoder, use_time_encoding=False)
    hstu = dataclasses.replace(hstu, positional_encoder=positions)
    tower = dataclasses.replace(config.model.user_tower, hstu=hstu)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, user_tower=tower))
    batch = pipeline.Pipeline(config, store).batch_at(0).batch
    assert batch.step_gap_s is None and batch.query_slot is not None


def test_histories_must_start_at_the_users_first_event(store):
    table = store.windows
    start = np.array(table.history_start)
    start[5] = table.history_start[-1]
    bad = dataclasses.replace(store, windows=dataclasses.replace(table, history_start=start))
    with pytest.raises(ValueError, match=r"window 5: history_start=\d+ is no event of its user"):
        next_item.training_rows(bad, num_contextual=0, max_seq_len=9)


def test_a_split_without_queries_is_refused(make_store, next_config):
    store = make_store([0, 0, 0], [1, 1, 1])
    with pytest.raises(ValueError, match="has an event before it to ask from; use model.objective"):
        pipeline.Pipeline(next_config(contextual=0), store)
