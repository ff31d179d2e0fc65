"""Dataclasses from what JSON holds of them, every field checked.

One of the loader's files (see `manifest.py`): it imports the standard library alone.
"""

import dataclasses
import types
import typing
from typing import Any


def from_fields(cls: type, raw: Any, *, where: str) -> Any:
    """A dataclass from the values of JSON.

    Args:
        cls: a dataclass.
        raw: what JSON holds of it.
        where: file and field, for messages.

    Raises:
        ValueError: other fields, or a value of another type.
    """
    fields = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(raw, dict) or set(raw) != set(fields):
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{where}: the fields are {found}, expected {sorted(fields)}.")
    hints = typing.get_type_hints(cls)
    return cls(**{n: _convert(hints[n], raw[n], f"{where}: {n}") for n in fields})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(args[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_fields(hint, value, where=where)
    if origin is tuple:
        _require(isinstance(value, list), value, where)
        is_pair = len(args) == 2 and args[1] is not Ellipsis
        _require(not is_pair or len(value) == 2, value, where)
        return tuple(_convert(args[0], each, where) for each in value)
    if origin is not None:  # a mapping by name
        _require(isinstance(value, dict), value, where)
        return {name: _convert(args[1], each, f"{where}.{name}") for name, each in value.items()}
    if hint is Any:
        return value
    is_right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    _require(is_right, value, where)
    return value


def _require(is_right: bool, value: Any, where: str) -> None:
    if not is_right:
        raise ValueError(f"{where}={value!r}: of the wrong type; export again.")
