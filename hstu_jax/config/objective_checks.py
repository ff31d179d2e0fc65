"""What `model.objective` does not go together with. Called by `schema.Config`."""

from typing import Any

from hstu_jax.config.checks import require
from hstu_jax.config.model_schema import NextItemConfig

_WHERE = "model.objective"


def check(config: Any) -> None:
    """Raises `ConfigError` where other fields do not fit the objective.

    Args:
        config: a `schema.Config` (which imports this module, so it is not named here).
    """
    if config.model.objective == "window":
        require(
            config.model.next_item == NextItemConfig(),
            "model.next_item",
            config.model.next_item,
            "is read with model.objective='next_item' only",
            "leave its fields at their defaults, or change the objective",
        )
        require(
            config.data.negative_sampler.exclusion == "group"
            or config.data.negative_sharing == "all",
            "data.negative_sampler.exclusion",
            config.data.negative_sampler.exclusion,
            "is for queries that have scores of their own, which model.objective='window' has not",
            "leave it 'group', use 'next_item', or set data.negative_sharing='all'",
        )
        rules = (_bias_rule(config),)
    else:
        rules = (*_data_rules(config), *_model_rules(config), _bias_rule(config))
    for is_right, rule, advice in rules:
        require(is_right, _WHERE, config.model.objective, rule, advice)


def _bias_rule(config: Any) -> tuple[bool, str, str]:
    stu = config.model.user_tower.hstu.stu
    asks_next = stu.use_time_bias and stu.time_bias_query == "next_request"
    reads_request = config.model.user_tower.encoder == "hstu" and asks_next
    return (
        not reads_request or bool(config.feature_groups.get("query_time")),
        "with stu.use_time_bias=True and stu.time_bias_query='next_request' asks at the "
        "request's time at a user's last token, and feature_groups.query_time names none",
        "name it, or use time_bias_query='own'",
    )


def _data_rules(config: Any) -> tuple[tuple[bool, str, str], ...]:
    data = config.data
    return (
        (
            data.source != "list_columns",
            "needs events, and the candidates of data.source='list_columns' are none",
            "prepare an event store, or use 'window'",
        ),
        (
            data.negative_sampler.kind != "HardNegativeSampler",
            "has a request for every positive, and hard negatives belong to a window's",
            "use data.negative_sampler.kind='NegativeSampler'",
        ),
        (
            data.ablation != "shuffled_order",
            "trains on the events that are asked for, and data.ablation='shuffled_order' would "
            "move them in front of their own queries",
            "use another ablation",
        ),
    )


def _model_rules(config: Any) -> tuple[tuple[bool, str, str], ...]:
    hstu = config.model.user_tower.hstu
    has_request = bool(config.feature_groups.get("query_time"))
    has_times = hstu.positional_encoder.use_time_encoding
    reads_request = has_times and config.model.next_item.time == "next_request"
    return (
        (
            hstu.stu.contextual_seq_len <= 0,
            "masks contextual tokens like history, not by "
            f"model.user_tower.hstu.stu.contextual_seq_len={hstu.stu.contextual_seq_len}: tokens "
            "that see the whole history would show every position its answer",
            "leave it at -1, or use 0",
        ),
        (
            hstu.attn_truncation_split_layer == 0,
            "needs every position of the last layer, and attn_truncation_split_layer="
            f"{hstu.attn_truncation_split_layer} cuts them off",
            "set both attn_truncation fields to 0",
        ),
        (
            hstu.output_postprocessor != "timestamp_layernorm",
            "has a request time for every position, and output_postprocessor="
            "'timestamp_layernorm' reads one a user",
            "use 'layernorm' or 'l2norm'",
        ),
        (
            not reads_request or has_request,
            "with next_item.time='next_request' reads the request's time at a user's last token, "
            "and feature_groups.query_time names none",
            "name it, or use next_item.time='own'",
        ),
        (
            has_times or config.model.next_item.time == NextItemConfig().time,
            f"reads next_item.time={config.model.next_item.time!r} with "
            "positional_encoder.use_time_encoding=True only",
            "leave it at its default, or switch the encoding on",
        ),
    )
