"""List columns: what a row becomes, what is left out and counted, and every refusal's message."""

import re

import numpy as np
import pyarrow as pa
import pytest

from hstu_jax.config import feature_schema
from hstu_jax.data import list_columns
from tests.data import lists

DELIMITED = {
    name: feature_schema.SequenceConfig(sequence_delim="|") for name in ("uih_seq", "cand_seq")
}


def histories(store, split="train"):
    """[(item ids, times, actions, watch times)] of every window, by loops."""
    found = []
    for window in store.windows_of_split(split):
        part = slice(store.windows.history_start[window], store.windows.history_end[window])
        found.append(
            (
                store.items.item_id[store.events.item_index[part]].tolist(),
                store.events.timestamp_s[part].tolist(),
                store.events.action[part].tolist(),
                store.events.watch_time_s[part].tolist(),
            )
        )
    return found


def positives(store, split="train"):
    items = store.items.item_id[store.events.item_index]
    return [items[store.windows.positives(w)].tolist() for w in store.windows_of_split(split)]


@pytest.mark.parametrize("delimiter", ["", "|"])
def test_rows_become_windows(tmp_path, delimiter):
    lists.write_both(tmp_path, delimiter=delimiter)
    store = list_columns.open_list_columns(
        lists.config(tmp_path, sequences=DELIMITED if delimiter else {})
    )
    kept = [row for row in lists.ROWS if row["cand_seq__video_id"]]
    names = ("video_id", "action_timestamp", "action_weight", "watch_time")
    expected = [tuple(row[f"uih_seq__{name}"] for name in names) for row in kept]
    assert histories(store) == expected == histories(store, "test")
    assert positives(store) == [[8], [5, 9], [6]]
    assert store.windows.request_time_s.tolist() == [lists.REQUEST] * 6
    # Labels are the candidates' own actions and watch times.
    of_candidates = store.windows.positive_events
    assert set(store.events.action[of_candidates].tolist()) == {3}
    assert set(store.events.watch_time_s[of_candidates].tolist()) == {1.25}
    assert store.users["user_id"][store.windows.user_index].tolist() == [1, 2, 3] * 2
    assert store.items.item_id.tolist() == [5, 6, 7, 8, 9]
    # 6 and 5 and 9 and 8 are candidates of training rows once; 7 is in a training history only.
    assert store.items.train_count.tolist() == [1, 1, 1, 1, 1]


def test_rows_without_candidates_and_empty_histories_are_counted(tmp_path):
    lists.write_both(tmp_path)
    store = list_columns.open_list_columns(lists.config(tmp_path))
    assert store.features.notes[0] == (
        "train: 3 rows of 1 file(s); 1 without a candidate left out, 1 without history; "
        "sequence_length left out 0 history entries and 0 candidates"
    )


@pytest.mark.parametrize("newest_first", [False, True])
def test_sequence_length_keeps_the_newest(tmp_path, newest_first):
    rows = [
        {
            name: value[::-1] if newest_first and name.startswith("uih") else value
            for name, value in row.items()
        }
        for row in lists.ROWS
    ]
    lists.write_both(tmp_path, rows)
    cut = feature_schema.SequenceConfig(sequence_length=2, newest_first=newest_first)
    config = lists.config(tmp_path, sequences={"uih_seq": cut})
    store = list_columns.open_list_columns(config)
    found = histories(store)
    assert [items for items, *_ in found] == [[6, 7], [], [6, 7]]
    assert [watch for *_, watch in found] == [[1.5, 2.5], [], [3.5, 4.5]]
    assert "left out 4 history entries and 0 candidates" in store.features.notes[0]
    cut = {"cand_seq": feature_schema.SequenceConfig(sequence_length=1)}
    if not newest_first:
        store = list_columns.open_list_columns(lists.config(tmp_path, sequences=cut))
        assert positives(store) == [[8], [9], [6]]


def test_newest_first_alone_turns_rows_around(tmp_path):
    rows = [{n: v[::-1] if n[:3] == "uih" else v for n, v in row.items()} for row in lists.ROWS]
    lists.write_both(tmp_path / "turned", rows)
    lists.write_both(tmp_path / "plain")
    turned = {"uih_seq": feature_schema.SequenceConfig(newest_first=True)}
    one = list_columns.open_list_columns(lists.config(tmp_path / "turned", sequences=turned))
    other = list_columns.open_list_columns(lists.config(tmp_path / "plain"))
    assert one.fingerprint() == other.fingerprint()


def test_files_are_read_in_the_order_of_their_names_in_small_batches(tmp_path, monkeypatch):
    from hstu_jax.data import list_files

    monkeypatch.setattr(list_files, "_BATCH_ROWS", 2)
    lists.write(tmp_path / "train" / "b.parquet", lists.ROWS[2:])
    lists.write(tmp_path / "train" / "a.parquet", lists.ROWS[:2])
    lists.write(tmp_path / "test" / "a.parquet", lists.ROWS)
    store = list_columns.open_list_columns(lists.config(tmp_path))
    assert histories(store) == histories(store, "test")
    bad = [{**lists.ROWS[3], "uih_seq__watch_time": [1.0, 2.0, float("nan"), 1.0, 1.0]}]
    lists.write(tmp_path / "train" / "b.parquet", [lists.ROWS[2], *bad])
    message = f"{tmp_path}/train/b.parquet row 1: uih_seq__watch_time=nan: must be finite"
    with pytest.raises(ValueError, match=re.escape(message)):
        list_columns.open_list_columns(lists.config(tmp_path))


def test_without_request_times_the_newest_event_is_the_anchor(tmp_path):
    lists.write_both(tmp_path)
    config = lists.config(tmp_path, groups={"query_time": ()})
    store = list_columns.open_list_columns(config)
    newest = lists.REQUEST - 60
    assert store.windows.request_time_s.tolist() == [newest, 0, newest] * 2


def test_string_item_ids(tmp_path):
    rows = [
        lists.row([f"v{i}" for i in r["uih_seq__video_id"]], [f"v{i}" for i in r["cand_seq__video_id"]])
        for r in lists.ROWS
    ]
    kind = pa.list_(pa.string())
    lists.write_both(
        tmp_path, rows, types={"uih_seq__video_id": kind, "cand_seq__video_id": kind}
    )
    hashed = feature_schema.IdFeature(
        hash_bucket_size=64, embedding_dim=128, embedding_name="video_id_emb"
    )
    features = {"uih_seq__video_id": hashed, "cand_seq__video_id": hashed}
    store = list_columns.open_list_columns(lists.config(tmp_path, features=features))
    assert store.items.item_id.tolist() == ["v5", "v6", "v7", "v8", "v9"]
    assert histories(store)[0][0] == ["v5", "v6", "v7"]
    lists.write_both(tmp_path, rows, delimiter="|")
    config = lists.config(tmp_path, features=features, sequences=DELIMITED)
    assert histories(list_columns.open_list_columns(config))[0][0] == ["v5", "v6", "v7"]
    rows[3]["cand_seq__video_id"] = [""]
    rows[3]["cand_seq__action_weight"] = rows[3]["cand_seq__watch_time"] = [1]
    for kind in (kind, pa.large_list(pa.large_string())):
        types = {"uih_seq__video_id": kind, "cand_seq__video_id": kind}
        lists.write_both(tmp_path, rows, types=types)
        message = r"row 3: cand_seq__video_id='': an empty id \(1 in all"
        with pytest.raises(ValueError, match=message):
            list_columns.open_list_columns(lists.config(tmp_path, features=features))


def changed(number, **columns):
    return [{**row, **columns} if n == number else row for n, row in enumerate(lists.ROWS)]


def without(column):
    return [{n: v for n, v in row.items() if n != column} for row in lists.ROWS]


T = lists.REQUEST
REFUSED = {
    "missing column": (
        without("uih_seq__watch_time"),
        ValueError,
        "column uih_seq__watch_time: missing (did you mean 'cand_seq__watch_time'?); the file has",
    ),
    "unequal side sequences": (
        changed(3, uih_seq__watch_time=[1.0]),
        ValueError,
        "a.parquet row 3: uih_seq__video_id has 5 entries and uih_seq__watch_time has 1: the",
    ),
    "labels of another length": (
        changed(1, cand_seq__action_weight=[1]),
        ValueError,
        "a.parquet row 1: cand_seq__video_id has 2 entries and cand_seq__action_weight has 1",
    ),
    "null row": (
        changed(1, uih_seq__video_id=None),
        ValueError,
        "column uih_seq__video_id: row 1 is null; write an empty list for no entry.",
    ),
    "null in a list": (
        changed(0, uih_seq__video_id=[5, None, 7]),
        ValueError,
        "row 0: uih_seq__video_id has a missing value; every entry needs one.",
    ),
    "times in milliseconds": (
        changed(3, uih_seq__action_timestamp=[T * 1000 + i for i in range(5)]),
        ValueError,
        f"row 3: uih_seq__action_timestamp={T * 1000}: looks like milliseconds",
    ),
    "request time in milliseconds": (
        changed(1, request_time=T * 1000),
        ValueError,
        f"row 1: request_time={T * 1000}: looks like milliseconds",
    ),
    "descending times": (
        changed(3, uih_seq__action_timestamp=[5, 4, 3, 2, 1]),
        ValueError,
        "row 3: uih_seq__action_timestamp=4: out of order: earlier than the entry before it; a "
        "row's history ascends in time (with sequences.uih_seq.newest_first=True it descends)",
    ),
    "history after the request": (
        changed(0, uih_seq__action_timestamp=[T, T, T + 1]),
        ValueError,
        f"row 0: uih_seq__action_timestamp={T + 1}: later than the row's request_time",
    ),
    "negative action": (
        changed(0, uih_seq__action_weight=[1, -1, 1]),
        ValueError,
        "row 0: uih_seq__action_weight=-1: must be action bits, 0 or more (1 in all)",
    ),
    "NaN watch time": (
        changed(0, uih_seq__watch_time=[1.0, float("nan"), 1.0]),
        ValueError,
        "row 0: uih_seq__watch_time=nan: must be finite and not negative",
    ),
    "null user": (
        changed(1, user_id=None),
        ValueError,
        "row 1: user_id is null; every row needs one; or set data.list_columns.user_id_field=''.",
    ),
    "null request": (
        changed(3, request_time=None),
        ValueError,
        "row 3: request_time is null; every row needs one.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_file_and_row(case, tmp_path):
    rows, kind, message = REFUSED[case]
    lists.write_both(tmp_path, rows)
    with pytest.raises(kind, match=re.escape(message)) as error:
        list_columns.open_list_columns(lists.config(tmp_path))
    assert str(tmp_path / "train" / "a.parquet") in str(error.value)


def test_wrong_types_are_refused(tmp_path):
    def opened(**options):
        sequences = options.pop("sequences", {})
        lists.write_both(tmp_path, **options)
        return list_columns.open_list_columns(lists.config(tmp_path, sequences=sequences))

    with pytest.raises(TypeError, match=r"type string: must be lists, since .*sequence_delim=''"):
        opened(delimiter="|")
    with pytest.raises(TypeError, match=r"type list<.*int64>: must be strings, since .*'\|'"):
        opened(sequences=DELIMITED)
    halves = changed(0, uih_seq__action_weight=[1.0, 1.5, 2.0])
    halves = [{**r, "uih_seq__action_weight": [float(x) for x in r["uih_seq__action_weight"]]}
              for r in halves]  # fmt: skip
    types = {"uih_seq__action_weight": pa.list_(pa.float64())}
    with pytest.raises(ValueError, match="row 0: uih_seq__action_weight has the value 1.5, which"):
        opened(rows=halves, types=types)
    words = changed(1, cand_seq__video_id=["5", "x"])
    with pytest.raises(ValueError, match=r"row 1: cand_seq__video_id has the value 'x', which"):
        opened(rows=words, delimiter="|", sequences=DELIMITED)


@pytest.mark.parametrize(
    ("column", "change", "kind", "message"),
    [
        ("user_id", float, TypeError, "column user_id: type double: ids must be integers or str"),
        ("user_id", lambda user: [user], TypeError, "column user_id: type list<.*>: ids must be"),
        ("user_id", lambda user: 2**63 + user, ValueError, "the id 9223372036854775811 is 2.63 or"),
        ("uih_seq__video_id", float, TypeError, "column uih_seq__video_id: type double: ids must"),
        ("cand_seq__video_id", lambda item: 2**63 + item, ValueError, "write such ids as strings"),
    ],
)
def test_ids_are_integers_or_strings(tmp_path, column, change, kind, message):
    is_user = column == "user_id"
    rows = [
        {**row, column: change(row[column]) if is_user else [change(i) for i in row[column]]}
        for row in lists.ROWS
    ]
    made = {float: pa.float64()}.get(change, pa.uint64())
    types = {column: made if is_user else pa.list_(made)}
    if is_user and isinstance(rows[0][column], list):
        types = {}
    lists.write_both(tmp_path, rows, types=types)
    with pytest.raises(kind, match=message):
        list_columns.open_list_columns(lists.config(tmp_path))


def test_request_times_are_whole_seconds(tmp_path):
    for value, kind in (("soon", pa.string()), (1.5, pa.float64())):
        rows = [{**row, "request_time": value} for row in lists.ROWS]
        lists.write_both(tmp_path, rows)
        with pytest.raises(TypeError, match=f"request_time: type {kind}: must hold whole seconds"):
            list_columns.open_list_columns(lists.config(tmp_path))


def test_missing_files_and_items(tmp_path):
    lists.write_both(tmp_path)
    config = lists.config(tmp_path, train_input_path=f"{tmp_path}/nothing/*")
    with pytest.raises(FileNotFoundError, match=r"train_input_path='.*': no such file; `python"):
        list_columns.open_list_columns(config)
    (tmp_path / "train" / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"text\.parquet: not a parquet file"):
        list_columns.open_list_columns(lists.config(tmp_path))


def test_item_file(tmp_path):
    import pyarrow.parquet as pq

    lists.write_both(tmp_path)
    path = tmp_path / "items.parquet"
    config = lists.config(tmp_path, item_input_path=str(path))

    def write(ids, **columns):
        pq.write_table(pa.table({"video_id": ids, **columns}), path)

    write([9, 8, 7, 6, 5, 4], train_count=[1, 2, 3, 4, 5, 0])
    store = list_columns.open_list_columns(config)
    assert store.items.item_id.tolist() == [9, 8, 7, 6, 5, 4]
    assert store.items.train_count.tolist() == [1, 2, 3, 4, 5, 0]
    assert histories(store)[0][0] == [5, 6, 7]
    write(["9", "8", "7", "6", "5"])  # strings in one file and integers in the other
    store = list_columns.open_list_columns(config)
    assert histories(store)[0][0] == ["5", "6", "7"]
    write([9, 8, 7, 6])
    message = "a.parquet row 0: uih_seq__video_id=5: no such item in data.list_columns.item_input_"
    with pytest.raises(ValueError, match=re.escape(message)):
        list_columns.open_list_columns(config)
    write(["9", ""])
    with pytest.raises(ValueError, match="column video_id: row 1 is empty; every item needs an id"):
        list_columns.open_list_columns(config)
    write([9, 8, 9])
    with pytest.raises(ValueError, match="column video_id: id 9 is on two rows"):
        list_columns.open_list_columns(config)
    write([9, None])
    with pytest.raises(ValueError, match="column video_id: row 1 is null"):
        list_columns.open_list_columns(config)
    write([5, 6, 7, 8, 9], train_count=[1, 1, -2, 1, 1])
    with pytest.raises(ValueError, match="row 2: train_count=-2: must not be negative"):
        list_columns.open_list_columns(config)
    pq.write_table(pa.table({"item": [5]}), path)
    with pytest.raises(ValueError, match=r"column video_id: missing; the file has \['item'\]"):
        list_columns.open_list_columns(config)


def test_rows_of_no_user(tmp_path):
    lists.write_both(tmp_path, without("user_id"))
    store = list_columns.open_list_columns(lists.config(tmp_path, user_id_field=""))
    assert store.windows.user_index.tolist() == list(range(6))
    assert np.array_equal(store.users["user_id"], np.arange(6))


def test_expressions_name_columns(tmp_path):
    renames = {"uih_seq__action_timestamp": "uih_seq__ts", "request_time": "asked"}
    rows = [{renames.get(n, n): v for n, v in row.items()} for row in lists.ROWS]
    lists.write_both(tmp_path, rows)
    raw_features = {
        "uih_seq__action_timestamp": feature_schema.RawFeature(expression="user:ts"),
        "request_time": feature_schema.RawFeature(expression="context:asked"),
    }
    store = list_columns.open_list_columns(lists.config(tmp_path, raw_features=raw_features))
    lists.write_both(tmp_path)
    assert store.fingerprint() == list_columns.open_list_columns(
        lists.config(tmp_path)
    ).fingerprint()
