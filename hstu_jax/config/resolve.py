"""`ConfigDict` in, validated dataclasses out: the only reader of a raw configuration.

`defaults()` is what every `configs/*.py` starts from: the whole tree, locked, so that a misspelt
field fails where it is written. `resolve()` checks names and types and builds `schema.Config`,
whose classes check values. `to_text()` is the resolved configuration for logs and for comparing.
"""

import collections.abc
import dataclasses
import difflib
import math
import types
import typing
from typing import Any

import ml_collections

from hstu_jax.config import checks, schema, seed_fields


def defaults() -> ml_collections.ConfigDict:
    """Every field of `schema.Config` at its default, locked."""
    return ml_collections.ConfigDict(_to_raw(schema.Config, _default_config())).lock()


def section(value: Any) -> ml_collections.ConfigDict:
    """A dataclass of the schema as a section of a raw configuration, with all its fields.

    Config files use it for sections that the defaults leave out (features, an item MLP), so that
    every field of them can be overridden on the command line.
    """
    return ml_collections.ConfigDict(_to_raw(type(value), value))


def resolve(raw: ml_collections.ConfigDict) -> schema.Config:
    """Turns a raw configuration into frozen, validated dataclasses.

    Args:
        raw: a `ConfigDict` with the fields of `schema.Config`.

    Returns:
        The configuration.

    Raises:
        ValueError: unknown field, or a value or combination that breaks a rule; the message starts
            with the field's path and its value.
        TypeError: a field of the wrong type.
    """
    return _build(schema.Config, raw.to_dict(), path="")


def to_text(config: schema.Config) -> str:
    """One `path = value` line per field, sorted: for logs, golden files and resume checks."""
    lines: list[str] = []

    def walk(value: Any, path: str) -> None:
        if dataclasses.is_dataclass(value):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, collections.abc.Mapping) and value:
            for name in sorted(value):
                walk(value[name], f"{path}.{name}" if path else name)
        else:
            lines.append(f"{path} = {value!r}")

    walk(config, "")
    return "\n".join(lines) + "\n"


def _default_config() -> schema.Config:
    # A Config without features breaks its own relations, so defaults are read off the class.
    config = object.__new__(schema.Config)
    for field in dataclasses.fields(schema.Config):
        has_factory = field.default_factory is not dataclasses.MISSING
        value = field.default_factory() if has_factory else field.default
        object.__setattr__(config, field.name, value)
    return config


def _to_raw(cls: type, value: Any) -> dict[str, Any]:
    raw = {}
    for field in dataclasses.fields(cls):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            item = _to_raw(type(item), item)
        elif isinstance(item, tuple):
            item = tuple(section(part) if dataclasses.is_dataclass(part) else part for part in item)
        elif isinstance(item, collections.abc.Mapping):
            item = dict(item)
        raw[field.name] = item
    return raw


def _build(cls: type, raw: dict[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in raw:
        if name not in hints:
            known_there = seed_fields.find(_join(path, name))
            if known_there is not None:
                raise checks.ConfigError(
                    _join(path, name), raw[name], *seed_fields.answer(known_there)
                )
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise checks.ConfigError(
                _join(path, name),
                raw[name],
                "there is no such field",
                f"{hint}known: {', '.join(sorted(hints))}",
            )
    values = {name: _convert(hints[name], raw[name], _join(path, name)) for name in raw}
    try:
        return cls(**values)
    except checks.ConfigError as error:
        raise (error.inside(path) if path else error) from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # `X | None`
        (inner,) = [a for a in args if a is not type(None)]
        return None if value is None else _convert(inner, value, path)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, ml_collections.ConfigDict):  # to_dict() stops at tuples
            value = value.to_dict()
        _require_type(isinstance(value, dict), path, value, "a section with fields")
        return _build(hint, value, path)
    if origin is typing.Literal:
        if value not in args:
            _refuse_seed_value(path, value)
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            hint_text = f"did you mean {near[0]!r}? " if near else ""
            raise checks.ConfigError(
                path, value, "unknown choice", f"{hint_text}available: {', '.join(map(repr, args))}"
            )
        return value
    if origin is tuple:
        _require_type(isinstance(value, (tuple, list)), path, value, "a tuple")
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is collections.abc.Mapping:
        _require_type(isinstance(value, dict), path, value, "a section with names")
        return {name: _convert(args[1], item, _join(path, name)) for name, item in value.items()}
    if hint is str:
        _refuse_seed_value(path, value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        may_be = value == math.inf and path.endswith(".norm_type")
        checks.require(may_be, path, value, "must be finite")
    is_right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    _require_type(is_right, path, value, f"of type {hint.__name__}")
    return value


def _refuse_seed_value(path: str, value: Any) -> None:
    answer = seed_fields.answer_value(path, value)
    if answer is not None:
        raise checks.ConfigError(path, value, *answer)


def _require_type(condition: bool, path: str, value: Any, expected: str) -> None:
    if not condition:
        raise TypeError(f"{path}={value!r}: must be {expected}, not {type(value).__name__}.")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
