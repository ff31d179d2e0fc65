"""Argument checks that every op shares; they run while tracing, before anything is compiled.

Checks that know one op's arguments are in that op's `api.py`; choosing an implementation is in
`dispatch.py`.
"""

from typing import Any

import jax.numpy as jnp

_FLOATS = ("float32", "bfloat16", "float16")


def check_rank(name: str, array: Any, axes: str) -> None:
    """Refuses an array that has not one axis per letter of `axes`.

    Raises:
        ValueError: wrong rank.
    """
    expected = len(axes.split())
    if array.ndim != expected:
        raise ValueError(
            f"{name}.shape={tuple(array.shape)}: must have {expected} axes [{axes}]; reshape it."
        )


def check_axis(name: str, array: Any, axis: int, letter: str, size: int, *, like: str) -> None:
    """Refuses an axis whose size differs from that of another argument.

    Raises:
        ValueError: sizes differ; both are named.
    """
    if array.shape[axis] != size:
        raise ValueError(
            f"{name}.shape={tuple(array.shape)}: axis {axis} ({letter}) must be {size} as in "
            f"{like}; got {array.shape[axis]}, make them equal."
        )


def check_float(name: str, array: Any, *, like: Any | None = None) -> None:
    """Refuses anything but float32, bfloat16 and float16, and a dtype other than `like`'s.

    Raises:
        TypeError: wrong dtype.
    """
    dtype = jnp.dtype(array.dtype)
    if dtype.name not in _FLOATS:
        raise TypeError(f"{name}.dtype={dtype.name}: must be one of {', '.join(_FLOATS)}; cast it.")
    if like is not None and jnp.dtype(like) != dtype:
        raise TypeError(
            f"{name}.dtype={dtype.name}: must equal q.dtype={jnp.dtype(like).name}; cast one."
        )


def check_positive(name: str, value: Any) -> None:
    """Refuses a number that is not a finite Python number above zero.

    Raises:
        TypeError: not a Python int or float (a traced value, for example).
        ValueError: zero, negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}={value!r}: must be a Python number, it is compiled in; use float()."
        )
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value}: must be positive and finite; it scales every score.")
