"""Several features a group, of events, items, users and rows: what batches hold, by loops."""

import dataclasses

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_jax.config.feature_schema import (
    IdFeature,
    NormalizerConfig,
    RawFeature,
    SequenceConfig,
)
from hstu_jax.data import event_store, list_columns, list_export, raw_columns
from hstu_jax.data.raw_columns import RawColumn
from hstu_jax.features import columns, id_mapping, pipeline
from tests.data import lists
from tests.features.test_list_batches import assert_same_batches, list_config

AUTHOR = IdFeature(hash_bucket_size=30, embedding_dim=4, embedding_name="author")
KIND = IdFeature(vocab_list=("short", "long"), embedding_dim=3, max_unknown_share=1.0)
MINUTES = RawFeature(normalizer=NormalizerConfig(method="zscore", standard_deviation=60.0))
HOW_LONG = RawFeature(boundaries=(10.0, 45.0), embedding_dim=5, embedding_name="how_long")
BITS = IdFeature(num_buckets=256, embedding_dim=2)


@pytest.fixture
def rich_store(make_store, tmp_path):
    """A store whose items have an author, a kind and a length."""
    rng = np.random.default_rng(3)
    plain = make_store(rng.integers(0, 30, 40), splits=[0] * 30 + [1] * 4 + [2] * 6)
    item_features = {
        "author": rng.integers(10**9, 10**10, 50),
        "kind": np.array(["short", "long", "other"])[rng.integers(0, 3, 50)],
        "seconds": rng.uniform(0, 90, 50),
    }
    return event_store.write_store(
        tmp_path / "rich",
        events=plain.events,
        windows=plain.windows,
        users=plain.users,
        items=plain.items,
        vocabularies={},
        stats={},
        item_features=item_features,
    )


@pytest.fixture
def rich_config(make_config):
    """Histories of 5 features and candidates of 4, besides two of the user."""
    config = make_config(contextual=2)
    features = {
        **config.features,
        "uih_seq__author": AUTHOR,
        "cand_seq__author": AUTHOR,
        "cand_seq__kind": KIND,
        "uih_seq__bits": dataclasses.replace(BITS, expression="user:action_weight"),
    }
    raw_features = {
        "uih_seq__minutes": dataclasses.replace(MINUTES, expression="item:seconds"),
        "cand_seq__seconds": MINUTES,
        "uih_seq__watched": dataclasses.replace(HOW_LONG, expression="user:watch_time"),
    }
    groups = {
        **config.feature_groups,
        "uih": (*config.feature_groups["uih"], "uih_seq__author", "uih_seq__bits",
                "uih_seq__minutes", "uih_seq__watched"),
        "candidate": ("cand_seq__video_id", "cand_seq__author", "cand_seq__kind",
                      "cand_seq__seconds"),
    }  # fmt: skip
    tower = dataclasses.replace(config.model, output_dim=8)
    return dataclasses.replace(
        config, features=features, raw_features=raw_features, feature_groups=groups, model=tower
    )


def test_batches_hold_every_feature(rich_store, rich_config):
    assert rich_config.group_width("uih") == 64 + 4 + 2 + 1 + 5
    assert rich_config.group_width("candidate") == 64 + 4 + 3 + 1
    item = rich_store.features.item
    seconds = item["seconds"].values
    kinds = np.array(["short", "long", "other"])
    kind_of = item["kind"].values[item["kind"].codes]
    assert set(kind_of) == set(kinds)
    author_id = (id_mapping.hash_words(item["author"].values) % np.uint64(30)).astype(int)
    kind_id = np.array([{"short": 2, "long": 3, "other": 1}[kind] for kind in kind_of])
    pipe = pipeline.Pipeline(rich_config, rich_store)
    batch = pipe.batch_at(0).batch
    is_used = batch.query_mask
    video = batch.positive["cand_seq__video_id"]
    for part, mask in ((batch.positive, is_used), (batch.negative, slice(None))):
        video = part["cand_seq__video_id"][mask]
        np.testing.assert_array_equal(part["cand_seq__author"][mask], author_id[video])
        np.testing.assert_array_equal(part["cand_seq__kind"][mask], kind_id[video])
        expected = (seconds[video] / 60).astype(np.float32)
        np.testing.assert_array_equal(part["cand_seq__seconds"][mask], expected)
        assert part["cand_seq__seconds"].dtype == np.float32
    for group, user in np.argwhere(batch.segment_lengths > 2):
        first = batch.segment_starts[group, user] + 2
        slots = slice(first, batch.segment_starts[group, user] + batch.segment_lengths[group, user])

        def held(name, group=group, slots=slots):
            values = batch.history[name] if name in batch.history else getattr(batch, name)
            return values[group].reshape(-1)[slots]

        video = held("uih_seq__video_id")
        np.testing.assert_array_equal(held("uih_seq__author"), author_id[video])
        np.testing.assert_array_equal(held("uih_seq__bits"), held("action"))
        expected = (seconds[video] / 60).astype(np.float32)
        np.testing.assert_array_equal(held("uih_seq__minutes"), expected)
        watched = held("watch_time_s")
        expected = (watched >= 10).astype(int) + (watched >= 45)
        np.testing.assert_array_equal(held("uih_seq__watched"), expected)
    unknown = int(np.count_nonzero(kind_id == 1))
    assert pipe.notes == (f"cand_seq__kind: 0 values missing and {unknown} unknown of 50",)


def test_list_columns_of_it_give_the_same(rich_store, rich_config, tmp_path):
    list_export.export(rich_store, tmp_path / "lists", options=list_export.ExportOptions())
    lists_config = list_config(rich_config, tmp_path / "lists")
    read = list_columns.open_list_columns(lists_config)
    one, other = pipeline.Pipeline(lists_config, read), pipeline.Pipeline(rich_config, rich_store)
    for step in range(other.num_steps(0)):
        assert_same_batches(one.batch_at(step), other.batch_at(step))


def test_further_columns_change_the_fingerprint(rich_store, make_store):
    plain = dataclasses.replace(rich_store, features=type(rich_store.features)())
    assert plain.fingerprint() == rich_store.stats["content_sha256"] != rich_store.fingerprint()
    again = event_store.open_store(rich_store.path)
    assert again.fingerprint() == rich_store.fingerprint()


def test_rows_have_features_of_their_own(tmp_path):
    """One user with changing features, several values a row, missing ones, a raw feature."""
    tags = [[1, 2], [], [9], [3, 1, 2]]
    rows = [
        {
            **row,
            "user_id": 5,
            "tags": tags[n],
            "city": ["x", None, "x", "y"][n],
            "age": 20.0 + n,
            "scores": [0.5 + n, 1.5],
        }
        for n, row in enumerate(lists.ROWS)
    ]
    lists.write_both(tmp_path, rows, types={"tags": pa.list_(pa.int64())})
    features = {
        "user_id": IdFeature(num_buckets=9, embedding_dim=2),
        "tags": IdFeature(num_buckets=10, embedding_dim=2, pooling="mean"),
        "town": IdFeature(vocab_list=("x", "y"), embedding_dim=2, expression="user:city"),
    }
    raw = {
        "age": RawFeature(boundaries=(21.5,), embedding_dim=2),
        "scores": RawFeature(value_dim=2),
    }
    config = lists.config(
        tmp_path,
        features=features,
        raw_features=raw,
        groups={"contextual": ("user_id", "tags", "town", "age", "scores")},
    )
    pipe = pipeline.Pipeline(config, list_columns.open_list_columns(config), split="test")
    made = pipe.batch_at(0)
    found = {
        int(window) - 3: slot for slot, window in enumerate(made.window_index[0]) if window >= 0
    }
    contextual = {name: values[0] for name, values in made.batch.contextual.items()}
    expected = {  # row number among those kept -> values
        0: ([1, 2, -1], 2, 0, [0.5, 1.5]),
        1: ([-1, -1, -1], 0, 0, [1.5, 1.5]),
        2: ([3, 1, 2], 3, 1, [3.5, 1.5]),
    }
    for row, (tag, town, age, scores) in expected.items():
        slot = found[row]
        assert contextual["tags"][slot].tolist() == tag
        assert (contextual["town"][slot], contextual["age"][slot]) == (town, age)
        assert contextual["user_id"][slot] == 5
        assert contextual["scores"][slot].tolist() == scores
    assert contextual["scores"].dtype == np.float32
    # Of the training and test rows that are kept, two have no town.
    assert "town: 2 values missing and 0 unknown of 6" in pipe.notes
    assert pipe.notes[0].startswith("train: 3 rows of 1 file(s); 1 without a candidate left out")


def test_a_feature_of_the_history_may_read_the_action_column_too(tmp_path):
    """In delimited files its type stays the action's, whatever the feature is."""
    features = {
        "uih_seq__kind": IdFeature(
            vocab_list=("1", "2", "3"), embedding_dim=2, expression="user:action_weight"
        )
    }
    groups = {"uih": ("uih_seq__video_id", "uih_seq__kind")}
    for delimiter in ("", "|"):
        lists.write_both(tmp_path, delimiter=delimiter)
        sequence = SequenceConfig(sequence_delim=delimiter)
        config = lists.config(
            tmp_path,
            features=features,
            groups=groups,
            sequences={"uih_seq": sequence, "cand_seq": sequence},
        )
        store = list_columns.open_list_columns(config)
        assert store.events.action[:3].tolist() == [1, 2, 3]
        found = pipeline.Pipeline(config, store).source.columns.history
        assert found["uih_seq__kind"][:3].tolist() == [2, 3, 4]


def test_pandas_categories_are_read(tmp_path):
    rows = [{**row, "city": ["x", None, "x", "y"][n]} for n, row in enumerate(lists.ROWS)]
    rows.append({**lists.ROWS[0], "city": ""})  # an empty string is a missing value too
    features = {"city": IdFeature(vocab_list=("x", "y"), embedding_dim=2)}
    config = lists.config(tmp_path, features=features, groups={"contextual": ("city",)})
    lists.write_both(tmp_path, rows, types={"city": pa.dictionary(pa.int8(), pa.string())})
    store = list_columns.open_list_columns(config)
    values = pipeline.Pipeline(config, store).source.columns.contextual["city"]
    assert values.tolist() == [2, 0, 3, 0] * 2


def test_other_words_in_a_vocabulary_file_are_another_run(tmp_path):
    lists.write_both(tmp_path, [{**row, "city": "x"} for row in lists.ROWS])
    prints = []
    for name, words in (("a", "x\ny\n"), ("b", "y\nx\n"), ("c", "x\ny\n")):
        path = tmp_path / name
        path.write_text(words)
        features = {"city": IdFeature(vocab_file=str(path), embedding_dim=2)}
        config = lists.config(tmp_path, features=features, groups={"contextual": ("city",)})
        store = list_columns.open_list_columns(config)
        prints.append(pipeline.Pipeline(config, store).fingerprint())
    assert prints[0] == prints[2] != prints[1]


def test_strings_of_several_values(tmp_path):
    rows = [{**row, "tags": "a\x1db" if n else "b"} for n, row in enumerate(lists.ROWS)]
    lists.write_both(tmp_path, rows)
    feature = IdFeature(vocab_list=("a", "b"), embedding_dim=2)
    for separator, expected in (("\x1d", [[3, -1], [2, 3], [2, 3]]), (",", None)):
        described = dataclasses.replace(feature, separator=separator)
        config = lists.config(
            tmp_path, features={"tags": described}, groups={"contextual": ("tags",)}
        )
        store = list_columns.open_list_columns(config)
        if expected is None:
            with pytest.raises(ValueError, match="vocab_list: does not list 'a"):
                pipeline.Pipeline(config, store)
            continue
        values = pipeline.Pipeline(config, store).source.columns.contextual["tags"]
        assert values[:3].tolist() == expected


def test_strings_are_split_by_a_plain_loop():
    words = np.array(["b", "a\x1db\x1dc", "", "c\x1d"])
    codes = np.array([1, -1, 0, 3, 2, 1])
    split = raw_columns.split_strings(RawColumn(values=words, codes=codes), "\x1d")
    expected = [
        [None] if code < 0 else [part or None for part in words[code].split("\x1d")]
        for code in codes
    ]
    found = [
        [None if code < 0 else str(split.values[code]) for code in split.codes[first:last]]
        for first, last in zip(split.offsets, split.offsets[1:], strict=False)
    ]
    assert found == expected
    plain = RawColumn(values=words[[0, 2]], codes=codes[:0])
    assert raw_columns.split_strings(plain, "\x1d") is plain


def test_users_of_an_event_store_may_have_several_values(make_store, make_config):
    store = make_store([3, 4, 2])
    tags = {"tags": RawColumn(values=np.array(["x\x1dy", "y", "x"]))}
    store = dataclasses.replace(store, features=dataclasses.replace(store.features, user=tags))
    config = make_config(contextual=0)
    features = {**config.features, "tags": IdFeature(vocab_list=("x", "y"))}
    groups = {**config.feature_groups, "contextual": ("tags",)}
    found = columns.resolve_columns(features=features, feature_groups=groups, store=store)
    assert found.contextual["tags"].tolist() == [[2, 3], [3, -1], [2, -1]]


def test_lists_of_users_are_exported_as_they_are(make_store, make_config, tmp_path):
    store = make_store([3, 4, 2, 5], splits=[0, 0, 1, 2])
    path = store.path / "users.parquet"
    tags = pa.array([["x", "y"], [], None, ["y", None]], pa.list_(pa.string()))
    pq.write_table(pq.read_table(path).append_column("tags", tags), path)
    store = event_store.open_store(store.path)
    config = make_config(contextual=0)
    config = dataclasses.replace(
        config,
        features={**config.features, "tags": IdFeature(vocab_list=("x", "y"))},
        feature_groups={**config.feature_groups, "contextual": ("tags",)},
    )
    list_export.export(store, tmp_path / "lists", options=list_export.ExportOptions())
    rows = list_config(config, tmp_path / "lists")
    one = pipeline.Pipeline(rows, list_columns.open_list_columns(rows))
    other = pipeline.Pipeline(config, store)
    assert_same_batches(one.batch_at(0), other.batch_at(0))
    tags = other.source.columns.contextual["tags"]
    assert tags.tolist() == [[2, 3], [-1, -1], [-1, -1], [3, 0]]


def test_a_feature_of_items_needs_the_item_file(tmp_path):
    lists.write_both(tmp_path)
    features = {"uih_seq__author": AUTHOR}
    groups = {"uih": ("uih_seq__video_id", "uih_seq__author")}
    config = lists.config(tmp_path, features=features, groups=groups)
    with pytest.raises(ValueError, match=r"column uih_seq__author: missing; .*item_input_path"):
        list_columns.open_list_columns(config)
    candidate = {"candidate": ("cand_seq__video_id", "cand_seq__author")}
    config = lists.config(tmp_path, features={"cand_seq__author": AUTHOR}, groups=candidate)
    with pytest.raises(ValueError, match=r"item_input_path='': the candidates' feature 'author'"):
        list_columns.open_list_columns(config)
    path = str(tmp_path / "items.parquet")
    pq.write_table(
        pa.table({"video_id": [5, 6, 7, 8, 9], "author": ["p", "q", None, "p", "r"]}), path
    )
    config = lists.config(tmp_path, features=features, groups=groups, item_input_path=path)
    store = list_columns.open_list_columns(config)
    found = pipeline.Pipeline(config, store).source.columns.history
    ids = (id_mapping.hash_words(np.array(["p", "q"])) % np.uint64(30)).astype(int)
    # The first row's history is 5, 6, 7, and 7 has no author.
    assert found["uih_seq__author"][:3].tolist() == [ids[0], ids[1], -1]


def test_rows_may_have_side_columns_of_their_own(tmp_path):
    rows = [{**r, "uih_seq__author": [None if i == 7 else f"a{i}" for i in r["uih_seq__video_id"]]}
            for r in lists.ROWS]  # fmt: skip
    lists.write_both(tmp_path, rows, types={"uih_seq__author": pa.list_(pa.string())})
    groups = {"uih": ("uih_seq__video_id", "uih_seq__author")}
    config = lists.config(tmp_path, features={"uih_seq__author": AUTHOR}, groups=groups)
    found = pipeline.Pipeline(config, list_columns.open_list_columns(config)).source.columns.history
    ids = (id_mapping.hash_words(np.array(["a5", "a6"])) % np.uint64(30)).astype(int)
    assert found["uih_seq__author"][:3].tolist() == [ids[0], ids[1], -1]


def test_an_expression_reads_another_column(make_store, make_config):
    store, config = make_store([3, 4]), make_config(contextual=1)
    follow = IdFeature(num_buckets=9, expression="user:follow_user_num_range")
    features = {**config.features, "follows": follow}
    groups = {**config.feature_groups, "contextual": ("follows",)}
    found = columns.resolve_columns(features=features, feature_groups=groups, store=store)
    np.testing.assert_array_equal(found.contextual["follows"], store.users["follow_user_num_range"])
    wrong = {**features, "follows": dataclasses.replace(follow, expression="user:folow_user")}
    with pytest.raises(ValueError) as error:
        columns.resolve_columns(features=wrong, feature_groups=groups, store=store)
    assert "feature_groups.contextual='follows' (which reads 'folow_user'): no such" in str(
        error.value
    )


def test_no_ids_leave_a_batch_whole(rich_store, rich_config):
    batch = pipeline.Pipeline(rich_config, rich_store).batch_at(0).batch
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(batch))
