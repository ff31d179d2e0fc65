"""Which keys a query may see: the mask rules of HSTU as at most two key intervals per query.

Every rule of the op turns into intervals of positions inside the query's own segment, so masks cost
memory linear in the length, and one tile comparison serves all rules. Host (numpy) and device (jnp)
use the same function. Segments and rows are not known here: `layout.py` is the next file.
"""

import dataclasses
import types

import numpy as np
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """Static description of a mask, hashable, so that it can be a jit-static argument.

    Without semi-local attention (`sla_k1 == sla_k2 == 0`) a history token sees the contextual
    tokens, itself and every earlier history token, contextual tokens see each other and the whole
    history, and a target sees itself and everything but other targets.

    Args:
        contextual_len: number of contextual tokens that open every segment.
        max_attn_len: window; a query sees this many earlier positions besides itself, where all
            contextual tokens count as one position. 0 = no window.
        min_full_attn_len: the last so many history tokens (and the targets) ignore the window.
            No effect without a window.
        sla_k1: semi-local attention: visible recent tokens, the query itself included.
        sla_k2: semi-local attention: length of the prefix that stays visible; contextual tokens
            are always part of it. `sla_k1 > 0` or `sla_k2 > 0` replaces all the rules above.

    Raises:
        TypeError: a field is not an int.
        ValueError: a field is negative.

    Source: TorchEasyRec 1.3.16, plain PyTorch path (docs/model.md).
    """

    contextual_len: int = 0
    max_attn_len: int = 0
    min_full_attn_len: int = 0
    sla_k1: int = 0
    sla_k2: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"{field.name}={value!r}: must be an int, got {type(value).__name__}; "
                    "convert it with int()."
                )
            if value < 0:
                raise ValueError(f"{field.name}={value}: must not be negative; use 0 for off.")

    @property
    def is_semi_local(self) -> bool:
        """True when semi-local attention replaces the standard mask."""
        return self.sla_k1 > 0 or self.sla_k2 > 0

    @property
    def prefix_len(self) -> int:
        """Tokens of the prefix that semi-local attention keeps visible."""
        return max(self.sla_k2, self.contextual_len)


@dataclasses.dataclass(frozen=True)
class KeyInterval:
    """Keys `start <= j < end` per query, as positions in its segment; empty when start >= end."""

    start: Int[Array | np.ndarray, "..."]
    end: Int[Array | np.ndarray, "..."]


def key_intervals(
    position: Int[Array | np.ndarray, "..."],
    length: Int[Array | np.ndarray, "..."],
    num_targets: Int[Array | np.ndarray, "..."] | None,
    *,
    rule: MaskRule,
    xp: types.ModuleType,
) -> tuple[KeyInterval, ...]:
    """Returns the keys that each query sees, as one or two intervals of segment positions.

    Args:
        position: position of the query inside its segment, 0 <= position < length.
        length: tokens of that segment, contextual tokens included; 0 or at least
            `rule.contextual_len` plus its targets.
        num_targets: targets at the end of that segment, or None for none anywhere (which saves
            the second interval of the standard mask).
        rule: the mask.
        xp: `numpy` or `jax.numpy`, whichever the arrays belong to.

    Returns:
        One interval, or two when the rule is semi-local or there are targets. They may overlap.

    Source: TorchEasyRec 1.3.16 (docs/model.md). There, ids are compared for all pairs; the
    intervals are the same set written per row.
    """
    history_end = length if num_targets is None else xp.maximum(length - num_targets, 0)
    is_target = position >= history_end
    if rule.is_semi_local:
        return _semi_local_intervals(position, history_end, is_target, rule=rule, xp=xp)
    # All targets stand at the position right after the history.
    limit = xp.minimum(position, history_end)
    start = xp.zeros_like(limit)
    if rule.max_attn_len:
        # The whole prefix shares one id, so it is visible as a whole or not at all.
        oldest = limit - rule.max_attn_len
        start = xp.where(oldest < rule.contextual_len, 0, oldest)
        if rule.min_full_attn_len:
            start = xp.where(limit >= history_end - rule.min_full_attn_len, 0, start)
    end = position + 1
    if rule.contextual_len:
        # Contextual rows look ahead over the history, with a window too.
        is_contextual = position < rule.contextual_len
        start = xp.where(is_contextual, 0, start)
        end = xp.where(is_contextual, history_end, end)
    if num_targets is None:
        return (KeyInterval(start, end),)
    earlier = KeyInterval(start, xp.where(is_target, history_end, end))
    itself = KeyInterval(position, xp.where(is_target, position + 1, position))
    return earlier, itself


def _semi_local_intervals(position, history_end, is_target, *, rule, xp):
    """Prefix interval and recent interval of the semi-local mask."""
    prefix_end = xp.where(is_target, history_end, xp.minimum(position + 1, rule.prefix_len))
    recent_start = xp.maximum(position - rule.sla_k1 + 1, rule.prefix_len)
    recent_end = xp.where(is_target, recent_start, position + 1)
    return KeyInterval(xp.zeros_like(position), prefix_end), KeyInterval(recent_start, recent_end)


def interval_breakpoints(
    history_end: Int[np.ndarray, "..."], *, rule: MaskRule
) -> list[Int[np.ndarray, "..."]]:
    """Positions at which the ends of `key_intervals` change their law (host only).

    Between two neighbouring breakpoints every start and every end rises with the position or
    stays, and an interval is empty for all positions or for none. The extremes over a range of
    queries are therefore found at its ends and at the breakpoints, without visiting each query.
    """
    fixed = {rule.contextual_len, rule.prefix_len if rule.is_semi_local else 0}
    edges = [np.full_like(history_end, edge) for edge in sorted(fixed)] + [history_end]
    if rule.min_full_attn_len:
        edges.append(history_end - rule.min_full_attn_len)
    return edges
