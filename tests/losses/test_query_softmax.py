"""The loss with a vector per query: against cross-entropy by hand, in blocks, and bad padding."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.losses import query_softmax as losses
from tests.losses import test_sampled_softmax as shared

VECTORS = ("query", "positive", "negative")


def draw(*, seed=0, negatives=shared.NEGATIVES):
    """Inputs of the user-wise loss, with as many users as queries: query q asks as user q."""
    inputs = shared.draw(seed=seed, negatives=negatives)
    query = np.random.default_rng(seed + 9).normal(size=inputs["positive"].shape, scale=1.5)
    del inputs["user"], inputs["positive_user"]
    return {**inputs, "query": jnp.asarray(query.astype(np.float32))}


@functools.partial(jax.jit, static_argnames=("temperature", "log_q_correction", "block_scores"))
def run(inputs, *, temperature=0.7, log_q_correction=True, block_scores=10**6):
    options = dict(temperature=temperature, log_q_correction=log_q_correction)
    return losses.query_softmax(**inputs, **options, block_scores=block_scores)


def gradients(inputs, *, cotangent=1.0, **options):
    vectors = {name: inputs[name] for name in VECTORS}
    return jax.grad(lambda v: cotangent * run({**inputs, **v}, **options).loss_sum)(vectors)


def plain(inputs, **options):
    """Loss and gradients of the user-wise oracle."""
    queries = inputs["query"].shape[1]
    owner = np.tile(np.arange(queries), (shared.GROUPS, 1))
    inputs = {**inputs, "user": inputs["query"], "positive_user": owner}
    total, pulls = shared.plain(inputs, **options)
    return total, {"query" if name == "user" else name: pull for name, pull in pulls.items()}


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("block_scores", [1, 3 * shared.GROUPS * shared.NEGATIVES, 10**6])
@pytest.mark.parametrize("log_q_correction", [True, False])
def test_loss_and_gradients_are_those_of_cross_entropy(block_scores, log_q_correction):
    inputs = draw()
    inputs["query_weight"] = jnp.asarray(
        np.random.default_rng(5).uniform(0, 3, inputs["query_mask"].shape).astype(np.float32)
    )
    options = dict(log_q_correction=log_q_correction)
    loss, pulls = plain(inputs, **options)
    options["block_scores"] = block_scores
    close(run(inputs, **options).loss_sum, loss)
    found = gradients(inputs, cotangent=-2.0, **options)
    for name in VECTORS:
        close(found[name], -2.0 * np.asarray(pulls[name]))


def test_scores_and_counts_by_hand():
    inputs = draw()
    for block_scores in (1, 10**6):
        found = run(inputs, block_scores=block_scores)
        mask = np.asarray(inputs["query_mask"])
        query = np.where(mask[..., None], inputs["query"], 0)
        scores = np.einsum("gqe,gme->gqm", query, inputs["negative"]) / 0.7
        positive = np.einsum("gqe,gqe->gq", query, inputs["positive"]) / 0.7
        close(found.positive_scores, positive)
        ahead = (scores >= positive[..., None]).sum(axis=-1)
        np.testing.assert_array_equal(np.asarray(found.num_ahead)[mask], ahead[mask])


def test_ties_count_against_the_model():
    inputs = draw()
    inputs |= {name: jnp.round(2 * inputs[name]) for name in VECTORS}  # sums without rounding
    inputs["negative"] = inputs["negative"].at[:, 2].set(inputs["positive"][:, 0])
    tied = np.asarray(run(inputs).num_ahead)[:, 0]
    inputs["negative"] = inputs["negative"].at[:, 2].set(-100 * inputs["query"][:, 0])
    np.testing.assert_array_equal(tied - np.asarray(run(inputs).num_ahead)[:, 0], 1)


@pytest.mark.parametrize("block_scores", [1, 10**6])
def test_masked_queries_may_hold_anything(block_scores):
    inputs = draw()
    mask = inputs["query_mask"][..., None]
    poisoned = {name: jnp.where(mask, inputs[name], jnp.nan) for name in ("query", "positive")}
    poisoned["positive_log_q"] = jnp.where(mask[..., 0], inputs["positive_log_q"], jnp.nan)
    options = dict(block_scores=block_scores)
    clean, dirty = run(inputs, **options), run({**inputs, **poisoned}, **options)
    np.testing.assert_array_equal(clean.loss_sum, dirty.loss_sum)
    pulls = [gradients(each, **options) for each in (inputs, {**inputs, **poisoned})]
    jax.tree.map(np.testing.assert_array_equal, *pulls)
    assert not np.asarray(pulls[0]["query"])[~np.asarray(mask[..., 0])].any()


def test_blocks_behind_the_last_query_are_as_if_they_were_not_there():
    inputs, used = draw(), shared.QUERIES - 2
    behind = jnp.arange(shared.QUERIES) >= used
    inputs["query_mask"] = inputs["query_mask"].at[0].set(True) & ~behind[None]
    names = (*inputs.keys() - {"negative", "negative_log_q"},)
    cut = {**inputs, **{name: inputs[name][:, :used] for name in names}}
    options = dict(block_scores=1)
    found, want = run(inputs, **options), run(cut, **options)
    np.testing.assert_array_equal(found.loss_sum, want.loss_sum)
    for name in ("positive_scores", "num_ahead"):
        np.testing.assert_array_equal(getattr(found, name)[:, :used], getattr(want, name))
        assert not np.asarray(getattr(found, name))[:, used:].any()
    pulls, want = gradients(inputs, **options), gradients(cut, **options)
    np.testing.assert_array_equal(pulls["negative"], want["negative"])
    np.testing.assert_array_equal(pulls["query"][:, :used], want["query"])


@pytest.mark.parametrize("block_scores", [1, 10**6])
def test_a_negative_that_is_no_number_reaches_the_loss_and_every_gradient(block_scores):
    inputs = draw()
    inputs["negative"] = inputs["negative"].at[1, 2, 0].set(jnp.nan)
    assert np.isnan(run(inputs, block_scores=block_scores).loss_sum)
    found = gradients(inputs, block_scores=block_scores)
    is_used = np.asarray(inputs["query_mask"][1])
    for name in ("query", "positive"):
        assert np.isnan(np.asarray(found[name])[1, is_used]).any(axis=-1).all()


def test_no_query_and_no_negative_give_zero():
    nobody = {**draw(), "query_mask": jnp.zeros((shared.GROUPS, shared.QUERIES), bool)}
    alone = draw(negatives=0)
    for inputs in (nobody, alone):
        assert float(run(inputs).loss_sum) == 0
        for pull in jax.tree.leaves(gradients(inputs)):
            np.testing.assert_array_equal(pull, 0)


def test_wrong_variants_are_caught():
    """An uncorrected positive, vectors of other queries, negatives of another scale."""
    inputs = draw()
    loss, pulls = plain(inputs)
    for wrong in (
        {"positive_log_q": jnp.zeros_like(inputs["positive_log_q"])},
        {"query": inputs["query"][:, ::-1]},
        {"negative": inputs["negative"] * 0.7},
    ):
        changed = {**inputs, **wrong}
        assert abs(float(run(changed).loss_sum) - loss) > 0.1
        assert np.abs(gradients(changed)["negative"] - pulls["negative"]).max() > 0.05


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match=re.escape("temperature=0.0: must be above 0")):
        losses.query_softmax(**draw(), temperature=0.0, log_q_correction=True)
