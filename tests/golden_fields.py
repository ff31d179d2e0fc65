"""The reference's recorded configurations -> sections of ours.

Text messages are parsed here; the runners put the sections together.
"""

import re

from hstu_jax.config import tower_schema


def action_mlp_config(fields: dict | None) -> tower_schema.ActionMlpConfig | None:
    """`action_mlp` section from the reference's nested arguments."""
    if fields is None:
        return None
    kinds = {
        "simple_mlp": tower_schema.SimpleMlpConfig,
        "parameterized_mlp": tower_schema.ParameterizedMlpConfig,
    }
    made = {name: kind(**fields[name]) if name in fields else None for name, kind in kinds.items()}
    return tower_schema.ActionMlpConfig(**made)


def mlp_config(fields: dict | None) -> tower_schema.MlpConfig | None:
    """`mlp` section from the reference's fields, repeated ones as lists."""
    if fields is None:
        return None
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return tower_schema.MlpConfig(**fields)


def parse_text(text: str) -> dict:
    """A protocol buffer text message as nested dicts of lists (every field is a list)."""
    tokens = iter(re.findall(r'"[^"]*"|[{}]|[\w.+-]+:?', text))

    def message():
        fields: dict[str, list] = {}
        for token in tokens:
            if token == "}":
                break
            if token.endswith(":"):
                value = _scalar(next(tokens))
            else:
                assert next(tokens) == "{", token
                value = message()
            fields.setdefault(token.removesuffix(":"), []).append(value)
        return fields

    return message()


def _scalar(token):
    if token.startswith('"'):
        return token.strip('"')
    if token in ("true", "false"):
        return token == "true"
    try:
        return float(token) if "." in token or "e" in token else int(token)
    except ValueError:
        return token


_REPEATED = (
    "action_weights",
    "watchtime_to_action_thresholds",
    "watchtime_to_action_weights",
    "hidden_units",
    "dropout_ratio",
    "time_duration_period_units",
    "time_duration_units_per_period",
)


def _single(fields):
    """`parse_text` output with lists only where the reference's field is repeated."""
    return {
        name: values if name in _REPEATED else _single_value(values[0])
        for name, values in fields.items()
    }


def _single_value(value):
    return _single(value) if isinstance(value, dict) else value


def parse_fields(text: str) -> dict:
    """A text message as nested dicts, with lists where the reference's field is repeated."""
    return _single(parse_text(text))
