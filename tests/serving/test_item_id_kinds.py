"""Hashed and listed item ids: integers or strings, in lists or delimited strings."""

import dataclasses
import gc
import shutil
import weakref

import numpy as np
import pyarrow as pa
import pytest

from hstu_jax.config.feature_schema import SequenceConfig
from hstu_jax.serving import artifact, exporter, feature_values, part_writer
from tests.serving import record_golden_artifact as recorded

NAMES = ("uih_seq__video_id", "cand_seq__video_id")
WORDS = tuple(map(str, range(recorded.NUM_ITEMS)))
KIND = {int: pa.int64(), str: pa.string()}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """They do not depend on the ids: lowered once."""
    kept = tmp_path_factory.mktemp("programs") / "programs"
    original, found = part_writer.write_programs, []

    def write(model, folder, sizes, *, platforms):
        if not found:
            found.append(original(model, folder, sizes, platforms=platforms))
            shutil.copytree(folder / "programs", kept)
        else:
            shutil.copytree(kept, folder / "programs")
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_writer, "write_programs", write)
        yield


def model(rule, delimiter):
    """The golden artefact's model with other item ids."""
    base = recorded.model()
    config = base.config
    changes = {"hash_bucket_size": 64} if rule == "hash" else {"vocab_list": WORDS}
    item = {name: dataclasses.replace(config.features[name], num_buckets=0, **changes)
            for name in NAMES}  # fmt: skip
    lists = dataclasses.replace(
        config.data.list_columns,
        validation_input_path="validation/*.parquet",
        train_input_path="train/*.parquet",
        eval_input_path="test/*.parquet",
    )
    config = dataclasses.replace(
        config,
        features={**config.features, **item},
        sequences={"uih_seq": SequenceConfig(sequence_delim=delimiter)},
        data=dataclasses.replace(config.data, source="list_columns", list_columns=lists),
    )
    weights = dict(base.weights)
    if rule == "vocabulary":  # two rows more than it has words
        name = config.embedding_names[NAMES[0]]
        weights[name] = weights[name][: recorded.NUM_ITEMS + 2]
    specs = tuple(
        dataclasses.replace(spec, num_rows=len(weights[spec.name])) for spec in base.specs
    )
    return dataclasses.replace(base, config=config, weights=weights, specs=specs)


def users(kind, delimiter):
    """Those of the golden artefact."""
    columns = recorded.users()
    columns[NAMES[0]] = [[kind(item) for item in row] for row in columns[NAMES[0]]]
    if delimiter:
        for name in columns:
            if name.startswith("uih_seq"):
                columns[name] = [delimiter.join(map(str, row)) for row in columns[name]]
    else:
        columns[NAMES[0]] = pa.array(columns[NAMES[0]], pa.list_(KIND[kind]))
    return columns


@pytest.mark.parametrize(
    ("rule", "kind", "delimiter"),
    [
        ("hash", int, ""), ("hash", int, "|"), ("hash", str, ""), ("hash", str, "|"),
        ("vocabulary", int, "|"),
    ],
)  # fmt: skip
def test_ids_of_either_kind_are_one(tmp_path, programs, rule, kind, delimiter):
    """The export compares itself with the live model, and takes both kinds for one id."""
    ids = np.array(sorted(map(kind, range(recorded.NUM_ITEMS))))
    rows = pa.record_batch({"video_id": pa.array(ids.tolist(), KIND[kind])})
    report = exporter.export(
        model(rule, delimiter),
        tmp_path / "export",
        training_items=exporter.TrainingItems(ids=ids[:30], counts=np.full(30, 2)),
        item_rows=[("items", rows)],
        options=exporter.ExportOptions(
            batch_sizes=(4,), item_batch_sizes=(64,), platforms=("cpu",)
        ),
    )
    assert max(report.check.users, report.check.items) <= 1e-6
    assert report.items.num_cold == 10
    opened = artifact.load(report.folder)
    np.testing.assert_array_equal(opened.item_ids(), ids)
    given = {each: opened.embed_users(users(each, delimiter)) for each in (int, str)}
    np.testing.assert_array_equal(given[int], given[str])
    assert len({vector.tobytes() for vector in given[int]}) == 3
    seen = set(ids[:30].tolist())
    events = [kind(item) for row in recorded.users()[NAMES[0]] for item in row[-8:]]
    assert opened.counts["unknown_item_ids"] == 2 * sum(item not in seen for item in events)
    with pytest.raises(TypeError, match="column video_id: type double: item ids are"):
        opened.has_training_event([0.5])
    if not delimiter:  # NumPy's empty list is one of floats
        empty = {name: [np.array([])] if name.startswith("uih") else column[:1]
                 for name, column in users(int, "").items()}  # fmt: skip
        np.testing.assert_array_equal(opened.embed_users(empty)[0], given[int][0])


def test_integers_are_found_as_their_decimals():
    words = np.array(["70", "x", "07", "+5", "-5", "", "9" * 30, "٥"])
    np.testing.assert_array_equal(
        feature_values.find(np.array([-5, 5, 7, 70]), words), [3, -1, -1, -1, 0, -1, -1, -1]
    )
    keys = np.array(["-5", "5", "70"])
    np.testing.assert_array_equal(feature_values.find(keys, np.array([70, 7, -5])), [2, -1, 0])


def test_rules_do_not_outlive_their_folder(tmp_path):
    np.save(tmp_path / "words.npy", np.array(["a"]))
    rules = feature_values.Rules(tmp_path, {})
    assert rules._listed(
        feature_values.Column(values=np.array(["a"])),
        {"file": "words.npy", "default_value": ""},
        "f",
    )[0].tolist() == [2]
    alive = weakref.ref(rules)
    del rules
    gc.collect()
    assert alive() is None
