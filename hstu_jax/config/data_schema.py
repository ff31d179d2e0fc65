"""The data section of the configuration: where rows come from and how they become batches.

Frozen dataclasses with their own checks. Relations to other sections are checked in `schema.py`,
which has the rest.
"""

import dataclasses
from typing import Literal

from hstu_jax.config.checks import require
from hstu_jax.config.feature_schema import ListColumnsConfig
from hstu_jax.config.sampler_schema import NegativeSamplerConfig

Ablation = Literal["none", "no_actions", "no_time", "shuffled_order", "shuffled_targets"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the rows come from and how they become batches (docs/design.md)."""

    path: str = "data/kuairand_sample"  # an event store folder
    # "sample": an event store, generated when missing; "list_columns": parquet files, not `path`.
    source: Literal["sample", "event_store", "list_columns"] = "event_store"
    list_columns: ListColumnsConfig = ListColumnsConfig()
    # Columns of the candidates, as long as they are: a label's length is the number of queries,
    # by which a row counts in the mean loss. Their values are a candidate's action and watch time.
    label_fields: tuple[str, ...] = ()
    batch_size: int = 128  # users in a global batch, at most
    num_groups: int = 1  # groups of users with negatives of their own; devices split them
    # "all": every user is scored against the negatives of all groups, num_groups * num_sample.
    negative_sharing: Literal["none", "all"] = "none"
    layout: Literal["packed", "padded"] = "packed"
    # Packed: slots of a group = rows of `row_len`. 0 = as many slots as users x mean length need.
    tokens_per_group: int = 0
    row_lens: tuple[int, ...] = ()  # padded: the short list of row lengths; () = the longest only
    queries_per_group: int = 0  # at most; 0 = 12 per user, next_item: 1.2 x the mean
    block_len: int = 128  # tokens in a block of the attention schedule
    num_prefetch: int = 2  # batches made ahead, in a background thread
    # Takes one kind of input away, to measure what it is worth (`hstu_jax/features/ablation.py`).
    ablation: Ablation = "none"
    negative_sampler: NegativeSamplerConfig = NegativeSamplerConfig()
    # At most one column of windows.arrow or users.parquet, or of the rows of list columns: weight
    # of the losses of a window's queries. Metrics stay unweighted.
    sample_weight_fields: tuple[str, ...] = ()

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
        self._check_sharing()
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
        require(
            len(self.sample_weight_fields) <= 1,
            "sample_weight_fields",
            self.sample_weight_fields,
            "holds more than one name, and one loss has one weight (the reference reads the first)",
            "leave the one that is to be used",
        )

    def _check_sharing(self):
        if self.negative_sharing == "none":
            return
        require(
            self.num_groups > 1,
            "negative_sharing",
            self.negative_sharing,
            f"is for several groups, and there is num_groups={self.num_groups}",
            "leave it 'none', or use more groups",
        )
        require(
            self.negative_sampler.exclusion == "query",
            "negative_sharing",
            self.negative_sharing,
            "makes the positives of one group negatives of others, which "
            f"negative_sampler.exclusion={self.negative_sampler.exclusion!r} rules out",
            "set that to 'query', which leaves out each user's own",
        )
