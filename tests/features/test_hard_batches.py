"""Batches with hard negatives and sample weights against loops over the store and the file."""

import dataclasses

import jax
import numpy as np
import pytest

from hstu_jax.data import event_store
from hstu_jax.features import pipeline

NAME = "cand_seq__video_id"
HEADER = "userid:int64\titemid:int64\tweight:float\n"
NUM_USERS, NUM_ITEMS = 30, 50


@pytest.fixture
def store(make_store):
    lengths = np.random.default_rng(5).integers(0, 20, NUM_USERS)
    made = make_store(lengths, num_items=NUM_ITEMS, splits=[0] * 22 + [1] * 3 + [2] * 5)
    weights = np.random.default_rng(6).random(NUM_USERS)
    events = event_store.write_store(
        made.path.with_name("weighted"),
        events=made.events,
        windows=made.windows,
        users=made.users | {"heft": weights},
        items=made.items,
        vocabularies={},
        stats={},
    )
    return events


@pytest.fixture
def lists(store, tmp_path):
    """Hard items of every user, by user_index; user 3 has none, user 4 has its own positives."""
    rng = np.random.default_rng(7)
    lists = [rng.permutation(NUM_ITEMS)[: rng.integers(1, 12)].tolist() for _ in range(NUM_USERS)]
    lists[3] = []
    lists[4] = [*_positives(store, 4), *lists[4]]
    lines = [f"{1000 + user}\t{item}\t1\n" for user, items in enumerate(lists) for item in items]
    (tmp_path / "edges.tsv").write_text(HEADER + "".join(lines))
    return lists


@pytest.fixture
def config(make_config, lists, tmp_path):
    """Function: further fields -> a configuration of a hard sampler."""

    def make(**fields):
        return make_config(
            num_groups=2,
            sampler_kind="HardNegativeSampler",
            sampler_hard_neg_edge_input_path=str(tmp_path / "edges.tsv"),
            **{"sampler_num_hard_sample": 4} | fields,
        )

    return make


def _positives(store, window):
    return store.events.item_index[store.windows.positives(window)].tolist()


def _batches(pipe):
    return [pipe.batch_at(step) for step in range(pipe.num_steps(0))]


def _per_window(batches):
    """window -> its user's hard negatives and weight, wherever the window is in the batches."""
    found = {}
    for item in batches:
        batch = item.batch
        for group, slot in np.ndindex(item.window_index.shape):
            mask = batch.hard_negative_mask[group, slot]
            content = batch.hard_negative[NAME][group, slot][mask].tolist()
            window = int(item.window_index[group, slot])
            assert (np.diff(mask.astype(int)) <= 0).all()  # the first slots
            assert not batch.hard_negative[NAME][group, slot][~mask].any()
            if window < 0:
                assert content == [] and batch.sample_weight[group, slot] == 0
            else:
                found[window] = content, float(batch.sample_weight[group, slot])
    return found


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("num", [4, 40])  # 40 a user: far more hard negatives than users
def test_every_user_has_the_beginning_of_its_list(store, config, lists, layout, num):
    pipe = pipeline.Pipeline(config(layout=layout, sampler_num_hard_sample=num), store)
    batches = _batches(pipe)
    assert {batch.shape.hard_negatives for batch in batches} == {num}
    assert batches[0].batch.hard_negative_mask.shape == (2, 4, num)
    found = _per_window(batches)
    assert sorted(found) == list(range(22))
    for window, (content, weight) in found.items():
        own = set(_positives(store, window))
        assert content == [item for item in lists[window] if item not in own][:num]
        assert weight == 1.0
    assert found[3][0] == [] and not set(found[4][0]) & set(_positives(store, 4))


def test_positives_are_kept_where_the_configuration_says_so(store, config, lists):
    pipe = pipeline.Pipeline(config(sampler_exclude_positives=False), store)
    assert _per_window(_batches(pipe))[4][0] == lists[4][:4]
    assert "kept (exclude_positives=False)" in pipe.hard_negatives_summary()


def test_log_q_is_the_simple_samplers(store, config):
    pipe = pipeline.Pipeline(config(sampler_weight_exponent=1.0), store)
    batch = pipe.batch_at(0).batch
    wanted = pipe.source.sampler.log_q(batch.hard_negative[NAME].reshape(-1))
    mask = batch.hard_negative_mask
    np.testing.assert_array_equal(batch.hard_negative_log_q[mask], wanted.reshape(mask.shape)[mask])
    assert len(np.unique(batch.hard_negative_log_q[mask])) > 3


def test_simple_negatives_are_those_of_the_plain_sampler(store, config, make_config):
    hard, plain = (
        pipeline.Pipeline(config(), store),
        pipeline.Pipeline(make_config(num_groups=2), store),
    )
    for step in range(2):
        np.testing.assert_array_equal(
            hard.batch_at(step).batch.negative[NAME], plain.batch_at(step).batch.negative[NAME]
        )
    assert plain.hard_negatives_summary() == ""
    assert plain.batch_at(0).batch.hard_negative[NAME].shape == (2, 4, 0)


def test_a_random_choice_is_a_function_of_seed_step_group_and_user(store, config, lists):
    random = config(sampler_hard_sample_strategy="random")
    pipe = pipeline.Pipeline(random, store)
    for first, again in zip(
        _batches(pipe), _batches(pipeline.Pipeline(random, store)), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, first.batch, again.batch)
    epochs = [
        _per_window(
            [
                pipe.batch_at(step)
                for step in range(pipe.first_step(epoch), pipe.first_step(epoch + 1))
            ]
        )
        for epoch in range(2)
    ]
    other = _per_window(_batches(pipeline.Pipeline(dataclasses.replace(random, seed=1), store)))
    for window in range(22):
        left = [item for item in lists[window] if item not in set(_positives(store, window))]
        for found in (*epochs, other):
            content = found[window][0]
            assert len(set(content)) == len(content) == min(4, len(left))
            assert set(content) <= set(left)
    for found in (epochs[1], other):
        assert sum(found[w][0] != epochs[0][w][0] for w in found) > 10


def test_evaluation_has_fixed_hard_negatives(store, config):
    random = config(sampler_hard_sample_strategy="random")
    results = []
    for seed in (0, 1):
        pipe = pipeline.Pipeline(dataclasses.replace(random, seed=seed), store)
        with pipe.eval_batches("test") as batches:
            results.append(_per_window(list(batches)))
    assert results[0] == results[1]
    assert sorted(results[0]) == list(range(25, 30))
    assert any(content for content, _ in results[0].values())


def test_sample_weights_are_the_users(store, make_config):
    config = make_config(num_groups=2, sample_weight_fields=("heft",))
    for batch in (
        _per_window(_batches(pipeline.Pipeline(config, store))),
        _per_window(_batches(pipeline.Pipeline(dataclasses.replace(config, seed=3), store))),
    ):
        weights = np.random.default_rng(6).random(NUM_USERS).astype(np.float32)
        assert {window: weight for window, (_, weight) in batch.items()} == {
            window: float(weights[window]) for window in range(22)
        }


def test_another_edge_file_is_another_run(config, store, tmp_path):
    path = tmp_path / "edges.tsv"
    text = path.read_text()
    prints = []
    for content in (text, text + "1003\t7\t1\n", text):
        path.write_text(content)
        prints.append(pipeline.Pipeline(config(), store).fingerprint())
    assert prints[0] == prints[2] != prints[1]
