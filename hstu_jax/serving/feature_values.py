"""Raw values of a column -> ids of a table, or numbers: the rules of training, from data alone.

One of the loader's files (see `manifest.py`), so it repeats what `hstu_jax.features.id_mapping`
does for training; a test holds the two together. Next on the path: `row_table.py`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hstu_jax.serving import manifest as manifest_lib

NO_ID = -1
_MISSING_ID, _UNLISTED_ID = 0, 1  # of a vocabulary, whose words have 2, 3, ...
_FIRST_WORD = 2
_LARGEST, _MOST_DIGITS = np.iinfo(np.int64).max, 19  # of an int64, which item ids are
_FNV_OFFSET, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """The values of a column: place i holds `values[codes[i]]`, or `values[i]` without codes.

    Attributes:
        values: integers, floats or strings.
        codes: position in `values` of each place, -1 = missing.
        offsets: row r has the places `offsets[r]:offsets[r + 1]`; None = one place a row.
    """

    values: np.ndarray
    codes: np.ndarray | None = None
    offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values if self.codes is None else self.codes)

    def spread(self, per_value: np.ndarray, missing: object) -> np.ndarray:
        """Result of every place from those of the values; `missing` where there is none."""
        if self.codes is None:
            return per_value
        return np.append(per_value, np.array([missing], per_value.dtype))[self.codes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mapped:
    """Ids (-1 = none) or float32 numbers of every place, and what could not be found.

    Attributes:
        places: a value for each place of the column.
        is_unknown: places whose value has no row of its own.
        num_missing: places without a value.
    """

    places: np.ndarray
    is_unknown: np.ndarray
    num_missing: int


def from_arrow(array: pa.Array, *, where: str) -> Column:
    """An Arrow array of numbers, booleans or strings, or of lists of them.

    A null, an empty string and a null in a list are missing values; a null list has no values.

    Raises:
        TypeError: another type.
    """
    offsets = None
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        array = array.flatten()
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    if pa.types.is_null(array.type):
        array = array.cast(pa.int64())
    kind = array.type
    if is_text(kind):
        array = pc.if_else(pc.equal(array, ""), pa.scalar(None, kind), array)
        coded = array.dictionary_encode()
        words = np.array(coded.dictionary.to_pylist(), dtype=np.str_)
        codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return Column(values=words, codes=codes.astype(np.int64), offsets=offsets)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise TypeError(f"{where}: type {kind}: must be numbers, booleans or strings, or lists.")
    codes = None
    if array.null_count:
        is_null = array.is_null().to_numpy(zero_copy_only=False)
        codes = np.where(is_null, -1, np.arange(len(array)))
        array = array.fill_null(0)
    return Column(values=array.to_numpy(zero_copy_only=False), codes=codes, offsets=offsets)


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is a string."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def split_strings(column: Column, separator: str) -> Column:
    """The column with strings that hold `separator` taken apart into several values a row.

    An empty part is a missing value. Other columns stay as they are.
    """
    words = column.values
    if not separator or column.offsets is not None or words.dtype.kind != "U":
        return column
    codes = column.codes.tolist() if column.codes is not None else range(len(words))
    rows = [words[code].split(separator) if code >= 0 else [""] for code in codes]
    if all(len(row) == 1 for row in rows):
        return column
    flat = np.array([word for row in rows for word in row], dtype=np.str_)
    values, places = np.unique(flat, return_inverse=True)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Column(values=values, codes=np.where(values[places] == "", -1, places), offsets=offsets)


class Rules:
    """The rules of a folder's features; words and keys are read when first asked for.

    Args:
        folder: the exported folder.
        translations: of original ids.
    """

    def __init__(self, folder: pathlib.Path, translations: Mapping[str, manifest_lib.Translation]):
        self._folder, self._translations = folder, translations
        self._words_read: dict[tuple[str, str], dict[str, int]] = {}
        self._keys_read: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def translate(self, column: Column, name: str, *, where: str) -> Column:
        """Original ids -> the model's; a key that is not listed becomes the unlisted number.

        So does a missing value where that number is a row: preparation gave both the same one.
        """
        keys, numbers = self._keys(name)
        values = column.values
        is_words = keys.dtype.kind == "U"
        if len(values) and (values.dtype.kind == "U") != is_words:
            kind = "strings" if is_words else "integers"
            raise TypeError(f"{where}: type {values.dtype}: original ids are {kind} here.")
        if len(values) and not is_words and values.dtype.kind not in "iu":
            raise TypeError(f"{where}: type {values.dtype}: original ids are integers here.")
        unlisted = self._translations[name].unlisted

        def with_unlisted(found):
            codes = column.codes
            if unlisted >= 0 and codes is not None:
                codes, found = np.where(codes < 0, len(found), codes), np.append(found, unlisted)
            return dataclasses.replace(column, values=found.astype(np.int64), codes=codes)

        if not len(keys) or not len(values):
            return with_unlisted(np.full(len(values), unlisted))
        place = find(keys, values)
        return with_unlisted(np.where(place >= 0, numbers[place], unlisted))

    def map(self, column: Column, feature: manifest_lib.Feature, *, where: str) -> Mapped:
        """The ids or numbers of a feature.

        Raises:
            ValueError: a value that is no number, or not finite.
            TypeError: strings or fractions where integers are needed.
        """
        kind = feature.rule["kind"]
        num_missing = 0 if column.codes is None else int(np.count_nonzero(column.codes < 0))
        if kind == "num_buckets":
            values, missing, unknown = _numbers_in_range(column, feature.rule, where)
        elif kind == "hash":
            values, missing, unknown = _hashed(column, feature.rule, where)
            if feature.translation is not None:  # has no row, nor a text to hash
                unknown = column.values < 0
                values = np.where(unknown, missing, values)
        elif kind == "vocabulary":
            values, missing, unknown = self._listed(column, feature.rule, where)
        else:
            values, missing, unknown = _numbers(column, feature.rule, where)
        return Mapped(
            places=column.spread(values, missing),
            is_unknown=column.spread(unknown, False),
            num_missing=num_missing,
        )

    def _listed(self, column, rule, where):
        """Ids 0 = missing, 1 = not listed, 2, 3, ... = words."""
        known = self._words(rule["file"], rule["default_value"])
        text = _as_text(column.values, where).tolist()
        ids = np.array([known.get(word, _UNLISTED_ID) for word in text], dtype=np.int64)
        return ids, _MISSING_ID, ids == _UNLISTED_ID

    def _words(self, file: str, default_value: str) -> dict[str, int]:
        if (file, default_value) in self._words_read:
            return self._words_read[file, default_value]
        words = np.load(self._folder / file, allow_pickle=False).tolist()
        known = {word: number + _FIRST_WORD for number, word in enumerate(words)}
        if default_value:
            known[default_value] = _MISSING_ID
        self._words_read[file, default_value] = known
        return known

    def _keys(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._keys_read:
            files = self._translations[name]
            keys, numbers = (
                np.load(self._folder / file, mmap_mode="r", allow_pickle=False)
                for file in (files.keys, files.numbers)
            )
            self._keys_read[name] = keys, numbers
        return self._keys_read[name]


def find(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Places of the values among ascending keys; -1 for those that are not there.

    Where one side holds integers and the other strings, an integer is its decimal string, as in the
    item catalogue of training. An integer outside int64 is not there.
    """
    if not len(keys) or not len(values):
        return np.full(len(values), -1, np.int64)
    is_possible = np.ones(len(values), bool)
    if keys.dtype.kind == "U":
        values = values.astype(np.str_)
    elif values.dtype.kind == "U":
        values, is_possible = _decimals(values)
    elif values.dtype == np.uint64:  # NumPy compares it to int64 as floats
        is_possible = values <= np.uint64(_LARGEST)
        values = values.astype(np.int64)
    place = np.minimum(np.searchsorted(keys, values), len(keys) - 1)
    return np.where(is_possible & (keys[place] == values), place, -1)


def _decimals(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64, whether the word is that integer as `str` writes it)."""
    numbers, is_number = np.zeros(len(words), np.int64), np.zeros(len(words), bool)
    for at, word in enumerate(words.tolist()):
        digits = word.removeprefix("-")
        # Nineteen digits at most: an int of any size costs time.
        if digits.isascii() and digits.isdecimal() and len(digits) <= _MOST_DIGITS:
            number = int(word)
            is_number[at] = str(number) == word and -_LARGEST - 1 <= number <= _LARGEST
            numbers[at] = number if is_number[at] else 0
    return numbers, is_number


def to_rows(
    places: np.ndarray, offsets: np.ndarray | None, feature: manifest_lib.Feature, *, where: str
) -> np.ndarray:
    """[places] -> [rows], or [rows, V] where a row may have several values (ids: -1 behind).

    Raises:
        ValueError: a row has another number of values than `value_dim`.
    """
    if offsets is None:
        if feature.value_dim > 1:
            raise ValueError(f"{where}: one value a row found, {feature.value_dim} expected.")
        return places
    counts = np.diff(offsets)
    if feature.value_dim and (counts != feature.value_dim).any():
        at = int(np.argmax(counts != feature.value_dim))
        raise ValueError(
            f"{where}: row {at} has {counts[at]} values, {feature.value_dim} expected."
        )
    width = max(int(counts.max(initial=0)), 1)
    rows = np.full((len(counts), width), 0 if feature.table is None else NO_ID, places.dtype)
    place = np.arange(len(places)) - np.repeat(offsets[:-1], counts)
    rows[np.repeat(np.arange(len(counts)), counts), place] = places
    return rows[:, 0] if width == 1 else rows


def hash_words(words: np.ndarray) -> np.ndarray:
    """64-bit FNV-1a hashes of strings, finished like MurmurHash3's; integers count as decimals.

    h = 0xcbf29ce484222325, then h = (h xor byte) * 0x100000001b3 for every byte; at last
    h = h xor (h >> 33), h = h * 0xff51afd7ed558ccd, h = h xor (h >> 33),
    h = h * 0xc4ceb9fe1a85ec53, h = h xor (h >> 33), all modulo 2^64.
    """
    encoded = [word.encode() for word in words.astype(np.str_).tolist()]
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


def _numbers_in_range(column, rule, where):
    values, size = column.values, rule["size"]
    if values.dtype.kind not in "iu" and len(values):
        kind = "strings" if values.dtype.kind == "U" else values.dtype
        raise TypeError(f"{where}: {kind} found; ids are integers 0..{size - 1} here.")
    default = int(rule["default_value"]) if rule["default_value"] else NO_ID
    values = values.astype(np.int64)
    is_unknown = (values < 0) | (values >= size)
    return np.where(is_unknown, default, values), default, is_unknown


def _hashed(column, rule, where):
    size, default = np.uint64(rule["size"]), rule["default_value"]
    missing = int(hash_words(np.array([default]))[0] % size) if default else NO_ID
    distinct, inverse = np.unique(_as_text(column.values, where), return_inverse=True)
    ids = (hash_words(distinct) % size).astype(np.int64)[inverse]
    return ids, missing, np.zeros(len(ids), bool)


def _numbers(column, rule, where):
    """Bucket, or normalized number, of every value."""
    try:
        numbers = column.values.astype(np.float64)
    except ValueError as error:
        raise ValueError(f"{where}: a value is no number ({error}).") from None
    if not np.isfinite(numbers).all():
        bad = numbers[~np.isfinite(numbers)][0]
        raise ValueError(f"{where}: the value {bad} is not finite; leave a missing one out (null).")
    both = _normalize(np.append(numbers, rule["default_value"]), rule["normalizer"])
    if rule["kind"] == "boundaries":
        result = np.searchsorted(np.array(rule["boundaries"]), both, side="right")
    else:
        result = both.astype(np.float32)
    return result[:-1], result[-1], np.zeros(len(numbers), bool)


def _normalize(x, rule):
    if rule["method"] == "minmax":
        return (x - rule["min"]) / (rule["max"] - rule["min"])
    if rule["method"] == "zscore":
        return (x - rule["mean"]) / rule["standard_deviation"]
    if rule["method"] == "log10":
        is_above = x > rule["threshold"]
        return np.where(is_above, np.log10(np.where(is_above, x, 1.0)), rule["default"])
    return x


def _as_text(values: np.ndarray, where: str) -> np.ndarray:
    if values.dtype.kind == "f" and len(values):  # NumPy's empty list is one of floats
        raise TypeError(f"{where}: {values.dtype} found; ids are integers or strings.")
    return values.astype(np.str_)
