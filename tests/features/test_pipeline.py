"""Purity, restart, prefetch: a batch is a function of (config, store, step) and nothing else."""

import concurrent.futures
import dataclasses
import gc
import threading
import time

import jax
import numpy as np
import pytest

from hstu_jax.features import pipeline

POSITIVE = "cand_seq__video_id"


@pytest.fixture
def store(make_store):
    lengths = np.random.default_rng(5).integers(0, 30, 60)
    return make_store(lengths, splits=[0] * 44 + [1] * 6 + [2] * 10)


def _assert_equal(actual, expected):
    assert (actual.step, actual.epoch, actual.shape) == (
        expected.step,
        expected.epoch,
        expected.shape,
    )
    np.testing.assert_array_equal(actual.window_index, expected.window_index)
    for a, b in zip(jax.tree.leaves(actual.batch), jax.tree.leaves(expected.batch), strict=True):
        np.testing.assert_array_equal(a, b)


def _configs(make_config, **changes):
    yield make_config(num_groups=2, **changes)
    yield make_config(num_groups=2, layout="padded", row_lens=(10, 22), **changes)


def _prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "hstu-prefetch"]


def test_any_order_any_thread_any_prefetch_gives_the_same_batches(store, make_config):
    for config in _configs(make_config):
        reference = pipeline.Pipeline(config, store)
        num_steps = reference.first_step(2)
        expected = [reference.batch_at(step) for step in range(num_steps)]
        fresh = pipeline.Pipeline(config, store)
        steps = np.random.default_rng(0).permutation(num_steps)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for step, batch in zip(steps, pool.map(fresh.batch_at, steps.tolist()), strict=True):
                _assert_equal(batch, expected[step])
        for num_prefetch in (1, 5):
            data = dataclasses.replace(config.data, num_prefetch=num_prefetch)
            other = pipeline.Pipeline(dataclasses.replace(config, data=data), store)
            with other.iterate(stop_step=num_steps) as batches:
                for batch, wanted in zip(batches, expected, strict=True):
                    _assert_equal(batch, wanted)


def test_restart_at_every_step_gives_the_same_rest(store, make_config):
    config = make_config(num_groups=2)
    whole = pipeline.Pipeline(config, store)
    num_steps = whole.first_step(2)
    expected = [whole.batch_at(step) for step in range(num_steps)]
    for start in range(num_steps + 1):
        restarted = pipeline.Pipeline(config, store)
        with restarted.iterate(start_step=start, stop_step=num_steps) as batches:
            for batch, wanted in zip(batches, expected[start:], strict=True):
                _assert_equal(batch, wanted)


def test_each_epoch_has_each_window_of_the_split_once(store, make_config):
    for config in _configs(make_config):
        pipe = pipeline.Pipeline(config, store)
        orders = []
        for epoch in range(3):
            steps = range(pipe.first_step(epoch), pipe.first_step(epoch + 1))
            batches = [pipe.batch_at(step) for step in steps]
            assert {batch.epoch for batch in batches} == {epoch}
            windows = np.concatenate([b.window_index.reshape(-1) for b in batches])
            orders.append(windows[windows >= 0].tolist())
            assert sorted(orders[-1]) == list(range(44))
        assert orders[0] != orders[1] != orders[2]


def test_negatives_depend_on_seed_step_and_group(store, make_config):
    config = make_config(num_groups=2, sampler_num_sample=30)
    pipe = pipeline.Pipeline(config, store)
    other = pipeline.Pipeline(dataclasses.replace(config, seed=1), store)
    drawn = [p.batch_at(s).batch.negative[POSITIVE][g].tolist()
             for p in (pipe, other) for s in (0, 1) for g in (0, 1)]  # fmt: skip
    assert len({tuple(group) for group in drawn}) == 8


def test_batches_have_only_the_listed_shapes(store, make_config):
    config = make_config(layout="padded", row_lens=(6, 12, 22), num_groups=2)
    pipe = pipeline.Pipeline(config, store)
    assert [shape.row_len for shape in pipe.shapes] == [6, 12, 22]
    batches = [pipe.batch_at(step) for step in range(pipe.first_step(3))]
    assert {batch.shape for batch in batches} == set(pipe.shapes)
    for batch in batches:
        assert batch.batch.action.shape == (2, 4, batch.shape.row_len)
    rows = [batch.shape.row_len for batch in batches[: pipe.num_steps(0)]]
    assert rows != sorted(rows)  # batches of different lengths are mixed
    packed = make_config(num_groups=2)
    assert pipeline.Pipeline(packed, store).shapes == (pipeline.batch_shape(packed, store),)


def test_eval_batches_are_fixed_and_complete(store, make_config):
    for config in _configs(make_config, sampler_num_eval_sample=7):
        results = []
        for seed in (0, 1):
            pipe = pipeline.Pipeline(dataclasses.replace(config, seed=seed), store)
            with pipe.eval_batches("test") as batches:
                results.append(list(batches))
            assert {b.shape.negatives for b in results[-1]} == {7}
            windows = np.concatenate([b.window_index.reshape(-1) for b in results[-1]])
            assert sorted(windows[windows >= 0]) == list(range(50, 60))
        for first, second in zip(*results, strict=True):
            _assert_equal(first, second)


def test_eval_batches_have_the_training_shape(store, make_config):
    pipe = pipeline.Pipeline(make_config(num_groups=2), store)
    with pipe.eval_batches("validation") as batches:
        assert {batch.shape for batch in batches} == set(pipe.shapes)


def test_stats_count_truncation_and_padding(make_store, make_config):
    store = make_store([0, 20, 21, 57, 5], [1, 2, 3, 4, 5])
    stats = pipeline.Pipeline(make_config(batch_size=4, layout="padded"), store).stats()
    assert dataclasses.asdict(stats) == {
        "windows": 5,
        "queries": 15,
        "tokens": 2 * 5 + 20 + 20 + 20 + 5,
        "slots": 2 * 4 * 22,
        "steps": 2,
        "truncated_windows": 2,
        "dropped_tokens": 38,
        "empty_histories": 1,
    }


def test_device_put_runs_in_the_background(store, make_config):
    pipe = pipeline.Pipeline(make_config(), store)
    names = []

    def device_put(batch):
        names.append(threading.current_thread().name)
        return jax.device_put(batch)

    with pipe.iterate(stop_step=2, device_put=device_put) as batches:
        first = next(batches)
        assert isinstance(first.batch.action, jax.Array)
        np.testing.assert_array_equal(first.batch.action, pipe.batch_at(0).batch.action)
        assert batches.wait_s > 0
        assert len(list(batches)) == 1
    assert set(names) == {"hstu-prefetch"}


def test_exceptions_reach_the_reader_in_their_place(store, make_config):
    pipe = pipeline.Pipeline(make_config(), store)
    calls = []

    def device_put(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("no more memory")
        return batch

    batches = pipe.iterate(device_put=device_put)
    assert [next(batches).step, next(batches).step] == [0, 1]
    with pytest.raises(RuntimeError, match="no more memory"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    assert not _prefetch_threads()


def test_threads_end_on_close_and_when_dropped(store, make_config):
    pipe = pipeline.Pipeline(make_config(), store)
    with pipe.iterate() as batches:
        next(batches)
        assert len(_prefetch_threads()) == 1
    assert not _prefetch_threads()
    batches.close()  # twice does no harm
    batches = pipe.iterate()
    next(batches)
    (thread,) = _prefetch_threads()
    del batches
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_batches_are_made_ahead_but_not_without_bound(store, make_config):
    pipe = pipeline.Pipeline(make_config(num_prefetch=3), store)
    made = []
    with pipe.iterate(device_put=lambda batch: made.append(1) or batch) as batches:
        next(batches)
        deadline = time.monotonic() + 10
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(made) == 5  # one taken, three queued, one in the thread's hands


def test_negative_step_and_positives_without_negatives_are_refused(make_store, make_config):
    store = make_store([3, 3], [2, 2], num_items=4, train_count=[5, 5, 5, 5])
    pipe = pipeline.Pipeline(make_config(num_items=4), store)
    with pytest.raises(ValueError, match=r"^step=-1: must not be negative"):
        pipe.batch_at(-1)
    lonely = make_store([3], [1], num_items=1)
    with pytest.raises(
        ValueError, match="all 1 items with weight in .* are positives of one group"
    ):
        pipeline.Pipeline(make_config(num_items=1), lonely).batch_at(0)
