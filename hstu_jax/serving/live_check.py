"""Is an opened folder the live model? Invented rows through both, before an export is finished.

The live side takes the training's own path: `features.id_mapping`, the rows of the tables, numpy's
block schedule, the model with its parameters. Only the exporter reads this file. The rows are from
`invented_rows.py`.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Float

from hstu_jax.config.feature_schema import IdFeature
from hstu_jax.data import list_layout, raw_columns
from hstu_jax.features import ages, id_mapping, next_item, sequence_rules, time_phases
from hstu_jax.features import batch as batch_lib
from hstu_jax.model import feature_lookup
from hstu_jax.serving import artifact, invented_rows, lowering, trained
from hstu_jax.serving import manifest as manifest_lib
from hstu_jax.tables import spec as table_spec
from pallas_kernels.hstu_attention import layout as attention_layout

_TOLERANCE = 1e-5  # of vectors that have length 1, or of a larger one's length


@dataclasses.dataclass(frozen=True)
class Differences:
    """Largest absolute difference of each tower's vectors, and how many were compared."""

    users: float
    items: float
    num_users: int
    num_items: int

    def line(self) -> str:
        """For the screen."""
        return (
            f"{self.num_users} invented users and {self.num_items} items with the live model: "
            f"largest difference {self.users:.1e} and {self.items:.1e}"
        )


def compare(model: trained.Trained, opened: artifact.Artifact) -> Differences:
    """Compares the vectors of invented rows.

    Raises:
        ValueError: they differ.
    """
    invent = invented_rows.Inventor(model, opened)
    users, items = invent.users(), invent.items()
    live_users = user_vectors(
        model,
        opened.manifest,
        invent.in_ids_of_the_model(users),
        item_values=invent.item_values(users),
    )
    live_items = item_vectors(model, opened.manifest, invent.in_ids_of_the_model(items))
    pairs = {
        "user": (opened.embed_users(invented_rows.as_inputs(users, opened.manifest)), live_users),
        "item": (opened.embed_items(items), live_items),
    }
    for name in opened.counts:
        opened.counts[name] = 0
    found = {}
    for tower, (exported, live) in pairs.items():
        found[tower] = float(np.max(np.abs(exported - live), initial=0.0))
        limit = _TOLERANCE * max(1.0, float(np.max(np.abs(live), initial=0.0)))
        if not found[tower] <= limit:
            raise ValueError(
                f"the exported {tower} tower differs from the live model by {found[tower]:.1e}, "
                f"more than {limit:.1e}; this is a defect of the export: please report it."
            )
    return Differences(found["user"], found["item"], *map(len, (live_users, live_items)))


def user_vectors(
    model: trained.Trained,
    manifest: manifest_lib.Manifest,
    columns: Mapping[str, pa.Array],
    *,
    item_values: Mapping[str, np.ndarray],
) -> Float[np.ndarray, "n E"]:
    """The live model's vectors of rows whose histories the model reads whole, oldest first.

    Args:
        model: the live model.
        manifest: says what the columns are for.
        columns: as lists, in the ids of the model.
        item_values: features that histories look up by item -> value of every event.
    """
    config, history = model.config, manifest.history
    num_contextual, groups = config.num_contextual, config.feature_groups
    lengths = columns[history.items].value_lengths().to_numpy(zero_copy_only=False)
    num_users, longest = len(lengths), max(int(lengths.max()), 1) + num_contextual
    rule = sequence_rules.mask_rule(
        config.model.user_tower.hstu.stu,
        num_contextual=num_contextual,
        objective=config.model.objective,
    )
    layout = attention_layout.from_lengths(
        (lengths + num_contextual).astype(np.int32),
        row_len=longest,
        block_len=config.data.block_len,
        rule=rule,
    )
    place = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    slots = np.repeat(np.arange(num_users) * longest + num_contextual, lengths) + place

    def spread(values: np.ndarray) -> np.ndarray:
        dtype = np.float32 if values.dtype.kind == "f" else np.int32
        filled = np.zeros(num_users * longest, dtype)
        filled[slots] = values
        return filled.reshape(1, num_users, longest)

    def event_values(column: str | None) -> np.ndarray:
        if column is None:
            return np.zeros(len(slots), np.int32)
        return columns[column].flatten().to_numpy(zero_copy_only=False)

    time = event_values(history.timestamp).astype(np.int64)
    newest = np.zeros(num_users, np.int64)
    newest[lengths > 0] = time[(np.cumsum(lengths) - 1)[lengths > 0]]
    anchor = newest
    if history.request_time is not None:
        anchor = columns[history.request_time].to_numpy(zero_copy_only=False).astype(np.int64)
    gap = spread((np.repeat(anchor, lengths) - time).astype(np.float32))
    gap[0, :, :num_contextual] = anchor[:, None]
    step_gap, step_time = None, next_item.step_time(config)
    if step_time is not None:
        step_gap = spread(next_item.step_gaps(time, lengths, anchor, kind=step_time))
        step_gap[0, :, :num_contextual] = next_item.NO_GAP_S
    one = np.zeros((1, 1), np.float32)
    candidate = {name: np.zeros((1, 1), np.int32) for name in groups["candidate"]}
    for name in groups["candidate"]:
        if not config.all_features[name].has_table:
            candidate[name] = np.zeros((1, 1), np.float32)
    batch = batch_lib.Batch(
        segment_starts=layout.starts[None],
        segment_lengths=layout.lengths[None],
        block_pairs=layout.block_pairs,
        num_block_pairs=layout.num_block_pairs,
        history={
            name: spread(
                item_values[name]
                if name in item_values
                else _mapped(config, name, columns[config.column(name)].flatten())
            )
            for name in groups["uih"]
        },
        action=spread(event_values(history.action).astype(np.int32)),
        watch_time_s=spread(event_values(history.watch_time).astype(np.float32)),
        time_gap_s=gap,
        step_gap_s=step_gap,
        age_s=spread(ages.ages(np.repeat(anchor, lengths), time)),
        last_phase=time_phases.time_phases(newest, history.periods)[None],
        contextual={
            name: _mapped(config, name, columns[config.column(name)], is_contextual=True)[None]
            for name in groups.get("contextual", ())
        },
        user_index=np.arange(num_users, dtype=np.int32)[None],
        user_mask=np.ones((1, num_users), bool),
        sample_weight=np.ones((1, num_users), np.float32),
        positive=candidate,
        positive_user=np.zeros((1, 1), np.int32),
        query_mask=np.zeros((1, 1), bool),
        positive_log_q=one,
        negative=candidate,
        negative_log_q=one,
        hard_negative={n: np.zeros((1, num_users, 0), np.int32) for n in groups["candidate"]},
        hard_negative_mask=np.zeros((1, num_users, 0), bool),
        hard_negative_log_q=np.zeros((1, num_users, 0), np.float32),
        block_len=layout.block_len,
        tail=_tail(config, layout, rule),
    )
    batch = jax.tree.map(jnp.asarray, batch)
    plan = feature_lookup.make_plan(config)
    towers = lowering.TowerFunctions(config, "xla").model

    @jax.jit
    def run(variables, weights, batch):
        vectors = _rows(model.specs, weights, feature_lookup.batch_ids(plan, batch))
        lookups = feature_lookup.to_lookups(plan, batch, vectors)
        return towers.apply(variables, lookups.history, lookups.contextual, batch, method="user")

    return np.asarray(run(model.variables, dict(model.weights), batch)[0])


def item_vectors(
    model: trained.Trained, manifest: manifest_lib.Manifest, columns: Mapping[str, pa.Array]
) -> Float[np.ndarray, "n E"]:
    """The live model's vectors of items."""
    config = model.config
    values = {
        name: jnp.asarray(
            _mapped(config, name, columns[list_layout.bare_name(config.column(name))])
        )
        for name in config.feature_groups["candidate"]
    }
    num_items = len(columns[manifest.item_id_column])
    plan = feature_lookup.make_plan(config)
    towers = lowering.TowerFunctions(config, "xla").model

    @jax.jit
    def run(variables, weights, values):
        ids = feature_lookup.item_ids(plan, values, jnp.ones(num_items, bool))
        embedding = feature_lookup.to_item_inputs(plan, _rows(model.specs, weights, ids), values)
        return towers.apply(variables, embedding, method="item")

    return np.asarray(run(model.variables, dict(model.weights), values))


def _rows(specs, weights, table_ids) -> dict[str, jax.Array]:
    """A vector for every occurrence; zeros where there is no id."""
    specs = {spec.name: spec for spec in specs}
    return {
        table: weights[table]
        .at[table_spec.rows_of(specs[table], each.ids, each.valid)]
        .get(mode="fill", fill_value=0.0)
        for table, each in table_ids.items()
    }


def _mapped(config, name: str, column: pa.Array, *, is_contextual: bool = False) -> np.ndarray:
    feature = config.all_features[name]
    raw = raw_columns.from_arrow(column, where=name)
    if is_contextual:
        raw = raw_columns.split_strings(raw, feature.separator)
    if isinstance(feature, IdFeature) and not feature.hash_bucket_size:
        feature = dataclasses.replace(feature, max_unknown_share=1.0)
    values = id_mapping.map_column(raw, feature, name=name).values
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int32)


def _tail(config, layout, rule) -> batch_lib.Tail | None:
    tail_len = sequence_rules.tail_len(config.model.user_tower)
    if not tail_len:
        return None
    row_len = int(layout.lengths.sum())
    return sequence_rules.plan_tail(
        layout.lengths[None],
        num_contextual=config.num_contextual,
        tail_len=tail_len,
        row_len=row_len,
        block_len=min(config.data.block_len, row_len),
        max_pairs=attention_layout.max_block_pairs(1, row_len, config.data.block_len),
        rule=rule,
    )
