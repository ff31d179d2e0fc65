"""Features, sequences and list columns in a configuration: what is refused, with its message."""

import dataclasses
import re

import pytest

from configs import kuairand
from hstu_jax.config import feature_schema, resolve
from hstu_jax.config.feature_schema import IdFeature, RawFeature


def list_edits():
    return {
        "data/source": "list_columns",
        "data/list_columns/train_input_path": "a/*.parquet",
        "data/list_columns/eval_input_path": "b/*.parquet",
        "eval/baselines": False,
    }


def test_list_columns_resolve():
    raw = kuairand.get_config()
    with raw.unlocked():
        lists(raw)
        raw.sequences = {"uih_seq": {"sequence_delim": "|"}}
    config = resolve.resolve(raw)
    assert config.sequences["uih_seq"].sequence_delim == "|"
    assert config.data.list_columns.train_input_path == "a/*.parquet"


def test_raw_features_resolve():
    raw = kuairand.get_config()
    with raw.unlocked():
        raw.raw_features = {
            "age": resolve.section(RawFeature(boundaries=(18.0, 60.0), embedding_dim=16))
        }
        raw.feature_groups.contextual = ("user_id", "age")
        raw.features = {n: f for n, f in raw.features.items() if n in ("user_id",) or "__" in n}
    config = resolve.resolve(raw)
    assert config.num_contextual == 2
    assert config.embedding_names["age"] == "age_emb"
    assert config.all_features["age"].num_ids == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {},
            "num_buckets=0: must be positive; or set one of hash_bucket_size, vocab_list, vocab_f",
        ),
        ({"num_buckets": -1}, "num_buckets=-1: must be positive."),
        (
            {"num_buckets": 4, "hash_bucket_size": 9},
            "hash_bucket_size=9: num_buckets=4 is set too, and one alone says how values become",
        ),
        ({"vocab_list": ("a", "a")}, "vocab_list=('a', 'a'): has 'a' twice; list each word once."),
        ({"vocab_list": ("a", "")}, "vocab_list=('a', ''): has an empty word; remove it."),
        ({"vocab_file": "no/where"}, "vocab_file='no/where': no such file; write one word a line."),
        (
            {"num_buckets": 4, "default_value": "4"},
            "default_value='4': must be one of the ids 0..3 of num_buckets, as a string; use ''",
        ),
        (
            {"vocab_list": ("a",), "default_value": "a"},
            "default_value='a': must not be a word of the vocabulary",
        ),
        ({"num_buckets": 4, "max_unknown_share": 1.5}, "max_unknown_share=1.5: must be in [0, 1]"),
        (
            {"hash_bucket_size": 4, "max_unknown_share": 0.5},
            "max_unknown_share=0.5: is not read: with hash_bucket_size=4 every value has an id",
        ),
        (
            {"num_buckets": 4, "expression": "users:age"},
            "expression='users:age': must be side:column with one of the sides user, item, context",
        ),
        ({"num_buckets": 4, "expression": "user:"}, "expression='user:': must be side:column"),
        ({"num_buckets": 4, "value_dim": -1}, "value_dim=-1: must not be negative."),
        ({"num_buckets": 4, "separator": ""}, "separator='': must not be empty."),
    ],
)
def test_id_feature(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        IdFeature(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boundaries": (2.0, 1.0)}, "boundaries=(2.0, 1.0): must be ascending and without"),
        ({"boundaries": (1.0,)}, "embedding_dim=0: must be positive exactly when there are bound"),
        ({"embedding_dim": 4}, "embedding_dim=4: must be positive exactly when"),
        ({"embedding_name": "x"}, "embedding_name='x': is read with boundaries only"),
        ({"value_dim": 0}, "value_dim=0: must be positive."),
        (
            {"boundaries": (1.0,), "embedding_dim": 2, "value_dim": 2},
            "value_dim=2: must be 1 with boundaries.",
        ),
    ],
)  # fmt: skip
def test_raw_feature(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RawFeature(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "minmax", "mean": 1.0}, "mean=1.0: is not read by method='minmax'; leave"),
        ({"method": "minmax", "min": 2.0}, "max=1.0: must be above min=2.0"),
        ({"method": "zscore", "standard_deviation": 0.0}, "standard_deviation=0.0: must be"),
        ({"method": "log10", "threshold": -1.0}, "threshold=-1.0: must not be negative"),
        ({"threshold": 0.5}, "threshold=0.5: is not read by method='none'"),
    ],
)  # fmt: skip
def test_normalizer(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        feature_schema.NormalizerConfig(**fields)


def refused(change, message):
    raw = kuairand.get_config()
    with raw.unlocked():
        change(raw)
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve.resolve(raw)


def lists(raw, **edits):
    for path, value in {**list_edits(), **edits}.items():
        *sections, name = path.split("/")
        section = raw
        for part in sections:
            section = section[part]
        section[name] = value


def set_lists(**edits):
    return lambda raw: lists(raw, **edits)


def set_field(path, value):
    def change(raw):
        *sections, name = path.split("/")
        section = raw
        for part in sections:
            section = section[part]
        section[name] = value

    return change


def without_actions(raw):
    actions = raw.model.user_tower.hstu.input_preprocessor.uih_preprocessor
    with raw.unlocked():
        actions.action_encoder, actions.action_mlp = None, None


def both(*changes):
    def change(raw):
        for one in changes:
            one(raw)

    return change


REFUSED = {
    "list columns of an event store": (
        set_field("data/list_columns/train_input_path", "a"),
        "data.list_columns.train_input_path='a': is read by data.source='list_columns' only",
    ),
    "sequences of an event store": (
        set_field("sequences", {"uih_seq": {"sequence_length": 4}}),
        "is read by data.source='list_columns' only, not by 'sample'; an event store's histories",
    ),
    "sequence of no feature": (
        both(set_lists(), set_field("sequences", {"seq": {"sequence_length": 4}})),
        "is the sequence of no feature; the features have cand_seq, uih_seq.",
    ),
    "negative sequence length": (
        both(set_lists(), set_field("sequences", {"uih_seq": {"sequence_length": -4}})),
        "sequences.uih_seq.sequence_length=-4: must not be negative.",
    ),
    "labels that an event store lacks": (
        set_field("data/label_fields", ("cand_seq__price",)),
        "an event store has no column 'cand_seq__price' of its positives; it has cand_seq__action",
    ),
    "labels of another sequence": (
        set_lists(**{"data/label_fields": ("uih_seq__watch_time",)}),
        "'uih_seq__watch_time' must be a column of the candidates' sequence 'cand_seq'",
    ),
    "no training files": (
        set_lists(**{"data/list_columns/train_input_path": ""}),
        "data.list_columns.train_input_path='': must name parquet files; a pattern such as",
    ),
    "no test files": (
        set_lists(**{"data/list_columns/eval_input_path": ""}),
        "data.list_columns.eval_input_path='': must name parquet files",
    ),
    "no validation files": (
        set_lists(**{"eval/every_num_steps": 5}),
        "data.list_columns.validation_input_path='': must name parquet files; for validation: give",
    ),
    "no times": (
        both(
            set_lists(),
            set_field("feature_groups/uih_timestamp", ()),
            set_field("model/user_tower/hstu/positional_encoder/use_time_encoding", False),
            set_field("model/user_tower/hstu/positional_encoder/num_time_buckets", 0),
        ),
        "feature_groups.uih_timestamp=(): must name",
    ),
    "an ablation of actions that the model does not read": (
        both(
            set_field("data/ablation", "no_actions"),
            without_actions,
        ),
        "data.ablation='no_actions': takes away what this model does not read; use another",
    ),
    "an ablation of times that the model does not read": (
        both(
            set_field("data/ablation", "no_time"),
            set_field("model/user_tower/hstu/positional_encoder/use_time_encoding", False),
        ),
        "data.ablation='no_time': takes away what this model does not read; use another",
    ),
    "an ablation undone by a feature": (
        both(
            set_field("data/ablation", "no_actions"),
            set_field(
                "features/uih_seq__bits",
                {"num_buckets": 256, "expression": "user:action_weight"},
            ),
            set_field("feature_groups/uih", ("uih_seq__video_id", "uih_seq__bits")),
        ),
        "data.ablation='no_actions': the feature 'uih_seq__bits' of the group uih reads",
    ),
    "a user of a sequence": (
        set_lists(
            **{
                "data/negative_sampler/kind": "HardNegativeSampler",
                "data/negative_sampler/num_hard_sample": 2,
                "data/negative_sampler/hard_neg_edge_input_path": "edges.tsv",
                "data/negative_sampler/user_id_field": "uih_seq__user",
            }
        ),
        "data.negative_sampler.user_id_field='uih_seq__user': is a column of the sequence "
        "'uih_seq', not of the row; name a column of the row itself",
    ),
    "a weight of a sequence": (
        set_lists(**{"data/sample_weight_fields": ("cand_seq__action_weight",)}),
        "data.sample_weight_fields='cand_seq__action_weight': is a column of the sequence 'cand_s",
    ),
    "a feature of the row from a sequence": (
        both(
            set_lists(),
            set_field("features/user_id/expression", "user:uih_seq__video_id"),
        ),
        "feature_groups.contextual='uih_seq__video_id': is a column of the sequence 'uih_seq', not",
    ),
    "two names": (
        set_field("raw_features", {"user_id": {}}),
        "features.user_id has the same name; rename one of them",
    ),
    "raw feature in no group": (
        set_field("raw_features", {"age": {}}),
        "is in no feature group, so nothing would read it",
    ),
    "raw feature of one column with options": (
        set_field("raw_features", {"request_time": {"default_value": 3.0}}),
        "raw_features.request_time.default_value=3.0: is not read: the feature stands in none of",
    ),
    "several values in a history": (
        set_field("features/uih_seq__video_id/value_dim", 3),
        "features.uih_seq__video_id.value_dim=3: must be 1 in the group uih",
    ),
    "pooling in a history": (
        set_field("features/uih_seq__video_id/pooling", "mean"),
        "features.uih_seq__video_id.pooling='mean': is not read in the group uih",
    ),
    "an item's feature of a row": (
        set_field("features/user_id/expression", "item:author"),
        "features.user_id.expression='item:author': a row has no item of its own, and the feature",
    ),
    "a user's feature of a candidate": (
        set_field("features/cand_seq__video_id/expression", "user:video_id"),
        "expression='user:video_id': candidates and negatives have the features of items alone",
    ),
    "two rules for one table": (
        both(
            set_field("features/cand_seq__video_id/num_buckets", 0),
            set_field("features/cand_seq__video_id/hash_bucket_size", 16_384),
        ),
        "embedding_name='video_id_emb': shares a table with features.",
    ),
    "widths of contextual features": (
        both(
            set_field("raw_features", {"age": {}}),
            set_field("feature_groups/contextual", ("user_id", "age")),
            lambda raw: [
                raw.features.__delitem__(n)
                for n in list(raw.features)
                if n != "user_id" and "__" not in n
            ],  # fmt: skip
        ),
        "must have one embedding_dim, since each feature becomes a token",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_together(case):
    refused(*REFUSED[case])


def test_vocabulary_file_is_checked(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("a\n\nb\n")
    with pytest.raises(ValueError, match="has an empty word"):
        IdFeature(vocab_file=str(file))
    other = tmp_path / "others.txt"
    other.write_text("a\nb\n")
    assert IdFeature(vocab_file=str(other)).num_ids == 4
    one = dataclasses.replace(IdFeature(vocab_file=str(other)), embedding_name="t")
    assert one.id_rule == IdFeature(vocab_list=("a", "b")).id_rule
