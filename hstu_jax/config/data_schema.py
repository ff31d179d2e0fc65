"""The data section of the configuration: where rows come from and how they become batches.

Frozen dataclasses with their own checks. Relations to other sections are checked in `schema.py`,
which has the rest.
"""

import dataclasses
from typing import Literal

from hstu_jax.config.checks import require
from hstu_jax.config.feature_schema import ListColumnsConfig

Ablation = Literal["none", "no_actions", "no_time", "shuffled_order", "shuffled_targets"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativeSamplerConfig:
    """Negatives drawn by item weight, with replacement, shared by one group's queries.

    Weights come from the item table file `input_path` where it is set, else they are the item's
    number of training events to the power `weight_exponent` (0 = uniform over the items that have
    at least one).
    """

    num_sample: int = 128
    num_eval_sample: int = 0  # 0 = num_sample
    input_path: str = ""
    weight_exponent: float = 0.0

    def __post_init__(self):
        require(self.num_sample > 0, "num_sample", self.num_sample, "must be positive")
        require(
            self.num_eval_sample >= 0,
            "num_eval_sample",
            self.num_eval_sample,
            "must not be negative",
        )
        require(
            not self.input_path or self.weight_exponent == 0,
            "weight_exponent",
            self.weight_exponent,
            f"is not read: the weights come from input_path={self.input_path!r}",
            "leave one of the two unset",
        )
        require(
            self.weight_exponent >= 0,
            "weight_exponent",
            self.weight_exponent,
            "must not be negative",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the rows come from and how they become batches (DESIGN 3.4, 3.5)."""

    path: str = "data/kuairand_sample"  # an event store folder
    # "sample": an event store, generated when missing; "list_columns": parquet files, not `path`.
    source: Literal["sample", "event_store", "list_columns"] = "event_store"
    list_columns: ListColumnsConfig = ListColumnsConfig()
    # Columns of the candidates, as long as they are: a label's length is the number of queries,
    # by which a row counts in the mean loss. Their values are a candidate's action and watch time.
    label_fields: tuple[str, ...] = ()
    batch_size: int = 128  # users in a global batch, at most
    num_groups: int = 1  # groups of users with negatives of their own; devices split them
    layout: Literal["packed", "padded"] = "packed"
    # Packed: slots of a group = rows of `row_len`. 0 = as many slots as users x mean length need.
    tokens_per_group: int = 0
    row_lens: tuple[int, ...] = ()  # padded: the short list of row lengths; () = the longest only
    queries_per_group: int = 0  # positives of a group, at most; 0 = 12 per user
    block_len: int = 128  # tokens in a block of the attention schedule
    num_prefetch: int = 2  # batches made ahead, in a background thread
    # Takes one kind of input away, to measure what it is worth (`hstu_jax/features/ablation.py`).
    ablation: Ablation = "none"
    negative_sampler: NegativeSamplerConfig = NegativeSamplerConfig()

    def __post_init__(self):
        for name in ("batch_size", "num_groups", "block_len", "num_prefetch"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("tokens_per_group", "queries_per_group"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(
            self.batch_size % self.num_groups == 0,
            "batch_size",
            self.batch_size,
            f"must be a multiple of num_groups={self.num_groups}",
            f"try {-(-self.batch_size // self.num_groups) * self.num_groups}",
        )
        require(
            self.layout == "packed" or not self.tokens_per_group,
            "tokens_per_group",
            self.tokens_per_group,
            "is read by layout='packed' only",
            "leave it 0 with layout='padded'",
        )
        require(
            self.layout == "padded" or not self.row_lens,
            "row_lens",
            self.row_lens,
            "is read by layout='padded' only",
            "leave it empty with layout='packed'",
        )
        require(
            tuple(sorted(set(self.row_lens))) == self.row_lens,
            "row_lens",
            self.row_lens,
            "must be ascending and without repeats",
        )
