"""The one form in which a wrong value of a file is refused.

Here: the message. Not here: the rules, and how a place in a file is called (`store_checks.py`,
`list_files.py`, `hstu_jax.features.sampler_inputs`).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Shaped


def refuse(
    bad: Bool[np.ndarray, "n"],
    values: Shaped[np.ndarray, "n"],
    *,
    place: Callable[[int], str],
    column: str,
    rule: str,
    unit: str = "",
) -> None:
    """Raises on the first True of `bad`, naming place, column, value, rule and how many there are.

    Args:
      bad: which entries break the rule.
      values: of all entries.
      place: file and row of an entry, by its number.
      column: name of the values.
      rule: what is broken, and what to do.
      unit: what is counted (`rows`), in front of "in all".

    Raises:
      ValueError: any is True.

    >>> refuse(np.array([False, True]), np.array([1, -2]), place=lambda at: f"a.csv row {at}",
    ...        column="age", rule="negative", unit="rows")
    Traceback (most recent call last):
    ValueError: a.csv row 1: age=-2: negative (1 rows in all).
    """
    if bad.any():
        at = int(np.argmax(bad))
        value = values[at]
        shown = repr(str(value)) if isinstance(value, str) else value
        counted = f"{int(np.count_nonzero(bad))} {unit}".rstrip()
        raise ValueError(f"{place(at)}: {column}={shown}: {rule} ({counted} in all).")
