"""The loader's rules of features are those of training, kind by kind."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from hstu_jax.config.feature_schema import IdFeature, NormalizerConfig, RawFeature
from hstu_jax.data import raw_columns
from hstu_jax.features import id_mapping
from hstu_jax.serving import feature_values
from hstu_jax.serving import manifest as manifest_lib

WORDS = ("red", "green", "blue", "ä", "7")
NUMBERS = pa.array([3, None, 0, 99, -1, 9, 10])
TEXT = pa.array(["red", "7", "", None, "ä", "none of them", "blue"])
LISTS = pa.array([[1, 2], [], None, [9, None, 12], [4]])
FLOATS = pa.array([0.5, None, 3.0, -7.25, 12.0])


def described(feature, tmp_path):
    """The manifest's description of a feature, written by hand from its fields."""
    if isinstance(feature, RawFeature):
        normalizer = dataclasses.asdict(feature.normalizer)
        rule = {
            "kind": "boundaries" if feature.boundaries else "number",
            "boundaries": list(feature.boundaries),
            "default_value": feature.default_value,
            "normalizer": normalizer,
        }
    elif feature.num_buckets:
        rule = {"kind": "num_buckets", "size": feature.num_buckets}
    elif feature.hash_bucket_size:
        rule = {"kind": "hash", "size": feature.hash_bucket_size}
    else:
        np.save(tmp_path / "words.npy", np.array(feature.vocab_list))
        rule = {"kind": "vocabulary", "file": "words.npy"}
    if isinstance(feature, IdFeature):
        rule["default_value"] = feature.default_value
    return manifest_lib.Feature(
        name="f",
        column="f",
        table="t" if feature.has_table else None,
        width=feature.width,
        pooling="sum",
        value_dim=feature.value_dim,
        separator="",
        translation=None,
        item_values=None,
        rule=rule,
    )


FEATURES = {
    "num_buckets": IdFeature(num_buckets=10, max_unknown_share=1.0),
    "num_buckets_default": IdFeature(num_buckets=10, default_value="4", max_unknown_share=1.0),
    "hash": IdFeature(hash_bucket_size=1000),
    "hash_default": IdFeature(hash_bucket_size=7, default_value="none"),
    "vocabulary": IdFeature(vocab_list=WORDS, max_unknown_share=1.0),
    "vocabulary_default": IdFeature(
        vocab_list=WORDS, default_value="none of them", max_unknown_share=1.0
    ),
    "number": RawFeature(default_value=2.5),
    "minmax": RawFeature(normalizer=NormalizerConfig(method="minmax", min=-1.0, max=3.0)),
    "zscore": RawFeature(
        normalizer=NormalizerConfig(method="zscore", mean=1.0, standard_deviation=0.3)
    ),
    "log10": RawFeature(normalizer=NormalizerConfig(method="log10"), default_value=0.1),
    "boundaries": RawFeature(boundaries=(0.0, 3.0, 9.5), embedding_dim=4),
}
COLUMNS = {"num_buckets": (NUMBERS, LISTS), "hash": (NUMBERS, TEXT, LISTS), "vocabulary": (TEXT,)}


@pytest.mark.parametrize("name", FEATURES)
def test_equal_to_training(name, tmp_path):
    feature = FEATURES[name]
    columns = COLUMNS.get(name.removesuffix("_default"), (FLOATS, NUMBERS))
    for array in columns:
        raw = raw_columns.from_arrow(array, where="f")
        expected = id_mapping.map_column(raw, feature, name="f")
        told = described(feature, tmp_path)
        column = feature_values.from_arrow(array, where="f")
        rules = feature_values.Rules(tmp_path, {})
        mapped = rules.map(column, told, where="f")
        found = feature_values.to_rows(mapped.places, column.offsets, told, where="f")
        np.testing.assert_array_equal(found, expected.values)
        assert (mapped.num_missing, int(mapped.is_unknown.sum())) == (
            expected.num_missing,
            expected.num_unknown,
        )


def test_strings_are_split_as_in_training():
    for array in (pa.array(["a|b", None, "", "c", "d||e"]), pa.array(["a", "b"]), NUMBERS):
        raw = raw_columns.split_strings(raw_columns.from_arrow(array, where="f"), "|")
        mapped = id_mapping.map_column(raw, FEATURES["hash"], name="f")
        column = feature_values.split_strings(feature_values.from_arrow(array, where="f"), "|")
        codes = np.arange(len(column)) if column.codes is None else column.codes
        assert mapped.num_missing == np.count_nonzero(codes < 0)
        offsets = None if raw.offsets is None else raw.offsets.tolist()
        assert offsets == (None if column.offsets is None else column.offsets.tolist())


def test_hashes_are_the_trainings():
    words = np.array(["", "a", "häß", "12345678901234567890", "7"])
    np.testing.assert_array_equal(feature_values.hash_words(words), id_mapping.hash_words(words))
    np.testing.assert_array_equal(
        feature_values.hash_words(np.array([7, -3])), id_mapping.hash_words(np.array(["7", "-3"]))
    )


@pytest.mark.parametrize(
    ("name", "array", "error", "message"),
    [
        ("num_buckets", TEXT, TypeError, "f: strings found; ids are integers 0..9 here"),
        ("num_buckets", FLOATS, TypeError, "f: double|f: float64 found; ids are integers"),
        ("hash", FLOATS, TypeError, "f: float64 found; ids are integers or strings"),
        ("number", TEXT, ValueError, "f: a value is no number"),
        ("number", pa.array([1.0, float("nan")]), ValueError, "f: the value nan is not finite"),
    ],
)
def test_wrong_values_are_refused(name, array, error, message, tmp_path):
    column = feature_values.from_arrow(array, where="f")
    rules = feature_values.Rules(tmp_path, {})
    with pytest.raises(error, match=message):
        rules.map(column, described(FEATURES[name], tmp_path), where="f")


def test_types_that_hold_no_values_are_refused():
    with pytest.raises(TypeError, match="f: type date32.*must be numbers, booleans or strings"):
        feature_values.from_arrow(pa.array([1], pa.date32()), where="f")
    told = manifest_lib.Feature(
        name="f", column="f", table="t", width=4, pooling="sum", value_dim=2, separator="",
        translation=None, item_values=None, rule={},
    )  # fmt: skip
    with pytest.raises(ValueError, match="f: row 1 has 1 values, 2 expected"):
        feature_values.to_rows(np.arange(3), np.array([0, 2, 3]), told, where="f")
    with pytest.raises(ValueError, match="f: one value a row found, 2 expected"):
        feature_values.to_rows(np.arange(3), None, told, where="f")


def test_original_ids_become_the_models(tmp_path):
    for name, values in (
        ("keys", np.array([10, 30, 70])),
        ("numbers", np.array([2, 0, 1])),
        ("words", np.array(["a", "b"])),
        ("places", np.array([2, 1])),
    ):
        np.save(tmp_path / f"{name}.npy", values)
    translation = manifest_lib.Translation
    rules = feature_values.Rules(
        tmp_path,
        {
            "item": translation(keys="keys.npy", numbers="numbers.npy", unlisted=-1),
            "degree": translation(keys="words.npy", numbers="places.npy", unlisted=0),
        },
    )
    column = feature_values.from_arrow(pa.array([70, 11, None, 10]), where="f")
    found = rules.translate(column, "item", where="f")
    np.testing.assert_array_equal(found.spread(found.values, -9), [1, -1, -9, 2])
    words = feature_values.from_arrow(pa.array(["b", "?", "a", None, ""]), where="f")
    found = rules.translate(words, "degree", where="f")
    np.testing.assert_array_equal(found.spread(found.values, -9), [1, 0, 2, 0, 0])
    # An id that is not listed has no text to hash, and is none of the rows.
    of_ids = described(FEATURES["hash"], tmp_path)
    mapped = rules.map(
        rules.translate(column, "item", where="f"),
        dataclasses.replace(of_ids, translation="item"),
        where="f",
    )
    np.testing.assert_array_equal(mapped.is_unknown, [False, True, False, False])
    np.testing.assert_array_equal(mapped.places[1:3], [-1, -1])
    assert mapped.num_missing == 1 and (mapped.places[[0, 3]] >= 0).all()
    with pytest.raises(TypeError, match="original ids are integers here"):
        rules.translate(words, "item", where="f")
    with pytest.raises(TypeError, match="original ids are strings here"):
        rules.translate(column, "degree", where="f")
