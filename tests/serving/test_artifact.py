"""An opened folder is the live model, row by row, and says what it was given."""

import shutil

import numpy as np
import pyarrow as pa
import pytest

from hstu_jax.serving import artifact
from tests.serving.conftest import one_user


def test_users_equal_the_live_model(exported, opened, live):
    rows = exported.rows("train")
    before = dict(opened.counts)
    vectors = opened.embed_users(rows)
    lengths = rows["uih_seq__video_id"].combine_chunks().value_lengths().to_numpy()
    # Among them are rows without history and some longer than the model reads.
    assert len(rows) >= 200 and lengths.min() == 0 and lengths.max() > 42
    np.testing.assert_allclose(vectors, live[0], rtol=0, atol=1e-6)
    assert vectors.dtype == np.float32 and vectors.shape == (len(rows), opened.manifest.dim)
    counted = {name: opened.counts[name] - before[name] for name in before}
    assert counted["users"] == len(rows)
    assert counted["empty_histories"] == np.count_nonzero(lengths == 0)
    assert counted["truncated_histories"] == np.count_nonzero(lengths > 42)
    assert counted["dropped_history_items"] == np.maximum(lengths - 42, 0).sum()
    assert counted["history_items"] == np.minimum(lengths, 42).sum()


def test_the_export_compared_itself(exported):
    """Its invented users have histories of 0, 1, 42 and other events."""
    check = exported.report.check
    assert check.num_users == 8 and check.num_items == 64
    assert 0 <= check.users <= 1e-6 and 0 <= check.items <= 1e-6


def test_items_equal_the_live_model(opened, live):
    items = live[1]
    vectors = opened.embed_items({"video_id": np.arange(len(items))})
    np.testing.assert_allclose(vectors, items, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(opened.item_vectors(), vectors)
    assert isinstance(opened.item_vectors(), np.memmap)


def test_exported_items_and_those_that_are_cold(exported, opened):
    store = exported.run.store
    np.testing.assert_array_equal(opened.item_ids(), np.arange(store.num_items))
    np.testing.assert_array_equal(opened.item_is_cold(), store.items.train_count == 0)
    assert opened.item_is_cold().any() and not opened.item_is_cold().all()
    assert exported.report.items.num_cold == np.count_nonzero(opened.item_is_cold())


def test_a_row_alone_is_the_row_among_others(exported, opened):
    """Neither the batch nor the length of its program changes a vector."""
    rows = exported.rows("test").slice(0, 20)
    together = opened.embed_users(rows)
    for at in (0, 7, 19):
        alone = opened.embed_users(rows.slice(at, 1))
        np.testing.assert_allclose(alone[0], together[at], rtol=0, atol=1e-6)


def test_numpy_lists_tables_and_batches_are_the_same_columns(exported, opened):
    rows = exported.rows("test").slice(0, 3)
    expected = opened.embed_users(rows)
    for columns in (
        rows.to_pydict(),
        rows.combine_chunks().to_batches()[0],
        {name: rows[name].to_numpy() for name in rows.column_names},
    ):
        np.testing.assert_array_equal(opened.embed_users(columns), expected)


def test_the_newest_events_are_kept(opened):
    """A history longer than the largest size is its newest 42 events."""
    rng = np.random.default_rng(0)
    items, time = rng.integers(0, 1000, 60), 1_650_000_000 + np.arange(60) * 60
    long = one_user(
        uih_seq__video_id=[items],
        uih_seq__action_timestamp=[time],
        uih_seq__action_weight=[np.ones(60, int)],
        uih_seq__watch_time=[np.ones(60)],
        request_time=[1_660_000_000],
    )
    short = {name: [v[0][-42:]] if name.startswith("uih") else v for name, v in long.items()}
    before = opened.counts["dropped_history_items"]
    np.testing.assert_array_equal(opened.embed_users(long), opened.embed_users(short))
    assert opened.counts["dropped_history_items"] - before == 18
    assert not np.array_equal(
        opened.embed_users({n: [v[0][:42]] if n.startswith("uih") else v for n, v in long.items()}),
        opened.embed_users(short),
    )


def test_ids_without_a_training_event_are_counted_or_refused(exported, opened):
    cold = int(np.flatnonzero(exported.run.store.items.train_count == 0)[0])
    row = one_user(uih_seq__video_id=[[5000, cold, 7]])
    before = dict(opened.counts)
    vectors = opened.embed_users(row)
    assert np.isfinite(vectors).all()
    assert opened.counts["unknown_item_ids"] - before["unknown_item_ids"] == 2
    assert opened.counts["unknown_values"] - before["unknown_values"] == 1  # 5000 has no row
    strict = artifact.load(exported.folder, verify=False, on_unknown="refuse")
    with pytest.raises(ValueError, match=r"row 0: uih_seq__video_id=5000: an item without a train"):
        strict.embed_users(row)
    with pytest.raises(ValueError, match="on_unknown='skip': unknown choice"):
        artifact.load(exported.folder, on_unknown="skip")
    before = opened.counts["cold_items"]
    opened.embed_items({"video_id": [cold, 1023]})
    assert opened.counts["cold_items"] - before == 2


def test_no_rows_are_no_vectors(opened):
    none = {name: values[:0] for name, values in one_user().items()}
    assert opened.embed_users(none).shape == (0, 16)
    assert opened.embed_items({"video_id": pa.array([], pa.int64())}).shape == (0, 16)


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported.folder, tmp_path / "copy")


def test_a_truncated_part_is_named(copy):
    file = copy / "tables" / "video_id_emb.npy"
    file.write_bytes(file.read_bytes()[:-8])
    for verify in (True, False):
        with pytest.raises(ValueError, match=r"video_id_emb.npy: \d+ bytes, and the manifest says"):
            artifact.load(copy, verify=verify)


@pytest.mark.parametrize(
    "name", ["tables/video_id_emb.npy", "training_items/ids.npy", "programs/cpu/item.bin"]
)
def test_a_changed_part_is_named(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(bytes(content))
    with pytest.raises(ValueError, match=rf"{name}: hash .* parts of two exports must not be"):
        artifact.load(copy)


def test_a_missing_part_is_named(copy):
    (copy / "programs" / "cpu" / "item.bin").unlink()
    with pytest.raises(ValueError, match=r"programs/cpu/item.bin: missing part"):
        artifact.load(copy)


def test_a_folder_that_is_no_export(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file, so this is no finished export"):
        artifact.load(tmp_path / "nothing")
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 7'))
    with pytest.raises(ValueError, match="format_version=7: this version reads 1; export again"):
        artifact.load(copy)
    manifest.write_text(text.replace('"max_seq_len": 42', '"max_seq_len": 41'))
    with pytest.raises(ValueError, match="does not belong to the other fields"):
        artifact.load(copy)
    manifest.write_text(text.replace('"outputs"', '"results"'))
    with pytest.raises(ValueError, match="manifest.json: the fields are"):
        artifact.load(copy)
    manifest.write_text(text[:100])
    with pytest.raises(ValueError, match="manifest.json: not JSON"):
        artifact.load(copy)


def test_items_of_another_model_are_refused(copy):
    record = copy / "items" / "items.json"
    text = record.read_text()
    at = text.index('"model_version": "') + len('"model_version": "')
    record.write_text(text[:at] + "0" * 64 + text[at + 64 :])
    with pytest.raises(ValueError, match="the items are of another export; write them again"):
        artifact.load(copy)
    shutil.rmtree(copy / "items")
    with pytest.raises(FileNotFoundError, match="items: no such folder; export with --item_input"):
        artifact.load(copy, verify=False).item_ids()


def test_a_platform_without_programs_is_refused(opened, exported, monkeypatch):
    monkeypatch.setattr(artifact.jax, "default_backend", lambda: "tpu")
    with pytest.raises(ValueError, match=r"has programs for \['cpu', 'cuda'\], and JAX ru"):
        artifact.load(exported.folder, verify=False)


def test_the_manifest_describes_the_inputs(opened):
    inputs = {each.name: each for each in opened.manifest.user_inputs}
    assert inputs["uih_seq__action_timestamp"].unit == "seconds"
    assert inputs["uih_seq__video_id"].shape == ("history",)
    assert inputs["request_time"].kind == "value" and not inputs["request_time"].is_null_allowed
    assert [each.name for each in opened.manifest.item_inputs] == ["video_id"]
    assert opened.manifest.history_column == "uih_seq__video_id"
    assert opened.manifest.item_id_column == "video_id"
    assert opened.manifest.source_step == 4
