"""The recorded text of a configuration (`resolve.to_text`) -> the configuration.

Checkpoints keep the text; whoever reads one needs no configuration file.
"""

import ast
from typing import Any

import ml_collections

from hstu_jax.config import resolve, schema


def parse(text: str, *, where: str) -> schema.Config:
    """The configuration that `resolve.to_text` wrote; fields that it lacks have their defaults.

    Args:
        text: one `path = value` a line.
        where: it comes from, for messages.

    Raises:
        ValueError: not such a text, or fields or values that this version refuses.
    """
    raw: dict[str, Any] = {}
    for line in text.splitlines():
        path, separator, value = line.partition(" = ")
        if not separator:
            raise ValueError(f"{where}: line {line!r} of the configuration is no `path = value`.")
        try:
            parsed = _plain(ast.parse(value, mode="eval").body)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{where}: {path} has an unreadable value ({error}).") from None
        _put(raw, path.split("."), parsed)
    try:
        return resolve.resolve(ml_collections.ConfigDict(raw))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: this version refuses the recorded configuration: {error}"
        ) from error


def _plain(node: ast.expr) -> Any:
    """The value of a literal; a dataclass's `Name(field=value, ...)` becomes a dict."""
    if isinstance(node, ast.Call):
        if node.args or not isinstance(node.func, ast.Name):
            raise ValueError("not a plain value")
        return {keyword.arg: _plain(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Tuple):
        return tuple(_plain(item) for item in node.elts)
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
        return float(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_plain(node.operand)
    return ast.literal_eval(node)


def _put(raw: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        raw = raw.setdefault(name, {})
    raw[path[-1]] = value
