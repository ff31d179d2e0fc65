"""Hard negatives and sample weights of list columns: those of the event store, and string ids."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from hstu_jax.config import sampler_schema
from hstu_jax.config.feature_schema import IdFeature
from hstu_jax.data import event_store, list_columns, list_export, schema
from hstu_jax.features import hard_negatives, pipeline, sampler_inputs
from tests.data import lists
from tests.features.test_list_batches import assert_same_batches, list_config

NUM_USERS, NUM_ITEMS = 60, 50
HEADERS = {
    "hard_neg_edge_input_path": "userid:int64\titemid:int64\tweight:float\n",
    "user_input_path": "id:int64\tweight:float\n",
    "item_input_path": "id:int64\tweight:float\tattrs:string\n",
}
PATHS = sampler_schema.PATHS[1:]


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def store(make_store, rng):
    """An event store whose ids are not its indices, and whose splits are mixed.

    So users of the exported rows come in another order. Users have a weight and windows another.
    """
    splits = rng.permutation([0] * 44 + [1] * 6 + [2] * 10)
    made = make_store(rng.integers(0, 30, NUM_USERS), splits=splits)
    items = event_store.ItemTable(
        item_id=rng.permutation(NUM_ITEMS).astype(np.int64) + 7000,
        train_count=np.array(made.items.train_count),
    )
    written = event_store.write_store(
        made.path.with_name("named"),
        events=made.events,
        windows=made.windows,
        users=made.users | {"heft": rng.random(NUM_USERS)},
        items=items,
        vocabularies={},
        stats={},
    )
    path = written.path / schema.WINDOWS_FILE
    table = pa.ipc.open_file(str(path)).read_all()
    table = table.append_column("window_heft", pa.array(rng.random(NUM_USERS).astype(np.float32)))
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_batch(table.to_batches()[0])
    return event_store.open_store(written.path)


@pytest.fixture
def folder(store, tmp_path):
    list_export.export(store, tmp_path / "lists", options=list_export.ExportOptions())
    return tmp_path / "lists"


def write_tables(folder, rng, *, user_id, item_id):
    """The three files, by the given ids of users and items; equal but for the ids."""
    folder.mkdir()
    users = [u for u in range(NUM_USERS) for _ in range(rng.integers(0, 12)) if u % 7]
    edges = [(user_id[u], item_id[rng.integers(0, NUM_ITEMS)]) for u in users]
    rng.shuffle(edges)
    lines = {
        "hard_neg_edge_input_path": [f"{user}\t{item}\t1\n" for user, item in edges],
        "user_input_path": [f"{user_id[u]}\t1\n" for u in range(0, NUM_USERS - 5)],
        "item_input_path": [f"{item_id[i]}\t{1 + i % 4}\tx:{item_id[i]}\n" for i in range(5, 50)],
    }
    for name, header in HEADERS.items():
        (folder / name).write_text(header + "".join(lines[name]))
    return {name: str(folder / name) for name in HEADERS}


def open_both(config, lists_config, store):
    """(pipeline of the rows, pipeline of the event store)"""
    read = list_columns.open_list_columns(lists_config)
    return pipeline.Pipeline(lists_config, read), pipeline.Pipeline(config, store)


def assert_same_steps(actual, expected):
    for step in range(expected.num_steps(0) + 1):
        assert_same_batches(actual.batch_at(step), expected.batch_at(step))
    with actual.eval_batches("test") as some, expected.eval_batches("test") as others:
        for a, b in zip(some, others, strict=True):
            assert_same_batches(a, b)


@pytest.mark.parametrize("strategy", ["full", "random"])
@pytest.mark.parametrize("field", ["user_id", "user_active_degree"])
def test_hard_negatives_are_those_of_the_event_store(
    store, folder, make_config, tmp_path, strategy, field
):
    keys = store.users[field]
    row_keys = np.arange(NUM_USERS) if field == "user_id" else keys
    files = [
        write_tables(tmp_path / name, np.random.default_rng(9), user_id=users, item_id=items)
        for name, users, items in (
            ("original", keys, store.items.item_id),
            ("rows", row_keys, np.arange(NUM_ITEMS)),
        )
    ]
    fields = {
        "kind": "HardNegativeSampler",
        "num_hard_sample": 3,
        "hard_sample_strategy": strategy,
        "user_id_field": field,
        "item_id_field": "cand_seq__video_id",
        "attr_fields": ("kind", "video_id"),
        "max_unknown_share": 0.3,  # items and users that their tables do not list
    }
    configs = [
        make_config(num_groups=2, **{f"sampler_{k}": v for k, v in {**fields, **paths}.items()})
        for paths in files
    ]
    actual, expected = open_both(configs[0], list_config(configs[1], folder), store)
    assert actual.hard_negatives_summary() == expected.hard_negatives_summary()
    masks = [expected.batch_at(step).batch.hard_negative_mask for step in range(2)]
    assert sum(mask.sum() for mask in masks) > 20
    assert_same_steps(actual, expected)


@pytest.mark.parametrize("name", ["heft", "window_heft"])
def test_weights_are_those_of_the_event_store(store, folder, make_config, name):
    config = make_config(num_groups=2, sample_weight_fields=(name,))
    actual, expected = open_both(config, list_config(config, folder), store)
    assert len(np.unique(expected.batch_at(0).batch.sample_weight)) > 4
    assert_same_steps(actual, expected)
    # Other weights make another run.
    plain = list_config(make_config(num_groups=2), folder)
    read = list_columns.open_list_columns(plain)
    assert pipeline.Pipeline(plain, read).fingerprint() != actual.fingerprint()


def test_one_column_in_both_files_is_not_exported(store, tmp_path):
    users = pa.parquet.read_table(store.path / schema.USERS_FILE)
    users = users.append_column("window_heft", pa.array(np.ones(NUM_USERS)))
    pa.parquet.write_table(users, store.path / schema.USERS_FILE)
    again = event_store.open_store(store.path)
    with pytest.raises(ValueError, match=r"^column window_heft: stands in both windows.arrow and"):
        list_export.export(again, tmp_path / "lists", options=list_export.ExportOptions())


TEXT = pa.list_(pa.string())
WORDS = {"uih_seq__video_id": TEXT, "cand_seq__video_id": TEXT}


def string_rows():
    """The rows of `lists` with ids `v5`, ..., `u1`, ... and an account that one row lacks."""
    rows = []
    for n, row in enumerate(lists.ROWS):
        named = {name: [f"v{i}" for i in row[name]] for name in WORDS}
        account = ["anna", None, "anna", "bob"][n]
        user = f"user {row['user_id']}"
        rows.append({**row, **named, "user_id": user, "account": account, "heft": 0.5 * n})
    return rows


def string_config(folder, edges, *, header="u:string\ti:string\tw:float", paths=None, **fields):
    """A configuration over string ids with a hard sampler over `edges`."""
    (folder / "edges.tsv").write_text("\n".join([header, *edges]) + "\n")
    hashed = IdFeature(hash_bucket_size=64, embedding_dim=128, embedding_name="video_id_emb")
    features = {"uih_seq__video_id": hashed, "cand_seq__video_id": hashed}
    config = lists.config(folder, features=features, **(paths or {}))
    sampler = sampler_schema.NegativeSamplerConfig(
        kind="HardNegativeSampler",
        num_hard_sample=2,
        hard_neg_edge_input_path=str(folder / "edges.tsv"),
        **fields,
    )
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, negative_sampler=sampler)
    )


def hard_ids(config, **options):
    """Ids of the hard negatives of every window of the opened rows."""
    store = list_columns.open_list_columns(config)
    section = config.data.negative_sampler
    edges = sampler_inputs.read_hard_edges(section, store, is_listed_item=None)
    sampler = hard_negatives.HardNegativeSampler(edges, num_sample=2, **options)
    windows = np.arange(len(store.windows))
    none = np.empty(0, np.int64)
    drawn = sampler.draw(
        windows, salt=np.full(len(windows), 5), positive_row=none, positive_item=none
    )
    return [
        store.items.item_id[index[mask]].tolist()
        for index, mask in zip(drawn.item_index, drawn.mask, strict=True)
    ]


EDGES = ["user 3\tv8\t1", "user 1\tv9\t1", "user 3\tv5\t1", "user 3\tv6\t1"]


def test_string_ids_are_matched_as_they_are(tmp_path):
    lists.write_both(tmp_path, string_rows(), types=WORDS)
    config = string_config(tmp_path, EDGES)
    # Rows 0, 1 and 3 have candidates, in both splits; user 2 has no edge.
    assert hard_ids(config) == [["v9"], [], ["v8", "v5"]] * 2
    chosen = hard_ids(config, strategy="random")
    assert set(chosen[2]) < {"v8", "v5", "v6"} and chosen[:3] == chosen[3:]
    batch = pipeline.Pipeline(config, list_columns.open_list_columns(config)).batch_at(0).batch
    assert batch.hard_negative_mask.sum() == 3
    with pytest.raises(ValueError, match=r"line 1: header .*: must have the types \['string', 'st"):
        hard_ids(string_config(tmp_path, EDGES, header="u:int64\ti:string\tw:float"))
    with pytest.raises(ValueError, match=r"entry 5: userid=user 9: no user_id of the list columns"):
        hard_ids(string_config(tmp_path, [*EDGES, "user 9\tv5\t1"]))
    with pytest.raises(ValueError, match=r"entry 5: itemid=v50: no item of the list columns \(1"):
        hard_ids(string_config(tmp_path, [*EDGES, "user 1\tv50\t1"]))


def test_users_may_be_told_by_another_column_of_the_rows(tmp_path):
    lists.write_both(tmp_path, string_rows(), types=WORDS)
    edges = ["bob\tv8\t1", "anna\tv9\t1", "anna\tv5\t1"]
    by_account = string_config(tmp_path, edges, user_id_field="account")
    # A row without an account has no hard negatives.
    expected = [["v9", "v5"], [], ["v8"]] * 2
    assert hard_ids(by_account) == expected
    rows_alone = {"user_id_field": ""}  # of list_columns: every row is another user
    assert hard_ids(string_config(tmp_path, edges, user_id_field="account", paths=rows_alone)) == (
        expected
    )


def test_columns_that_name_no_user_are_refused(tmp_path):
    rows = [{**row, "both": ["a", "b"]} for row in string_rows()]
    lists.write_both(tmp_path, rows, types={**WORDS, "both": TEXT})
    for name, kind, message in (
        ("acount", ValueError, r"user_id_field='acount': no such column in .*, which has \['acc"),
        ("both", ValueError, "user_id_field='both': has several values an entry in the list col"),
        ("heft", TypeError, "user_id_field='heft': holds float64 in the list columns; ids are"),
    ):
        with pytest.raises(kind, match=message):
            hard_ids(string_config(tmp_path, EDGES, user_id_field=name))


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([1.0, 2.0, -1.0, 1.0], ValueError, r"a.parquet row 2: heft=-1.0: must be finite and not"),
        ([1.0, np.nan, np.inf, 1.0], ValueError, r"row 1: heft=nan: must be finite .* \(2 in all"),
        (["a", "b", "c", "d"], TypeError, "column heft: string found; a weight is one number a"),
        ([[1.0]] * 4, TypeError, "column heft: list<.*> found; a weight is one number a row"),
        ([1.0, None, 1.0, 1.0], ValueError, "row 1: heft is null; every row needs one"),
        (None, ValueError, "sample_weight_fields='heft': no such column in .*; name one of them"),
    ],
)
def test_weights_of_rows_that_are_refused(tmp_path, values, kind, message):
    further = [{}] * 4 if values is None else [{"heft": value} for value in values]
    rows = [{**row, **more} for row, more in zip(lists.ROWS, further, strict=True)]
    lists.write_both(tmp_path, rows)
    config = lists.config(tmp_path)
    data = dataclasses.replace(config.data, sample_weight_fields=("heft",))
    with pytest.raises(kind, match=message):
        list_columns.open_list_columns(dataclasses.replace(config, data=data))
