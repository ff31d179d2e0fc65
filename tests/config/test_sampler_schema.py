"""The samplers' section: every field that is wrong, or that the chosen kind does not read."""

import re

import pytest

from configs import kuairand
from hstu_jax.config import data_schema, resolve, sampler_schema

HARD = {
    "kind": "HardNegativeSampler",
    "hard_neg_edge_input_path": "edges.tsv",
    "num_hard_sample": 4,
}
ATTRS = {
    "item_input_path": "items.tsv",
    "item_id_field": "cand_seq__video_id",
    "attr_fields": ("video_id",),
}


def _resolve(**fields):
    raw = kuairand.get_config()
    for name, value in fields.items():
        with raw.data.negative_sampler.ignore_type():
            raw.data.negative_sampler[name] = value
    return resolve.resolve(raw).data.negative_sampler


def test_both_kinds_resolve():
    assert _resolve().kind == "NegativeSampler"
    assert _resolve(**HARD, **ATTRS, hard_sample_strategy="random").attr_fields == ("video_id",)
    assert data_schema.NegativeSamplerConfig is sampler_schema.NegativeSamplerConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "NegativeSamplerV2"}, "kind='NegativeSamplerV2': unknown choice; did you mean"),
        ({"num_hard_sample": 4}, "num_hard_sample=4: is not read by kind='NegativeSampler'; leave"),
        ({"exclude_positives": False}, "exclude_positives=False: is not read by kind='Negative"),
        ({"user_id_field": "uid"}, "user_id_field='uid': is not read by kind='NegativeSampler'"),
        ({"input_path": "odps://t"}, "input_path='odps://t': is not a file path; export the table"),
        ({**HARD, "input_path": "t.tsv"}, "input_path='t.tsv': is not read by kind='HardNegative"),
        (
            {**HARD, "hard_neg_edge_input_path": ""},
            "hard_neg_edge_input_path='': kind='HardNegativeSampler' needs the file of hard edges; "
            "make one with `python -m hstu_jax.prepare hard_negatives`.",
        ),
        ({**HARD, "num_hard_sample": 0}, "num_hard_sample=0: must be positive with kind='Hard"),
        ({**HARD, "num_hard_sample": -1}, "num_hard_sample=-1: must not be negative."),
        ({**HARD, "hard_sample_strategy": "topk"}, "hard_sample_strategy='topk': unknown choice"),
        ({**HARD, "user_id_field": ""}, "user_id_field='': must name a column of users.parquet or"),
        ({**HARD, "field_delimiter": ""}, "field_delimiter='': must be one character"),
        ({"field_delimiter": ","}, "field_delimiter=',': is not read: there is no file, since"),
        ({"field_delimiter": "::", "input_path": "t.tsv"}, "field_delimiter='::': must be one"),
        ({**HARD, "max_unknown_share": 1.5}, "max_unknown_share=1.5: must be in [0, 1]."),
        (
            {**HARD, "item_input_path": "t.tsv", "weight_exponent": 1.0},
            "weight_exponent=1.0: is not read: the weights come from item_input_path='t.tsv'",
        ),
        ({**HARD, "attr_fields": ("video_id",)}, "attr_fields=('video_id',): is not read without"),
        ({**HARD, **ATTRS, "item_id_field": ""}, "item_id_field='': goes with attr_fields="),
        ({**HARD, **ATTRS, "attr_fields": ("video_id",) * 2}, "names a field twice"),
        (
            {**HARD, "attr_delimiter": "|"},
            "attr_delimiter='|': must not be empty, and is read with",
        ),
        ({**HARD, **ATTRS, "attr_delimiter": "\t"}, "attr_delimiter='\\t': must differ from field"),
        (
            {**HARD, **ATTRS, "item_id_field": "video_id"},
            "item_id_field='video_id': is no feature of the group candidate; choose one of",
        ),
        (
            {**HARD, **ATTRS, "attr_fields": ("tag",)},
            "attr_fields=('tag',): lacks the candidate features cand_seq__video_id; name every",
        ),
    ],
)
def test_wrong_fields_are_refused_with_their_path(fields, message):
    with pytest.raises(ValueError, match=re.escape("data.negative_sampler.")) as error:
        _resolve(**fields)
    assert message in str(error.value)


def test_more_than_one_sample_weight_is_refused():
    raw = kuairand.get_config()
    raw.data.sample_weight_fields = ("a", "b")
    with pytest.raises(ValueError, match=r"^data\.sample_weight_fields=\('a', 'b'\): holds more"):
        resolve.resolve(raw)
