"""The files of a `HardNegativeSampler` -> weights by item_index and hard edges by user_index.

Ids in these files are original ones: `item_id` of items.parquet, and the values of
`user_id_field` in users.parquet. Here: what they stand for, and what becomes of ids that the event
store does not have. Not here: reading lines (`hstu_jax.data.sampler_files`) and drawing
(`hard_negatives.py`, the next file on the path).
"""

import dataclasses
import pathlib

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from hstu_jax.config import sampler_schema
from hstu_jax.data import event_store, sampler_files

_SECTION = "data.negative_sampler"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardEdges:
    """The hard-edge table, by user.

    Attributes:
        start: per user_index, its first place in `item_index`.
        count: per user_index, how many edges it has.
        item_index: items of all edges, one user id after the other, each in the file's order.
        num_lines: lines of the file.
        num_dropped: lines whose user or item is not in the store (or not in the user or item
            table); they are left out.
    """

    start: Int[np.ndarray, "users"]
    count: Int[np.ndarray, "users"]
    item_index: Int[np.ndarray, "edges"]
    num_lines: int
    num_dropped: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemTable:
    """The item table, by item.

    Attributes:
        weight: per item_index; 0 for items that the table lacks.
        is_listed: items that have a line.
    """

    weight: Float[np.ndarray, "N"]
    is_listed: Bool[np.ndarray, "N"]


def read_item_table(
    config: sampler_schema.NegativeSamplerConfig, store: event_store.EventStore
) -> ItemTable:
    """Weights of the items of `item_input_path`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken lines, an id twice, too many unknown ids, or an `attrs` that does not
            hold the `attr_fields`, the item's own id among them.
    """
    path = _existing(config, "item_input_path")
    table = _read(config, path, sampler_files.ITEM_COLUMNS)
    ids = table["id"]
    is_repeat = np.ones(len(ids), dtype=bool)
    is_repeat[np.unique(ids, return_index=True)[1]] = False
    _refuse(is_repeat, ids, path, "id", "on an earlier line already")
    if config.attr_fields:
        _check_attributes(table["attrs"], ids, config, path)
    index = index_of(ids, store.items.item_id)
    _check_unknown(config, index < 0, ids, path, f"no item_id of {store.path}/items.parquet")
    known = index >= 0
    weight = np.zeros(store.num_items)
    is_listed = np.zeros(store.num_items, dtype=bool)
    weight[index[known]] = table["weight"][known]
    is_listed[index[known]] = True
    return ItemTable(weight=weight, is_listed=is_listed)


def read_hard_edges(
    config: sampler_schema.NegativeSamplerConfig,
    store: event_store.EventStore,
    *,
    is_listed_item: Bool[np.ndarray, "N"] | None,
) -> HardEdges:
    """The edges of `hard_neg_edge_input_path` between known users and items.

    Users of equal `user_id_field` share their edges. Edges given twice are kept twice, as in the
    reference; the edges' weights have no use there either.

    Args:
        config: the sampler's section.
        store: where the ids are.
        is_listed_item: items that may be hard negatives; None = all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken lines, too many unknown ids, or `user_id_field` is no integer column.
    """
    user_keys = _user_keys(config, store)
    path = _existing(config, "hard_neg_edge_input_path")
    table = _read(config, path, sampler_files.EDGE_COLUMNS)
    allowed = np.unique(user_keys)
    if config.user_input_path:
        user_path = _existing(config, "user_input_path")
        listed = _read(config, user_path, sampler_files.USER_COLUMNS)["id"]
        is_unknown = ~np.isin(listed, allowed)
        _check_unknown(config, is_unknown, listed, user_path, _no_user(config, store))
        allowed = np.intersect1d(allowed, listed)
    no_user = ~np.isin(table["userid"], allowed)
    listed_only = f" or not in {config.user_input_path}" if config.user_input_path else ""
    rule = _no_user(config, store) + listed_only
    _check_unknown(config, no_user, table["userid"], path, rule, column="userid")
    index = index_of(table["itemid"], store.items.item_id)
    no_item = index < 0
    if is_listed_item is not None:
        no_item |= ~is_listed_item[np.maximum(index, 0)]
    listed_only = f" or not in {config.item_input_path}" if config.item_input_path else ""
    rule = f"no item_id of {store.path}/items.parquet{listed_only}"
    _check_unknown(config, no_item, table["itemid"], path, rule, column="itemid")

    is_known = ~no_user & ~no_item
    keys = table["userid"][is_known]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    start = np.searchsorted(keys, user_keys, side="left")
    return HardEdges(
        start=start,
        count=np.searchsorted(keys, user_keys, side="right") - start,
        item_index=index[is_known][order].astype(np.int32),
        num_lines=len(is_known),
        num_dropped=int(np.count_nonzero(~is_known)),
    )


def index_of(ids: Int[np.ndarray, "n"], known: Int[np.ndarray, "N"]) -> Int[np.ndarray, "n"]:
    """Place of each id in `known` (any order, no repeats), -1 where it is not there."""
    order = np.argsort(known, kind="stable")
    place = np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)
    found = order[place]
    return np.where(known[found] == ids, found, -1)


def _read(config, path, columns) -> dict[str, Shaped[np.ndarray, "_"]]:
    return sampler_files.read_columns(path, columns, delimiter=config.field_delimiter)


def _existing(config: sampler_schema.NegativeSamplerConfig, field: str) -> pathlib.Path:
    path = pathlib.Path(getattr(config, field))
    if not path.is_file():
        raise FileNotFoundError(
            f"{_SECTION}.{field}={str(path)!r}: no such file; make it with "
            "`python -m hstu_jax.prepare hard_negatives --store ...`."
        )
    return path


def _user_keys(
    config: sampler_schema.NegativeSamplerConfig, store: event_store.EventStore
) -> Int[np.ndarray, "users"]:
    known = sorted(store.users)
    if config.user_id_field not in known:
        raise ValueError(
            f"{_SECTION}.user_id_field={config.user_id_field!r}: no such column in "
            f"{store.path}/users.parquet; known are {known}."
        )
    return store.users[config.user_id_field].astype(np.int64)


def _no_user(config: sampler_schema.NegativeSamplerConfig, store: event_store.EventStore) -> str:
    return f"no {config.user_id_field} of {store.path}/users.parquet"


def _check_attributes(
    attrs: Shaped[np.ndarray, "_"],
    ids: Int[np.ndarray, "_"],
    config: sampler_schema.NegativeSamplerConfig,
    path: pathlib.Path,
) -> None:
    """An item's features are columns of the event store; `attrs` must not say something else."""
    place = config.attr_fields.index(config.item_id_field.split("__")[-1])
    values = [str(text).split(config.attr_delimiter) for text in attrs.tolist()]
    counts = np.array([len(value) for value in values])
    rule = (
        f"must hold {len(config.attr_fields)} values joined by "
        f"{config.attr_delimiter!r}: {', '.join(config.attr_fields)}"
    )
    _refuse(counts != len(config.attr_fields), attrs, path, "attrs", rule)
    own = np.array([value[place] for value in values], dtype=object)
    differs = own != np.array([str(number) for number in ids.tolist()], dtype=object)
    rule = f"its {config.attr_fields[place]} must be the line's id"
    _refuse(differs, attrs, path, "attrs", rule)


def _check_unknown(
    config: sampler_schema.NegativeSamplerConfig,
    is_unknown: Bool[np.ndarray, "_"],
    ids: Int[np.ndarray, "_"],
    path: pathlib.Path,
    rule: str,
    *,
    column: str = "id",
) -> None:
    count = int(np.count_nonzero(is_unknown))
    if count > config.max_unknown_share * len(ids):
        at = int(np.argmax(is_unknown))
        raise ValueError(
            f"{path} entry {at + 1}: {column}={ids[at]}: {rule} ({count} of {len(ids)} entries, "
            f"more than {_SECTION}.max_unknown_share={config.max_unknown_share}); ids are the "
            "original ones, not dense indices."
        )


def _refuse(
    bad: Bool[np.ndarray, "_"],
    values: Shaped[np.ndarray, "_"],
    path: pathlib.Path,
    column: str,
    rule: str,
) -> None:
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(
            f"{path} entry {at + 1}: {column}={values[at : at + 1].tolist()[0]!r}: {rule} "
            f"({int(bad.sum())} such entries in all)."
        )
