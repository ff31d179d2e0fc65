"""Training with the next-item objective: the window's loss where both must agree, and devices."""

import jax
import numpy as np
import pytest

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


@pytest.mark.long
def test_shuffled_targets_fall_to_chance(small_store, tmp_path):
    """Right targets teach far more than popularity; dealt anew to the queries they teach less."""
    found = {}
    for ablation in ("none", "shuffled_targets"):
        config = small_config(
            small_store,
            tmp_path / ablation,
            model__objective="next_item",
            data__ablation=ablation,
            train__num_steps=300,
        )
        run = run_lib.build_run(config, small_store, devices=jax.devices()[:1])
        state = run_lib.init_state(run)
        for number in range(300):
            state, _ = run.train_step(state, run.put(run.pipeline.batch_at(number).batch))
        eval_set = evaluation.make_eval_set(small_store, split="test", exclude_seen=True)
        means = evaluation.evaluate(run, state, eval_set).metrics.means()
        counts = np.asarray(small_store.items.train_count, np.float32)
        popular = evaluation.rank(
            eval_set,
            lambda start, stop, counts=counts: np.tile(counts, (stop - start, 1)),
            config.eval,
        )
        found[ablation] = means["recall@50"]
        found["popularity"] = popular.metrics.means()["recall@50"]
    print(found)
    assert found["none"] > 1.3 * max(found["shuffled_targets"], found["popularity"])
    assert found["shuffled_targets"] < 1.25 * found["popularity"]
