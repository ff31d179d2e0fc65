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


def test_the_window_objective_refuses_it(make_config):
    with pytest.raises(ValueError, match="exclusion='query': is for queries that have scores of t"):
        make_config(sampler_exclusion="query")
    assert model_schema.ModelConfig().objective == "window"
