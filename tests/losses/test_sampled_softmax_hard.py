"""Hard negatives in the loss: a query-by-query float64 oracle, absent ones, poison, log q."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.losses import sampled_softmax as losses
from hstu_jax.metrics import ranking
from tests.losses import test_sampled_softmax as shared_only

GROUPS, USERS, QUERIES, HARD, WIDTH = 2, 4, 7, 9, 5  # more hard negatives than users
VECTORS = ("user", "positive", "negative")
TEMPERATURE = 0.7


def draw(*, seed=0, negatives=6):
    """User 0 has every hard negative, user 1 some, user 2 none; user 3 has no query."""
    inputs = shared_only.draw(seed=seed, negatives=negatives)
    rng = np.random.default_rng(seed + 10)
    mask = np.zeros((GROUPS, USERS, HARD), bool)
    mask[:, 0], mask[0, 1, :3], mask[1, 1, :1], mask[:, 3, :2] = True, True, True, True
    inputs["hard"] = losses.HardNegatives(
        vectors=jnp.asarray(rng.normal(size=(*mask.shape, WIDTH)).astype(np.float32) * 1.5),
        mask=jnp.asarray(mask),
        log_q=jnp.asarray(rng.normal(size=mask.shape).astype(np.float32)),
    )
    weight = rng.random((GROUPS, QUERIES)).astype(np.float32)
    return {**inputs, "query_weight": jnp.asarray(weight)}


@functools.partial(jax.jit, static_argnames=("log_q_correction",))
def run(inputs, *, log_q_correction=True):
    """(result, gradients of the loss sum by all four kinds of vectors)."""

    def loss(vectors, hard_vectors):
        hard = losses.HardNegatives(
            vectors=hard_vectors, mask=inputs["hard"].mask, log_q=inputs["hard"].log_q
        )
        result = losses.sampled_softmax(
            temperature=TEMPERATURE,
            log_q_correction=log_q_correction,
            **{**inputs, **vectors, "hard": hard},
        )
        return result.loss_sum, result

    vectors = {name: inputs[name] for name in VECTORS}
    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (pulls, hard_pull), result = grad(vectors, inputs["hard"].vectors)
    return result, {**pulls, "hard": hard_pull}


def plain(inputs, *, log_q_correction=True):
    """Oracle: one softmax per query over the positive, M shared and the user's own negatives."""
    values = {name: np.asarray(inputs[name]) for name in inputs if name != "hard"}
    user, positive, negative = (values[name].astype(np.float64) for name in VECTORS)
    hard, mask, hard_log_q = (
        np.asarray(getattr(inputs["hard"], name)) for name in ("vectors", "mask", "log_q")
    )
    pulls = {name: np.zeros(values[name].shape) for name in VECTORS}
    pulls["hard"] = np.zeros(hard.shape)
    total = 0.0
    for g, q in zip(*np.nonzero(values["query_mask"]), strict=True):
        u, m = values["positive_user"][g, q], negative.shape[1]
        own = np.flatnonzero(mask[g, u])
        items = np.concatenate([positive[g, q][None], negative[g], hard[g, u, own]])
        logits = items @ user[g, u] / TEMPERATURE
        if log_q_correction:
            logits -= np.concatenate(
                [
                    values["positive_log_q"][g, q][None],
                    values["negative_log_q"][g],
                    hard_log_q[g, u, own],
                ]
            )
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        weight = values["query_weight"][g, q]
        total -= weight * np.log(shares[0])
        shares[0] -= 1
        shares *= weight / TEMPERATURE
        pulls["user"][g, u] += shares @ items
        pulls["positive"][g, q] += shares[0] * user[g, u]
        pulls["negative"][g] += shares[1 : 1 + m, None] * user[g, u]
        pulls["hard"][g, u, own] += shares[1 + m :, None] * user[g, u]
    return total, pulls


@pytest.mark.parametrize("log_q_correction", [True, False])
@pytest.mark.parametrize("negatives", [6, 0])
def test_loss_and_gradients_equal_one_softmax_per_query(log_q_correction, negatives):
    inputs = draw(negatives=negatives)
    result, gradients = run(inputs, log_q_correction=log_q_correction)
    total, pulls = plain(inputs, log_q_correction=log_q_correction)
    np.testing.assert_allclose(result.loss_sum, total, rtol=1e-5)
    for name, value in gradients.items():
        np.testing.assert_allclose(value, pulls[name], rtol=1e-4, atol=1e-5, err_msg=name)
    mask = np.asarray(inputs["hard"].mask)
    assert not np.asarray(gradients["hard"])[~mask].any()
    scores = np.asarray(result.hard_negative_scores)
    assert (scores[~mask] == -np.inf).all() and np.isfinite(scores[mask]).all()


def test_wrong_variants_are_far_from_the_oracle():
    inputs = draw()
    right, hard = plain(inputs)[0], inputs["hard"]

    def changed(**fields):
        return plain({**inputs, "hard": losses.HardNegatives(**{**vars(hard), **fields})})[0]

    wrong = {
        "hard negatives dropped": changed(mask=jnp.zeros_like(hard.mask)),
        "absent ones counted": changed(mask=jnp.ones_like(hard.mask)),
        "hard negatives not corrected": changed(log_q=jnp.zeros_like(hard.log_q)),
        "other users' lists": changed(vectors=hard.vectors[:, ::-1]),
    }
    for name, value in wrong.items():
        assert abs(value - right) > 0.2, name


def test_equal_log_q_changes_nothing_with_hard_negatives_either():
    inputs = draw()
    for name in ("positive_log_q", "negative_log_q"):
        inputs[name] = jnp.full_like(inputs[name], -8.7)
    hard = inputs["hard"]
    inputs["hard"] = losses.HardNegatives(
        vectors=hard.vectors, mask=hard.mask, log_q=jnp.full_like(hard.log_q, -8.7)
    )
    (on, _), (off, _) = run(inputs), run(inputs, log_q_correction=False)
    np.testing.assert_allclose(on.loss_sum, off.loss_sum, rtol=1e-5)


def test_padding_may_hold_nan():
    inputs = draw()
    hard, mask = inputs["hard"], np.asarray(inputs["hard"].mask)
    used = np.zeros((GROUPS, USERS), bool)
    for g, q in zip(*np.nonzero(np.asarray(inputs["query_mask"])), strict=True):
        used[g, inputs["positive_user"][g, q]] = True
    held = mask & used[..., None]
    poisoned = {
        **inputs,
        "user": jnp.where(used[..., None], inputs["user"], jnp.nan),
        "query_weight": jnp.where(inputs["query_mask"], inputs["query_weight"], jnp.nan),
        "hard": losses.HardNegatives(
            vectors=jnp.where(held[..., None], hard.vectors, jnp.nan),
            mask=hard.mask,
            log_q=jnp.where(mask, hard.log_q, jnp.nan),
        ),
    }
    for got, want in zip(jax.tree.leaves(run(poisoned)), jax.tree.leaves(run(inputs)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_users_without_any_negative_have_loss_zero():
    inputs = draw(negatives=0)
    inputs["positive_user"] = jnp.full_like(inputs["positive_user"], 2)  # has no hard negative
    result, gradients = run(inputs)
    assert float(result.loss_sum) == 0 and float(result.count) > 0
    for name, value in gradients.items():
        assert not np.asarray(value).any(), name


def test_no_array_of_queries_by_hard_negatives_is_made():
    inputs = draw()
    text = str(jax.make_jaxpr(lambda inputs: run(inputs)[1])(inputs))
    assert f"[{GROUPS},{USERS},{HARD}]" in text
    assert f"[{GROUPS},{QUERIES},{HARD}" not in text


def test_hard_negatives_count_among_the_competitors():
    inputs = draw()
    result, _ = run(inputs)
    rows = jnp.concatenate([result.negative_scores, result.hard_negative_scores], axis=-1)
    arguments = {name: inputs[name] for name in ("positive_user", "query_mask")}
    hits, _ = ranking.sampled_hits(
        positive_scores=result.positive_scores, negative_scores=rows, cutoffs=(1, 3), **arguments
    )
    expected = [0, 0]
    for g, q in zip(*np.nonzero(np.asarray(inputs["query_mask"])), strict=True):
        u = int(inputs["positive_user"][g, q])
        own = np.asarray(result.hard_negative_scores)[g, u][np.asarray(inputs["hard"].mask)[g, u]]
        others = np.concatenate([np.asarray(result.negative_scores)[g, u], own])
        ahead = (others >= float(result.positive_scores[g, q])).sum()
        expected = [count + (ahead < k) for count, k in zip(expected, (1, 3), strict=True)]
    np.testing.assert_array_equal(hits, expected)
