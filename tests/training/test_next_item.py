"""Training with the next-item objective: the window's loss where both must agree, devices, leaks.

From the events of a store to the vectors that queries are scored with: no event that is asked for
reaches its own query. Each half has its own tests, `tests/features/test_next_item.py` and
`tests/model/test_next_item.py`.
"""

import dataclasses

import jax
import numpy as np
import pytest

from hstu_jax.features import packing, pipeline, windows
from hstu_jax.training import evaluation
from hstu_jax.training import run as run_lib
from tests.features import tied_events
from tests.training.small_config import small_config, with_two_tables

_SAME = dict(
    data__batch_size=16,
    data__num_groups=2,
    data__negative_sampler__num_sample=12,
    model__user_tower__hstu__attn_num_layers=1,
    model__user_tower__hstu__positional_encoder__use_time_encoding=False,
)
_WINDOW = dict(_SAME, model__user_tower__hstu__stu__contextual_seq_len=0)
_NEXT = dict(_SAME, model__objective="next_item")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Windows of one event: every positive is asked for at its own time."""
    folder = tmp_path_factory.mktemp("next_item") / "store"
    return tied_events.write_store(folder, mode="events", window_events=1)


def train(store, folder, options, *, num_devices=1, num_steps=3):
    """(batches, losses and hits) of some steps."""
    config = with_two_tables(small_config(store, folder, **options))
    run = run_lib.build_run(config, store, devices=jax.devices()[:num_devices])
    state, losses, batches = run_lib.init_state(run), [], []
    for number in range(num_steps):
        batch = run.pipeline.batch_at(number).batch
        state, metrics = run.train_step(state, run.put(batch))
        metrics = jax.device_get(metrics)
        losses.append([metrics.loss_sum / metrics.num_queries, *metrics.recall_hits])
        batches.append(batch)
    return batches, losses


def test_one_positive_a_window_without_prefix_and_times_is_the_window_objective(store, tmp_path):
    """Equal tokens, negatives, losses, hits and, by the next steps' losses, gradients: of the last
    position's short cut on one device, and of every position on two."""
    window, window_losses = train(store, tmp_path, _WINDOW)
    found, losses = train(store, tmp_path, _NEXT, num_devices=2)
    for left, right in zip(window, found, strict=True):
        np.testing.assert_array_equal(left.segment_starts, right.segment_starts)
        np.testing.assert_array_equal(left.time_gap_s, right.time_gap_s)
        assert all(np.array_equal(left.negative[n], right.negative[n]) for n in left.negative)
    np.testing.assert_allclose(losses, window_losses, rtol=2e-5)
    assert np.ptp(np.array(losses)[:, 0]) > 0.01  # steps differ, so gradients matter


_MAX_LEN = 20
_CHAIN = {
    "model__objective": "next_item",
    "model__user_tower__max_seq_len": _MAX_LEN,
    "model__user_tower__hstu__attn_num_layers": 1,
    # Besides the time encoding: every time that tokens can read.
    "model__user_tower__hstu__stu__use_time_bias": True,
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A store with events of one second, a run, its first state, and windows to look at."""
    folder = tmp_path_factory.mktemp("chain")
    store = tied_events.write_store(folder / "store", mode="train_events", window_events=30)
    config = with_two_tables(small_config(store, folder, **_CHAIN))
    run = run_lib.build_run(config, store, devices=jax.devices()[:1])
    chosen = np.flatnonzero(run.pipeline.source.rows.num_queries > 4)[:6]
    return store, run, run_lib.init_state(run), chosen


def query_vectors(chain, store, spoil=lambda source: source):
    """{layout: vectors of the chosen windows' queries}, and the events that they ask for."""
    _, run, state, chosen = chain
    source = spoil(pipeline.Pipeline(run.config, store).source)
    shape = dataclasses.replace(run.pipeline.shapes[0], rows=6, row_len=48)  # two users in a row
    rows = source.rows
    lengths = np.minimum(rows.row_end - store.windows.history_start, _MAX_LEN)[chosen] + 1
    found = {}
    for layout in ("packed", "padded"):
        starts = windows.place_windows(lengths, shape=shape, one_user_per_row=layout == "padded")
        assert (starts % shape.row_len > 0).any() == (layout == "packed")
        plan = windows.GroupPlan(windows=chosen, starts=starts)
        batch, window_index = packing.build_batch(
            [plan], source=source, shape=shape, group_rng=np.random.default_rng
        )
        _, vectors = run.eval_step(state, run.put(batch))
        offsets = store.windows.positive_offsets
        used = window_index[0, window_index[0] >= 0]
        positive = np.concatenate([np.arange(offsets[w], offsets[w + 1]) for w in used])
        positive = positive[rows.is_kept[positive]]
        order = np.argsort(positive)
        found[layout] = np.asarray(vectors)[0, : len(positive)][order]
    return found, np.asarray(store.windows.positive_events)[positive[order]]


def with_another_future(store, asked):
    """The store with other events from one second of each user on, and which events that changes.

    The events of that second stay where they are and become others; those behind are moved by years
    too. "Asked" events of that second or before must be asked for with the same vector.
    """
    events, rng = store.events, np.random.default_rng(2)
    user, time_s = np.asarray(events.user_index), np.asarray(events.timestamp_s)
    second = np.full(user.max() + 1, np.iinfo(np.int64).max)
    for each in np.unique(user[asked]):
        mine = asked[user[asked] == each]
        is_tied = time_s[mine] == time_s[mine - 1]  # the second event of a second, or a later one
        mine = mine[is_tied] if is_tied.any() else mine
        second[each] = time_s[mine[len(mine) // 3]]
    is_changed, is_moved = time_s >= second[user], time_s > second[user]
    other = (np.asarray(events.item_index) + rng.integers(1, 9, len(user))) % tied_events.NUM_ITEMS
    changed = dataclasses.replace(
        events,
        item_index=np.where(is_changed, other, events.item_index).astype(np.int32),
        action=np.where(is_changed, 8, events.action).astype(np.int32),
        watch_time_s=np.where(is_changed, 1.5, events.watch_time_s).astype(np.float32),
        timestamp_s=time_s + np.where(is_moved, 4 * 365 * 86_400, 0),
    )
    return dataclasses.replace(store, events=changed), is_moved[asked]


def chain_changes(chain, spoil=lambda source: source):
    """{layout: whether each query that must not, and each that must, has another vector then}."""
    store = chain[0]
    before, asked = query_vectors(chain, store, spoil)
    other, is_later = with_another_future(store, asked)
    after, _ = query_vectors(chain, other, spoil)
    differs = {name: (vectors != after[name]).any(axis=1) for name, vectors in before.items()}
    return {name: (each[~is_later], each[is_later]) for name, each in differs.items()}


def test_an_event_never_reaches_the_query_that_asks_for_it(chain):
    changes = chain_changes(chain)
    assert list(changes) == ["packed", "padded"]
    for early, late in changes.values():
        assert len(early) > 15 and not early.any()
        assert len(late) > 15 and late.all()


def _see_the_same_second(source):
    ends = np.asarray(source.store.windows.positive_events)
    return dataclasses.replace(source, rows=dataclasses.replace(source.rows, query_end=ends))


def test_queries_that_see_their_own_second_are_caught(chain):
    for early, _ in chain_changes(chain, _see_the_same_second).values():
        assert early.any()


def dealt_to_others(batch):
    """The batch with every target at a query of another user."""
    (used,) = (np.flatnonzero(mask) for mask in batch.query_mask)  # users one after the other
    most = np.bincount(batch.positive_user[0, used]).max()
    assert 2 * most <= len(used)
    positive = {name: values.copy() for name, values in batch.positive.items()}
    log_q = batch.positive_log_q.copy()
    for values in (*positive.values(), log_q):
        values[0, used] = np.roll(values[0, used], most, axis=0)
    return dataclasses.replace(batch, positive=positive, positive_log_q=log_q)


@pytest.mark.long
def test_shuffled_targets_fall_to_chance(small_store, tmp_path):
    """Right targets teach far more than popularity; targets of other users teach no more."""
    found = {}
    for name, deal in (("true", lambda batch: batch), ("others", dealt_to_others)):
        config = small_config(
            small_store, tmp_path / name, model__objective="next_item", train__num_steps=300
        )
        run = run_lib.build_run(config, small_store, devices=jax.devices()[:1])
        state = run_lib.init_state(run)
        for number in range(300):
            state, _ = run.train_step(state, run.put(deal(run.pipeline.batch_at(number).batch)))
        eval_set = evaluation.make_eval_set(small_store, split="test", exclude_seen=True)
        means = evaluation.evaluate(run, state, eval_set).metrics.means()
        counts = np.asarray(small_store.items.train_count, np.float32)
        popular = evaluation.rank(
            eval_set,
            lambda start, stop, counts=counts: np.tile(counts, (stop - start, 1)),
            config.eval,
        )
        found[name] = means["recall@50"]
        found["chance"] = popular.metrics.means()["recall@50"]
    assert found["true"] > 1.25 * max(found["others"], found["chance"]), found
    assert found["others"] < 1.15 * found["chance"], found
