"""Values to ids: every rule against plain Python, missing and unknown values, and refusals."""

import re

import numpy as np
import pytest

from hstu_jax.config.feature_schema import IdFeature, NormalizerConfig, RawFeature
from hstu_jax.data.raw_columns import RawColumn
from hstu_jax.features import id_mapping

MASK = 2**64 - 1


def fnv_1a(text):
    """FNV-1a of a string, as RFC 9923 writes it."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def finalized(value):
    value = ((value ^ (value >> 33)) * 0xFF51AFD7ED558CCD) & MASK
    value = ((value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
    return value ^ (value >> 33)


def column(*values, codes=None, offsets=None):
    return RawColumn(
        values=np.array(values),
        codes=None if codes is None else np.array(codes),
        offsets=None if offsets is None else np.array(offsets),
    )


def mapped(raw, feature):
    return id_mapping.map_column(raw, feature, name="f")


def test_hash_is_the_documented_one():
    # Test vectors that come with FNV.
    assert fnv_1a("") == 0xCBF29CE484222325
    assert fnv_1a("a") == 0xAF63DC4C8601EC8C
    assert fnv_1a("foobar") == 0x85944171F73967E8
    words = ["", "a", "foobar", "視頻", "a\x1db", "12345678901234567890"]
    expected = [finalized(fnv_1a(word)) for word in words]
    assert id_mapping.hash_words(np.array(words)).tolist() == expected
    numbers = np.array([0, 7, -3, 2**62])
    expected = [finalized(fnv_1a(str(number))) for number in numbers.tolist()]
    assert id_mapping.hash_words(numbers).tolist() == expected
    # Recorded: a change of the hash would make every trained table useless.
    feature = IdFeature(hash_bucket_size=1000)
    found = mapped(column("beijing", "shanghai", "42"), feature).values.tolist()
    assert found == [finalized(fnv_1a(w)) % 1000 for w in ("beijing", "shanghai", "42")]
    assert found == RECORDED


RECORDED = [367, 612, 476]


def test_hash_spreads_neighbours_evenly():
    ids = mapped(column(*range(20_000)), IdFeature(hash_bucket_size=100)).values
    counts = np.bincount(ids, minlength=100)
    # 200 a bucket; the spread of a fair draw is 14.
    assert 140 < counts.min() and counts.max() < 260 and 9 < counts.std() < 20


def test_numbers_are_their_own_ids_without_a_copy():
    raw = column(3, 0, 4)
    assert mapped(raw, IdFeature(num_buckets=5)).values is raw.values


def test_integers_and_their_strings_hash_alike():
    feature = IdFeature(hash_bucket_size=77)
    one, other = mapped(column(5, 17), feature), mapped(column("5", "17"), feature)
    np.testing.assert_array_equal(one.values, other.values)


@pytest.mark.parametrize(
    ("default", "expected", "missing"),
    [("", [1, -1, -1, 2, -1], -1), ("0", [1, 0, 0, 2, 0], 0)],
)
def test_numbers_out_of_range_are_counted_and_become_the_default(default, expected, missing):
    feature = IdFeature(num_buckets=5, default_value=default, max_unknown_share=0.5)
    result = mapped(column(1, 5, -2, 2, codes=[0, 1, 2, 3, -1]), feature)
    assert result.values.tolist() == expected
    assert (result.num_missing, result.num_unknown, result.num_values) == (1, 2, 5)
    result = mapped(column(1, 5, -2, 2), feature)
    assert result.values.tolist() == expected[:4] and result.num_unknown == 2


def test_a_larger_share_of_unknown_values_is_refused():
    raw = column(1, 5, 9, 2)
    mapped(raw, IdFeature(num_buckets=5, max_unknown_share=0.5))
    message = (
        "features.f.num_buckets=5: 5 is outside it (2 of 4 values are unknown, a share of 0.5, "
        "above features.f.max_unknown_share=0.4); raise that, or add them."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        mapped(raw, IdFeature(num_buckets=5, max_unknown_share=0.4))
    with pytest.raises(ValueError, match=r"num_buckets=5: id 5 is outside 0\.\.4 \(2 such"):
        mapped(raw, IdFeature(num_buckets=5))
    # A distinct value that no place has does not count.
    assert mapped(column(1, 9, codes=[0, 0]), IdFeature(num_buckets=5)).num_unknown == 0


def test_vocabulary_ids(tmp_path):
    raw = column("b", "zz", "a", codes=[0, 1, 2, -1, 1])
    feature = IdFeature(vocab_list=("a", "b"), max_unknown_share=1.0)
    result = mapped(raw, feature)
    assert result.values.tolist() == [3, 1, 2, 0, 1]
    assert (result.num_missing, result.num_unknown) == (1, 2)
    assert feature.num_ids == 4
    file = tmp_path / "words.txt"
    file.write_text("a\nb\n")
    from_file = IdFeature(vocab_file=str(file), max_unknown_share=1.0)
    assert from_file.num_ids == 4
    np.testing.assert_array_equal(mapped(raw, from_file).values, result.values)
    # The default value is a word of its own, the first.
    defaulted = IdFeature(vocab_list=("a", "b"), default_value="zz")
    assert mapped(raw, defaulted).values.tolist() == [3, 0, 2, 0, 0]
    message = "features.f.vocab_list: does not list 'zz' (2 of 5 values are unknown"
    with pytest.raises(ValueError, match=re.escape(message)):
        mapped(raw, IdFeature(vocab_list=("a", "b")))
    numbers = mapped(column(7, 9), IdFeature(vocab_list=("9", "7")))
    assert numbers.values.tolist() == [3, 2]


def test_missing_values_of_a_hash():
    raw = column("x", codes=[0, -1])
    assert mapped(raw, IdFeature(hash_bucket_size=9)).values.tolist()[1] == -1
    filled = mapped(raw, IdFeature(hash_bucket_size=9, default_value="x")).values
    assert filled[0] == filled[1]


def test_several_values_an_entry():
    raw = column(4, 1, 2, offsets=[0, 2, 2, 3])
    rows = mapped(raw, IdFeature(num_buckets=5)).values
    assert rows.tolist() == [[4, 1], [-1, -1], [2, -1]]
    with pytest.raises(ValueError, match=r"value_dim=2: row 1 has 0 values \(2 such rows in all"):
        mapped(raw, IdFeature(num_buckets=5, value_dim=2))
    one = column(4, 1, offsets=[0, 1, 2])
    assert mapped(one, IdFeature(num_buckets=5, value_dim=1)).values.tolist() == [4, 1]
    with pytest.raises(ValueError, match="value_dim=3: the column holds one value a row"):
        mapped(column(4), IdFeature(num_buckets=5, value_dim=3))


def test_buckets_of_a_number():
    feature = RawFeature(boundaries=(0.0, 1.5, 3.0), embedding_dim=4, default_value=2.0)
    raw = column(-1.0, 0.0, 1.4, 1.5, 99.0, codes=[0, 1, 2, 3, 4, -1])
    # A boundary belongs to the bucket above it.
    assert mapped(raw, feature).values.tolist() == [0, 1, 1, 2, 3, 2]
    assert feature.num_ids == 4


@pytest.mark.parametrize(
    ("rule", "formula"),
    [
        (NormalizerConfig(), lambda x: x),
        (NormalizerConfig(method="minmax", min=1.0, max=5.0), lambda x: (x - 1) / 4),
        (NormalizerConfig(method="zscore", mean=2.0, standard_deviation=4.0),
         lambda x: (x - 2) / 4),
        (
            NormalizerConfig(method="log10", threshold=1.0, default=-3.0),
            lambda x: np.log10(x) if x > 1 else -3.0,
        ),
    ],
)  # fmt: skip
def test_normalizers(rule, formula):
    values = [0.0, 1.0, 10.0, 250.5]
    feature = RawFeature(normalizer=rule, default_value=7.0)
    result = mapped(column(*values, codes=[0, 1, 2, 3, -1]), feature)
    expected = np.array([formula(x) for x in [*values, 7.0]], np.float32)
    assert result.values.dtype == np.float32
    np.testing.assert_allclose(result.values, expected, rtol=1e-7)
    buckets = RawFeature(normalizer=rule, boundaries=(0.5,), embedding_dim=2)
    assert mapped(column(*values), buckets).values.tolist() == [
        int(formula(x) >= 0.5) for x in values
    ]


def test_raw_values_of_a_row():
    raw = column("1.5", "2", "3", "4", offsets=[0, 2, 4])
    rows = mapped(raw, RawFeature(value_dim=2)).values
    assert rows.tolist() == [[1.5, 2.0], [3.0, 4.0]] and rows.dtype == np.float32
    with pytest.raises(ValueError, match=r"raw_features\.f\.value_dim=3: row 0 has 2 values"):
        mapped(raw, RawFeature(value_dim=3))


@pytest.mark.parametrize(
    ("raw", "feature", "kind", "message"),
    [
        (column("a"), IdFeature(num_buckets=3), TypeError, "needs integers, and the column has st"),
        (column(1.5), IdFeature(num_buckets=3), TypeError, "needs integers, and the column has fl"),
        (column(1.5), IdFeature(hash_bucket_size=3), TypeError, "ids are integers or strings"),
        (column("a"), RawFeature(), ValueError, "raw_features.f: a value is no number"),
        (column(np.inf), RawFeature(), ValueError, "raw_features.f: the value inf is not finite"),
    ],
)
def test_wrong_values_are_refused(raw, feature, kind, message):
    with pytest.raises(kind, match=message):
        mapped(raw, feature)


def test_empty_columns():
    for feature in (
        IdFeature(num_buckets=3),
        IdFeature(hash_bucket_size=3),
        IdFeature(vocab_list=("a",)),
        RawFeature(),
    ):
        empty = RawColumn(values=np.array([], dtype=np.str_))
        if isinstance(feature, RawFeature):
            empty = RawColumn(values=np.array([], dtype=np.float64))
        assert mapped(empty, feature).values.shape == (0,)
