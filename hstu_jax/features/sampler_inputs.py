"""The files of a `HardNegativeSampler` -> weights by item_index and hard edges by user.

Ids in these files are the user's own. Of an event store: `item_id` of items.parquet, and the values
of the column `user_id_field` of users.parquet. Of list columns: the items' ids in the rows, and the
values of the rows' column `user_id_field`. They are strings where that column holds strings. Here:
what they stand for, and what becomes of ids that the data does not have. Not here: reading lines
(`hstu_jax.data.sampler_files`) and drawing (`hard_negatives.py`, the next file on the path).
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Shaped

from hstu_jax.config import sampler_schema
from hstu_jax.data import event_store, raw_columns, refusal, sampler_files
from hstu_jax.features import id_mapping

_SECTION = "data.negative_sampler"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardEdges:
    """The hard-edge table, a list of items for each user.

    Attributes:
        start: first place in `item_index` of each list.
        count: how many edges each list has.
        item_index: items of all edges, one user id after the other, each in the file's order.
        list_of_window: which list a window has: of an event store its user_index, of list columns
            the place of its user id, a row without one having the last list, which is empty.
        number_of_window: number of the window's user, on which random choices depend: the
            user_index, or of list columns the user's id, hashed if it is a string.
        num_lines: lines of the file.
        num_dropped: lines whose user or item is not in the store (or not in the user or item
            table); they are left out.
    """

    start: Int[np.ndarray, "lists"]
    count: Int[np.ndarray, "lists"]
    item_index: Int[np.ndarray, "edges"]
    list_of_window: Int[np.ndarray, "windows"]
    number_of_window: Integer[np.ndarray, "windows"]
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
    known_items = _item_ids(store)
    table = read_table(
        path, sampler_files.ITEM_COLUMNS, delimiter=config.field_delimiter, id=known_items
    )
    ids = table["id"]
    _refuse(is_repeat(ids), ids, path, "id", "on an earlier line already")
    if config.attr_fields:
        _check_attributes(table["attrs"], ids, config, path)
    index = index_of(ids, known_items)
    _check_unknown(config, index < 0, ids, path, _no_item(store))
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
        ValueError: broken lines, too many unknown ids, no column `user_id_field`, or one of
            several values.
        TypeError: that column holds neither integers nor strings.
    """
    known_users, list_of_entry = _user_ids(config, store)
    known_items = _item_ids(store)
    path = _existing(config, "hard_neg_edge_input_path")
    delimiter = config.field_delimiter
    table = read_table(
        path,
        sampler_files.EDGE_COLUMNS,
        delimiter=delimiter,
        userid=known_users,
        itemid=known_items,
    )
    allowed = known_users
    if config.user_input_path:
        user_path = _existing(config, "user_input_path")
        listed = read_table(
            user_path, sampler_files.USER_COLUMNS, delimiter=delimiter, id=known_users
        )["id"]
        is_unknown = ~np.isin(listed, allowed)
        _check_unknown(config, is_unknown, listed, user_path, _no_user(config, store))
        allowed = np.intersect1d(allowed, listed)
    no_user = ~np.isin(table["userid"], allowed)
    listed_only = f" or not in {config.user_input_path}" if config.user_input_path else ""
    rule = _no_user(config, store) + listed_only
    _check_unknown(config, no_user, table["userid"], path, rule, column="userid")
    index = index_of(table["itemid"], known_items)
    no_item = index < 0
    if is_listed_item is not None:
        no_item |= ~is_listed_item[np.maximum(index, 0)]
    listed_only = f" or not in {config.item_input_path}" if config.item_input_path else ""
    rule = _no_item(store) + listed_only
    _check_unknown(config, no_item, table["itemid"], path, rule, column="itemid")

    is_known = ~no_user & ~no_item
    order = np.argsort(table["userid"][is_known], kind="stable")
    lists = _lists_of(table["userid"][is_known][order], known_users, list_of_entry, store)
    return HardEdges(
        **lists,
        item_index=index[is_known][order].astype(np.int32),
        num_lines=len(is_known),
        num_dropped=int(np.count_nonzero(~is_known)),
    )


def _lists_of(
    keys: Shaped[np.ndarray, "edges"],
    known: Shaped[np.ndarray, "ids"],
    list_of_entry: Int[np.ndarray, "entries"],
    store: event_store.EventStore,
) -> dict[str, Integer[np.ndarray, "_"]]:
    """Where the lists of ascending user ids are, and which list and number each window has."""
    # One more list, an empty one, in the last place: -1, a user without an id, finds it.
    start = np.append(np.searchsorted(keys, known, side="left"), len(keys))
    stop = np.append(np.searchsorted(keys, known, side="right"), len(keys))
    list_of_window = number = store.windows.user_index
    if store.features.window is None:  # a list for every user, since entries are users
        start, stop = start[list_of_entry], stop[list_of_entry]
    else:
        list_of_window = np.where(list_of_entry < 0, len(known), list_of_entry)
        ids = store.users["user_id"]
        number = (id_mapping.hash_words(ids) if ids.dtype.kind == "U" else ids)[number]
    return {
        "start": start,
        "count": stop - start,
        "list_of_window": list_of_window,
        "number_of_window": number,
    }


def index_of(ids: Shaped[np.ndarray, "n"], known: Shaped[np.ndarray, "N"]) -> Int[np.ndarray, "n"]:
    """Place of each id in `known` (any order, no repeats), -1 where it is not there."""
    order = np.argsort(known, kind="stable")
    place = np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)
    found = order[place]
    return np.where(known[found] == ids, found, -1)


def is_repeat(ids: Shaped[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which ids stand at an earlier place too."""
    repeats = np.ones(len(ids), dtype=bool)
    repeats[np.unique(ids, return_index=True)[1]] = False
    return repeats


def read_table(
    path: pathlib.Path,
    columns: Sequence[tuple[str, str]],
    *,
    delimiter: str,
    **known: Shaped[np.ndarray, "_"],
) -> dict[str, Shaped[np.ndarray, "_"]]:
    """The columns of a sampler's file; those of ids are strings where the data's ids are.

    Args:
        path: the file.
        columns: as for `sampler_files.read_columns`.
        delimiter: between columns.
        **known: column of ids -> the ids that the data has.

    Raises:
        ValueError: another header, or a broken line.
    """
    texts = [name for name, ids in known.items() if ids.dtype.kind == "U"]
    typed = [(name, "string" if name in texts else kind) for name, kind in columns]
    table = sampler_files.read_columns(path, typed, delimiter=delimiter)
    return table | {name: table[name].astype(np.str_) for name in texts}


def _existing(config: sampler_schema.NegativeSamplerConfig, field: str) -> pathlib.Path:
    path = pathlib.Path(getattr(config, field))
    if not path.is_file():
        raise FileNotFoundError(
            f"{_SECTION}.{field}={str(path)!r}: no such file; make it with "
            "`python -m hstu_jax.prepare hard_negatives --store ...`."
        )
    return path


def _item_ids(store: event_store.EventStore) -> Shaped[np.ndarray, "N"]:
    """What the sampler's files call each item."""
    key = store.features.item_key
    return store.items.item_id if key is None else key


def _user_ids(
    config: sampler_schema.NegativeSamplerConfig, store: event_store.EventStore
) -> tuple[Shaped[np.ndarray, "ids"], Int[np.ndarray, "entries"]]:
    """(distinct ids ascending, which of them each user, or each row of list columns, has; -1)."""
    columns = store.features.window
    if columns is None:
        own = {name: raw_columns.RawColumn(values=ids) for name, ids in store.users.items()}
        columns = {**own, **store.features.user}
    field = f"{_SECTION}.user_id_field={config.user_id_field!r}"
    if config.user_id_field not in columns:
        raise ValueError(
            f"{field}: no such column in {_user_table(store)}; known are {sorted(columns)}."
        )
    column = columns[config.user_id_field]
    if column.offsets is not None:
        raise ValueError(
            f"{field}: has several values an entry in {_user_table(store)}; a user has one id."
        )
    if column.values.dtype.kind not in "iuU":
        raise TypeError(
            f"{field}: holds {column.values.dtype} in {_user_table(store)}; ids are integers or "
            "strings."
        )
    known, place = np.unique(column.values, return_inverse=True)
    if known.dtype.kind != "U":
        known = known.astype(np.int64)
    return known, place if column.codes is None else np.append(place, -1)[column.codes]


def _user_table(store: event_store.EventStore) -> str:
    return f"{store.path}/users.parquet" if store.features.window is None else "the list columns"


def _no_user(config: sampler_schema.NegativeSamplerConfig, store: event_store.EventStore) -> str:
    return f"no {config.user_id_field} of {_user_table(store)}"


def _no_item(store: event_store.EventStore) -> str:
    if store.features.item_key is None:
        return f"no item_id of {store.path}/items.parquet"
    return "no item of the list columns"


def _check_attributes(
    attrs: Shaped[np.ndarray, "_"],
    ids: Shaped[np.ndarray, "_"],
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
    ids: Shaped[np.ndarray, "_"],
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
            f"more than {_SECTION}.max_unknown_share={config.max_unknown_share}); ids are those "
            "of your own data (of an event store the original ones, not dense indices)."
        )


def _refuse(
    bad: Bool[np.ndarray, "_"],
    values: Shaped[np.ndarray, "_"],
    path: pathlib.Path,
    column: str,
    rule: str,
) -> None:
    refusal.refuse(
        bad,
        values,
        place=lambda at: f"{path} entry {at + 1}",
        column=column,
        rule=rule,
        unit="such entries",
    )
