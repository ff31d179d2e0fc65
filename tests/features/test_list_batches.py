"""Batches of list-column files are those of the event store that the files were made from."""

import dataclasses

import jax
import numpy as np
import pytest

from hstu_jax.config import feature_schema
from hstu_jax.data import list_columns, list_export
from hstu_jax.features import pipeline
from tests.data import lists as list_rows

LABELS = ("cand_seq__action_weight", "cand_seq__watch_time")


def list_config(config, folder, *, delimited=False, **fields):
    """The same configuration, reading exported files."""
    paths = feature_schema.ListColumnsConfig(
        train_input_path=f"{folder}/train/*.parquet",
        validation_input_path=f"{folder}/validation/*.parquet",
        eval_input_path=f"{folder}/test/*.parquet",
        item_input_path=f"{folder}/items.parquet",
    )
    data = dataclasses.replace(
        config.data, source="list_columns", list_columns=paths, label_fields=LABELS
    )
    sequence = feature_schema.SequenceConfig(sequence_delim="|" if delimited else "")
    sequences = {"uih_seq": sequence, "cand_seq": sequence}
    return dataclasses.replace(config, data=data, **{"sequences": sequences, **fields})


@pytest.fixture
def store(make_store):
    rng = np.random.default_rng(5)
    splits = [0] * 44 + [1] * 6 + [2] * 10
    # An item without an event, and counts that are not those of the rows.
    counts = rng.integers(0, 40, 50)
    return make_store(rng.integers(0, 30, 60), splits=splits, train_count=counts)


def assert_same_batches(actual, expected):
    assert (actual.step, actual.epoch, actual.shape) == (
        expected.step,
        expected.epoch,
        expected.shape,
    )
    assert jax.tree.structure(actual.batch) == jax.tree.structure(expected.batch)
    for a, b in zip(jax.tree.leaves(actual.batch), jax.tree.leaves(expected.batch), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("delimited", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_bit_equal_batches(store, make_config, tmp_path, delimited, layout):
    options = list_export.ExportOptions(delimited=delimited)
    list_export.export(store, tmp_path / "lists", options=options)
    rows = {"row_lens": (12, 23)} if layout == "padded" else {}
    config = make_config(
        contextual=3, num_groups=2, layout=layout, sampler_weight_exponent=0.5, **rows
    )
    expected = pipeline.Pipeline(config, store)
    lists = list_config(config, tmp_path / "lists", delimited=delimited)
    read = list_columns.open_list_columns(lists)
    actual = pipeline.Pipeline(lists, read)
    assert actual.shapes == expected.shapes
    assert actual.stats() == expected.stats()
    for step in range(expected.first_step(2)):
        assert_same_batches(actual.batch_at(step), expected.batch_at(step))
    for split in ("validation", "test"):
        with actual.eval_batches(split) as some, expected.eval_batches(split) as others:
            for a, b in zip(some, others, strict=True):
                assert_same_batches(a, b)
    # What evaluation and baselines read besides batches.
    np.testing.assert_array_equal(read.items.item_id, store.items.item_id)
    np.testing.assert_array_equal(read.items.train_count, store.items.train_count)
    test = store.windows_of_split("test")
    positives = np.concatenate([store.windows.positives(w) for w in test])
    others = np.concatenate([read.windows.positives(w) for w in read.windows_of_split("test")])
    for name in ("item_index", "action", "watch_time_s"):
        np.testing.assert_array_equal(
            getattr(read.events, name)[others], getattr(store.events, name)[positives]
        )


def test_short_histories_and_no_anchor_are_equal_too(store, make_config, tmp_path):
    list_export.export(store, tmp_path / "lists", options=list_export.ExportOptions(max_history=20))
    config = make_config(query_time=False, contextual=0)  # max_seq_len is 20
    lists = list_config(config, tmp_path / "lists")
    actual = pipeline.Pipeline(lists, list_columns.open_list_columns(lists))
    expected = pipeline.Pipeline(config, store)
    for step in range(expected.first_step(1)):
        assert_same_batches(actual.batch_at(step), expected.batch_at(step))


def test_sampler_table_names_items_by_their_ids(store, make_config, tmp_path):
    list_export.export(store, tmp_path / "lists", options=list_export.ExportOptions())
    table = str(store.path / "item_table.tsv")
    config = make_config(sampler_input_path=table)
    lists = list_config(config, tmp_path / "lists")
    actual = pipeline.Pipeline(lists, list_columns.open_list_columns(lists))
    assert_same_batches(actual.batch_at(3), pipeline.Pipeline(config, store).batch_at(3))


def test_fingerprint_follows_the_values(store, make_config, tmp_path):
    prints = set()
    for number, max_history in enumerate((0, 0, 3)):
        folder = tmp_path / str(number)
        options = list_export.ExportOptions(max_history=max_history)
        list_export.export(store, folder, options=options)
        read = list_columns.open_list_columns(list_config(make_config(), folder))
        prints.add(read.fingerprint())
    assert len(prints) == 2


def test_rows_without_any_candidate_are_no_split(tmp_path):
    none = {name: [] for name in list_rows.ROWS[0] if name.startswith("cand_seq")}
    list_rows.write_both(tmp_path, [{**row, **none} for row in list_rows.ROWS])
    config = list_rows.config(tmp_path)
    with pytest.raises(ValueError, match="has no such window; give files whose rows have candid"):
        pipeline.Pipeline(config, list_columns.open_list_columns(config))
