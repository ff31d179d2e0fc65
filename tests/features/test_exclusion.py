"""Negatives of next-item batches: without the group's positives, or from all items."""

import dataclasses

import numpy as np
import pytest

from hstu_jax.config import model_schema
from hstu_jax.features import pipeline
from tests.features import tied_events

POSITIVE = "cand_seq__video_id"


def test_negatives_are_drawn_from_all_items(make_config, tmp_path):
    store = tied_events.write_store(tmp_path / "store", mode="train_events", window_events=30)
    config = make_config(sampler_num_sample=200, batch_size=4)
    model = dataclasses.replace(config.model, objective="next_item")
    found = {}
    for exclusion in ("group", "query"):
        sampler = dataclasses.replace(config.data.negative_sampler, exclusion=exclusion)
        data = dataclasses.replace(config.data, negative_sampler=sampler)
        changed = dataclasses.replace(config, data=data, model=model)
        made = pipeline.Pipeline(changed, store, split="train")
        batch = made.batch_at(0).batch
        found[exclusion] = set(batch.negative[POSITIVE].ravel().tolist())
        positives = set(batch.positive[POSITIVE][batch.query_mask].tolist())
        evaluated = next(iter(made.eval_batches("test"))).batch
        shown = set(evaluated.positive[POSITIVE][evaluated.query_mask].tolist())
        # Evaluation asks once a user: there the group's positives are always left out.
        assert not shown & set(evaluated.negative[POSITIVE].ravel().tolist())
    assert not found["group"] & positives
    assert len(found["query"] & positives) > len(positives) // 2
    assert np.isfinite(batch.negative_log_q).all()


@pytest.mark.parametrize("objective", ["window", "next_item"])
def test_groups_that_share_their_negatives_draw_from_all_items(make_config, tmp_path, objective):
    """In evaluation too."""
    store = tied_events.write_store(tmp_path / "store", mode="train_events", window_events=30)
    options = dict(sampler_num_sample=300, batch_size=8, num_groups=2)
    shared = dict(sampler_exclusion="query", negative_sharing="all")
    model = dataclasses.replace(make_config(**options).model, objective=objective)
    made = pipeline.Pipeline(
        dataclasses.replace(make_config(**options, **shared), model=model), store, split="train"
    )
    for batch in (made.batch_at(0).batch, next(iter(made.eval_batches("test"))).batch):
        assert batch.query_mask.any()
        for group in np.flatnonzero(batch.query_mask.any(axis=1)):
            positives = batch.positive[POSITIVE][group][batch.query_mask[group]]
            assert np.isin(positives, batch.negative[POSITIVE][group]).any()
        assert (batch.negative[POSITIVE][0] != batch.negative[POSITIVE][1]).any()


def test_sharing_needs_groups_and_exclusion_by_query(make_config):
    with pytest.raises(
        ValueError, match="negative_sharing='all': is for several groups, and there is num_groups=1"
    ):
        make_config(negative_sharing="all", sampler_exclusion="query")
    with pytest.raises(
        ValueError, match="negative_sharing='all': makes the positives of one group"
    ):
        make_config(negative_sharing="all", num_groups=2)


def test_the_window_objective_refuses_it(make_config):
    with pytest.raises(ValueError, match="exclusion='query': is for queries that have scores of t"):
        make_config(sampler_exclusion="query")
    assert model_schema.ModelConfig().objective == "window"
