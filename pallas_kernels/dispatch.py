"""Which implementation of an op runs: by name exactly that one, "auto" the first that can.

Every op passes its own literal table of implementations; nothing registers itself here. Argument
checks that hold for all implementations are in `checks.py`.
"""

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_logger = logging.getLogger(__name__)
_logged_fallbacks: set[tuple[str, str]] = set()
_logged_choices: set[tuple[str, str]] = set()


class UnsupportedByKernel(ValueError):
    """The arguments are right, but this kernel cannot run them; another implementation can."""


def run(
    implementation: str,
    table: Mapping[str, Callable[..., Any]],
    *,
    auto_order: Sequence[str],
    op: str,
    call: Callable[[Callable[..., Any]], Any],
) -> Any:
    """Returns `call(kernel)` for the chosen kernel of the table.

    Args:
        implementation: a key of the table, or "auto".
        table: implementations by name.
        auto_order: names that "auto" tries in turn; the last one must support everything.
        op: name of the op, for messages.
        call: hands the op's arguments to the kernel it is given.

    Raises:
        ValueError: unknown implementation.
        UnsupportedByKernel: from the kernel asked for by name, or from the last one of "auto".
    """
    if implementation != "auto":
        return call(choose(implementation, table, op=op))
    for name in auto_order[:-1]:
        try:
            result = call(table[name])
            _log_choice(op, name)
            return result
        except UnsupportedByKernel as error:
            if (op, name) not in _logged_fallbacks:
                _logged_fallbacks.add((op, name))
                _logger.warning("%s: implementation %s is not used: %s", op, name, error)
    _log_choice(op, auto_order[-1])
    return call(table[auto_order[-1]])


def _log_choice(op, name):
    if (op, name) not in _logged_choices:
        _logged_choices.add((op, name))
        _logger.info("%s: 'auto' is %s", op, name)


def choose(
    implementation: str, table: Mapping[str, Callable[..., Any]], *, op: str
) -> Callable[..., Any]:
    """Returns the implementation of that name.

    Raises:
        ValueError: unknown name; the message lists the known ones and the nearest.
    """
    if implementation in table:
        return table[implementation]
    known = ["auto", *table]
    nearest = difflib.get_close_matches(str(implementation), known, n=1)
    hint = f"did you mean {nearest[0]!r}" if nearest else "use 'auto'"
    raise ValueError(
        f"implementation={implementation!r}: {op} has {', '.join(map(repr, known))}; {hint}?"
        if nearest
        else f"implementation={implementation!r}: {op} has {', '.join(map(repr, known))}; {hint}."
    )
