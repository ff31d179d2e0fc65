"""The features of the configuration: ids, raw values, sequences, and the files of list columns.

Frozen dataclasses with their own checks. Which group a feature stands in, and how features fit
together, is checked in `schema.py`, which has the rest.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Literal

from hstu_jax.config.checks import ConfigError, require

EXPRESSION_SIDES = ("user", "item", "context")
# Sequence and feature are joined by this: `uih_seq` + `video_id` is the column uih_seq__video_id.
SEQUENCE_SEPARATOR = "__"
# Rows of a vocabulary's table in front of its words: the missing value, and words not listed.
NUM_VOCABULARY_EXTRAS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdFeature:
    """A value looked up in an embedding table.

    Exactly one of `num_buckets`, `hash_bucket_size`, `vocab_list` and `vocab_file` says how a value
    becomes an id (`hstu_jax/features/id_mapping.py` has the rules). Features with the same
    `embedding_name` share one table and must agree on all of that.
    """

    num_buckets: int = 0  # integers 0..num_buckets-1, which are their own ids
    hash_bucket_size: int = 0  # any value, hashed; different values may share an id
    vocab_list: tuple[str, ...] = ()  # listed words; ids 0 = missing, 1 = not listed, 2.. = words
    vocab_file: str = ""  # the same, one word a line
    embedding_dim: int = 32
    embedding_name: str = ""  # "" = the feature has a table of its own, `<feature>_emb`
    # First values are uniform within +- this; 0 = the reference's sqrt(1 / number of ids).
    init_bound: float = 0.0
    expression: str = ""  # `side:column`, where the column has another name than the feature
    # In place of a missing value, and of a number outside num_buckets. "" = no id: a zero vector
    # (with a vocabulary: id 0).
    default_value: str = ""
    # Values outside num_buckets or not in the vocabulary, as a share of the column: more of them
    # is an error.
    max_unknown_share: float = 0.0
    # Of the group `contextual`: values of a row, exactly; 0 = any number. Their vectors are pooled.
    value_dim: int = 0
    pooling: Literal["sum", "mean"] = "sum"
    separator: str = "\x1d"  # between the values of a row that is a string

    def __post_init__(self):
        require(self.init_bound >= 0, "init_bound", self.init_bound, "must not be negative")
        require(self.embedding_dim > 0, "embedding_dim", self.embedding_dim, "must be positive")
        _require_one_size(self)
        require(
            0 <= self.max_unknown_share <= 1,
            "max_unknown_share",
            self.max_unknown_share,
            "must be in [0, 1]",
        )
        require(
            not self.hash_bucket_size or self.max_unknown_share == 0,
            "max_unknown_share",
            self.max_unknown_share,
            f"is not read: with hash_bucket_size={self.hash_bucket_size} every value has an id",
            "leave it 0",
        )
        if self.num_buckets and self.default_value:
            is_id = self.default_value.isdecimal() and int(self.default_value) < self.num_buckets
            require(
                is_id,
                "default_value",
                self.default_value,
                f"must be one of the ids 0..{self.num_buckets - 1} of num_buckets, as a string",
                "use '' for a zero vector",
            )
        _require_words(self)
        require(self.value_dim >= 0, "value_dim", self.value_dim, "must not be negative")
        require(bool(self.separator), "separator", self.separator, "must not be empty")
        require_expression(self.expression)

    @property
    def num_ids(self) -> int:
        """Rows of the table; reads `vocab_file` once."""
        if self.num_buckets or self.hash_bucket_size:
            return self.num_buckets or self.hash_bucket_size
        return len(self.words()) + NUM_VOCABULARY_EXTRAS

    @property
    def width(self) -> int:
        """Numbers that the feature contributes to a vector."""
        return self.embedding_dim

    @property
    def has_table(self) -> bool:
        """Whether the feature is looked up."""
        return True

    @property
    def id_rule(self) -> tuple:
        """What features of one table must share, besides the table's own size."""
        if self.num_buckets:  # out-of-range numbers become the default, whatever else is shared
            return ("num_buckets", self.num_buckets)
        if self.hash_bucket_size:
            return ("hash_bucket_size", self.hash_bucket_size)
        return ("vocabulary", self.words(), self.default_value)

    def words(self) -> tuple[str, ...]:
        """The vocabulary in id order; () without one."""
        return read_words(self.vocab_file) if self.vocab_file else self.vocab_list


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizerConfig:
    """What is done to a raw value x before anything else.

    "minmax": (x - min) / (max - min). "zscore": (x - mean) / standard_deviation.
    "log10": log10(x) where x > threshold, `default` elsewhere.

    Source: EasyRec, docs/source/feature/fg_docs/RawFeature.md, where the same choices are written
    as one string, `method=log10,threshold=1e-10,default=-10`.
    """

    method: Literal["none", "minmax", "zscore", "log10"] = "none"
    min: float = 0.0
    max: float = 1.0
    mean: float = 0.0
    standard_deviation: float = 1.0
    threshold: float = 1e-10
    default: float = -10.0

    def __post_init__(self):
        read = {
            "none": (),
            "minmax": ("min", "max"),
            "zscore": ("mean", "standard_deviation"),
            "log10": ("threshold", "default"),
        }[self.method]
        for field in dataclasses.fields(self):
            if field.name != "method" and field.name not in read:
                require(
                    getattr(self, field.name) == field.default,
                    field.name,
                    getattr(self, field.name),
                    f"is not read by method={self.method!r}",
                    f"leave it {field.default}",
                )
        require(self.max > self.min, "max", self.max, f"must be above min={self.min}")
        require(
            self.standard_deviation > 0,
            "standard_deviation",
            self.standard_deviation,
            "must be positive",
        )
        require(self.threshold >= 0, "threshold", self.threshold, "must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawFeature:
    """A number, or several: cut into buckets that are looked up, or used as it is.

    With `boundaries` the id of x is the number of boundaries that are at most x, and the feature
    has a table of `len(boundaries) + 1` rows; without, its `value_dim` numbers stand beside the
    embeddings. For the groups that take one column (`uih_action`, `query_time`, ...) it only says
    where that column is (`expression`).
    """

    expression: str = ""  # `side:column`, where the column has another name than the feature
    value_dim: int = 1  # numbers of a row, exactly
    boundaries: tuple[float, ...] = ()
    default_value: float = 0.0  # in place of a missing value, before the normalizer
    normalizer: NormalizerConfig = NormalizerConfig()
    embedding_dim: int = 0  # with boundaries
    embedding_name: str = ""
    init_bound: float = 0.0
    separator: str = "\x1d"  # between the values of a row that is a string

    def __post_init__(self):
        require_expression(self.expression)
        require(bool(self.separator), "separator", self.separator, "must not be empty")
        require(self.value_dim > 0, "value_dim", self.value_dim, "must be positive")
        ascending = tuple(sorted(set(self.boundaries))) == self.boundaries
        require(ascending, "boundaries", self.boundaries, "must be ascending and without repeats")
        require(self.init_bound >= 0, "init_bound", self.init_bound, "must not be negative")
        require(
            (self.embedding_dim > 0) == bool(self.boundaries) and self.embedding_dim >= 0,
            "embedding_dim",
            self.embedding_dim,
            f"must be positive exactly when there are boundaries (={self.boundaries})",
        )
        for name in ("embedding_name", "init_bound"):
            require(
                bool(self.boundaries) or not getattr(self, name),
                name,
                getattr(self, name),
                "is read with boundaries only",
                "leave it unset, or set boundaries",
            )
        require(
            not self.boundaries or self.value_dim == 1,
            "value_dim",
            self.value_dim,
            "must be 1 with boundaries",
        )

    @property
    def num_ids(self) -> int:
        """Rows of the table."""
        return len(self.boundaries) + 1

    @property
    def width(self) -> int:
        """Numbers that the feature contributes to a vector."""
        return self.embedding_dim or self.value_dim

    @property
    def has_table(self) -> bool:
        """Whether the feature is looked up."""
        return bool(self.boundaries)

    @property
    def id_rule(self) -> tuple:
        """What features of one table must share, besides the table's own size."""
        return ("boundaries", self.boundaries)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """How the sequences of one name (`uih_seq`, `cand_seq`) lie in the list-column files.

    A row's columns `<name>__*` are equally long. A null element is refused in the item, time,
    action and watch time columns, and a missing value elsewhere.
    """

    sequence_length: int = 0  # keeps a row's last n entries, the newest; 0 = all
    # Between the values of a row that is a string; "" = the columns are lists.
    sequence_delim: str = ""
    newest_first: bool = False  # rows run from the newest entry to the oldest; turned when read

    def __post_init__(self):
        require(
            self.sequence_length >= 0,
            "sequence_length",
            self.sequence_length,
            "must not be negative",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListColumnsConfig:
    """Parquet files with one training row a line (`data.source = "list_columns"`).

    Paths may hold `*`; files are read in the order of their names.
    """

    train_input_path: str = ""
    validation_input_path: str = ""  # for eval.every_num_steps, eval.baselines, eval.split
    eval_input_path: str = ""  # the split "test"
    # One item a row: the item id under its bare name (`video_id`), and columns of its features.
    # "" = the items that occur in the rows.
    item_input_path: str = ""
    user_id_field: str = "user_id"  # tells users apart; "" = every row is another user


def column_of(feature: str, expression: str) -> str:
    """The column that a feature reads: its own name, or the one of its `expression`.

    >>> column_of("uih_seq__clicked", "item:video_id")
    'uih_seq__video_id'
    """
    if not expression:
        return feature
    column = expression.partition(":")[2]
    sequence, separator, _ = feature.partition(SEQUENCE_SEPARATOR)
    return f"{sequence}{separator}{column}" if separator else column


def require_expression(expression: str) -> None:
    """Raises `ConfigError` unless `expression` is "" or `side:column`."""
    side, colon, column = expression.partition(":")
    require(
        not expression or (side in EXPRESSION_SIDES and bool(colon) and bool(column)),
        "expression",
        expression,
        f"must be side:column with one of the sides {', '.join(EXPRESSION_SIDES)}",
        "leave it '' for a column of the feature's own name",
    )


@functools.lru_cache(maxsize=64)
def read_words(path: str) -> tuple[str, ...]:
    """The words of a vocabulary file, one a line; read once a process.

    Raises:
        ConfigError: no such file, an empty line, or a word twice.
    """
    file = pathlib.Path(path)
    require(file.is_file(), "vocab_file", path, "no such file", "write one word a line")
    words = tuple(file.read_text(encoding="utf-8").splitlines())
    _require_distinct("vocab_file", path, words)
    return words


def _require_one_size(feature: IdFeature) -> None:
    for name in ("num_buckets", "hash_bucket_size"):
        value = getattr(feature, name)
        require(value >= 0, name, value, "must be positive")
    sizes = {
        name: getattr(feature, name)
        for name in ("num_buckets", "hash_bucket_size", "vocab_list", "vocab_file")
    }
    given = [name for name, value in sizes.items() if value]
    if not given:
        raise ConfigError(
            "num_buckets",
            feature.num_buckets,
            "must be positive",
            f"or set one of {', '.join(list(sizes)[1:])} in its place",
        )
    if len(given) > 1:
        raise ConfigError(
            given[1],
            sizes[given[1]],
            f"{given[0]}={sizes[given[0]]!r} is set too, and one alone says how values become ids",
            "leave one of them",
        )


def _require_words(feature: IdFeature) -> None:
    _require_distinct("vocab_list", feature.vocab_list, feature.vocab_list)
    if feature.vocab_list or feature.vocab_file:
        words = feature.words()  # reads the file, so that a wrong one is refused here
        require(
            not feature.default_value or feature.default_value not in words,
            "default_value",
            feature.default_value,
            "must not be a word of the vocabulary: it has id 0, and the words have 2, 3, ...",
        )


def _require_distinct(field: str, value: object, words: Iterable[str]) -> None:
    seen: set[str] = set()
    for word in words:
        require(bool(word), field, value, "has an empty word", "remove it")
        require(word not in seen, field, value, f"has {word!r} twice", "list each word once")
        seen.add(word)
