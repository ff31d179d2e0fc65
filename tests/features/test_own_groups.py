"""Processes that make their own groups hold together what one process makes."""

import jax
import numpy as np
import pytest

from hstu_jax.config import data_schema
from hstu_jax.features import pipeline
from tests.training.small_config import small_config


@pytest.mark.parametrize("kind", data_schema.Ablation.__args__)
@pytest.mark.parametrize("order", ["shuffled", "stored"])
def test_groups_are_those_of_the_whole_batch(small_store, kind, order):
    config = small_config(
        small_store,
        "unused",
        data__num_groups=8,
        data__ablation=kind,
    )
    split = {"shuffled": "train", "stored": "test"}[order]
    whole = pipeline.Pipeline(config, small_store, split=split, order=order)
    parts = ((0, 7), (1, 3, 4), (2, 5, 6))
    own = [
        pipeline.Pipeline(config, small_store, split=split, order=order, groups=groups)
        for groups in parts
    ]
    # The last batch of an epoch has groups without a window.
    steps = (0, whole.num_steps(0) - 1)
    assert not whole.batch_at(steps[1]).batch.user_mask.any(axis=1).all()
    for step in steps:
        expected = whole.batch_at(step)
        for groups, part in zip(parts, own, strict=True):
            found = part.batch_at(step)
            assert found.shape == expected.shape
            np.testing.assert_array_equal(found.window_index, expected.window_index[list(groups)])
            leaves = jax.tree.leaves_with_path(found.batch)
            for (path, got), (_, want) in zip(
                leaves, jax.tree.leaves_with_path(expected.batch), strict=True
            ):
                np.testing.assert_array_equal(got, want[list(groups)], err_msg=str(path))
                assert got.dtype == want.dtype
        assert sum(p.batch_at(step).num_users for p in own) == expected.num_users


def test_evaluation_batches_hold_the_same_groups(small_store):
    config = small_config(small_store, "unused", data__num_groups=4)
    whole = pipeline.Pipeline(config, small_store)
    part = pipeline.Pipeline(config, small_store, groups=(1, 2))
    with whole.eval_batches("test") as batches:
        expected = [batch.window_index[1:3] for batch in batches]
    with part.eval_batches("test") as batches:
        found = [batch.window_index for batch in batches]
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, want)
