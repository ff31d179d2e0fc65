"""Keeps values that are not finite inside their own segment, so that packing never spreads them.

A tile multiplies masked scores, exact zeros, with every value in the tile, and 0 * NaN is NaN. The
blockwise paths therefore compute with such values cleared and mark the segments that held them,
which costs one linear pass. Used by every path but the dense one.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def finite_or_zero(
    array: Float[Array, "R L H W"], is_token: Bool[Array, "R L"]
) -> Float[Array, "R L H W"]:
    """Returns the array with padding slots and values that are not finite set to zero."""
    return jnp.where(is_token[:, :, None, None] & jnp.isfinite(array), array, 0)


def poisoned_segments(
    segment: Int[Array, "R L"], *arrays: Float[Array, "R L H _"], num_segments: int
) -> Bool[Array, "S"]:
    """True for each segment in which any of the arrays holds a value that is not finite.

    Args:
        segment: segment of each slot, -1 in padding, which is ignored.
        *arrays: token arrays.
        num_segments: S.
    """
    is_bad = jnp.zeros(segment.shape, bool)
    for array in arrays:
        is_bad = is_bad | ~jnp.isfinite(array).all(axis=(2, 3))
    # Padding writes to an extra entry, which is cut off.
    target = jnp.where(segment >= 0, segment, num_segments)
    return jnp.zeros(num_segments + 1, bool).at[target].max(is_bad)[:num_segments]


def at_tokens(is_bad: Bool[Array, "S"], segment: Int[Array, "R L"]) -> Bool[Array, "R L 1 1"]:
    """Spreads a flag per segment to its tokens; false in padding."""
    return (is_bad[jnp.maximum(segment, 0)] & (segment >= 0))[:, :, None, None]
