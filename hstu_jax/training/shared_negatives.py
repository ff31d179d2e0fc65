"""Negatives of all groups for every user, `data.negative_sharing="all"`: what a shard's loss is of.

Here: the arguments of a loss, with the negatives of the whole mesh in place of the groups' own. The
losses know nothing of it (`hstu_jax.losses`); `step.py` calls both.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hstu_jax.training import partition

_OF_NEGATIVES = ("negative", "negative_log_q", "negative_item")


def share(arguments: dict[str, Any]) -> dict[str, Any]:
    """A loss's arguments for one group: all users of this shard, negatives of the whole mesh.

    Each of the n groups draws its m negatives alone and with replacement from all items, item i
    with probability q(i) at every draw: no group leaves anything out (`exclusion="query"`). So the
    n m draws of all are those of one group that draws n m: item i is expected n m q(i) times, and
        z = score - log(n m q(i)) = score - log q(i) - log(n m),
    where the last term is the same for the positive and for all negatives and cancels in
    log(exp(z_pos) + sum exp(z_neg)) - z_pos. What is subtracted is log q(i), as without sharing.
    What is a positive of the query (next-item objective) or of one of the user's queries (window)
    is no negative of it, whichever group has drawn it, and counts in no sampled metric.

    Groups are joined in their own order, so that the result does not depend on how they lie on
    the devices. What is sent is item vectors, in float32, with the items' values and log q; a
    vector's gradients of all shards are summed where it came from, which is what differentiation
    makes of the gathering.

    Args:
        arguments: of `sampled_softmax` or `query_softmax`, arrays [G, ...] of this shard's groups.

    Returns:
        The same with arrays [1, G * ..., ...], and [1, n * M, ...] of negatives.
    """
    shared = {}
    for name, value in arguments.items():
        if name in _OF_NEGATIVES:
            shared[name] = jax.tree.map(_gather, value)
        elif name == "positive_user":
            users = arguments["user"].shape[1]
            first = users * jnp.arange(len(value), dtype=value.dtype)[:, None]
            shared[name] = _join(value + first)
        else:
            shared[name] = jax.tree.map(_join, value)
    return shared


def per_group(scores: Any, *, groups: int) -> Any:
    """A loss's result for one group, cut into the shard's own: [1, G * n, ...] to [G, n, ...].

    Args:
        scores: tree of such arrays and of scalars.
        groups: G.
    """

    def split(x):
        return x.reshape(groups, x.shape[1] // groups, *x.shape[2:]) if x.ndim else x

    return jax.tree.map(split, scores)


def _join(x):
    return x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])


def _gather(x):
    # Sums of gradients over devices in float32, as they are within one.
    x = x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    return _join(jax.lax.all_gather(x, partition.AXES, axis=0, tiled=True))
