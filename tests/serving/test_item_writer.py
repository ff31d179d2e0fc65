"""Item files that break a rule are named with their column; new items replace the old ones."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_jax.serving import (
    artifact,
    catalogue,
    contract,
    feature_values,
    item_writer,
    prediction,
    unfinished,
)
from hstu_jax.serving import manifest as manifest_lib


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported.folder, tmp_path / "copy")


def write(folder, name="a.parquet", **columns):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return str(folder / "*.parquet")


def test_new_items_replace_those_of_the_export(copy, tmp_path, exported):
    cold = int(np.flatnonzero(exported.run.store.items.train_count == 0)[0])
    warm = int(np.flatnonzero(exported.run.store.items.train_count > 0)[0])
    pattern = write(tmp_path / "new", "b.parquet", video_id=[warm, 1023])
    write(tmp_path / "new", "a.parquet", video_id=[cold], original_id=[77])
    opened = artifact.load(copy)
    with pytest.raises(ValueError, match="a.parquet column video_id: item .* has no training ev"):
        item_writer.write_items(opened, item_writer.read_rows(pattern), copy, on_cold="refuse")
    shutil.rmtree(tmp_path / "new")
    pattern = write(tmp_path / "new", video_id=[cold, warm, 1023], original_id=[77, 78, 79])
    written = item_writer.write_items(opened, item_writer.read_rows(pattern), copy)
    assert (written.num_items, written.num_cold) == (3, 2)
    again = artifact.load(copy)
    np.testing.assert_array_equal(again.item_ids(), [cold, warm, 1023])
    np.testing.assert_array_equal(again.item_is_cold(), [True, False, True])
    table = pq.read_table(copy / "items" / "items.parquet")
    assert table.column_names == ["item_id", "item_tower_emb", "is_cold", "original_id"]
    assert table["original_id"].to_pylist() == [77, 78, 79]
    found = np.stack(table["item_tower_emb"].to_numpy())
    np.testing.assert_array_equal(found, again.item_vectors())
    np.testing.assert_array_equal(found, opened.embed_items({"video_id": [cold, warm, 1023]}))
    assert not [p for p in copy.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"item": [1]}, ValueError, "a.parquet column video_id: missing"),
        ({"video_id": ["a"]}, TypeError, "a.parquet column video_id: .*item ids are integers"),
        ({"video_id": [1.5]}, TypeError, "a.parquet column video_id: type double"),
        ({"video_id": [1, 2, 1]}, ValueError, "a.parquet column video_id: id 1 is on two rows"),
        ({"video_id": [1, None]}, ValueError, "a.parquet column video_id: row 1 is null"),
        ({"video_id": pa.array([], pa.int64())}, ValueError, "item_input_path=.*: no rows in"),
    ],
)
def test_wrong_item_files_are_refused(opened, tmp_path, columns, error, message):
    pattern = write(tmp_path / "items", **columns)
    with pytest.raises(error, match=message):
        item_writer.write_items(opened, item_writer.read_rows(pattern), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_id_in_two_files_is_refused(opened, tmp_path):
    pattern = write(tmp_path / "items", video_id=[1, 2])
    write(tmp_path / "items", "b.parquet", video_id=[2])
    with pytest.raises(ValueError, match="video_id: id 2 is on two rows"):
        item_writer.write_items(opened, item_writer.read_rows(pattern), tmp_path / "out")


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([3, 4, 3], ValueError, "item_input_path=.* column video_id: id 3 is on two rows"),
        (["a"], TypeError, "a.parquet column video_id: type string: item ids are integers here"),
        ([1, None], ValueError, "a.parquet column video_id: row 1 is null"),
        (pa.array([2**63 + 5], pa.uint64()), ValueError, "an id is 2.63 or more .* as strings"),
        (None, ValueError, "a.parquet column video_id: missing; the file has"),
    ],
)
def test_files_are_checked_before_an_export(tmp_path, ids, error, message):
    columns = {"other": [1]} if ids is None else {"video_id": ids}
    pattern = write(tmp_path / "items", **columns)
    with pytest.raises(error, match=message):
        item_writer.check_files(
            pattern, columns=("video_id",), id_column="video_id", must_be_integers=True
        )


def test_ids_beyond_int64_are_refused(opened, tmp_path):
    """They were written as negative numbers, and compared through floats."""
    pattern = write(tmp_path / "items", video_id=pa.array([1, 2**63 + 5], pa.uint64()))
    with pytest.raises(ValueError, match="a.parquet column video_id: an id is 2.63 or more"):
        item_writer.write_items(opened, item_writer.read_rows(pattern), tmp_path / "out")
    near = np.array([2**62 + 1], np.uint64)
    assert feature_values.find(np.array([2**62]), near) == -1
    assert feature_values.find(np.array([-5, 2**62 + 1]), near) == 1
    assert feature_values.find(np.array([-5]), np.array([2**64 - 5], np.uint64)) == -1
    assert not opened.has_training_event(np.array([2**64 - 1], np.uint64)).any()


@pytest.mark.parametrize("first", [None, [77], pa.array([77], pa.int32())])
@pytest.mark.parametrize("second", [None, [2**40]])
def test_original_ids_of_several_files(opened, tmp_path, first, second):
    """A file without them has nulls, and types are put together."""
    given = {"a": first, "b": second}
    for number, (name, values) in enumerate(given.items()):
        columns = {} if values is None else {"original_id": values}
        pattern = write(tmp_path / "items", f"{name}.parquet", video_id=[number], **columns)
    item_writer.write_items(opened, item_writer.read_rows(pattern), tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "items" / "items.parquet")
    if first is None and second is None:
        assert "original_id" not in table.column_names
        return
    expected = [None if first is None else 77, None if second is None else 2**40]
    assert table["original_id"].to_pylist() == expected


def test_original_ids_of_two_kinds_are_refused_by_file(opened, tmp_path):
    write(tmp_path / "items", "a.parquet", video_id=[1], original_id=[7])
    pattern = write(tmp_path / "items", "b.parquet", video_id=[2], original_id=["x"])
    with pytest.raises(TypeError, match="b.parquet column original_id: type string, and int64 in"):
        item_writer.write_items(opened, item_writer.read_rows(pattern), tmp_path / "out")


def test_what_a_killed_refresh_left_is_removed(opened, tmp_path):
    """A folder that another writer holds stays."""
    out, running = tmp_path / "out", tmp_path / "out" / ".items-124"
    for name in (".items-123", ".old-items-123", ".items-mine"):
        (out / name).mkdir(parents=True)
    pattern = write(tmp_path / "items", video_id=[1])
    with unfinished.held(running):
        item_writer.write_items(opened, item_writer.read_rows(pattern), out)
        assert sorted(each.name for each in out.iterdir()) == [".items-124", ".items-mine", "items"]
        with pytest.raises(FileExistsError, match="being written by another process; wait"):
            with unfinished.held(running):
                pass
    assert not running.exists()


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="item_input_path=.*: no such file; give parquet"):
        list(item_writer.read_rows(str(tmp_path / "*.parquet")))
    (tmp_path / "a.parquet").write_text("video_id\n1\n")
    with pytest.raises(ValueError, match="a.parquet: not a parquet file"):
        list(item_writer.read_rows(str(tmp_path / "*.parquet")))


def test_training_counts_of_item_files(tmp_path):
    pattern = write(tmp_path / "items", video_id=[9, 4, 7], train_count=[2, 0, 5])
    seen = catalogue.training_items_of_files(pattern, id_column="video_id")
    np.testing.assert_array_equal(seen.ids, [7, 9])
    np.testing.assert_array_equal(seen.counts, [5, 2])
    with pytest.raises(ValueError, match="a.parquet column item: missing; the file has"):
        catalogue.training_items_of_files(pattern, id_column="item")
    write(tmp_path / "items", "b.parquet", video_id=[1])
    assert catalogue.training_items_of_files(pattern, id_column="video_id") is None
    write(tmp_path / "items", "b.parquet", video_id=[1], train_count=["many"])
    with pytest.raises(TypeError, match="b.parquet column train_count: not whole numbers"):
        catalogue.training_items_of_files(pattern, id_column="video_id")


@pytest.mark.parametrize("verify", [True, False])
def test_a_load_during_a_refresh_is_of_one_generation(copy, tmp_path, monkeypatch, verify):
    """The items are replaced behind the check of their parts, or in the middle of it."""
    opened = artifact.load(copy)
    pattern = write(tmp_path / "new", video_id=[7, 3, 5])
    original, calls = manifest_lib.check_parts, []

    def check_then_replace(folder, parts, *, verify):
        original(folder, parts, verify=verify)
        if folder.name == "items" and not calls:
            calls.append(folder)
            item_writer.write_items(opened, item_writer.read_rows(pattern), copy)

    monkeypatch.setattr(manifest_lib, "check_parts", check_then_replace)
    found = artifact.load(copy, verify=verify)
    assert calls and found.item_ids().tolist() == [7, 3, 5]
    np.testing.assert_array_equal(found.item_vectors(), opened.embed_items({"video_id": [7, 3, 5]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record | {"parts": {}}, "items.json: parts does not list is_cold.npy|"
         "items.json: parts does not list item_ids.npy, which is in use"),
        (lambda record: record | {"num_items": 3}, "item_ids.npy: 1000 items, and items.json say"),
    ],
)  # fmt: skip
def test_records_that_do_not_cover_the_items_are_refused(copy, change, message):
    file = copy / "items" / "items.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=message):
        artifact.load(copy)


@pytest.mark.parametrize(
    "name", ["programs/cpu/item.bin", "tables/video_id_emb.npy", "training_items/ids.npy"]
)
def test_a_file_that_no_hash_covers_is_refused(copy, name):
    file = copy / "manifest.json"
    content = json.loads(file.read_text())
    del content["parts"][name]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"parts does not list {name}, which is in use"):
        artifact.load(copy)


def test_vectors_that_no_list_column_holds_are_refused(opened, tmp_path):
    users = tmp_path / "users.parquet"
    pq.write_table(pa.table({"a": [1]}), users)
    with pytest.raises(ValueError, match="batch_rows=1073741824: a column of lists holds 1342177"):
        prediction.predict(
            opened,
            input_path=str(users),
            output_path=str(tmp_path / "out.parquet"),
            options=prediction.PredictOptions(batch_rows=2**30),
        )


def test_an_item_input_of_original_strings_says_so(exported):
    promises = contract.make_contract(exported.model.config, translated={"video_id": "key"})
    assert [each.dtype for each in promises.item_inputs] == ["key"]
