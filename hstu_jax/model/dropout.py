"""Dropout whose bits depend on the token, not on where the token lies.

A bit is a function of (key, user index in the global batch, position in the history, channel), so
packing, padding, sharding and computing only the last position do not change it (docs/design.md).
Which keys exist is decided in `encoder.py`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.extend.random
import jax.numpy as jnp
from jax import ad_checkpoint
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt16

KEEP_MASK = "dropout_keep_mask"  # name of the bits in checkpoint policies

# One hash of two 32-bit counters gives two words, cut into lanes of 16 bits: four channels.
_LANE_BITS = 16
_CHANNELS_PER_HASH = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenIdentity:
    """What a token's random bits are made from.

    Attributes:
        user_index: number of the token's user in the global batch.
        position: position in the user's segment.
    """

    user_index: Int[Array, "*tokens"]
    position: Int[Array, "*tokens"]


def keep_threshold(rate: float) -> int:
    """Lanes below this value are dropped: `rate` rounded to a multiple of 2**-16.

    Raises:
        ValueError: a rate outside [0, 1), or so near 1 that everything would be dropped.
    """
    threshold = round(rate * 2**_LANE_BITS)
    if not 0 <= threshold < 2**_LANE_BITS:
        raise ValueError(
            f"rate={rate}: must be in [0, 1) also when rounded to a multiple of 2**-16; 0 switches "
            "dropout off."
        )
    return threshold


def random_lanes(
    key: PRNGKeyArray, identity: TokenIdentity, *, num_channels: int
) -> UInt16[Array, "*tokens D"]:
    """16 random bits for every channel of every token.

    threefry-2x32(key; user_index, position * ceil(D / 4) + channel // 4), lane channel % 4. The
    second counter is taken modulo 2**32: bits repeat only 2**32 / ceil(D / 4) positions apart.

    Args:
        key: a typed key of the default (threefry) implementation.
        identity: whose bits.
        num_channels: D.

    Raises:
        ValueError: a key of another implementation.
    """
    words = jax.random.key_data(key)
    if words.shape != (2,):
        raise ValueError(f"key={key}: must be one threefry key; make it with jax.random.key(seed).")
    num_hashes = -(-num_channels // _CHANNELS_PER_HASH)
    position = identity.position.astype(jnp.uint32)[..., None]
    ones = (1,) * (position.ndim - 1)
    hash_index = jnp.arange(num_hashes, dtype=jnp.uint32).reshape(*ones, -1)
    second = position * jnp.uint32(num_hashes) + hash_index
    first = jnp.broadcast_to(identity.user_index.astype(jnp.uint32)[..., None], second.shape)
    low, high = jax.extend.random.threefry2x32_p.bind(words[0], words[1], first, second)
    # Low half of a word first: lanes 0 .. 3 are those of `low`, then those of `high`.
    lanes = jax.lax.bitcast_convert_type(jnp.stack([low, high], axis=-1), jnp.uint16)
    # The width is spelled out: there may be no token at all, and -1 cannot be told from nothing.
    width = num_hashes * _CHANNELS_PER_HASH
    return lanes.reshape(*identity.position.shape, width)[..., :num_channels]


def dropout(
    x: Float[Array, "*tokens D"],
    *,
    rate: float,
    key: PRNGKeyArray | None,
    identity: TokenIdentity,
) -> Float[Array, "*tokens D"]:
    """Zeroes channels with probability `rate` and scales the others by the inverse keep rate.

    Args:
        x: tokens.
        rate: probability, rounded to a multiple of 2**-16; the scale uses the rounded value.
        key: key of this step and layer; None = evaluation, nothing is dropped.
        identity: whose tokens these are.
    """
    return dropout_parts((x,), rate=rate, key=key, identity=identity)[0]


def dropout_parts(
    parts: Sequence[Float[Array, "*tokens _"]],
    *,
    rate: float,
    key: PRNGKeyArray | None,
    identity: TokenIdentity,
) -> tuple[Float[Array, "*tokens _"], ...]:
    """`dropout` of the concatenation of `parts`, without making it.

    Args:
        parts: arrays over the same tokens; channels count through all of them.
        rate: as for `dropout`, and so are the others.
        key: see there.
        identity: see there.
    """
    threshold = keep_threshold(rate)
    if key is None or threshold == 0:
        return tuple(parts)
    num_channels = sum(part.shape[-1] for part in parts)
    keep_mask = random_lanes(key, identity, num_channels=num_channels) >= threshold
    # Named for the policies of `stu.py`: whether the backward pass keeps it or draws it again.
    keep_mask = ad_checkpoint.checkpoint_name(keep_mask, KEEP_MASK)
    scale = 2**_LANE_BITS / (2**_LANE_BITS - threshold)
    kept, start = [], 0
    for part in parts:
        mask = keep_mask[..., start : start + part.shape[-1]]
        kept.append(jnp.where(mask, part * scale, 0.0))
        start += part.shape[-1]
    return tuple(kept)
