"""Feature groups of the configuration -> columns of the event store.

Here: which column a feature name stands for, and the check that ids fit their table. Not here:
which events and users a batch takes from the columns (`windows.py`, `packing.py`).
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float, Int

from hstu_jax.config import schema
from hstu_jax.data import event_store

# Feature name -> event or window column, for each group that has a fixed set of features.
_KNOWN_FEATURES: dict[str, dict[str, str]] = {
    "uih": {"uih_seq__video_id": "item_index"},
    "candidate": {"cand_seq__video_id": "item_index"},
    "uih_action": {"uih_seq__action_weight": "action"},
    "uih_watchtime": {"uih_seq__watch_time": "watch_time_s"},
    "uih_timestamp": {"uih_seq__action_timestamp": "timestamp_s"},
    "query_time": {"request_time": "request_time_s"},
}
_CHECK_BLOCK = 4_000_000  # ids checked at a time: a column may be larger than memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchColumns:
    """Store columns by what a batch does with them; views, nothing is copied.

    Attributes:
        history: id feature of the `uih` group -> value per event.
        action: bitmask per event, or None without a `uih_action` group.
        watch_time_s: seconds per event, or None without a `uih_watchtime` group.
        timestamp_s: Unix seconds per event.
        request_time_s: Unix seconds per window, or None without a `query_time` group (then the
            newest event is the anchor of a user's times).
        contextual: id feature of the `contextual` group -> value per user.
        candidate: id features of the `candidate` group; each is the item_index itself.
    """

    history: dict[str, np.ndarray]
    action: Int[np.ndarray, "_"] | None
    watch_time_s: Float[np.ndarray, "_"] | None
    timestamp_s: Int[np.ndarray, "_"]
    request_time_s: Int[np.ndarray, "_"] | None
    contextual: dict[str, np.ndarray]
    candidate: tuple[str, ...]


def resolve_columns(
    *,
    features: Mapping[str, schema.IdFeature],
    feature_groups: Mapping[str, tuple[str, ...]],
    store: event_store.EventStore,
) -> BatchColumns:
    """Finds every feature's column and checks its ids against the table's size.

    `user_id` is the dense user_index; other contextual features are the columns of that name in
    users.parquet.

    Args:
        features: sizes of the id features.
        feature_groups: group name -> feature names, in order.
        store: where the columns are.

    Raises:
        ValueError: a feature without a column (lists the known ones), an id feature without an
            entry in `features`, or ids outside 0..num_buckets-1 (feature, first value, count).
    """
    events = store.events
    for group, known in _KNOWN_FEATURES.items():
        _check_known(group, feature_groups.get(group, ()), known)
    users = {"user_id": np.arange(store.num_users, dtype=np.int32)}
    users |= {name: column for name, column in store.users.items() if name != "user_id"}
    contextual_names = feature_groups.get("contextual", ())
    _check_known("contextual", contextual_names, users)
    contextual = {name: users[name] for name in contextual_names}
    uih_names = feature_groups.get("uih", ())
    history = {name: getattr(events, _KNOWN_FEATURES["uih"][name]) for name in uih_names}
    for name, values in (contextual | history).items():
        check_ids(values, feature=name, num_buckets=_num_buckets(features, name))
    candidate = tuple(feature_groups.get("candidate", ()))
    for name in candidate:
        last = np.array([store.num_items - 1], dtype=np.int64)
        check_ids(last, feature=name, num_buckets=_num_buckets(features, name))
    return BatchColumns(
        history=history,
        action=events.action if feature_groups.get("uih_action") else None,
        watch_time_s=events.watch_time_s if feature_groups.get("uih_watchtime") else None,
        timestamp_s=events.timestamp_s,
        request_time_s=store.windows.request_time_s if feature_groups.get("query_time") else None,
        contextual=contextual,
        candidate=candidate,
    )


def check_ids(values: Int[np.ndarray, "_"], *, feature: str, num_buckets: int) -> None:
    """Checks that every id has a row in its table.

    Args:
        values: the ids.
        feature: name shown in the message.
        num_buckets: rows of the table.

    Raises:
        ValueError: an id is negative or not below `num_buckets`.
    """
    first, count, largest = None, 0, 0
    for start in range(0, len(values), _CHECK_BLOCK):
        block = values[start : start + _CHECK_BLOCK]
        if block.min() >= 0 and block.max() < num_buckets:
            continue
        bad = (block < 0) | (block >= num_buckets)
        if first is None:
            first = int(block[np.argmax(bad)])
        count += int(bad.sum())
        largest = max(largest, int(block.max()))
    if first is None:
        return
    advice = f"set it to at least {largest + 1}" if largest >= num_buckets else "prepare again"
    raise ValueError(
        f"features.{feature}.num_buckets={num_buckets}: id {first} is outside 0..{num_buckets - 1} "
        f"({count} such values in all); {advice}."
    )


def _check_known(group: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"feature_groups.{group}={name!r}: no such column in the event store; "
                f"{hint}known are {known}."
            )


def _num_buckets(features: Mapping[str, schema.IdFeature], name: str) -> int:
    if name not in features:
        raise ValueError(
            f"features.{name}: missing; an id feature needs num_buckets and embedding_dim "
            f"(given are {sorted(features)})."
        )
    return features[name].num_buckets
