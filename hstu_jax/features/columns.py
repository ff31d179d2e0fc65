"""Feature groups of the configuration -> columns of the store, as a batch holds them.

Here: which column a feature's name or `expression` stands for, and what was missing or unknown in
it. Not here: values to ids (`id_mapping.py`), and which events and users a batch takes from the
columns (`windows.py`, `packing.py`).
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped

from hstu_jax.config import feature_schema, schema
from hstu_jax.data import event_store, raw_columns
from hstu_jax.data.raw_columns import RawColumn
from hstu_jax.features import id_mapping

# Column name -> event or window column of an event store, by group. Histories and candidates may
# also read columns of items.parquet, under their sequence's name.
_STORE_COLUMNS: dict[str, dict[str, str]] = {
    "uih_action": {"uih_seq__action_weight": "action"},
    "uih_watchtime": {"uih_seq__watch_time": "watch_time_s"},
    "uih_timestamp": {"uih_seq__action_timestamp": "timestamp_s"},
    "query_time": {"request_time": "request_time_s"},
}
_STORE_HISTORY = {
    "uih_seq__video_id": "item_index",
    "uih_seq__action_weight": "action",
    "uih_seq__watch_time": "watch_time_s",
    "uih_seq__action_timestamp": "timestamp_s",
}
_STORE_SEQUENCES = {"uih": "uih_seq", "candidate": "cand_seq"}
_ITEM_ID = "video_id"  # of an event store: the item_index


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchColumns:
    """Columns by what a batch does with them; ids in range are views, nothing is copied.

    A feature's column holds ids (-1 = none), or float32 numbers of a raw feature without
    boundaries.

    Attributes:
        history: feature of the `uih` group -> value per event.
        action: bitmask per event, or None without a `uih_action` group.
        watch_time_s: seconds per event, or None without a `uih_watchtime` group.
        timestamp_s: Unix seconds per event.
        request_time_s: Unix seconds per window, or None without a `query_time` group (then the
            newest event is the anchor of a user's times).
        contextual: feature of the `contextual` group -> value, or several, per entry.
        contextual_entry: which entry of these a window has: its user's, or its own.
        candidate: feature of the `candidate` group -> value per item_index.
        notes: what was missing or unknown, a line a feature.
    """

    history: dict[str, Shaped[np.ndarray, "_"]]
    action: Int[np.ndarray, "_"] | None
    watch_time_s: Float[np.ndarray, "_"] | None
    timestamp_s: Int[np.ndarray, "_"]
    request_time_s: Int[np.ndarray, "_"] | None
    contextual: dict[str, Shaped[np.ndarray, "_ ..."]]
    contextual_entry: Int[np.ndarray, "_"]
    candidate: dict[str, Shaped[np.ndarray, "_"]]
    notes: tuple[str, ...] = ()


def resolve_columns(
    *,
    features: Mapping[str, schema.IdFeature],
    feature_groups: Mapping[str, tuple[str, ...]],
    store: event_store.EventStore,
    raw_features: Mapping[str, schema.RawFeature] | None = None,
) -> BatchColumns:
    """Finds every feature's column and turns its values into ids or numbers.

    Of an event store, `uih_seq__video_id` and `cand_seq__video_id` are the item_index, `user_id` is
    the user_index, other contextual features are the columns of that name in users.parquet, and
    other features of histories and candidates are columns of items.parquet. Of list columns, a
    history's feature is the rows' column of that name where they have one, and the item's
    otherwise; a candidate's feature is always the item's, so that negatives have it too.

    Args:
        features: id features.
        feature_groups: group name -> feature names, in order.
        store: where the columns are.
        raw_features: raw features.

    Raises:
        ValueError: a feature without a column (lists the known ones) or without an entry in
            `features`, or values that `id_mapping.map_column` refuses.
    """
    described = {**features, **(raw_features or {})}
    sources = _sources(store)
    notes: list[str] = []

    def column_name(name: str) -> str:
        feature = described.get(name)
        return feature_schema.column_of(name, feature.expression if feature else "")

    def read(group: str) -> dict[str, np.ndarray]:
        mapped = {}
        for name in feature_groups.get(group, ()):
            column = _find(group, name, column_name(name), sources[group], store)
            feature = _describe(described, name)
            if group == "contextual":  # elsewhere a position holds one value
                column = raw_columns.split_strings(column, feature.separator)
            result = id_mapping.map_column(column, feature, name=name)
            if result.has_notes:
                notes.append(
                    f"{name}: {result.num_missing:,} values missing and {result.num_unknown:,} "
                    f"unknown of {result.num_values:,}"
                )
            mapped[name] = result.values
        return mapped

    for group, known in _STORE_COLUMNS.items():
        if store.features.window is None:
            for name in feature_groups.get(group, ()):
                _check_known(group, name, column_name(name), known, store)
    is_per_window = store.features.window is not None
    num_windows = len(store.windows)
    events = store.events
    return BatchColumns(
        history=read("uih"),
        action=events.action if feature_groups.get("uih_action") else None,
        watch_time_s=events.watch_time_s if feature_groups.get("uih_watchtime") else None,
        timestamp_s=events.timestamp_s,
        request_time_s=store.windows.request_time_s if feature_groups.get("query_time") else None,
        contextual=read("contextual"),
        contextual_entry=np.arange(num_windows) if is_per_window else store.windows.user_index,
        candidate=read("candidate"),
        notes=tuple(notes),
    )


def _sources(store: event_store.EventStore) -> dict[str, dict[str, RawColumn]]:
    """Column name -> column, by group that features stand in."""
    extra = store.features
    if extra.window is not None:
        return {
            "contextual": dict(extra.window),
            "uih": dict(extra.event),
            "candidate": {},
        }
    users = {"user_id": RawColumn(values=np.arange(store.num_users, dtype=np.int32))}
    users |= {
        name: RawColumn(values=column) for name, column in store.users.items() if name != "user_id"
    }
    history = {
        name: RawColumn(values=getattr(store.events, column))
        for name, column in _STORE_HISTORY.items()
    }
    return {"contextual": {**users, **extra.user}, "uih": history, "candidate": {}}


def _find(
    group: str,
    name: str,
    column: str,
    source: Mapping[str, RawColumn],
    store: event_store.EventStore,
) -> RawColumn:
    """The raw column of a feature."""
    if column in source:
        return source[column]
    if group == "contextual":
        _check_known(group, name, column, source, store)
    items = dict(store.features.item)
    if store.features.window is None:
        items[_ITEM_ID] = RawColumn(values=np.arange(store.num_items, dtype=np.int32))
    sequence, _, bare = column.partition(feature_schema.SEQUENCE_SEPARATOR)
    expected = sequence if store.features.window is not None else _STORE_SEQUENCES[group]
    known = {*source, *(f"{expected}{feature_schema.SEQUENCE_SEPARATOR}{item}" for item in items)}
    _check_known(group, name, column, known, store)
    return items[bare] if group == "candidate" else items[bare].take(store.events.item_index)


def _check_known(
    group: str, name: str, column: str, known: Iterable[str], store: event_store.EventStore
) -> None:
    known = sorted(known)
    if column in known:
        return
    near = difflib.get_close_matches(column, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    reads = "" if column == name else f" (which reads {column!r})"
    where = "the event store" if store.features.window is None else "the list columns"
    raise ValueError(
        f"feature_groups.{group}={name!r}{reads}: no such column in {where}; "
        f"{hint}known are {known}."
    )


def _describe(
    described: Mapping[str, schema.IdFeature | schema.RawFeature], name: str
) -> schema.IdFeature | schema.RawFeature:
    if name not in described:
        raise ValueError(
            f"features.{name}: missing; an id feature needs num_buckets and embedding_dim "
            f"(given are {sorted(described)})."
        )
    return described[name]
