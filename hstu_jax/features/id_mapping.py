"""Raw values of a feature -> ids of its table, or the numbers that the model takes as they are.

Here: integers in range, hashing, vocabularies, buckets of a number, normalizers, what happens to
missing and unknown values. Each is done once per distinct value, on the host, when a pipeline is
built. Not here: which column a feature reads (`columns.py`, which calls this).

An id of -1 means "no id": a zero vector that learns nothing (`model/feature_lookup.py`).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt64

from hstu_jax.config.feature_schema import NUM_VOCABULARY_EXTRAS, IdFeature, RawFeature
from hstu_jax.data.raw_columns import RawColumn

NO_ID = -1
_MISSING_ID, _UNLISTED_ID = 0, 1  # of a vocabulary
_CHECK_BLOCK = 4_000_000  # ids checked at a time: a column may be larger than memory
_FNV_OFFSET, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


@dataclasses.dataclass(frozen=True, kw_only=True)
class MappedColumn:
    """What a batch holds of a feature.

    Attributes:
        values: [entries] ids, or [entries, V] where an entry has up to V of them (-1 behind its
            last); float32 of the same shapes for a raw feature without boundaries.
        num_missing: values that the files lack.
        num_unknown: values outside num_buckets or the vocabulary.
        num_values: all of them.
    """

    values: Shaped[np.ndarray, "entries *V"]
    num_missing: int
    num_unknown: int
    num_values: int

    @property
    def has_notes(self) -> bool:
        """Whether there is something to report."""
        return self.num_missing + self.num_unknown > 0


def map_column(column: RawColumn, feature: IdFeature | RawFeature, *, name: str) -> MappedColumn:
    """Turns a column into what a batch holds.

    Args:
        column: the raw values.
        feature: how.
        name: of the feature, for messages.

    Raises:
        ValueError: more unknown values than `max_unknown_share`, a number of values other than
            `value_dim`, a value that is no number or not finite.
        TypeError: strings or fractions where integers are needed.
    """
    if isinstance(feature, RawFeature):
        places, num_unknown = _raw_values(column, feature, name), 0
    else:
        places, num_unknown = _ids(column, feature, name)
    num_missing = 0 if column.codes is None else int(np.count_nonzero(column.codes < 0))
    values = _to_rows(places, column.offsets, feature, name)
    return MappedColumn(
        values=values, num_missing=num_missing, num_unknown=num_unknown, num_values=len(places)
    )


def check_ids(values: Int[np.ndarray, "_"], *, feature: str, num_buckets: int) -> None:
    """Checks that every id has a row in its table.

    Args:
        values: the ids.
        feature: name shown in the message.
        num_buckets: rows of the table.

    Raises:
        ValueError: an id is negative or not below `num_buckets`.
    """
    first, count, largest = None, 0, 0
    for start in range(0, len(values), _CHECK_BLOCK):
        block = values[start : start + _CHECK_BLOCK]
        if block.min() >= 0 and block.max() < num_buckets:
            continue
        bad = (block < 0) | (block >= num_buckets)
        if first is None:
            first = int(block[np.argmax(bad)])
        count += int(bad.sum())
        largest = max(largest, int(block.max()))
    if first is None:
        return
    advice = f"set it to at least {largest + 1}" if largest >= num_buckets else "prepare again"
    raise ValueError(
        f"features.{feature}.num_buckets={num_buckets}: id {first} is outside 0..{num_buckets - 1} "
        f"({count} such values in all); {advice}."
    )


def hash_words(words: Shaped[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """64-bit hashes of strings; an integer counts as its decimal string.

    h = FNV-1a of the UTF-8 bytes: h = 0xcbf29ce484222325, then h = (h xor byte) * 0x100000001b3 for
    every byte; and at last, so that the low bits depend on all bytes, h = h xor (h >> 33),
    h = h * 0xff51afd7ed558ccd, h = h xor (h >> 33), h = h * 0xc4ceb9fe1a85ec53,
    h = h xor (h >> 33), all modulo 2^64. The id is h modulo `hash_bucket_size`.

    Args:
        words: strings or integers.

    Source: FNV-1a of Fowler, Noll and Vo (RFC 9923); the finalizer of MurmurHash3. The reference's
        own hash is closed, so hashed ids differ from its.
    """
    text = words.astype(np.str_)
    encoded = [word.encode() for word in text.tolist()]
    length = np.array([len(word) for word in encoded], dtype=np.int64)
    width = int(length.max(initial=0))
    padded = b"".join(word.ljust(width, b"\0") for word in encoded)
    data = np.frombuffer(padded, np.uint8).reshape(len(encoded), width)
    hashed = np.full(len(encoded), _FNV_OFFSET, np.uint64)
    for place in range(width):
        longer = (hashed ^ data[:, place].astype(np.uint64)) * np.uint64(_FNV_PRIME)
        hashed = np.where(place < length, longer, hashed)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashed = (hashed ^ (hashed >> np.uint64(33))) * np.uint64(factor)
    return hashed ^ (hashed >> np.uint64(33))


def _ids(column: RawColumn, feature: IdFeature, name: str) -> tuple[np.ndarray, int]:
    """(id of every place, how many were unknown)."""
    if feature.num_buckets:
        return _numbers_in_range(column, feature, name)
    if column.codes is None:
        distinct, codes = np.unique(column.values, return_inverse=True)
        column = dataclasses.replace(column, values=distinct, codes=codes.astype(np.int64))
    if feature.hash_bucket_size:
        size = np.uint64(feature.hash_bucket_size)
        default = feature.default_value
        missing = int(hash_words(np.array([default]))[0] % size) if default else NO_ID
        ids = (hash_words(_as_text(column.values, name)) % size).astype(np.int32)
        return _spread(ids, column, missing), 0
    known = {word: n + NUM_VOCABULARY_EXTRAS for n, word in enumerate(feature.words())}
    if feature.default_value:
        known[feature.default_value] = _MISSING_ID
    text = _as_text(column.values, name).tolist()
    ids = np.array([known.get(word, _UNLISTED_ID) for word in text], dtype=np.int32)
    places = _spread(ids, column, _MISSING_ID)
    num_unknown = int(np.count_nonzero(places == _UNLISTED_ID))
    if num_unknown:
        first = text[int(np.argmax(ids == _UNLISTED_ID))]
        where = f"features.{name}.{'vocab_file' if feature.vocab_file else 'vocab_list'}"
        _check_share(feature, name, num_unknown, len(places), f"{where}: does not list {first!r}")
    return places, num_unknown


def _numbers_in_range(column: RawColumn, feature: IdFeature, name: str) -> tuple[np.ndarray, int]:
    values, size = column.values, feature.num_buckets
    if values.dtype.kind in "US" and len(values) == 0:
        values = values.astype(np.int64)
    if values.dtype.kind not in "iu":
        raise TypeError(
            f"features.{name}.num_buckets={size}: needs integers, and the column has "
            f"{'strings' if values.dtype.kind == 'U' else values.dtype}; use hash_bucket_size or a "
            "vocabulary."
        )
    if column.codes is not None and feature.max_unknown_share == 0:
        is_used = np.zeros(len(values) + 1, dtype=bool)
        is_used[column.codes] = True  # -1, a missing value, marks the last
        check_ids(values[is_used[:-1]], feature=name, num_buckets=size)
    elif feature.max_unknown_share == 0:
        check_ids(values, feature=name, num_buckets=size)
        return values, 0
    default = int(feature.default_value) if feature.default_value else NO_ID
    is_unknown = (values < 0) | (values >= size)
    ids = np.where(is_unknown, default, values).astype(np.int32)
    if column.codes is None:
        places, num_unknown = ids, int(np.count_nonzero(is_unknown))
    else:
        places = _spread(ids, column, default)
        num_unknown = int(np.count_nonzero(_spread(is_unknown, column, False)))
    if num_unknown:
        rule = f"features.{name}.num_buckets={size}: {values[np.argmax(is_unknown)]} is outside it"
        _check_share(feature, name, num_unknown, len(places), rule)
    return places, num_unknown


def _check_share(feature: IdFeature, name: str, num: int, total: int, what: str) -> None:
    if num > feature.max_unknown_share * total:
        raise ValueError(
            f"{what} ({num} of {total} values are unknown, a share of {num / total:.3g}, above "
            f"features.{name}.max_unknown_share={feature.max_unknown_share}); raise that, or add "
            "them."
        )


def _raw_values(column: RawColumn, feature: RawFeature, name: str) -> np.ndarray:
    """Bucket, or normalized number, of every place."""
    try:
        numbers = column.values.astype(np.float64)
    except ValueError as error:
        raise ValueError(f"raw_features.{name}: a value is no number ({error}).") from None
    if not np.isfinite(numbers).all():
        bad = numbers[~np.isfinite(numbers)]
        raise ValueError(
            f"raw_features.{name}: the value {bad[0]} is not finite ({len(bad)} distinct or in "
            "all); leave a missing value out (null)."
        )
    both = _normalize(np.append(numbers, feature.default_value), feature)
    if feature.boundaries:
        result = np.searchsorted(np.array(feature.boundaries), both, side="right").astype(np.int32)
    else:
        result = both.astype(np.float32)
    return result[:-1] if column.codes is None else _spread(result[:-1], column, result[-1])


def _normalize(x: Float[np.ndarray, "n"], feature: RawFeature) -> Float[np.ndarray, "n"]:
    rule = feature.normalizer
    if rule.method == "minmax":
        return (x - rule.min) / (rule.max - rule.min)
    if rule.method == "zscore":
        return (x - rule.mean) / rule.standard_deviation
    if rule.method == "log10":
        is_above = x > rule.threshold
        return np.where(is_above, np.log10(np.where(is_above, x, 1.0)), rule.default)
    return x


def _to_rows(
    places: np.ndarray, offsets: np.ndarray | None, feature: IdFeature | RawFeature, name: str
) -> np.ndarray:
    """[places] -> [entries] or [entries, V], where an entry may have several values."""
    is_id = isinstance(feature, IdFeature)
    section = f"{'features' if is_id else 'raw_features'}.{name}.value_dim={feature.value_dim}"
    if offsets is None:
        if feature.value_dim > 1:
            raise ValueError(f"{section}: the column holds one value a row; set it to 1.")
        return places
    counts = np.diff(offsets)
    if feature.value_dim and (counts != feature.value_dim).any():
        is_wrong = counts != feature.value_dim
        at = int(np.argmax(is_wrong))
        raise ValueError(
            f"{section}: row {at} has {counts[at]} values ({int(is_wrong.sum())} such rows in all)"
            + ("; 0 takes any number." if is_id else ".")
        )
    width = max(int(counts.max(initial=0)), 1)
    fill = NO_ID if is_id else 0
    rows = np.full((len(counts), width), fill, dtype=places.dtype)
    place = np.arange(len(places)) - np.repeat(offsets[:-1], counts)
    rows[np.repeat(np.arange(len(counts)), counts), place] = places
    return rows[:, 0] if width == 1 else rows


def _spread(per_value: np.ndarray, column: RawColumn, missing: object) -> np.ndarray:
    """Result of every place from the results of the distinct values; `missing` for code -1."""
    with_missing = np.append(per_value, np.array([missing], per_value.dtype))
    return with_missing[column.codes]  # -1 takes the last


def _as_text(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind == "f":
        raise TypeError(
            f"features.{name}: the column holds {values.dtype}; ids are integers or strings (a "
            "number cut into buckets is a raw feature with boundaries)."
        )
    return values.astype(np.str_)
