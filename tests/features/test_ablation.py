"""Ablations take away what they name, and nothing else."""

import dataclasses

import numpy as np
import pytest

from hstu_jax.features import pipeline
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
