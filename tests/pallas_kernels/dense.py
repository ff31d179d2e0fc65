"""HSTU attention in float64, all pairs at once: the fast oracle of property and rounding tests.

`oracle.py` has the slow loops that are written from the rules; masks come from there.
"""

import numpy as np


def attention(q, k, v, g, mask, alpha, divisor, rab=0.0):
    """Output and gradients (o, dq, dk, dv) of sum(o * g) by the formula; rab: [R, L, L] or 0."""
    return _products(*_scores(q, k, v, g, mask, alpha, divisor, rab), q, k, v, g)


def bias_gradient(q, k, v, g, mask, alpha, divisor, rab):
    """Gradient of sum(o * g) with respect to the bias of every pair, [R, L, L]."""
    return _scores(q, k, v, g, mask, alpha, divisor, rab)[1].sum(axis=1) / alpha


def magnitudes(q, k, v, g, mask, alpha, divisor):
    """Sums of the absolute terms of each result: what the rounding of scores is relative to."""
    scores, dlogits = _scores(q, k, v, g, mask, alpha, divisor)
    return _products(np.abs(scores), np.abs(dlogits), *(np.abs(x) for x in (q, k, v, g)))


def _scores(q, k, v, g, mask, alpha, divisor, rab=0.0):
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    logits = alpha * np.einsum("rihk,rjhk->rhij", q, k)
    logits = logits + np.broadcast_to(rab, mask.shape)[:, None]
    gate = 1 / (1 + np.exp(-logits))
    scores = logits * gate / divisor * mask[:, None]
    slope = alpha * (gate + logits * gate * (1 - gate)) / divisor * mask[:, None]
    return scores, np.einsum("rihv,rjhv->rhij", g, v) * slope


def _products(scores, dlogits, q, k, v, g):
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    return (
        np.einsum("rhij,rjhv->rihv", scores, v),
        np.einsum("rhij,rjhk->rihk", dlogits, k),
        np.einsum("rhij,rihk->rjhk", dlogits, q),
        np.einsum("rhij,rihv->rjhv", scores, g),
    )
