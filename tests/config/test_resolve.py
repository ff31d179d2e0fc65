"""Configurations: every wrong field is refused with its path, value, rule and what to do."""

import math
import subprocess
import sys

import pytest

from configs import kuairand
from hstu_jax.config import resolve, schema


def config_with(path, value, variant="sample"):
    raw = kuairand.get_config(variant)
    *sections, name = path.split(".")
    section = raw
    for part in sections:
        section = section[part]
    with section.ignore_type():
        section[name] = value
    return resolve.resolve(raw)


def test_values_arrive():
    config = config_with("model.temperature", 0.2)
    assert config.model.temperature == 0.2
    assert isinstance(config, schema.Config)
    assert config.num_contextual == 6
    assert config.embedding_names["uih_seq__video_id"] == "video_id_emb"
    assert config.embedding_names["user_id"] == "user_id_emb"


def test_an_integer_is_a_float():
    assert config_with("model.temperature", 1).model.temperature == 1.0


def test_misspelt_field_in_a_config_file_names_the_nearest():
    raw = kuairand.get_config()
    with pytest.raises(AttributeError, match="Did you mean .*num_steps"):
        raw.train.num_stepz = 3


def test_unknown_field_of_a_feature_names_the_nearest():
    raw = kuairand.get_config()
    with raw.unlocked():
        raw.features.user_id.num_bucket = 4
    expected = (
        r"features\.user_id\.num_bucket=4: there is no such field; did you mean 'num_buckets'"
    )
    with pytest.raises(ValueError, match=expected):
        resolve.resolve(raw)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.temperature", -1.0, r"model\.temperature=-1\.0: must be positive\."),
        ("model.temperature", math.inf, r"model\.temperature=inf: must be finite\."),
        ("train.dense_optimizer.lr", math.inf, r"train\.dense_optimizer\.lr=inf: must be finite\."),
        (
            "model.user_tower.hstu.stu.qk_bias_init",
            math.nan,
            r"model\.user_tower\.hstu\.stu\.qk_bias_init=nan: must be finite\.",
        ),
        ("seed", 2**32, r"seed=4294967296: must be in 0 \.\. 2\*\*32 - 1\."),
        ("model.user_tower.max_seq_len", 0, r"max_seq_len=0: must be positive"),
        ("model.user_tower.hstu.input_dropout_ratio", 1.0, r"=1\.0: must be in \[0, 1\)"),
        ("model.user_tower.hstu.stu.scaling_seqlen", 0, r"scaling_seqlen=0: would divide by zero"),
        ("model.user_tower.hstu.stu.num_heads", -4, r"stu\.num_heads=-4: must be positive"),
        (
            "model.user_tower.hstu.stu.embedding_dim",
            32,
            r"hidden_units=128: the item tower's width must equal .*embedding_dim=32; .*output_dim",
        ),
        ("model.user_tower.hstu.stu.sla_k1", -1, r"stu\.sla_k1=-1: must not be negative; use 0"),
        (
            "model.user_tower.hstu.stu.contextual_seq_len",
            7,
            r"contextual_seq_len=7: must not exceed the 6 tokens of .*contextual, .*; use -1",
        ),
        (
            "model.user_tower.hstu.attn_truncation_tail_len",
            5,
            r"attn_truncation_split_layer=0: goes together with attn_truncation_tail_len=5; set",
        ),
        ("model.user_tower.hstu.attn_truncation_tail_len", -5, r"tail_len=-5: must not be neg"),
        ("data.row_lens", (64, 134), r"row_lens=\(64, 134\): is read by layout='padded' only"),
        ("data.tokens_per_group", 10, r"tokens_per_group=10: must hold at least one user"),
        ("train.num_epochs", 0, r"train\.num_steps=0: needs num_steps or num_epochs"),
        ("eval.top_k", (), r"eval\.top_k=\(\): must be one or more"),
        ("train.dense_optimizer.beta2", 1.5, r"beta2=1\.5: must be in \[0, 1\)"),
        ("metrics.recall_at_k", (0,), r"recall_at_k=\(0,\): must be one or more positive"),
        ("eval.every_num_steps", -5, r"every_num_steps=-5: must not be negative"),
        ("eval.num_bootstrap", 0, r"num_bootstrap=0: must be positive"),
        ("eval.catalogue", "al", r"eval\.catalogue='al': unknown choice; did you mean 'all'\?"),
        ("mesh.chip", 0, r"mesh\.chip=0: must be positive, or -1"),
        (
            "mesh.host_exchange_slack",
            0.5,
            r"mesh\.host_exchange_slack=0\.5: has no effect with host=1 and chip=-1; leave it at",
        ),
        (
            "mesh.replicated_table_bytes",
            -1,
            r"mesh\.replicated_table_bytes=-1: must not be negative; 0 splits every table",
        ),
        ("mesh.exchange", "raged", r"mesh\.exchange='raged': unknown choice; did you mean 'ragg"),
        (
            "mesh.exchange_slack",
            0.0,
            r"mesh\.exchange_slack=0\.0: must be a positive number; 1\.25",
        ),
        ("model.output_dim", 8, r"initialization='aligned': needs linear towers"),
    ],
)
def test_a_value_that_breaks_a_rule(path, value, message):
    with pytest.raises(ValueError, match=message):
        config_with(path, value)


def config_with_hstu(**fields):
    raw = kuairand.get_config("sample")
    hstu = raw.model.user_tower.hstu
    for name, value in fields.items():
        section = hstu.stu if name in hstu.stu else hstu
        section[name] = value
    return resolve.resolve(raw)


def test_truncation_needs_a_layer_behind_the_split_and_something_to_cut():
    cut = dict(attn_truncation_tail_len=5, attn_num_layers=2)
    assert config_with_hstu(**cut, attn_truncation_split_layer=1)
    message = r"user_tower\.hstu\.attn_truncation_split_layer=2: must be below attn_num_layers=2,"
    with pytest.raises(ValueError, match=message):
        config_with_hstu(**cut, attn_truncation_split_layer=2)
    cut["attn_truncation_tail_len"] = 26
    message = r"hstu\.attn_truncation_tail_len=26: would cut nothing .*max_seq_len=26; use a"
    with pytest.raises(ValueError, match=message):
        config_with_hstu(**cut, attn_truncation_split_layer=1)


def test_a_window_beside_semi_local_attention_is_refused():
    message = r"stu\.max_attn_len=4: would not be read: .*\(sla_k1=2, sla_k2=0\) replaces.*; set it"
    with pytest.raises(ValueError, match=message):
        config_with_hstu(max_attn_len=4, sla_k1=2)


def test_unknown_choice_lists_the_choices():
    expected = (
        r"model\.similarity='COSIN': unknown choice; did you mean 'COSINE'\? available: 'COSINE'"
    )
    with pytest.raises(ValueError, match=expected):
        config_with("model.similarity", "COSIN")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.num_steps", 1.5, r"train\.num_steps=1\.5: must be of type int, not float"),
        ("eval.exclude_seen", 1, r"eval\.exclude_seen=1: must be of type bool, not int"),
        ("workdir", 3, r"workdir=3: must be of type str, not int"),
        ("eval.top_k", 5, r"eval\.top_k=5: must be a tuple, not int"),
        ("model.item_tower", 5, r"model\.item_tower=5: must be a section with fields"),
    ],
)
def test_wrong_type(path, value, message):
    with pytest.raises(TypeError, match=message):
        config_with(path, value)


def test_groups_must_name_known_features():
    expected = r"feature_groups\.uih=\('nope',\): names 'nope', which features does not describe"
    with pytest.raises(ValueError, match=expected):
        config_with("feature_groups.uih", ("nope",))


def test_groups_must_be_groups_of_the_model():
    raw = kuairand.get_config()
    with raw.unlocked():
        raw.feature_groups.uhi = ("user_id",)
    with pytest.raises(
        ValueError, match=r"feature_groups\.uhi=.*is not a group that the model reads"
    ):
        resolve.resolve(raw)


def test_a_needed_group_must_be_there():
    with pytest.raises(ValueError, match=r"feature_groups\.uih_action=\(\): must name a feature"):
        config_with("feature_groups.uih_action", ())


def test_features_of_one_table_must_agree():
    expected = r"embedding_name='video_id_emb': shares a table with features\."
    with pytest.raises(ValueError, match=expected):
        config_with("features.cand_seq__video_id.num_buckets", 5)


def test_contextual_features_must_be_equally_wide():
    with pytest.raises(
        ValueError, match=r"feature_groups\.contextual=.*must have one embedding_dim"
    ):
        config_with("features.user_id.embedding_dim", 8)


def test_action_mlp_and_encoder_come_together():
    expected = r"uih_preprocessor\.action_mlp=None: must be set exactly when action_encoder is"
    with pytest.raises(ValueError, match=expected):
        config_with("model.user_tower.hstu.input_preprocessor.uih_preprocessor.action_mlp", None)


def test_groups_divide_the_batch():
    raw = kuairand.get_config()
    raw.data.batch_size, raw.data.num_groups = 10, 4
    with pytest.raises(ValueError, match=r"batch_size=10: must be a multiple .*; try 12"):
        resolve.resolve(raw)


def test_a_configuration_loads_without_jax():
    code = (
        "import sys; from configs import kuairand; from hstu_jax.config import resolve;"
        "resolve.resolve(kuairand.get_config()); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_that_would_not_be_read_are_refused():
    raw = kuairand.get_config()
    raw.data.layout, raw.data.tokens_per_group = "padded", 4096
    with pytest.raises(ValueError, match="tokens_per_group=4096: is read by layout='packed' only"):
        resolve.resolve(raw)
    raw = kuairand.get_config()
    raw.data.negative_sampler.input_path, raw.data.negative_sampler.weight_exponent = "t.tsv", 0.5
    with pytest.raises(ValueError, match="weight_exponent=0.5: is not read: the weights come from"):
        resolve.resolve(raw)
    raw = kuairand.get_config()
    with raw.unlocked():
        raw.features.extra = dict(num_buckets=4)
    with pytest.raises(ValueError, match=r"features\.extra=.*is in no feature group"):
        resolve.resolve(raw)
    raw = kuairand.get_config()
    raw.eval.exclude_seen, raw.eval.also_with_seen = False, True
    with pytest.raises(ValueError, match="also_with_seen=True: has nothing to add: with exclude_s"):
        resolve.resolve(raw)
    raw.eval.also_with_seen, raw.eval.baselines, raw.eval.mean_baseline = False, False, False
    with pytest.raises(ValueError, match="mean_baseline=False: has no effect with baselines=False"):
        resolve.resolve(raw)
    raw.eval.mean_baseline, raw.eval.oracle, raw.eval.split = True, True, "validation"
    with pytest.raises(ValueError, match="oracle=True: exists for the test split"):
        resolve.resolve(raw)
