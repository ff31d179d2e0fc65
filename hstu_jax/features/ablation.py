"""What a model loses without one kind of input: batches with that input taken away.

For checks and for the ablation table of `docs/results.md`; chosen by `data.ablation`. A model must
be trained and evaluated on the same kind, so all but the targets are changed in both.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from hstu_jax.config import data_schema
from hstu_jax.features.batch import Batch

SHUFFLES = ("shuffled_order", "shuffled_targets")  # kinds whose draws run through all groups


def apply(
    kind: data_schema.Ablation,
    batch: Batch,
    *,
    num_contextual: int,
    is_training: bool,
    users: Int[np.ndarray, "G U"],
    rng: np.random.Generator,
) -> Batch:
    """The batch without one kind of input.

    Args:
        kind: "no_actions": no action bits and no watch times. "no_time": every time gap, age and
            phase is 0, positions stay. "shuffled_order": what was watched is dealt anew to the
            times of each user's history, so that neither positions nor clocks tell the order.
            "shuffled_targets": the positives of a group are dealt anew to its queries; training
            only. With a query at every position, of which a user's own positives would fit many,
            no query gets one of its own user while the group has others. "none": unchanged.
        batch: on the host; not changed.
        num_contextual: C.
        is_training: whether the batch is for training.
        users: who is in every user slot; a user of several slots is the same in all.
        rng: decides the shuffles.
    """
    if kind == "no_actions":
        zeros = np.zeros_like(batch.action)
        return dataclasses.replace(
            batch, action=zeros, watch_time_s=np.zeros_like(batch.watch_time_s)
        )
    if kind == "no_time":
        zeros = np.zeros_like(batch.time_gap_s)
        return dataclasses.replace(
            batch,
            time_gap_s=zeros,
            step_gap_s=None if batch.step_gap_s is None else zeros,
            age_s=None if batch.age_s is None else np.zeros_like(batch.age_s),
            last_phase=np.zeros_like(batch.last_phase),
        )
    if kind == "shuffled_order":
        return _shuffle_order(batch, num_contextual, rng)
    if kind == "shuffled_targets" and is_training:
        return _shuffle_targets(batch, users, rng)
    return batch


def _shuffle_order(batch: Batch, num_contextual: int, rng: np.random.Generator) -> Batch:
    groups = batch.segment_starts.shape[0]
    flat = {name: np.array(values).reshape(groups, -1) for name, values in batch.history.items()}
    action = np.array(batch.action).reshape(groups, -1)
    watch_time_s = np.array(batch.watch_time_s).reshape(groups, -1)
    for group, user in np.argwhere(batch.segment_lengths > num_contextual):
        start = batch.segment_starts[group, user] + num_contextual
        stop = batch.segment_starts[group, user] + batch.segment_lengths[group, user]
        order = rng.permutation(np.arange(start, stop))
        for values in (*flat.values(), action, watch_time_s):
            values[group, start:stop] = values[group, order]
    shape = batch.action.shape
    return dataclasses.replace(
        batch,
        history={name: values.reshape(shape) for name, values in flat.items()},
        action=action.reshape(shape),
        watch_time_s=watch_time_s.reshape(shape),
    )


def _shuffle_targets(batch: Batch, users: np.ndarray, rng: np.random.Generator) -> Batch:
    positive = {name: np.array(values) for name, values in batch.positive.items()}
    log_q = np.array(batch.positive_log_q)
    for group in range(batch.query_mask.shape[0]):
        used = np.flatnonzero(batch.query_mask[group])
        order = rng.permutation(used.size)
        if batch.query_slot is not None:
            user = users[group, batch.positive_user[group, used]]
            _give_to_others(order, user, rng)
        for values in (*positive.values(), log_q):
            values[group, used] = values[group, used[order]]
    return dataclasses.replace(batch, positive=positive, positive_log_q=log_q)


def _give_to_others(order: np.ndarray, user: np.ndarray, rng: np.random.Generator) -> None:
    """Exchanges, in place, what queries got of their own user for something of another.

    `order[i]` is the query whose positive query i gets, `user[i]` who asks query i. What a user of
    more than half of all queries cannot give away stays.
    """
    for query in np.flatnonzero(user[order] == user):
        if user[order[query]] != user[query]:
            continue  # was given away meanwhile
        fits = np.flatnonzero((user != user[query]) & (user[order] != user[query]))
        if fits.size:
            other = rng.choice(fits)
            order[[query, other]] = order[[other, query]]
