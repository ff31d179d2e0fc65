"""What `model.objective` refuses, with path, value, rule and way out."""

import dataclasses
import re

import pytest

from configs import kuairand
from hstu_jax.config import checks, resolve, sampler_schema

_HSTU = "model.user_tower.hstu"
_NEXT = {"model.objective": "next_item"}
_TIME_BIAS = {
    f"{_HSTU}.stu.use_time_bias": True,
    f"{_HSTU}.positional_encoder.use_time_encoding": False,
}


def resolved(values):
    """The sample's configuration with some fields replaced."""
    raw = kuairand.get_config("sample")
    for path, value in values.items():
        *sections, name = path.split(".")
        section = raw
        for part in sections:
            section = section[part]
        section[name] = value
    return resolve.resolve(raw)


def test_the_objective_resolves():
    config = resolved({**_NEXT, "model.next_item.time": "own"})
    assert (config.model.objective, config.model.next_item.time) == ("next_item", "own")
    assert resolved({}).model.objective == "window"
    own = {f"{_HSTU}.stu.time_bias_query": "own", "feature_groups.query_time": ()}
    assert resolved({**_NEXT, **_TIME_BIAS, **own}).model.objective == "next_item"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.objective": "next"}, "model.objective='next': unknown choice; did you mean"),
        (
            {**_NEXT, "model.next_item.time": "age"},
            "model.next_item.time='age': unknown choice; available: 'next_request', 'own'.",
        ),
        (
            {"model.next_item.time": "own"},
            "model.next_item=NextItemConfig(time='own'): is read with model.objective='next_item' "
            "only; leave its fields at their defaults, or change the objective.",
        ),
        (
            {
                **_NEXT,
                "model.next_item.time": "own",
                f"{_HSTU}.positional_encoder.use_time_encoding": False,
            },
            "reads next_item.time='own' with positional_encoder.use_time_encoding=True only; "
            "leave it at its default, or switch the encoding on.",
        ),
        (
            {**_NEXT, "feature_groups.query_time": ()},
            "reads the request's time at a user's last token, and feature_groups.query_time names "
            "none; name it, or use next_item.time='own'.",
        ),
        (
            {**_NEXT, **_TIME_BIAS, "feature_groups.query_time": ()},
            "with stu.use_time_bias=True and stu.time_bias_query='next_request' asks at the "
            "request's time at a user's last token, and feature_groups.query_time names none; name "
            "it, or use time_bias_query='own'.",
        ),
        (
            {**_TIME_BIAS, "feature_groups.query_time": ()},
            "model.objective='window': with stu.use_time_bias=True and stu.time_bias_query="
            "'next_request' asks at the request's time at a user's last token",
        ),
        (
            {**_TIME_BIAS, "feature_groups.uih_timestamp": ()},
            "feature_groups.uih_timestamp=(): must name a feature, since the model reads it.",
        ),
        (
            {**_NEXT, f"{_HSTU}.stu.contextual_seq_len": 3},
            "not by model.user_tower.hstu.stu.contextual_seq_len=3: tokens that see the whole "
            "history would show every position its answer; leave it at -1, or use 0.",
        ),
        (
            {
                **_NEXT,
                f"{_HSTU}.attn_num_layers": 2,
                f"{_HSTU}.attn_truncation_split_layer": 1,
                f"{_HSTU}.attn_truncation_tail_len": 8,
            },
            "needs every position of the last layer, and attn_truncation_split_layer=1 cuts them "
            "off; set both attn_truncation fields to 0.",
        ),
        (
            {
                **_NEXT,
                f"{_HSTU}.output_postprocessor": "timestamp_layernorm",
                f"{_HSTU}.timestamp_layernorm.time_duration_period_units": (3600,),
                f"{_HSTU}.timestamp_layernorm.time_duration_units_per_period": (24,),
            },
            "output_postprocessor='timestamp_layernorm' reads one a user; use 'layernorm' or "
            "'l2norm'.",
        ),
        (
            {**_NEXT, "data.ablation": "shuffled_order"},
            "data.ablation='shuffled_order' would move them in front of their own queries; use "
            "another ablation.",
        ),
    ],
)
def test_refused(values, message):
    with pytest.raises(checks.ConfigError, match=re.escape(message)) as caught:
        resolved(values)
    if "the model reads it" in message:
        assert str(caught.value) == message
    elif "reads" in message or "needs" in message:
        assert str(caught.value).startswith("model.objective='next_item': ")


def test_refused_sources():
    """Fields that take more to be set at all."""
    config = resolved(_NEXT)
    data = dataclasses.replace(
        config.data,
        negative_sampler=sampler_schema.NegativeSamplerConfig(
            kind="HardNegativeSampler",
            num_sample=8,
            num_hard_sample=2,
            hard_neg_edge_input_path="edges.txt",
        ),
    )
    with pytest.raises(checks.ConfigError, match="hard negatives belong to a window's; use data"):
        dataclasses.replace(config, data=data)


def test_refused_for_list_columns():
    raw = kuairand.get_config("sample")
    raw.data.source, raw.model.objective = "list_columns", "next_item"
    raw.data.list_columns.train_input_path = "a/*.parquet"
    raw.data.list_columns.eval_input_path = "b/*.parquet"
    raw.eval.baselines = False
    message = "the candidates of data.source='list_columns' are none; prepare an event store, or"
    with pytest.raises(checks.ConfigError, match=re.escape(message)):
        resolve.resolve(raw)
