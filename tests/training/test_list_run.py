"""Training on list columns is training on the event store they came from; features change it."""

import dataclasses

import jax
import numpy as np
import pytest

from hstu_jax import cli, prepare
from hstu_jax.config.feature_schema import IdFeature, NormalizerConfig, RawFeature
from hstu_jax.data import event_store
from hstu_jax.training import counting, evaluation
from hstu_jax.training import run as run_lib
from tests.data import lists
from tests.training.small_config import small_config, with_two_tables

AUTHOR = IdFeature(num_buckets=7, embedding_dim=4, embedding_name="author")


@pytest.fixture(scope="module")
def rich_store(small_store, tmp_path_factory):
    """The small sample with an author and a length of every item, by the item's number."""
    items = np.arange(small_store.num_items)
    return event_store.write_store(
        tmp_path_factory.mktemp("rich") / "store",
        events=small_store.events,
        windows=small_store.windows,
        users=small_store.users,
        items=small_store.items,
        vocabularies=small_store.vocabularies,
        stats=small_store.stats,
        item_features={"author": items % 7, "seconds": (items % 50) * 2.0},
    )


@pytest.fixture(scope="module")
def folder(rich_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "lists"
    prepare.main(["list_columns", "--from", str(rich_store.path), "--out_dir", str(folder)])
    return folder


def rich_config(store, workdir, **settings):
    """The small configuration with features of items, and item vectors of 24 + 3 numbers."""
    config = small_config(
        store,
        workdir,
        model__user_tower__hstu__attn_num_layers=1,
        # "aligned" starts with only as many inputs as the model is wide, and leaves out the others.
        model__initialization="reference",
        **settings,
    )
    config = with_two_tables(config)
    scaled = NormalizerConfig(method="zscore", standard_deviation=50.0)
    groups = config.feature_groups
    return dataclasses.replace(
        config,
        features={**config.features, "uih_seq__author": AUTHOR, "cand_seq__author": AUTHOR},
        raw_features={
            "uih_seq__seconds": RawFeature(normalizer=scaled),
            "cand_seq__seconds": RawFeature(boundaries=(20.0, 60.0), embedding_dim=3),
        },
        feature_groups={
            **groups,
            "uih": (*groups["uih"], "uih_seq__author", "uih_seq__seconds"),
            "candidate": (*groups["candidate"], "cand_seq__author", "cand_seq__seconds"),
        },
    )


def reading(folder):
    """Settings that read the exported files."""
    return {
        "data__source": "list_columns",
        "data__path": "not read",
        "data__label_fields": ("cand_seq__action_weight", "cand_seq__watch_time"),
        "data__list_columns__train_input_path": f"{folder}/train/*.parquet",
        "data__list_columns__validation_input_path": f"{folder}/validation/*.parquet",
        "data__list_columns__eval_input_path": f"{folder}/test/*.parquet",
        "data__list_columns__item_input_path": f"{folder}/items.parquet",
    }


def build(config):
    return run_lib.build_run(config, cli.open_data(config), devices=jax.devices()[:1])


def weights(state):
    return jax.device_get({name: table.weights for name, table in state.tables.items()})


def test_runs_are_equal_and_learn_every_feature(rich_store, folder, tmp_path):
    run = build(rich_config(rich_store, tmp_path, data__source="event_store"))
    batch = run.pipeline.batch_at(0).batch
    author, seconds = batch.positive["cand_seq__author"], batch.history["uih_seq__seconds"]
    others = (
        dataclasses.replace(batch, positive={**batch.positive, "cand_seq__author": 6 - author}),
        dataclasses.replace(batch, history={**batch.history, "uih_seq__seconds": seconds + 1}),
    )
    losses = set()
    for other in (*others, batch):
        state = run_lib.init_state(run)
        before = weights(state)
        state, metrics = run.train_step(state, run.put(other))
        assert metrics.num_not_finite == 0
        losses.add(float(metrics.loss_sum))
    assert len(losses) == 3
    for name, used in (("author", 7), ("cand_seq__seconds_emb", 3)):
        is_changed = (weights(state)[name] != before[name]).any(axis=1)
        assert is_changed[:used].all() and not is_changed[used:].any()
    # Evaluation gives the item tower the same features: no two items have the same vector.
    vectors = np.asarray(evaluation.item_vectors(run, state))[: rich_store.num_items]
    assert len(np.unique(vectors, axis=0)) == rich_store.num_items

    other_run = build(rich_config(rich_store, tmp_path, **reading(folder)))
    other = run_lib.init_state(other_run)
    other, _ = other_run.train_step(other, run.put(other_run.pipeline.batch_at(0).batch))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    # The banner says what was left out on reading.
    banner = run_lib.describe(other_run, other)
    assert "train: 608 rows of 1 file(s); 0 without a candidate left out" in banner


def test_counted_baselines_take_the_rows_as_windows(tmp_path):
    lists.write_both(tmp_path)
    paths = {"validation_input_path": f"{tmp_path}/test/*.parquet"}
    config = lists.config(tmp_path, **paths)
    store = cli.open_data(config)
    eval_set = evaluation.make_eval_set(store, split="test", exclude_seen=True)
    counted, note = counting.counting_baselines(store, eval_set, config.eval)
    assert "pairs of the training windows" in note
    # The test row whose positive is in its history has nothing to rank.
    ranks = counted["popularity"].ranks
    assert (ranks.num_ranked, ranks.num_seen, ranks.num_cold) == (3, 1, 0)


def test_export_prints_the_flags_and_refuses_a_used_folder(small_store, folder, tmp_path, capsys):
    arguments = ["list_columns", "--from", str(small_store.path), "--out_dir"]
    prepare.main([*arguments, str(tmp_path / "again"), "--delimited", "--max_history", "3"])
    text = capsys.readouterr().out
    assert f"--config.data.list_columns.eval_input_path={tmp_path}/again/test/*.parquet" in text
    assert "--config.sequences.cand_seq.sequence_delim='|'" in text
    with pytest.raises(SystemExit, match="exists and is not empty; choose another folder"):
        prepare.main([*arguments, str(folder)])


def test_the_oracle_is_of_the_sample_only(folder, small_store, tmp_path):
    config = small_config(small_store, tmp_path, eval__oracle=True, **reading(folder))
    with pytest.raises(ValueError, match="eval.oracle=True: only the generated sample has true"):
        cli.open_data(config)
