"""Training rows as list columns or delimited strings -> the arrays of an event store, in memory.

A row of the parquet files is a user's history, the items to be found, and what else features read:

    uih_seq__video_id, uih_seq__action_timestamp, ...   one list a row, equally long, oldest first
    cand_seq__video_id                                  items to be found: the row's queries
    cand_seq__action_weight, cand_seq__watch_time       labels, as long as the candidates
    request_time, user_id, user_active_degree, ...      one value a row (or a list of them)

With `sequence_delim` a list is a string, and an empty string an empty list (the reference counts it
as one value, an empty id). Names are the configuration's: a feature reads the column of its name or
its `expression`. Times are whole seconds. A row may have no history; one without a candidate is left
out and counted. Items are those of `item_input_path`, or those that occur; without a `train_count`
there, an item counts as often as it is a training row's candidate, and once if a training history
has it.

Here: opening what `data.list_columns` names. Not here: which columns that takes
(`list_layout.py`), the files (`list_files.py`), the items (`item_file.py`) and the store
(`list_store.py`). Next on the path: `features/columns.py`, as for any store.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

from hstu_jax.config import schema as config_schema
from hstu_jax.config.feature_checks import sequence_name
from hstu_jax.data import item_file, list_files, list_layout, list_store
from hstu_jax.data.event_store import EventStore


def open_list_columns(config: config_schema.Config) -> EventStore:
    """Reads the files of `data.list_columns` into memory.

    Args:
      config: its features say which columns are read.

    Returns:
      A store whose splits are the train, validation and eval files. Rows are windows in the files'
      order; rows without a candidate are left out and counted in `features.notes`.

    Raises:
      FileNotFoundError: a pattern without files.
      ValueError, TypeError: columns or values that break a rule; names file, row and column.
    """
    paths, layout = config.data.list_columns, list_layout.layout_of(config)
    split_files = {
        split: list_files.expand_paths(pattern, field=f"data.list_columns.{field}")
        for split, field, pattern in (
            ("train", "train_input_path", paths.train_input_path),
            ("validation", "validation_input_path", paths.validation_input_path),
            ("test", "eval_input_path", paths.eval_input_path),
        )
        if pattern
    }
    in_rows = list_files.column_names(split_files["train"][0])
    for field, name in (
        ("data.negative_sampler.user_id_field", layout.hard_user),
        ("data.sample_weight_fields", layout.sample_weight),
    ):
        if name and name not in in_rows:
            raise ValueError(
                f"{field}={name!r}: no such column in {split_files['train'][0]}, which has "
                f"{sorted(in_rows)}; name one of them."
            )
    side = {name: kind for name, kind in layout.history_side.items() if name in in_rows}
    of_items = {name: list_layout.bare_name(name) for name in layout.history_side if name not in in_rows}
    if of_items and not paths.item_input_path:
        raise ValueError(
            f"{split_files['train'][0]} column {next(iter(of_items))}: missing; the file has "
            f"{sorted(in_rows)}. (A feature of items may stand in data.list_columns."
            "item_input_path in its place.)"
        )
    layout = dataclasses.replace(layout, history_side=side)
    splits = {
        split: list_files.read_rows(
            files, sequences=list_layout.sequences_to_read(layout), scalars=list_layout.scalars_to_read(layout)
        )
        for split, files in split_files.items()
    }
    for rows in splits.values():
        _check_id_types(layout, rows)
    catalogue = _catalogue(layout, splits, paths.item_input_path, tuple(of_items.values()))
    return list_store.build(
        layout,
        splits,
        catalogue=catalogue,
        history_of_items=of_items,
        path=pathlib.Path(paths.train_input_path),
    )


def _check_id_types(layout: list_layout.ListLayout, rows: list_files.Rows) -> None:
    ids = {
        column: rows.sequences[sequence_name(column)].values[column]
        for column in (layout.history_item, layout.candidate_item)
    }
    if layout.user_id:
        ids[layout.user_id] = rows.scalars[layout.user_id]
    for column, values in ids.items():
        item_file.check_id_type(values, where=f"{rows.files[0]} column {column}")


def _catalogue(
    layout: list_layout.ListLayout,
    splits: Mapping[str, list_files.Rows],
    item_input_path: str,
    of_history: tuple[str, ...],
) -> item_file.Catalogue:
    if item_input_path:
        columns = tuple(dict.fromkeys((*layout.item_features, *of_history)))
        return item_file.read_items(
            item_input_path, id_column=layout.item_column, feature_columns=columns
        )
    if layout.item_features:
        raise ValueError(
            f"data.list_columns.item_input_path='': the candidates' feature "
            f"{layout.item_features[0]!r} is read from the item file, so that negatives have it "
            "too; give a parquet file with one item a row."
        )
    ids = [
        rows.sequences[sequence_name(column)].values[column]
        for rows in splits.values()
        for column in (layout.history_item, layout.candidate_item)
    ]
    return item_file.items_of_rows(ids, id_column=layout.item_column)
