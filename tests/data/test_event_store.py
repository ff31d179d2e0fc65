"""Writing and opening a store: round trip, atomic replacement, and every refused input."""

import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from hstu_jax.data import event_store, schema


def changed(parts, table, column, values):
    """Copy of the parts with one column replaced."""
    return {**parts, table: dataclasses.replace(parts[table], **{column: values})}


def test_round_trip(store_path, store_parts):
    store = event_store.open_store(store_path)
    for table in ("events", "windows", "items"):
        for field in dataclasses.fields(store_parts[table]):
            written = getattr(store_parts[table], field.name)
            read = getattr(getattr(store, table), field.name)
            np.testing.assert_array_equal(read, written)
            assert read.dtype == written.dtype, field.name
    assert set(store.users) == {"user_id", *schema.USER_CATEGORIES}
    np.testing.assert_array_equal(store.users["user_id"], [7, 9])
    assert (store.num_users, store.num_items, len(store.events), len(store.windows)) == (2, 3, 5, 2)
    np.testing.assert_array_equal(store.windows.positives(1), [4])
    np.testing.assert_array_equal(store.windows_of_split("test"), [1])
    assert store.vocabularies["user_active_degree"] == ["word"]
    assert store.stats["action_counts"]["click"] == 2
    assert store.stats["num_buckets"]["user_active_degree"] == 2
    with pytest.raises(ValueError, match=r"split='valid': unknown"):
        store.windows_of_split("valid")


def test_event_columns_are_read_only_maps_of_one_uncompressed_batch(store_path):
    store = event_store.open_store(store_path)
    assert not store.events.timestamp_s.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        store.events.timestamp_s[0] = 1
    reader = pa.ipc.open_file(pa.memory_map(str(store_path / schema.EVENTS_FILE)))
    assert reader.num_record_batches == 1
    raw = np.array([100, 200, 200, 50, 60], np.int64).tobytes()
    assert raw in (store_path / schema.EVENTS_FILE).read_bytes()


def test_item_table_has_the_reference_format(tmp_path, store_parts):
    path = event_store.write_store(tmp_path / "store", **store_parts, item_weight_exponent=0.5).path
    assert (path / schema.ITEM_TABLE_FILE).read_text() == (
        "id:int64\tweight:float\tattrs:string\n0\t2\t11\n1\t1\t12\n2\t0\t13\n"
    )


def test_item_table_is_uniform_by_default(store_path):
    lines = (store_path / schema.ITEM_TABLE_FILE).read_text().splitlines()
    assert [line.split("\t")[1] for line in lines[1:]] == ["1", "1", "1"]


def test_equal_content_gives_equal_files_and_fingerprint(tmp_path, store_parts):
    first = event_store.write_store(tmp_path / "a", **store_parts)
    second = event_store.write_store(tmp_path / "b", **store_parts)
    assert first.fingerprint() == second.fingerprint()
    assert first.stats["sha256_written"] == second.stats["sha256_written"]
    watch = np.array([1.5, 0.0, 9.25, 3.0, 4.5], np.float32)
    other = event_store.write_store(
        tmp_path / "c", **changed(store_parts, "events", "watch_time_s", watch)
    )
    assert other.fingerprint() != first.fingerprint()


def test_missing_store_names_the_command(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"nothing/events.arrow: no such file; make the data with "
        r"`python -m hstu_jax.prepare sample --out_dir \S*nothing`",
    ):
        event_store.open_store(tmp_path / "nothing")


def test_existing_folders_are_not_lost(tmp_path, store_parts, store_path):
    with pytest.raises(FileExistsError, match="already holds an event store; add --overwrite"):
        event_store.write_store(store_path, **store_parts)
    event_store.write_store(store_path, **store_parts, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="exists and is not an event store"):
        event_store.write_store(tmp_path / "mine", **store_parts, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "store"]


def test_a_failed_write_leaves_the_old_store_and_no_rest(tmp_path, store_parts, store_path):
    def fail(path):
        path.write_text("half")
        raise RuntimeError("disk full")

    before = event_store.open_store(store_path).fingerprint()
    with pytest.raises(RuntimeError, match="disk full"):
        event_store.write_store(
            store_path, **store_parts, overwrite=True, extra_files={"extra.npz": fail}
        )
    assert event_store.open_store(store_path).fingerprint() == before
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


EVENT_CASES = [
    ("timestamp_s", [100_000, 200_000, 200_000, 50_000, 1_649_349_856_990],
     "row 4: timestamp_s=1649349856990: looks like milliseconds; times are whole seconds"),
    ("timestamp_s", [100, 200, 150, 50, 60],
     "row 2: timestamp_s=150: out of order: earlier than the same user's event before it (1 rows"),
    ("timestamp_s", [-5, 200, 200, 50, 60], "row 0: timestamp_s=-5: negative time (1 rows in all)"),
    ("user_index", [0, 0, 1, 0, 1], "row 3: user_index=0: out of order; events are sorted by user"),
    ("user_index", [0, 0, 0, 1, 2], "row 4: user_index=2: outside 0..1 of users.parquet (1 rows"),
    ("item_index", [0, 1, 3, 0, -1], "row 2: item_index=3: outside 0..2 of items.parquet (2 rows"),
    ("action", [1, 256, 0, 0, 129], "row 1: action=256: unknown bits; known are 0..255"),
    ("watch_time_s", [1, np.nan, 0, 0, -1],
     "row 1: watch_time_s=nan: must be finite and not negative (2 rows in all)"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "values", "message"), EVENT_CASES)
def test_bad_events_are_refused(tmp_path, store_parts, column, values, message):
    dtype = getattr(store_parts["events"], column).dtype
    parts = changed(store_parts, "events", column, np.array(values, dtype))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        event_store.write_store(tmp_path / "bad", **parts)
    assert "events.arrow" in str(error.value)
    assert not (tmp_path / "bad").exists()


WINDOW_CASES = [
    ("history_end", [2, 4], "row 0: history_end: the history must be strictly before"),
    ("history_end", [1, 6], "row 1: history_end=6: after the last of 5 events"),
    ("history_start", [0, 2], "row 1: history_start: the history holds another user's events"),
    ("history_start", [2, 3], "row 0: history_start=2: must be 0 or more and not after"),
    ("request_time_s", [200_000_000_000, 60], "row 0: request_time_s=200000000000: looks like mil"),
    ("request_time_s", [201, 60], "row 0: positive_events: a positive before request_time_s"),
    ("split", [0, 3], "row 1: split=3: must be 0, 1 or 2"),
    ("user_index", [0, 2], "row 1: user_index=2: outside 0..1 of users.parquet"),
    ("positive_events", [2, 5], "row 1: positive_events=5: outside 0..4 of events.arrow"),
    ("positive_events", [4, 4], "row 0: positive_events: a positive of another user"),
    ("positive_offsets", [0, 2, 2], "row 1: positive_events=0: a window without positives"),
    ("positive_offsets", [0, 1, 3], "column positive_events: broken offsets"),
]


@pytest.mark.parametrize(("column", "values", "message"), WINDOW_CASES)
def test_bad_windows_are_refused(tmp_path, store_parts, column, values, message):
    dtype = getattr(store_parts["windows"], column).dtype
    parts = changed(store_parts, "windows", column, np.array(values, dtype))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        event_store.write_store(tmp_path / "bad", **parts)
    assert "windows.arrow" in str(error.value)


def test_unequal_columns_and_wrong_dtypes_are_refused(tmp_path, store_parts):
    short = changed(store_parts, "events", "action", np.zeros(4, np.int32))
    with pytest.raises(
        ValueError, match=r"events.arrow: columns of unequal length .*'action': 4, 'watch"
    ):
        event_store.write_store(tmp_path / "bad", **short)
    wide = changed(store_parts, "events", "timestamp_s", np.zeros(5, np.float64))
    with pytest.raises(
        TypeError, match="events.arrow column timestamp_s: dtype float64 found, int64 expected"
    ):
        event_store.write_store(tmp_path / "bad", **wide)
    offsets = changed(store_parts, "windows", "positive_offsets", np.array([0, 2], np.int64))
    with pytest.raises(ValueError, match="positive_events: 2 offsets for 2 windows"):
        event_store.write_store(tmp_path / "bad", **offsets)
    users = {k: v for k, v in store_parts["users"].items() if k != "register_days_range"}
    with pytest.raises(ValueError, match="users.parquet column register_days_range: missing"):
        event_store.write_store(tmp_path / "bad", **{**store_parts, "users": users})


def rewrite_events(path, change, batches=1):
    """Rewrites events.arrow on disk, past the writer's checks."""
    file = path / schema.EVENTS_FILE
    table = change(pa.ipc.open_file(file).read_all())
    with pa.ipc.new_file(str(file), table.schema) as writer:
        size = -(-table.num_rows // batches)
        for batch in table.combine_chunks().to_batches(max_chunksize=size):
            writer.write_batch(batch)


def column_as(name, dtype):
    def change(table):
        at = table.schema.get_field_index(name)
        return table.set_column(at, name, table[name].cast(dtype))

    return change


def test_broken_files_on_disk_are_refused(store_path):
    rewrite_events(store_path, column_as("watch_time_s", pa.float64()))
    with pytest.raises(
        TypeError, match="column watch_time_s: dtype float64 found, float32 expected"
    ):
        event_store.open_store(store_path)
    rewrite_events(store_path, column_as("watch_time_s", pa.float32()), batches=2)
    with pytest.raises(ValueError, match="2 record batches found, 1 expected"):
        event_store.open_store(store_path)
    backwards = pa.array([100, 200, 150, 50, 60], pa.int64())
    rewrite_events(store_path, lambda t: t.set_column(2, "timestamp_s", backwards))
    with pytest.raises(ValueError, match="row 2: timestamp_s=150: out of order"):
        event_store.open_store(store_path)
    gap = pa.array([100, None, 200, 50, 60], pa.int64())
    rewrite_events(store_path, lambda t: t.set_column(2, "timestamp_s", gap))
    with pytest.raises(ValueError, match="column timestamp_s: 1 missing values; none is allowed"):
        event_store.open_store(store_path)
    rewrite_events(store_path, lambda t: t.drop_columns(["action"]))
    with pytest.raises(ValueError, match="events.arrow column action: missing; expected int32"):
        event_store.open_store(store_path)
    (store_path / schema.EVENTS_FILE).write_text("user_id,video_id\n")
    with pytest.raises(ValueError, match="events.arrow: not an Arrow file"):
        event_store.open_store(store_path)


def test_other_format_version_is_refused(store_path):
    file = store_path / schema.STATS_FILE
    stats = json.loads(file.read_text())
    file.write_text(json.dumps({**stats, "format_version": 0}))
    with pytest.raises(ValueError, match="format_version=0: this version reads 1"):
        event_store.open_store(store_path)


def test_user_index_that_is_not_dense_is_refused(store_path):
    file = store_path / schema.USERS_FILE
    table = pa.parquet.read_table(file)
    pa.parquet.write_table(table.set_column(0, "user_index", pa.array([0, 2], pa.int32())), file)
    with pytest.raises(ValueError, match=r"users.parquet column user_index: must be 0, 1, 2"):
        event_store.open_store(store_path)
