"""Which ids of a batch go to which embedding table, and back: vectors to the model's inputs.

The tables themselves live outside the model (`hstu_jax.tables`); whoever holds them (the training
step, evaluation, an exported artefact) asks here for the ids, looks them up in one go per table,
and hands the vectors back. Next on the path: `match.py`.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hstu_jax.config import schema
from hstu_jax.features import batch as batch_lib
from hstu_jax.model import lookups as lookups_lib
from pallas_kernels.hstu_attention import layout as attention_layout

Lookups = lookups_lib.Lookups


@dataclasses.dataclass(frozen=True)
class LookupPlan:
    """Static: the id features of each group, in group order, with their tables.

    Attributes:
        history: (feature, table) of the group `uih`.
        contextual: (feature, table) of the group `contextual`; each feature is one token.
        candidate: (feature, table) of the group `candidate`.
    """

    history: tuple[tuple[str, str], ...]
    contextual: tuple[tuple[str, str], ...]
    candidate: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class TableIds:
    """The occurrences of one table's ids: `ids` are looked up where `valid`."""

    ids: Int[Array, "n"]
    valid: Bool[Array, "n"]


def make_plan(config: schema.Config) -> LookupPlan:
    """The plan of a configuration."""
    tables = config.embedding_names

    def uses(group: str) -> tuple[tuple[str, str], ...]:
        return tuple((name, tables[name]) for name in config.feature_groups.get(group, ()))

    return LookupPlan(uses("uih"), uses("contextual"), uses("candidate"))


def history_mask(batch: batch_lib.Batch, *, contextual_len: int) -> Bool[Array, "G R L"]:
    """Slots that hold a history item: inside a segment, behind its contextual slots."""
    layout = batch.sequence_layout()
    is_used = attention_layout.token_segments(layout) >= 0
    is_history = is_used & (attention_layout.token_positions(layout) >= contextual_len)
    return is_history.reshape(batch.time_gap_s.shape)


def batch_ids(plan: LookupPlan, batch: batch_lib.Batch) -> dict[str, TableIds]:
    """Every id of the batch, by table, in the order that `to_lookups` expects."""
    history = history_mask(batch, contextual_len=len(plan.contextual))
    parts = [(table, batch.history[name], history) for name, table in plan.history]
    parts += [(table, batch.contextual[name], batch.user_mask) for name, table in plan.contextual]
    parts += [(table, batch.positive[name], batch.query_mask) for name, table in plan.candidate]
    parts += [
        (table, batch.negative[name], jnp.ones(batch.negative[name].shape, bool))
        for name, table in plan.candidate
    ]
    parts += [
        (table, batch.hard_negative[name], batch.hard_negative_mask)
        for name, table in plan.candidate
    ]
    return _by_table(parts)


def item_ids(
    plan: LookupPlan, items: Mapping[str, Int[Array, "N"]], valid: Bool[Array, "N"]
) -> dict[str, TableIds]:
    """The ids that the item tower alone needs: one item per entry."""
    return _by_table([(table, items[name], valid) for name, table in plan.candidate])


def to_lookups(
    plan: LookupPlan, batch: batch_lib.Batch, vectors: Mapping[str, Float[Array, "n _"]]
) -> Lookups:
    """The model's inputs from the vectors of `batch_ids`."""
    take = _Taker(vectors)
    history = take.group(plan.history, batch.time_gap_s.shape)
    contextual = take.tokens(plan.contextual, batch.user_mask.shape)
    positive = take.group(plan.candidate, batch.query_mask.shape)
    negative = take.group(plan.candidate, batch.negative_log_q.shape)
    hard_negative = take.group(plan.candidate, batch.hard_negative_mask.shape)
    return Lookups(
        history=history,
        contextual=contextual,
        positive=positive,
        negative=negative,
        hard_negative=hard_negative,
    )


def to_item_inputs(
    plan: LookupPlan, vectors: Mapping[str, Float[Array, "n _"]], *, num_items: int
) -> Float[Array, "N F"]:
    """The item tower's input from the vectors of `item_ids`."""
    return _Taker(vectors).group(plan.candidate, (num_items,))


def _by_table(parts: list[tuple[str, jax.Array, jax.Array]]) -> dict[str, TableIds]:
    grouped: dict[str, list] = {}
    for table, ids, valid in parts:
        grouped.setdefault(table, []).append((ids.reshape(-1), valid.reshape(-1)))
    return {
        table: TableIds(*(jnp.concatenate(column) for column in zip(*uses, strict=True)))
        for table, uses in grouped.items()
    }


class _Taker:
    """Cuts each table's vectors into its uses, in the order in which their ids were listed."""

    def __init__(self, vectors: Mapping[str, jax.Array]):
        self._vectors = vectors
        self._taken = dict.fromkeys(vectors, 0)

    def _take(self, table: str, shape: tuple[int, ...]) -> jax.Array:
        start, size = self._taken[table], 1
        for length in shape:
            size *= length
        self._taken[table] = start + size
        vectors = self._vectors[table]
        return vectors[start : start + size].reshape(*shape, vectors.shape[-1])

    def group(self, uses: tuple[tuple[str, str], ...], shape: tuple[int, ...]) -> jax.Array:
        """Features of a group side by side on the last axis."""
        return jnp.concatenate([self._take(table, shape) for _, table in uses], axis=-1)

    def tokens(self, uses: tuple[tuple[str, str], ...], shape: tuple[int, ...]) -> jax.Array:
        """Features of a group as tokens: [*shape, C, Cf]."""
        if not uses:
            return jnp.zeros((*shape, 0, 0), jnp.float32)
        return jnp.stack([self._take(table, shape) for _, table in uses], axis=-2)
