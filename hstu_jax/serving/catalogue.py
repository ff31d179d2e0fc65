"""All items of an export, and which of them training has seen: from item files, or from the data.

Only the exporter reads this file.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hstu_jax.config import schema
from hstu_jax.data import event_store, raw_columns
from hstu_jax.serving import contract, exporter, item_writer

TRAIN_COUNT = "train_count"


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
            raise TypeError(
                f"{file} column {TRAIN_COUNT}: must be whole numbers ({error})."
            ) from None
        ids.append(batch.column(id_column))
        counts.append(count.to_numpy(zero_copy_only=False))
    id_array = pa.chunked_array(ids).combine_chunks()
    if id_array.null_count:
        raise ValueError(f"{pattern} column {id_column}: has a null; every item needs an id.")
    return _seen(id_array, np.concatenate(counts))


def training_items_of_store(store: event_store.EventStore) -> exporter.TrainingItems:
    """Items with a training event of the data that the model was trained on."""
    return _seen(_ids(store), np.asarray(store.items.train_count))


def rows_of_store(
    store: event_store.EventStore, config: schema.Config
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Every item of the data, with what the item tower reads of it."""
    promises = contract.make_contract(config)
    columns = {promises.item_id_column: _ids(store)}
    for each in promises.item_inputs:
        if each.name not in columns:
            columns[each.name] = _to_arrow(store.features.item[each.name])
    original = pa.array(store.items.item_id)
    columns.setdefault(item_writer.ORIGINAL_ID, original)
    for batch in pa.table(columns).to_batches(max_chunksize=item_writer.BATCH_ROWS):
        yield str(store.path), batch


def _ids(store: event_store.EventStore) -> pa.Array:
    key = store.features.item_key
    return pa.array(np.arange(store.num_items, dtype=np.int64) if key is None else key)


def _to_arrow(column: raw_columns.RawColumn) -> pa.Array:
    values = pa.array(column.values)
    return (
        values
        if column.codes is None
        else values.take(pa.array(column.codes, mask=column.codes < 0))
    )


def _seen(ids: pa.Array, counts: np.ndarray) -> exporter.TrainingItems:
    if pa.types.is_integer(ids.type):
        values = ids.to_numpy(zero_copy_only=False).astype(np.int64)
    else:
        values = np.array(pc.cast(ids, pa.string()).to_pylist(), dtype=np.str_)
    order = np.argsort(values, kind="stable")
    order = order[counts[order] > 0]
    return exporter.TrainingItems(ids=values[order], counts=counts[order].astype(np.int64))
