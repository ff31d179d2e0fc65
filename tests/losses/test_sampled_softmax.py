"""Sampled softmax against plain cross-entropy, the recorded reference, and bad padding."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.losses import sampled_softmax as losses
from hstu_jax.metrics import ranking

GROUPS, USERS, QUERIES, NEGATIVES, WIDTH = 2, 4, 7, 6, 5
VECTORS = ("user", "positive", "negative")


def draw(*, seed=0, negatives=NEGATIVES):
    """Two groups; user 3 has no query, some queries are masked."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.5):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32) * scale)

    mask = np.ones((GROUPS, QUERIES), bool)
    mask[0, 5:] = mask[1, 2] = False
    return {
        "user": normal(GROUPS, USERS, WIDTH),
        "positive": normal(GROUPS, QUERIES, WIDTH),
        "negative": normal(GROUPS, negatives, WIDTH),
        "positive_user": jnp.asarray(rng.integers(0, 3, (GROUPS, QUERIES))),
        "query_mask": jnp.asarray(mask),
        "positive_log_q": normal(GROUPS, QUERIES),
        "negative_log_q": normal(GROUPS, negatives),
    }


@functools.partial(jax.jit, static_argnames=("temperature", "log_q_correction"))
def run(inputs, *, temperature=0.7, log_q_correction=True):
    return losses.sampled_softmax(
        temperature=temperature, log_q_correction=log_q_correction, **inputs
    )


@functools.partial(jax.jit, static_argnames=("temperature", "log_q_correction"))
def gradients(inputs, **options):
    """Gradients of the loss sum by the three kinds of vectors."""
    vectors = {name: inputs[name] for name in VECTORS}
    return jax.grad(lambda v: run({**inputs, **v}, **options).loss_sum)(vectors)


def plain(inputs, *, temperature=0.7, log_q_correction=True):
    """Oracle: [Q, 1 + M] cross-entropy in float64, one query at a time, with its gradients."""
    values = {name: np.asarray(value) for name, value in inputs.items()}
    user, positive, negative = (values[name].astype(np.float64) for name in VECTORS)
    pulls = {name: np.zeros(values[name].shape) for name in VECTORS}
    total = 0.0
    for g, q in zip(*np.nonzero(values["query_mask"]), strict=True):
        u = values["positive_user"][g, q]
        items = np.concatenate([positive[g, q][None], negative[g]])
        logits = items @ user[g, u] / temperature
        if log_q_correction:
            logits[0] -= values["positive_log_q"][g, q]
            logits[1:] -= values["negative_log_q"][g]
        weights = np.exp(logits - logits.max())
        log_total = np.log(weights.sum()) + logits.max()
        weights /= weights.sum()
        weight = 1.0 if "query_weight" not in values else values["query_weight"][g, q]
        total -= weight * (logits[0] - log_total)
        weights[0] -= 1
        weights *= weight / temperature
        pulls["user"][g, u] += weights @ items
        pulls["positive"][g, q] += weights[0] * user[g, u]
        pulls["negative"][g] += weights[1:, None] * user[g, u]
    return total, pulls


@pytest.mark.parametrize("log_q_correction", [True, False])
def test_loss_and_gradients_equal_plain_cross_entropy(log_q_correction):
    inputs = draw()
    got = run(inputs, log_q_correction=log_q_correction)
    total, pulls = plain(inputs, log_q_correction=log_q_correction)
    np.testing.assert_allclose(got.loss_sum, total, rtol=1e-5)
    assert float(got.count) == 11
    for name, value in gradients(inputs, log_q_correction=log_q_correction).items():
        np.testing.assert_allclose(value, pulls[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_query_weights_weigh_the_loss_and_the_count():
    inputs = draw()
    weight = np.random.default_rng(3).random((GROUPS, QUERIES)).astype(np.float32)
    inputs["query_weight"] = jnp.asarray(weight)
    got = run(inputs)
    np.testing.assert_allclose(got.loss_sum, plain(inputs)[0], rtol=1e-5)
    np.testing.assert_allclose(got.count, weight[np.asarray(inputs["query_mask"])].sum(), rtol=1e-6)


def test_wrong_variants_are_far_from_the_oracle():
    inputs = draw()
    right = plain(inputs)[0]
    wrong = {
        "positive not corrected": plain({**inputs, "positive_log_q": jnp.zeros((GROUPS, QUERIES))})[
            0
        ],
        "sign of log q": plain(
            {
                **inputs,
                "positive_log_q": -inputs["positive_log_q"],
                "negative_log_q": -inputs["negative_log_q"],
            }
        )[0],
        "no temperature": plain(inputs, temperature=1.0)[0],
        "other users' scores": plain(
            {**inputs, "positive_user": (inputs["positive_user"] + 1) % 3}
        )[0],
        "masked queries counted": plain(
            {**inputs, "query_mask": jnp.ones((GROUPS, QUERIES), bool)}
        )[0],
    }
    for name, value in wrong.items():
        assert abs(value - right) > 0.5, name


def test_uniform_sampling_makes_the_correction_vanish():
    inputs = draw()
    for name in ("positive_log_q", "negative_log_q"):
        inputs[name] = jnp.full_like(inputs[name], -8.7)
    on, off = run(inputs), run(inputs, log_q_correction=False)
    np.testing.assert_allclose(on.loss_sum, off.loss_sum, rtol=1e-5)


def test_whole_corpus_as_negatives_is_the_full_softmax():
    """With every other item as a negative the loss is -log p(item | user) over the corpus."""
    rng = np.random.default_rng(2)
    items = rng.normal(size=(NEGATIVES + 1, WIDTH)).astype(np.float32) * 1.5
    inputs = draw()
    right = np.array([2, 5])  # each group has its own right item
    inputs["negative"] = jnp.asarray(np.stack([np.delete(items, r, axis=0) for r in right]))
    inputs["positive"] = jnp.broadcast_to(items[right][:, None], (GROUPS, QUERIES, WIDTH))
    got = run(inputs, log_q_correction=False)
    logits = np.asarray(inputs["user"], np.float64) @ items.T.astype(np.float64) / 0.7
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = sum(
        -log_p[g, inputs["positive_user"][g, q], right[g]]
        for g, q in zip(*np.nonzero(np.asarray(inputs["query_mask"])), strict=True)
    )
    np.testing.assert_allclose(got.loss_sum, expected, rtol=1e-5)


def test_padding_may_hold_nan():
    inputs = draw()
    clean, clean_gradients = run(inputs), gradients(inputs)
    mask = np.asarray(inputs["query_mask"])
    used = np.zeros((GROUPS, USERS), bool)
    for g, q in zip(*np.nonzero(mask), strict=True):
        used[g, inputs["positive_user"][g, q]] = True
    assert not used.all()
    poisoned = dict(inputs)
    poisoned["user"] = jnp.where(used[..., None], inputs["user"], jnp.nan)
    poisoned["positive"] = jnp.where(mask[..., None], inputs["positive"], jnp.nan)
    poisoned["positive_log_q"] = jnp.where(mask, inputs["positive_log_q"], jnp.nan)
    poisoned["positive_user"] = jnp.where(mask, inputs["positive_user"], USERS - 1)
    for got, expected in (
        (run(poisoned), clean),
        (gradients(poisoned), clean_gradients),
    ):
        for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(left, right)


def test_nothing_in_use_gives_zeros():
    inputs = draw()
    inputs["query_mask"] = jnp.zeros((GROUPS, QUERIES), bool)
    inputs["user"] = jnp.full_like(inputs["user"], jnp.nan)
    got = run(inputs)
    assert (float(got.loss_sum), float(got.count)) == (0.0, 0.0)
    for name, value in gradients(inputs).items():
        assert not np.asarray(value).any(), name


def test_no_negatives_give_loss_zero():
    inputs = draw(negatives=0)
    got = run(inputs)
    assert (float(got.loss_sum), float(got.count)) == (0.0, 11.0)
    assert got.negative_scores.shape == (GROUPS, USERS, 0)
    for name, value in gradients(inputs).items():
        assert not np.asarray(value).any(), name


def test_huge_scores_stay_finite_and_bfloat16_sums_in_float32():
    inputs = draw()
    inputs.update({name: inputs[name] * 100 for name in VECTORS})
    got = run(inputs)
    np.testing.assert_allclose(got.loss_sum, plain(inputs)[0], rtol=1e-5)
    inputs = draw()
    inputs.update({name: inputs[name].astype(jnp.bfloat16) for name in VECTORS})
    got = run(inputs)
    assert got.loss_sum.dtype == got.negative_scores.dtype == jnp.float32
    np.testing.assert_allclose(got.loss_sum, plain(inputs)[0], rtol=1e-5)


def test_the_matrix_of_queries_by_negatives_is_never_made():
    inputs = draw()
    text = str(jax.make_jaxpr(lambda inputs: gradients(inputs, temperature=0.7))(inputs))
    assert f"[{GROUPS},{USERS},{NEGATIVES}]" in text
    assert f"[{GROUPS},{QUERIES},{NEGATIVES}]" not in text


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature=0.0: must be above 0"):
        run(draw(), temperature=0.0)


@pytest.mark.long
def test_golden_family_f(golden_dir):
    """Recorded scores, losses, recalls and gradients of every case without hard negatives.

    `tests/test_golden.py` replays them in every suite, those with hard negatives too.
    """
    num_cases = 0
    for file in sorted(golden_dir.glob("F*.npz")):
        recorded = np.load(file)
        meta = json.loads(str(recorded["meta_json"]))
        if meta["num_hard_neg"]:
            continue
        num_cases += 1
        full = meta["op"] == "HSTUMatch"
        names = ("out.user_emb", "out.item_emb") if full else ("in.user_emb", "in.item_emb")
        user, item = (jnp.asarray(recorded[name]) for name in names)
        lengths = np.asarray(meta["pos_lengths"])
        similarity = recorded["out.similarity"]
        queries, temperature = int(lengths.sum()), meta.get("temperature")
        if temperature is None:  # full models: a line of the configuration text
            temperature = float(re.search(r"temperature: ([\d.]+)", meta["config"])[1])
        inputs = {
            "user": user[None],
            "positive": item[None, :queries],
            "negative": item[None, queries:],
            "positive_user": jnp.asarray(np.repeat(np.arange(lengths.size), lengths))[None],
            "query_mask": jnp.ones((1, queries), bool),
            "positive_log_q": jnp.zeros((1, queries)),
            "negative_log_q": jnp.zeros((1, similarity.shape[1] - 1)),
        }
        if "in.sample_weight" in recorded:
            inputs["query_weight"] = jnp.asarray(recorded["in.sample_weight"])[None]
        options = {"temperature": temperature, "log_q_correction": False}
        got = run(inputs, **options)
        np.testing.assert_allclose(got.positive_scores[0], similarity[:, 0], atol=1e-4)
        owner = np.asarray(inputs["positive_user"])[0]
        np.testing.assert_allclose(got.negative_scores[0][owner], similarity[:, 1:], atol=1e-4)
        np.testing.assert_allclose(got.loss_sum / got.count, recorded["out.loss"], rtol=1e-5)
        hits, rows = ranking.sampled_hits(
            positive_scores=got.positive_scores,
            negative_scores=got.negative_scores,
            positive_user=inputs["positive_user"],
            query_mask=inputs["query_mask"],
            cutoffs=(1, 5),
        )
        prefix = ("out.metric.recall@", "out.recall_at_")[not full]
        for hit, cutoff in zip(hits, (1, 5), strict=True):
            np.testing.assert_allclose(hit / rows, recorded[f"{prefix}{cutoff}"], rtol=1e-6)
        if not full:
            pulls = gradients(inputs, **options)
            items = np.concatenate([pulls["positive"][0], pulls["negative"][0]])
            for mine, name in ((pulls["user"][0], "user_emb"), (items, "item_emb")):
                np.testing.assert_allclose(
                    mine / got.count, recorded[f"grad_in.{name}"], atol=1e-3, rtol=1e-3
                )
    assert num_cases >= 1
