"""Ablations take away what they name, and nothing else."""

import dataclasses

import numpy as np
import pytest

from hstu_jax.features import ablation, pipeline
from tests.training.small_config import small_config

# With an hour of the day in the output, so that every field holds something.
_HSTU = "model__user_tower__hstu__"
PERIODS = {
    f"{_HSTU}output_postprocessor": "timestamp_layernorm",
    f"{_HSTU}timestamp_layernorm__time_duration_period_units": (3600,),
    f"{_HSTU}timestamp_layernorm__time_duration_units_per_period": (24,),
}


def batch_of(store, kind, *, order="shuffled"):
    config = small_config(store, "unused", data__ablation=kind, **PERIODS)
    split = "train" if order == "shuffled" else "test"
    return pipeline.Pipeline(config, store, split=split, order=order).batch_at(1).batch


def differing(left, right):
    """Names of the fields that differ."""
    changed = set()
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        pairs = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else [(a, b)]
        if any(not np.array_equal(x, y) for x, y in pairs):
            changed.add(field.name)
    return changed


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("no_actions", {"action", "watch_time_s"}),
        ("no_time", {"time_gap_s", "last_phase"}),
        ("shuffled_order", {"history", "action", "watch_time_s"}),
        ("shuffled_targets", {"positive"}),
    ],
)
def test_only_the_named_input_changes(small_store, kind, fields):
    plain, changed = batch_of(small_store, "none"), batch_of(small_store, kind)
    # Uniform negatives: every positive has the same log q, shuffled or not.
    assert differing(plain, changed) == fields
    assert differing(changed, batch_of(small_store, kind)) == set()


def test_shuffled_order_deals_each_users_items_anew(small_store):
    plain, changed = batch_of(small_store, "none"), batch_of(small_store, "shuffled_order")
    (name,) = plain.history
    ids, shuffled = (b.history[name].reshape(-1) for b in (plain, changed))
    actions = [b.action.reshape(-1) for b in (plain, changed)]
    for start, length in zip(plain.segment_starts[0], plain.segment_lengths[0], strict=True):
        slots = slice(start, start + length)
        before = sorted(zip(ids[slots], actions[0][slots], strict=True))
        assert before == sorted(zip(shuffled[slots], actions[1][slots], strict=True))


def test_targets_are_true_in_evaluation(small_store):
    plain = batch_of(small_store, "none", order="stored")
    assert differing(plain, batch_of(small_store, "shuffled_targets", order="stored")) == set()


def test_no_target_of_next_item_is_of_its_own_user(small_store):
    config = small_config(small_store, "unused", model__objective="next_item")
    found = pipeline.Pipeline(config, small_store, split="train", order="shuffled").batch_at(1)
    batch, slots = found.batch, np.arange(found.window_index.size)[None]
    users = slots // 2  # two windows of every user
    (used,) = np.nonzero(batch.query_mask[0])
    user = users[0][batch.positive_user[0, used]]
    # Numbers in place of items, which several users may have watched.
    positive = {
        name: np.arange(ids.size).reshape(ids.shape) for name, ids in batch.positive.items()
    }
    batch = dataclasses.replace(batch, positive=positive)
    owner = np.full(batch.query_mask.size, -1)
    owner[used] = user

    def num_kept(users):
        kept = 0
        for seed in range(20):
            dealt = ablation.apply(
                "shuffled_targets",
                batch,
                num_contextual=config.num_contextual,
                is_training=True,
                users=users,
                rng=np.random.default_rng(seed),
            )
            (numbers,) = dealt.positive.values()
            assert sorted(numbers[0, used]) == list(used)
            kept += (owner[numbers[0, used]] == user).sum()
        return kept

    assert num_kept(users) == 0
    assert num_kept(slots) > 0  # slots taken for users


def test_a_user_of_most_queries_keeps_what_nobody_else_can_take():
    user = np.array([7, 7, 7, 7, 7, 3, 4])
    order = np.arange(7)
    ablation._give_to_others(order, user, np.random.default_rng(0))
    assert (user[order] == user).sum() == 3
    alone = np.arange(3)
    ablation._give_to_others(alone, np.zeros(3, int), np.random.default_rng(0))
    assert (alone == np.arange(3)).all()
