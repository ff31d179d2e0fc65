"""The samplers' section of the configuration: which negatives a query is trained against.

One section for all kinds; a field that its `kind` does not read must stay unset. Relations to other
sections are checked in `schema.py`; the samplers are in `hstu_jax/features/negatives.py` and
`hard_negatives.py`.
"""

import dataclasses
from typing import Literal

from hstu_jax.config.checks import require

SamplerKind = Literal["NegativeSampler", "HardNegativeSampler"]
HardSampleStrategy = Literal["full", "random"]

_HARD_ONLY = (
    "user_input_path",
    "item_input_path",
    "hard_neg_edge_input_path",
    "num_hard_sample",
    "hard_sample_strategy",
    "exclude_positives",
    "item_id_field",
    "user_id_field",
    "attr_fields",
    "attr_delimiter",
    "max_unknown_share",
)
PATHS = ("input_path", "user_input_path", "item_input_path", "hard_neg_edge_input_path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativeSamplerConfig:
    """Negatives drawn by item weight, shared by one group's queries; and hard ones of each user.

    Weights of `NegativeSampler` come from the item table file `input_path` where it is set (its ids
    are item indices, as preparation writes them), those of `HardNegativeSampler` from
    `item_input_path` (its ids are the original ones, or of list columns those of the rows); else
    they are the item's number of training events to the power `weight_exponent` (0 = uniform over
    the items that have at least one).

    `HardNegativeSampler` also gives every user up to `num_hard_sample` items of the hard-edge
    table, in evaluation too. Its files are text: a header of `name:type` columns, one entry a line.
    """

    kind: SamplerKind = "NegativeSampler"
    num_sample: int = 128
    num_eval_sample: int = 0  # 0 = num_sample
    input_path: str = ""
    weight_exponent: float = 0.0
    # No item is a negative of its own query. "group": negatives are drawn from what is no positive
    # of the whole group; "query" (next_item): drawn from all items, and each query leaves out its
    # own, for groups whose positives are a large part of the catalogue. With shared negatives
    # it is "query", and the window objective leaves out the positives of all of a user's queries.
    exclusion: Literal["group", "query"] = "group"
    field_delimiter: str = "\t"  # between the columns of the files' lines
    # HardNegativeSampler only, from here.
    user_input_path: str = ""  # id, weight: users that may have hard negatives; "" = all
    item_input_path: str = ""  # id, weight, attrs: items that may be negatives; "" = all
    hard_neg_edge_input_path: str = ""  # user id, item id, weight (not used, as in the reference)
    num_hard_sample: int = 0  # of a user, at most
    hard_sample_strategy: HardSampleStrategy = "full"  # the first in the file, or a random choice
    # Leave out what is a positive of the same window; False = the reference's way.
    exclude_positives: bool = True
    # Column of users.parquet, or of the rows of list columns, that user ids are values of.
    user_id_field: str = "user_id"
    item_id_field: str = ""  # the candidate feature that item ids are values of; with attr_fields
    attr_fields: tuple[str, ...] = ()  # what `attrs` holds, in order; () = it is not looked at
    attr_delimiter: str = ":"
    max_unknown_share: float = 0.01  # of a file's lines that name a user or item not in the store

    def __post_init__(self):
        require(self.num_sample > 0, "num_sample", self.num_sample, "must be positive")
        for name in ("num_eval_sample", "num_hard_sample", "weight_exponent"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in PATHS:
            require(
                "://" not in getattr(self, name),
                name,
                getattr(self, name),
                "is not a file path",
                "export the table to a text file",
            )
        require(
            not (self.input_path or self.item_input_path) or self.weight_exponent == 0,
            "weight_exponent",
            self.weight_exponent,
            f"is not read: the weights come from input_path={self.input_path!r}"
            if self.input_path
            else f"is not read: the weights come from item_input_path={self.item_input_path!r}",
            "leave one of the two unset",
        )
        require(
            len(self.field_delimiter) == 1 and self.field_delimiter not in "\r\n:",
            "field_delimiter",
            self.field_delimiter,
            "must be one character, no line break and no colon, which stands in the header",
        )
        require(
            self.field_delimiter == "\t" or self.kind != "NegativeSampler" or bool(self.input_path),
            "field_delimiter",
            self.field_delimiter,
            "is not read: there is no file, since input_path=''",
            "leave it a tab, or give the item table",
        )
        if self.kind == "NegativeSampler":
            self._check_that_hard_fields_are_unset()
        else:
            self._check_hard_fields()

    def _check_that_hard_fields_are_unset(self):
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _HARD_ONLY:
            require(
                getattr(self, name) == defaults[name],
                name,
                getattr(self, name),
                f"is not read by kind={self.kind!r}",
                "leave it unset, or set kind='HardNegativeSampler'",
            )

    def _check_hard_fields(self):
        require(
            not self.input_path,
            "input_path",
            self.input_path,
            "is not read by kind='HardNegativeSampler'",
            "give the item table as item_input_path, with original item ids",
        )
        require(
            bool(self.hard_neg_edge_input_path),
            "hard_neg_edge_input_path",
            self.hard_neg_edge_input_path,
            "kind='HardNegativeSampler' needs the file of hard edges",
            "make one with `python -m hstu_jax.prepare hard_negatives`",
        )
        require(
            self.num_hard_sample > 0,
            "num_hard_sample",
            self.num_hard_sample,
            "must be positive with kind='HardNegativeSampler'",
            "set it, or use kind='NegativeSampler'",
        )
        require(
            bool(self.user_id_field),
            "user_id_field",
            "",
            "must name a column of users.parquet or of the rows",
        )
        require(
            0 <= self.max_unknown_share <= 1,
            "max_unknown_share",
            self.max_unknown_share,
            "must be in [0, 1]",
        )
        self._check_attributes()

    def _check_attributes(self):
        require(
            not self.attr_fields or bool(self.item_input_path),
            "attr_fields",
            self.attr_fields,
            "is not read without item_input_path, whose attrs column it describes",
            "set item_input_path, or leave it empty",
        )
        require(
            bool(self.attr_fields) == bool(self.item_id_field),
            "item_id_field",
            self.item_id_field,
            f"goes with attr_fields={self.attr_fields}: it says which of them is the item's id",
            "set both, or none of them",
        )
        require(
            len(set(self.attr_fields)) == len(self.attr_fields),
            "attr_fields",
            self.attr_fields,
            "names a field twice",
        )
        require(
            bool(self.attr_delimiter) and (bool(self.attr_fields) or self.attr_delimiter == ":"),
            "attr_delimiter",
            self.attr_delimiter,
            "must not be empty, and is read with attr_fields only",
        )
        require(
            self.attr_delimiter != self.field_delimiter,
            "attr_delimiter",
            self.attr_delimiter,
            "must differ from field_delimiter",
        )
