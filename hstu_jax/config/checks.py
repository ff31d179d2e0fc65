"""The one form of a configuration error: `<path>=<value>: <rule broken>; <what to do>`.

`schema.py` raises it with the field's name; `resolve.py` puts the path of the section in front.
"""

import dataclasses
import re
from collections.abc import Mapping


class ConfigError(ValueError):
    """A field with a value that breaks a rule.

    Args:
        field: name or dotted path of the field.
        value: what it holds.
        rule: the rule it breaks.
        advice: what to do about it, or "".
    """

    def __init__(self, field: str, value: object, rule: str, advice: str = ""):
        self.field, self.value, self.rule, self.advice = field, value, rule, advice
        super().__init__(f"{field}={value!r}: {rule}" + (f"; {advice}." if advice else "."))

    def inside(self, section: str) -> "ConfigError":
        """The same error with `section` in front of the field."""
        return ConfigError(f"{section}.{self.field}", self.value, self.rule, self.advice)


def require(condition: bool, field: str, value: object, rule: str, advice: str = "") -> None:
    """Raises `ConfigError` unless `condition` holds."""
    if not condition:
        raise ConfigError(field, value, rule, advice)


def require_ratio(field: str, value: float) -> None:
    """Raises `ConfigError` unless `value` is a probability below 1."""
    require(0 <= value < 1, field, value, "must be in [0, 1)")


def require_cutoffs(field: str, cutoffs: tuple[int, ...]) -> None:
    """Raises `ConfigError` unless `cutoffs` are one or more positive numbers."""
    is_right = len(cutoffs) > 0 and all(k > 0 for k in cutoffs)
    require(is_right, field, cutoffs, "must be one or more positive numbers")


def require_compiles(field: str, pattern: str) -> None:
    """Raises `ConfigError` unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(field, pattern, f"is not a regular expression ({error})") from None


def require_read(section: object, *, choice: str, readers: Mapping[str, tuple]) -> None:
    """Raises `ConfigError` for a field that was set although the chosen kind does not read it.

    Args:
        section: dataclass of the configuration.
        choice: its field that chooses.
        readers: field -> values of `choice` that read it.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    chosen = getattr(section, choice)
    for name, choices in readers.items():
        value = getattr(section, name)
        if chosen not in choices and value != defaults[name]:
            wanted = " or ".join(repr(c) for c in choices)
            raise ConfigError(
                name,
                value,
                f"is read with {choice}={wanted} only, not with {chosen!r}",
                f"leave it at {defaults[name]!r}, or change {choice}",
            )
