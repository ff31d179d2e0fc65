"""The event store: a folder with all events, windows (training rows), users and items.

Here: opening a folder as memory-mapped NumPy columns, and writing one in a single step. Not here:
the records (`records.py`), the rules of their values (`store_checks.py`), single files
(`store_files.py`), how windows are chosen (`windowing.py`) and how raw files become columns
(`kuairand.py`, `sample.py`). Histories are slices
of `events`; nothing is copied row by row. Next on the path: `features/windows.py`.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from hstu_jax.data import raw_columns, schema, store_checks, store_files
from hstu_jax.data.records import Events, ItemTable, Windows


@dataclasses.dataclass(frozen=True)
class EventStore:
    """An opened event store.

    Attributes:
      path: the folder.
      events: memory-mapped, read-only.
      windows: memory-mapped, read-only (`positive_offsets` too).
      users: `user_id` (int64) and one int32 category id per `schema.USER_CATEGORIES`, each
        indexed by user_index.
      items: the catalogue.
      vocabularies: category column -> its strings; string number j has category id j + 1.
      stats: contents of `stats.json`.
      features: further columns that features may read: of users.parquet and items.parquet, or, of
        a store made of list columns, of their rows.
    """

    path: pathlib.Path
    events: Events
    windows: Windows
    users: dict[str, np.ndarray]
    items: ItemTable
    vocabularies: dict[str, list[str]]
    stats: dict[str, Any]
    features: raw_columns.FeatureColumns = raw_columns.FeatureColumns()

    @property
    def num_users(self) -> int:
        """Number of users; user_index is below it."""
        return len(self.users["user_id"])

    @property
    def num_items(self) -> int:
        """Number of items; item_index is below it."""
        return len(self.items)

    def fingerprint(self) -> str:
        """SHA-256 of the columns' contents; equal data, equal fingerprint.

        From `stats.json`, and with the further columns of users and items if there are any.
        """
        recorded = str(self.stats["content_sha256"])
        if self.features.window is not None or not (self.features.user or self.features.item):
            return recorded
        digest = hashlib.sha256(recorded.encode())
        store_files.add_feature_columns(digest, self.features)
        return digest.hexdigest()

    def windows_of_split(self, split: str) -> Shaped[np.ndarray, "_"]:
        """Window numbers of "train", "validation" or "test", ascending.

        Raises:
          ValueError: another split name.
        """
        if split not in schema.SPLIT_NAMES:
            raise ValueError(f"split={split!r}: unknown; choose from {schema.SPLIT_NAMES}.")
        return np.flatnonzero(self.windows.split == schema.SPLIT_NAMES.index(split))


def open_store(path: str | os.PathLike[str], *, verify: bool = True) -> EventStore:
    """Opens a prepared folder; event and window columns are memory maps.

    Args:
      path: folder that `write_store` (or `python -m hstu_jax.prepare`) made.
      verify: also read every value once and check order, ranges and times. Costs a pass over the
        files (tens of milliseconds for a million events).

    Raises:
      FileNotFoundError: the folder or one of its files is missing; names the command.
      ValueError, TypeError: a column, dtype, order or range is wrong; names file and column.
    """
    folder = pathlib.Path(path)
    for name in (*schema.COLUMNS_BY_FILE, schema.VOCABULARIES_FILE, schema.STATS_FILE):
        if not (folder / name).is_file():
            command = schema.PREPARE_COMMAND.format(path=folder)
            raise FileNotFoundError(
                f"{folder / name}: no such file; make the data with `{command}` "
                "(or `python -m hstu_jax.prepare kuairand --raw_dir ... --out_dir ...`)."
            )
    stats = json.loads((folder / schema.STATS_FILE).read_text())
    if stats.get("format_version") != schema.FORMAT_VERSION:
        raise ValueError(
            f"{folder / schema.STATS_FILE} format_version={stats.get('format_version')}: this "
            f"version reads {schema.FORMAT_VERSION}; prepare the data again."
        )
    event_columns = store_files.read_arrow(folder / schema.EVENTS_FILE)
    window_columns = store_files.read_arrow(folder / schema.WINDOWS_FILE)
    users = store_files.read_parquet(folder / schema.USERS_FILE)
    items = store_files.read_parquet(folder / schema.ITEMS_FILE)
    users.pop("user_index")
    store = EventStore(
        path=folder,
        events=Events(**{c.name: event_columns[c.name] for c in schema.EVENT_COLUMNS}),
        windows=Windows(
            **{c.name: window_columns[c.name] for c in schema.WINDOW_COLUMNS},
            positive_offsets=window_columns["positive_offsets"],
        ),
        users=users,
        items=ItemTable(item_id=items["item_id"], train_count=items["train_count"]),
        vocabularies=json.loads((folder / schema.VOCABULARIES_FILE).read_text()),
        stats=stats,
        features=raw_columns.FeatureColumns(
            user=store_files.read_further_columns(folder / schema.USERS_FILE),
            item=store_files.read_further_columns(folder / schema.ITEMS_FILE),
        ),
    )
    if verify:
        store_checks.check_values(
            store.events,
            store.windows,
            num_users=store.num_users,
            num_items=store.num_items,
            folder=folder,
        )
    return store


def write_store(
    path: str | os.PathLike[str],
    *,
    events: Events,
    windows: Windows,
    users: Mapping[str, np.ndarray],
    items: ItemTable,
    vocabularies: Mapping[str, list[str]],
    stats: Mapping[str, Any],
    item_features: Mapping[str, np.ndarray] | None = None,
    item_weight_exponent: float = 0.0,
    extra_files: Mapping[str, Callable[[pathlib.Path], None]] | None = None,
    overwrite: bool = False,
) -> EventStore:
    """Checks the columns and writes the folder: under a temporary name, renamed at the end.

    Args:
      path: folder to make.
      events: sorted by user, then time.
      windows: rows over `events`.
      users: `user_id` and the category columns, by user_index.
      items: catalogue, by item_index.
      vocabularies: category column -> strings in id order from 1.
      stats: goes into `stats.json`; format version, counts and hashes are added here.
      item_features: further columns of items.parquet, by item_index: numbers or strings.
      item_weight_exponent: weight in the item table = train_count ** exponent (0: all 1).
      extra_files: file name -> function that writes it at the path it is given.
      overwrite: replace an event store that is already there.

    Returns:
      The store, opened from the written files.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false, or it is not an event store.
      ValueError, TypeError: columns of unequal length, wrong dtype, order or range.
    """
    folder = pathlib.Path(path)
    check_target(folder, overwrite=overwrite)
    store_checks.check_columns_of(events, windows, users, items, folder=folder)
    store_checks.check_values(
        events, windows, num_users=len(users["user_id"]), num_items=len(items), folder=folder
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        store_files.write_columns(temporary, events, windows, users, items, item_features or {})
        store_files.write_item_table(
            temporary / schema.ITEM_TABLE_FILE, items, item_weight_exponent
        )
        store_files.write_json(temporary / schema.VOCABULARIES_FILE, dict(vocabularies))
        for name, write in (extra_files or {}).items():
            write(temporary / name)
        written = {p.name: store_files.file_sha256(p) for p in sorted(temporary.iterdir())}
        store_files.write_json(
            temporary / schema.STATS_FILE,
            {
                "format_version": schema.FORMAT_VERSION,
                **stats,
                **_counts(events, users, items, vocabularies),
                "item_weight_exponent": item_weight_exponent,
                "content_sha256": store_files.content_sha256(events, windows, users, items),
                "sha256_written": written,
            },
        )
        if folder.exists():
            retired = folder.with_name(f".{folder.name}.retired-{os.getpid()}")
            os.replace(folder, retired)
            os.replace(temporary, folder)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return open_store(folder, verify=False)


def _counts(
    events: Events,
    users: Mapping[str, np.ndarray],
    items: ItemTable,
    vocabularies: Mapping[str, list[str]],
) -> dict[str, Any]:
    """What every store counts the same way, whatever it was made from."""
    return {
        "users": len(users["user_id"]),
        "items": len(items),
        "cold_items": int((items.train_count == 0).sum()),
        "events": len(events),
        "action_counts": {
            name: int(((events.action & bit) != 0).sum())
            for name, bit in schema.ACTION_BITS.items()
        },
        # Smallest `num_buckets` of each id feature: dense ids, and a vocabulary plus its 0.
        "num_buckets": {
            "user_id": len(users["user_id"]),
            "video_id": len(items),
            **{name: len(words) + 1 for name, words in vocabularies.items()},
        },
    }


def check_target(folder: pathlib.Path, *, overwrite: bool) -> None:
    """Checks that a store may be written here, so that a long preparation does not end in vain.

    Raises:
      FileExistsError: the folder holds something else, or a store and `overwrite` is false.
    """
    if not folder.exists():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / schema.STATS_FILE).is_file():
        raise FileExistsError(
            f"out_dir={folder}: exists and is not an event store; choose another folder."
        )
    if not overwrite:
        raise FileExistsError(
            f"out_dir={folder}: already holds an event store; add --overwrite to replace it."
        )
