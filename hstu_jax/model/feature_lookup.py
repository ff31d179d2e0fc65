"""Which ids of a batch go to which embedding table, and back: vectors to the model's inputs.

The tables themselves live outside the model (`hstu_jax.tables`); whoever holds them (the training
step, evaluation, an exported artefact) asks here for the ids, looks them up in one go per table,
and hands the vectors back. Next on the path: `match.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from hstu_jax.config import schema
from hstu_jax.features import batch as batch_lib
from hstu_jax.model import lookups as lookups_lib
from pallas_kernels.hstu_attention import layout as attention_layout

Lookups = lookups_lib.Lookups


@dataclasses.dataclass(frozen=True)
class Use:
    """A feature of a group.

    Attributes:
        feature: its name.
        table: where its ids are looked up; None = the batch holds the numbers themselves.
        pooling: of several values.
    """

    feature: str
    table: str | None
    pooling: Literal["sum", "mean"] = "sum"


@dataclasses.dataclass(frozen=True)
class LookupPlan:
    """Static: the features of each group, in group order, with their tables.

    Attributes:
        history: of the group `uih`.
        contextual: of the group `contextual`; each feature is one token.
        candidate: of the group `candidate`.
    """

    history: tuple[Use, ...]
    contextual: tuple[Use, ...]
    candidate: tuple[Use, ...]


@dataclasses.dataclass(frozen=True)
class TableIds:
    """The occurrences of one table's ids: `ids` are looked up where `valid`."""

    ids: Int[Array, "n"]
    valid: Bool[Array, "n"]


def make_plan(config: schema.Config) -> LookupPlan:
    """The plan of a configuration."""
    tables = config.embedding_names

    def uses(group: str) -> tuple[Use, ...]:
        names = config.feature_groups.get(group, ())
        poolings = {name: feature.pooling for name, feature in config.features.items()}
        return tuple(Use(n, tables.get(n), poolings.get(n, "sum")) for n in names)

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
    parts = [(use, batch.history[use.feature], history) for use in plan.history]
    parts += [(use, batch.contextual[use.feature], batch.user_mask) for use in plan.contextual]
    parts += [(use, batch.positive[use.feature], batch.query_mask) for use in plan.candidate]
    every_negative = jnp.ones(batch.negative_log_q.shape, bool)
    parts += [(use, batch.negative[use.feature], every_negative) for use in plan.candidate]
    parts += [
        (use, batch.hard_negative[use.feature], batch.hard_negative_mask) for use in plan.candidate
    ]
    return _by_table(parts)


def item_ids(
    plan: LookupPlan, items: Mapping[str, Num[Array, "N"]], valid: Bool[Array, "N"]
) -> dict[str, TableIds]:
    """The ids that the item tower alone needs: one item per entry."""
    return _by_table([(use, items[use.feature], valid) for use in plan.candidate])


def to_lookups(
    plan: LookupPlan, batch: batch_lib.Batch, vectors: Mapping[str, Float[Array, "n _"]]
) -> Lookups:
    """The model's inputs from the vectors of `batch_ids`."""
    take = _Taker(vectors)
    return Lookups(
        history=take.group(plan.history, batch.history),
        contextual=take.tokens(plan.contextual, batch.contextual, batch.user_mask.shape),
        positive=take.group(plan.candidate, batch.positive),
        negative=take.group(plan.candidate, batch.negative),
        hard_negative=take.group(plan.candidate, batch.hard_negative),
    )


def to_item_inputs(
    plan: LookupPlan,
    vectors: Mapping[str, Float[Array, "n _"]],
    items: Mapping[str, Num[Array, "N"]],
) -> Float[Array, "N F"]:
    """The item tower's input from the vectors of `item_ids` and the items themselves."""
    return _Taker(vectors).group(plan.candidate, items)


def _by_table(parts: list[tuple[Use, jax.Array, jax.Array]]) -> dict[str, TableIds]:
    """Occurrences by table; an id of -1 (no id) counts as a slot that holds nothing."""
    grouped: dict[str, list] = {}
    for use, ids, valid in parts:
        # An empty part adds nothing, and on two devices XLA of jax 0.11 crashes on it.
        if use.table is None or ids.size == 0:
            continue
        valid = valid.reshape(*valid.shape, *(1,) * (ids.ndim - valid.ndim))
        valid = jnp.broadcast_to(valid, ids.shape) & (ids >= 0)
        grouped.setdefault(use.table, []).append((ids.reshape(-1), valid.reshape(-1)))
    return {
        table: TableIds(*(jnp.concatenate(column) for column in zip(*uses, strict=True)))
        for table, uses in grouped.items()
    }


class _Taker:
    """Cuts each table's vectors into its uses, in the order in which their ids were listed."""

    def __init__(self, vectors: Mapping[str, jax.Array]):
        self._vectors = vectors
        self._taken = dict.fromkeys(vectors, 0)

    def _take(self, use: Use, values: jax.Array, num_axes: int) -> jax.Array:
        """[*slots, width] of a feature's `values` [*slots] or [*slots, V]; `num_axes` of slots."""
        if use.table is None:
            return values[..., None] if values.ndim == num_axes else values
        start, size = self._taken[use.table], values.size
        self._taken[use.table] = start + size
        vectors = self._vectors[use.table]
        vectors = vectors[start : start + size].reshape(*values.shape, vectors.shape[-1])
        return vectors if values.ndim == num_axes else _pool(vectors, values >= 0, use.pooling)

    def group(self, uses: tuple[Use, ...], values: Mapping[str, jax.Array]) -> jax.Array:
        """Features of a group side by side on the last axis."""
        taken = [self._take(use, values[use.feature], values[use.feature].ndim) for use in uses]
        return jnp.concatenate(taken, axis=-1)

    def tokens(
        self, uses: tuple[Use, ...], values: Mapping[str, jax.Array], shape: tuple[int, ...]
    ) -> jax.Array:
        """Features of a group as tokens: [*shape, C, Cf]."""
        if not uses:
            return jnp.zeros((*shape, 0, 0), jnp.float32)
        taken = [self._take(use, values[use.feature], len(shape)) for use in uses]
        return jnp.stack(taken, axis=-2)


def _pool(
    vectors: Float[Array, "*slots V F"], is_value: Bool[Array, "*slots V"], pooling: str
) -> Float[Array, "*slots F"]:
    """Sum over the values that are there, or their mean; zeros where there is none."""
    total = jnp.sum(jnp.where(is_value[..., None], vectors, 0.0), axis=-2)
    if pooling == "sum":
        return total
    return total / jnp.maximum(jnp.sum(is_value, axis=-1, dtype=total.dtype), 1.0)[..., None]
