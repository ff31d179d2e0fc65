"""Training with every option of the towers' small modules at once: whole-batch statistics."""

import dataclasses

import jax
import numpy as np
import pytest

from hstu_jax.training import partition
from hstu_jax.training import run as run_lib
from tests.training.small_config import small_config

_HSTU = "model__user_tower__hstu__"
_UIH = f"{_HSTU}input_preprocessor__uih_preprocessor__"
_ACTIONS = f"{_UIH}action_encoder__simple_action_encoder__"
OPTIONS = {
    "data__num_groups": 2,
    "model__initialization": "reference",
    "model__user_tower__encoder": "mean",  # compiles fast; none of this is in the layers
    "model__item_tower__mlp__hidden_units": (12, 16),
    "model__item_tower__mlp__activation": "Dice",
    "model__item_tower__mlp__use_bn": True,
    "model__item_tower__mlp__dropout_ratio": (0.25,),
    f"{_HSTU}output_postprocessor": "timestamp_layernorm",
    f"{_HSTU}timestamp_layernorm__time_duration_period_units": (3600, 86400),
    f"{_HSTU}timestamp_layernorm__time_duration_units_per_period": (24, 7),
    f"{_ACTIONS}watchtime_to_action_thresholds": (10.0, 30.0),
    f"{_ACTIONS}watchtime_to_action_weights": (256, 512),
    f"{_UIH}action_mlp__simple_mlp": None,
    f"{_UIH}action_mlp__parameterized_mlp": dict(hidden_dim=8),
}
NUM_STEPS = 2


@pytest.fixture(scope="module")
def trained(small_store, tmp_path_factory):
    """(run on two devices, first state, state after some steps, losses)."""
    config = small_config(small_store, tmp_path_factory.mktemp("run"), **OPTIONS)
    # Two tables in place of seven: sorting the ids of each takes long to compile.
    names = ("user_id", "uih_seq__video_id", "cand_seq__video_id")
    config = dataclasses.replace(
        config,
        features={name: config.features[name] for name in names},
        feature_groups={**config.feature_groups, "contextual": ("user_id",)},
    )
    run = run_lib.build_run(config, small_store, devices=jax.devices()[:2])
    state = run_lib.init_state(run)
    first, losses = jax.device_get(state), []
    for number in range(NUM_STEPS):
        state, metrics = run.train_step(state, run.put(run.pipeline.batch_at(number).batch))
        losses.append(float(metrics.loss_sum) / float(metrics.num_queries))
    return run, first, state, losses


def test_every_parameter_and_statistic_changes(trained):
    run, first, state, losses = trained
    assert np.all(np.isfinite(losses)) and run.train_step._cache_size() == 1
    after = {"params": state.params, "batch_stats": state.batch_stats}
    before = {"params": first.params, "batch_stats": first.batch_stats}
    same = jax.tree.map(lambda new, old: np.array_equal(new, old), after, before)
    still = [
        jax.tree_util.keystr(path)
        for path, is_same in jax.tree_util.tree_leaves_with_path(same)
        if is_same
    ]
    assert still == []
    assert len(jax.tree.leaves(state.batch_stats)) == 8  # two layers, batch norm and Dice in each


def test_statistics_are_saved_and_used_in_evaluation(trained):
    run, first, state, _ = trained
    checkpointer = run.checkpointer()
    checkpointer.save(state, run.record())
    checkpointer.wait()
    restored = checkpointer.restore(NUM_STEPS, state)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, restored.batch_stats, state.batch_stats)
    items = np.arange(8, dtype=np.int32)
    ids = {use.feature: items for use in run.program.plan.candidate}

    def vectors(state):
        return jax.device_get(run.item_step(state, run.put((ids, items >= 0))))

    np.testing.assert_array_equal(vectors(restored), vectors(state))
    first_stats = jax.device_put(first.batch_stats, partition.replicated_sharding(run.mesh))
    untrained = dataclasses.replace(state, batch_stats=first_stats)
    assert np.abs(vectors(untrained) - vectors(state)).max() > 1e-3
