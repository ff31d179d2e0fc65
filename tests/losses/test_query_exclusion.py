"""A query's own positive among the shared negatives: left out of that query, and of no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses import test_query_softmax as shared

NUM_ITEMS = 4


def draw(seed=0):
    """Inputs with two features of items, so few items that most queries meet their own."""
    inputs = shared.draw(seed=seed)
    rng = np.random.default_rng(seed)
    groups, queries = inputs["query_mask"].shape
    negatives = inputs["negative"].shape[1]
    for name, size in (("positive_item", queries), ("negative_item", negatives)):
        item = rng.integers(0, NUM_ITEMS, (groups, size))
        values = np.stack([item % 2, item], axis=-1)
        inputs[name] = {"id": jnp.asarray(item // 2), "pair": jnp.asarray(values)}
    return inputs


def number(items):
    return np.asarray(items["pair"])[..., 1]


def slow_loss(inputs, temperature=0.7):
    """Cross-entropy query by query in float64, and its count of negatives ahead."""
    total, ahead = 0.0, []
    positive_item, negative_item = number(inputs["positive_item"]), number(inputs["negative_item"])
    for g, q in zip(*np.nonzero(np.asarray(inputs["query_mask"])), strict=True):
        query = np.asarray(inputs["query"], np.float64)[g, q]
        kept = np.flatnonzero(negative_item[g] != positive_item[g, q])
        score = query @ np.asarray(inputs["positive"], np.float64)[g, q] / temperature
        scores = np.asarray(inputs["negative"], np.float64)[g, kept] @ query / temperature
        logits = np.append(
            scores - np.asarray(inputs["negative_log_q"])[g, kept],
            score - np.asarray(inputs["positive_log_q"])[g, q],
        )
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[-1]
        ahead.append(int((scores >= score).sum()))
    return total, ahead


@pytest.mark.parametrize("block_scores", [1, 10**6])
def test_loss_counts_and_gradients_leave_out_the_own_positive(block_scores):
    inputs = draw()
    total, ahead = slow_loss(inputs)
    found = shared.run(inputs, block_scores=block_scores)
    np.testing.assert_allclose(found.loss_sum, total, rtol=3e-5)
    mask = np.asarray(inputs["query_mask"])
    assert np.asarray(found.num_ahead)[mask].tolist() == ahead
    # With the own positive among the negatives the loss is another.
    plain = {k: v for k, v in inputs.items() if not k.endswith("_item")}
    assert float(shared.run(plain).loss_sum) - total > 0.1
    # Gradients by differences along a random direction.
    rng = np.random.default_rng(3)
    pulls = shared.gradients(inputs, block_scores=block_scores)
    for name in shared.VECTORS:
        direction = rng.normal(size=inputs[name].shape)
        direction *= 1e-4 / np.abs(direction).max()
        ends = [
            slow_loss({**inputs, name: np.asarray(inputs[name], np.float64) + sign * direction})[0]
            for sign in (1, -1)
        ]
        slope = float(np.sum(np.asarray(pulls[name], np.float64) * direction))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2, rtol=1e-3)


def test_a_query_without_other_negatives_costs_nothing():
    inputs = draw()
    for name in ("positive_item", "negative_item"):
        inputs[name] = jax.tree.map(jnp.zeros_like, inputs[name])
    assert float(shared.run(inputs).loss_sum) == 0
    for pull in jax.tree.leaves(shared.gradients(inputs)):
        np.testing.assert_array_equal(pull, 0)
