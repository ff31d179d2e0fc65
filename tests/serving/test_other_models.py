"""Exports of models with other inputs: list columns with every kind of feature, original ids."""

import dataclasses

import jax
import numpy as np
import pyarrow as pa
import pytest

from hstu_jax import cli
from hstu_jax.config import resolve
from hstu_jax.config.feature_schema import IdFeature, NormalizerConfig, RawFeature, SequenceConfig
from hstu_jax.config.tower_schema import TimestampLayerNormConfig
from hstu_jax.data import event_store, list_export
from hstu_jax.serving import artifact, catalogue, contract, exporter, live_check, lowering, trained
from hstu_jax.training import run as run_lib
from tests.data import lists
from tests.training.small_config import small_config

OPTIONS = exporter.ExportOptions(batch_sizes=(8,), item_batch_sizes=(64,), platforms=("cpu",))
WORDS = ("new", "old", "none")


def model_of(config, store):
    run = run_lib.build_run(config, store, devices=jax.devices()[:1])
    state = run_lib.init_state(run)
    return run, trained.from_state(config, state, recorded=resolve.to_text(config))


def list_config(folder):
    """Hashed items, a vocabulary, buckets, plain numbers, several values, strings, newest first."""
    item = IdFeature(hash_bucket_size=50, embedding_dim=8, embedding_name="item")
    features = {
        "uih_seq__video_id": item,
        "cand_seq__video_id": item,
        "tags": IdFeature(vocab_list=WORDS, embedding_dim=4, pooling="mean", separator="/",
                          max_unknown_share=1.0),
        "degree": IdFeature(num_buckets=5, default_value="2", embedding_dim=4,
                            max_unknown_share=1.0),
        "uih_seq__author": IdFeature(num_buckets=30, embedding_dim=4, max_unknown_share=1.0),
    }  # fmt: skip
    raw_features = {
        "age": RawFeature(boundaries=(20.0, 40.0), embedding_dim=4),
        "cand_seq__price": RawFeature(
            normalizer=NormalizerConfig(method="zscore", standard_deviation=50.0)
        ),
    }
    base = lists.config(
        folder,
        item_input_path=f"{folder}/items.parquet",
        features=features,
        raw_features=raw_features,
        groups={
            "uih": ("uih_seq__video_id", "uih_seq__author"),
            "candidate": ("cand_seq__video_id", "cand_seq__price"),
            "contextual": ("tags", "degree", "age"),
        },
        sequences={"uih_seq": SequenceConfig(sequence_delim="|", newest_first=True)},
    )
    tower, item_tower = base.model.user_tower, base.model.item_tower
    hstu = dataclasses.replace(
        tower.hstu,
        stu=dataclasses.replace(
            tower.hstu.stu, embedding_dim=16, num_heads=2, hidden_dim=8, attention_dim=8
        ),
        attn_num_layers=2,
        attn_truncation_split_layer=1,
        attn_truncation_tail_len=9,
        output_postprocessor="timestamp_layernorm",
        timestamp_layernorm=TimestampLayerNormConfig(
            time_duration_period_units=(3600, 86400), time_duration_units_per_period=(24, 7)
        ),
    )
    model = dataclasses.replace(
        base.model,
        item_tower=dataclasses.replace(
            item_tower, mlp=dataclasses.replace(item_tower.mlp, hidden_units=(16,), use_bn=True)
        ),
        user_tower=dataclasses.replace(tower, hstu=hstu, max_seq_len=20),
        initialization="reference",
    )
    return dataclasses.replace(base, model=model, data=dataclasses.replace(base.data, block_len=8))


@pytest.fixture(scope="module")
def of_lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    rows = [
        lists.row([f"v{i}" for i in items], [f"v{i}" for i in wanted], user=user)
        | {"tags": tags, "degree": user % 4, "age": 7.0 * user}
        for user, (items, wanted, tags) in enumerate(
            [([5, 6, 7], [8], "new/old"), ([], [5], ""), ([9, 9, 5, 6], [6], "odd")]
        )
    ]
    strings = []
    for row in rows:
        turned = {
            name: "|".join(map(str, values[::-1])) if name.startswith("uih") else values
            for name, values in row.items()
        }
        strings.append(turned)
    types = {name: pa.string() for name in rows[0] if name.startswith("uih")}
    types["cand_seq__video_id"] = pa.list_(pa.string())
    for split in ("train", "test"):
        lists.write(folder / split / "a.parquet", strings, types=types)
    names = [f"v{i}" for i in range(5, 12)]
    table = pa.table(
        {"video_id": names, "author": np.arange(7) * 4, "price": np.linspace(1, 99, 7)}
    )
    lists.pq.write_table(table, folder / "items.parquet")
    config = list_config(folder)
    store = cli.open_data(config)
    run, model = model_of(config, store)
    report = exporter.export(
        model,
        folder / "export",
        training_items=catalogue.training_items_of_store(store),
        item_rows=catalogue.rows_of_store(store, config),
        data_maps=catalogue.data_maps(store, config),
        options=OPTIONS,
    )
    return run, model, report, strings


def test_every_kind_of_feature_of_list_columns(of_lists):
    """Truncation and phases of the time in the model; invented rows, and the training's own."""
    run, model, report, rows = of_lists
    assert max(report.check.users, report.check.items) <= 1e-6
    opened = artifact.load(report.folder)
    assert opened.manifest.history.newest_first and opened.manifest.history.sequence_delim == "|"
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    vectors = opened.embed_users(columns)
    # The live side from the pipeline's own columns: ids as training has them.
    batch = run.pipeline.batch_at(0).batch
    assert np.isfinite(vectors).all() and len({v.tobytes() for v in vectors}) == 3
    mapped = run.pipeline.source.columns
    authors = opened.manifest.history_features[1]
    assert authors.item_values is not None
    stored = np.load(report.folder / authors.item_values)
    keys = np.load(report.folder / opened.manifest.item_keys).tolist()
    items = [word for row in rows[:1] for word in row["uih_seq__video_id"].split("|")[::-1]]
    np.testing.assert_array_equal(
        mapped.history["uih_seq__author"][:3], [stored[keys.index(item)] for item in items]
    )
    assert batch.tail is not None
    np.testing.assert_array_equal(opened.item_ids(), [f"v{i}" for i in range(5, 12)])
    assert opened.item_is_cold().tolist() == [False] * 5 + [True] * 2  # nobody had v10 and v11
    # Statistics of batch norm are the item tower's, beside its parameters.
    names = {array.name for array in opened.manifest.parameters if array.tower == "item"}
    assert any(name.startswith("batch_stats/item_tower/") for name in names)


def test_pooled_missing_and_unknown_values_are_counted(of_lists):
    report, rows = of_lists[2], of_lists[3]
    opened = artifact.load(report.folder, verify=False)
    opened.embed_users({name: [row[name] for row in rows] for name in rows[0]})
    # "odd" is no word; the empty tag is missing.
    assert (opened.counts["unknown_values"], opened.counts["missing_values"]) == (1, 1)
    unknown = {name: [rows[0][name]] for name in rows[0]} | {"uih_seq__video_id": ["v5|v99|v6"]}
    opened.embed_users(unknown)
    assert opened.counts["unknown_item_ids"] == 1


@pytest.fixture(scope="module")
def of_original_ids(small_store, tmp_path_factory):
    """A next-item model with a bias by time, whose items have an author, looked up by item."""
    folder = tmp_path_factory.mktemp("original")
    items = np.arange(small_store.num_items)
    store = event_store.write_store(
        folder / "store",
        events=small_store.events,
        windows=small_store.windows,
        users=small_store.users,
        items=small_store.items,
        vocabularies=small_store.vocabularies,
        stats=small_store.stats,
        item_features={"author": items * 3 % 7},
    )
    config = small_config(
        store,
        folder / "run",
        model__objective="next_item",
        model__user_tower__hstu__attn_num_layers=1,
        model__user_tower__hstu__stu__use_time_bias=True,
        model__user_tower__hstu__stu__use_gate=False,
    )
    author = IdFeature(num_buckets=7, embedding_dim=4)
    config = dataclasses.replace(
        config,
        features={**config.features, "uih_seq__author": author},
        feature_groups={
            **config.feature_groups, "uih": ("uih_seq__video_id", "uih_seq__author"),
        },
        model=dataclasses.replace(
            config.model,
            initialization="reference",
            item_tower=dataclasses.replace(config.model.item_tower, mlp=None),
        ),
    )  # fmt: skip
    run, model = model_of(config, store)
    report = exporter.export(
        model,
        folder / "export",
        training_items=catalogue.training_items_of_store(store, ids="original"),
        item_rows=catalogue.rows_of_store(store, config, ids="original"),
        data_maps=catalogue.data_maps(store, config, ids="original"),
        options=OPTIONS,
    )
    list_export.export(store, folder / "lists", options=list_export.ExportOptions(max_history=42))
    rows = lists.pq.read_table(folder / "lists" / "test" / "part-00000.parquet").slice(0, 12)
    return store, run, model, report, rows


def test_original_ids_and_features_of_items(of_original_ids):
    """Rows in the raw data's ids are the live model's rows in the ids of training."""
    store, run, model, report, rows = of_original_ids
    opened = artifact.load(report.folder)
    assert opened.manifest.ids == "original"
    dense = rows["uih_seq__video_id"].combine_chunks()
    item_ids = np.asarray(store.items.item_id)
    columns = {name: rows[name].combine_chunks() for name in rows.column_names}
    original = dict(columns)
    original["uih_seq__video_id"] = pa.ListArray.from_arrays(
        dense.offsets, pa.array(item_ids[dense.values.to_numpy()])
    )
    user_ids = np.asarray(store.users["user_id"])
    original["user_id"] = user_ids[rows["user_id"].to_numpy()]
    for name, words in store.vocabularies.items():
        numbers = rows[name].to_numpy()
        original[name] = [words[number - 1] if number else "?" for number in numbers]
    events = dense.flatten().to_numpy()
    live = live_check.user_vectors(
        model, opened.manifest, columns, item_values={"uih_seq__author": events * 3 % 7}
    )
    np.testing.assert_allclose(opened.embed_users(original), live, rtol=0, atol=1e-6)
    layer = model.variables["params"]["user_tower"]["encoder"]["stack"]["layers_0"]
    assert np.ptp(layer["logit_bias"]["by_interval"]) > 0
    assert lowering.user_shapes(model.config, batch=1, length=3)["age_s"].dtype == np.int32
    assert opened.counts["unknown_item_ids"] < opened.counts["history_items"]
    np.testing.assert_array_equal(opened.item_ids(), item_ids)
    items = live_check.item_vectors(
        model, opened.manifest, {"video_id": pa.array(np.arange(store.num_items))}
    )
    np.testing.assert_allclose(opened.item_vectors(), items, rtol=0, atol=1e-6)
    assert not [each.name for each in opened.manifest.user_inputs if "author" in each.name]
    # An item is its row of the table here: there are no parameters.
    assert not (report.folder / "item_tower").exists()


def test_original_ids_are_of_event_stores(of_lists):
    run, model = of_lists[:2]
    with pytest.raises(ValueError, match="ids='original': the model was trained on list columns"):
        catalogue.check_ids(model.config, "original")
    assert catalogue.history_features_of_items(model.config) == ("uih_seq__author",)
    assert contract.is_store(model.config) is False
