"""What an export must know of the data: its items, those that training has seen, original ids.

From item files where they say it, else from the data that the model was trained on. Only the
exporter reads this file.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from hstu_jax.config import schema
from hstu_jax.data import event_store, interactions, list_files, list_layout, raw_columns
from hstu_jax.features import id_mapping
from hstu_jax.serving import contract, exporter, item_writer

TRAIN_COUNT = "train_count"
Ids = Literal["model", "original"]


def training_items_of_files(pattern: str, *, id_column: str) -> exporter.TrainingItems | None:
    """Items with a `train_count` above 0; None where a file has no such column.

    Args:
        pattern: of the item files.
        id_column: item ids.

    Raises:
        ValueError, TypeError: no id column, or counts that are no counts; names file and column.
    """
    ids, counts = [], []
    for file, batch in item_writer.read_rows(pattern):
        names = batch.schema.names
        if id_column not in names:
            raise ValueError(f"{file} column {id_column}: missing; the file has {sorted(names)}.")
        if TRAIN_COUNT not in names:
            return None
        try:
            count = batch.column(TRAIN_COUNT).cast(pa.int64()).fill_null(0)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise TypeError(f"{file} column {TRAIN_COUNT}: not whole numbers ({error}).") from None
        ids.append(item_writer.item_ids(batch, id_column, where=file))
        counts.append(count.to_numpy(zero_copy_only=False))
    return _seen(np.concatenate(ids), np.concatenate(counts))


def training_items_of_store(
    store: event_store.EventStore, *, ids: Ids = "model"
) -> exporter.TrainingItems:
    """Items with a training event of the data that the model was trained on."""
    return _seen(_item_ids(store, ids), np.asarray(store.items.train_count))


def rows_of_store(
    store: event_store.EventStore, config: schema.Config, *, ids: Ids = "model"
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Every item of the data, with what the item tower reads of it."""
    promises = contract.make_contract(config)
    columns = {promises.item_id_column: pa.array(_item_ids(store, ids))}
    for each in promises.item_inputs:
        if each.name not in columns:
            columns[each.name] = _to_arrow(store.features.item[each.name])
    if ids == "model":
        columns.setdefault(item_writer.ORIGINAL_ID, pa.array(store.items.item_id))
    for batch in pa.table(columns).to_batches(max_chunksize=item_writer.BATCH_ROWS):
        yield str(store.path), batch


def history_features_of_items(config: schema.Config) -> tuple[str, ...]:
    """Features of the history that training looked up by the item of an event.

    With list columns, those that the training files lack.

    Raises:
        FileNotFoundError: the training files are needed to know, and are not there.
    """
    if contract.is_store(config):
        return contract.store_item_features(config)
    paths, layout = config.data.list_columns, list_layout.layout_of(config)
    if not paths.item_input_path or not layout.history_side:
        return ()
    files = list_files.expand_paths(
        paths.train_input_path, field="data.list_columns.train_input_path"
    )
    in_rows = list_files.column_names(files[0])
    names = config.feature_groups["uih"]
    return tuple(name for name in names if config.column(name) not in in_rows)


def data_maps(
    store: event_store.EventStore, config: schema.Config, *, ids: Ids = "model"
) -> exporter.DataMaps:
    """Original ids where they are asked for, and the history's features of items.

    Raises:
        ValueError: original ids of list columns, which have the only ids there are, or of a store
            whose raw ids are texts.
    """
    translations = {}
    if ids == "original":
        check_ids(config, ids)
        if (store.path / interactions.ITEM_IDS_FILE).is_file():
            raise ValueError(
                f"ids='original': {store.path} has items and users by the number of their line in "
                f"{interactions.ITEM_IDS_FILE} and {interactions.USER_IDS_FILE}, as its raw ids "
                "are texts; use 'model' and translate."
            )
        promises = contract.make_contract(config)
        translations[promises.item_id_column] = _translation(np.asarray(store.items.item_id))
        for feature in promises.contextual_features:
            if feature.column == "user_id":
                translations["user_id"] = _translation(np.asarray(store.users["user_id"]))
            elif feature.column in store.vocabularies:
                words = np.array(store.vocabularies[feature.column], dtype=np.str_)
                # Preparation numbers a column's strings from 1; 0 is a string that it lacks.
                translations[feature.column] = _translation(words, first=1, unlisted=0)
    names = history_features_of_items(config)
    if not names:
        return exporter.DataMaps(translations=translations)
    keys = _item_ids(store, ids)
    order = np.argsort(keys, kind="stable")
    return exporter.DataMaps(
        translations=translations,
        item_keys=keys[order],
        item_values={name: _item_values(store, config, name, order) for name in names},
    )


def check_ids(config: schema.Config, ids: Ids) -> None:
    """Raises ValueError where there are no other ids than the model's."""
    if ids == "original" and not contract.is_store(config):
        raise ValueError(
            "ids='original': the model was trained on list columns, which have the only ids that "
            "there are; use 'model'."
        )


def _item_values(store, config, name: str, order: np.ndarray) -> np.ndarray:
    """Ids or numbers of a feature of every item, and in the last place those of a missing value."""
    bare = list_layout.bare_name(config.column(name))
    raw, feature = store.features.item[bare], config.all_features[name]
    values = id_mapping.map_column(raw, feature, name=name).values
    none = raw_columns.RawColumn(values=raw.values[:0], codes=np.array([-1]))
    missing = id_mapping.map_column(none, feature, name=name).values
    return np.concatenate([values[order], missing.astype(values.dtype)])


def _translation(
    keys: np.ndarray, *, first: int = 0, unlisted: int = -1
) -> tuple[np.ndarray, np.ndarray, int]:
    order = np.argsort(keys, kind="stable")
    return keys[order], order.astype(np.int64) + first, unlisted


def _item_ids(store: event_store.EventStore, ids: Ids) -> Shaped[np.ndarray, "N"]:
    if ids == "original":
        return np.asarray(store.items.item_id)
    key = store.features.item_key
    return np.arange(store.num_items, dtype=np.int64) if key is None else np.asarray(key)


def _to_arrow(column: raw_columns.RawColumn) -> pa.Array:
    values = pa.array(column.values)
    if column.codes is None:
        return values
    return values.take(pa.array(column.codes, mask=column.codes < 0))


def _seen(ids: np.ndarray, counts: np.ndarray) -> exporter.TrainingItems:
    order = np.argsort(ids, kind="stable")
    order = order[counts[order] > 0]
    return exporter.TrainingItems(ids=ids[order], counts=counts[order].astype(np.int64))
