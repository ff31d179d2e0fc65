"""Keys sent to the devices that own them, in rounds of buckets of a fixed size.

A key says where a row lives: bucket `key // width` is the device that owns it, `key % width` its
place there. Keys are ascending and distinct on every device, so the keys of a bucket are one run,
and those of a range of places are one run in it. A round is a range of places, the same on every
device, in which no device has more keys for a bucket than fit: nothing is ever dropped, and all
that is sent about a row is sent in one round. What is sent and answered is in `exchange.py`.

Values of a bucket are sent whole, empty places included, or, where the platform has
`lax.ragged_all_to_all`, its filled places only. What arrives is the same in both, and lies in the
same places. Keys are always sent whole: they are four bytes each, and a TPU's ragged operation
would send 512 for each of them (a row of 128 lanes; seen in what libtpu 0.0.52 compiles for v5e).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Buckets are made as for this many keys at least. Few keys do not spread evenly, and tables of a
# few thousand rows are not spread at all (`spec.TableSpec`); their rows are cheap to send.
_MIN_KEYS = 1024


@dataclasses.dataclass(frozen=True)
class Level:
    """One all-to-all of the way to a row's owner.

    Attributes:
        axis_names: mesh axes along which keys are sent.
        all_axis_names: mesh axes of all devices that must do the same rounds.
        num_buckets: devices along `axis_names`.
        width: places of a bucket; keys of num_buckets * width or more are none.
        bucket_size: most keys that a device sends to another in one round.
        is_ragged: send values of filled places only; XLA's CPU backend cannot.
    """

    axis_names: tuple[str, ...]
    all_axis_names: tuple[str, ...]
    num_buckets: int
    width: int
    bucket_size: int
    is_ragged: bool = False

    @property
    def num_keys(self) -> int:
        """Number of keys; also the key that means "no row"."""
        return self.num_buckets * self.width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Round:
    """The part of a device's keys that is sent now. Fields are `Any`: a tree of a loop's body.

    Attributes:
        low: [] int32, first place of the range.
        high: [] int32, the place behind its last one; the same on every device.
        start: [num_buckets] int32, position of the first key of every bucket that is sent.
        count: [num_buckets] int32, number of keys sent; at most `bucket_size`.
        asked: [num_buckets, 2] int32, `start` and `count` of the keys that every other device sends
            to this one; None where whole buckets are sent.
    """

    low: Any
    high: Any
    start: Any
    count: Any
    asked: Any = None


def bucket_size(*, num_keys: int, capacity: int, num_buckets: int, width: int, slack: float) -> int:
    """Keys of a bucket: `slack` times an even share of them, never more than there can be.

    Args:
        num_keys: keys that are to be expected: all buckets together hold `slack` times as many.
        capacity: most keys that there can be.
        num_buckets: number of buckets.
        width: places of a bucket.
        slack: see above.
    """
    share = math.ceil(slack * max(num_keys, _MIN_KEYS) / num_buckets)
    return min(share, capacity, width)


def next_round(keys: Int[Array, "capacity"], level: Level, low: Int[Array, ""]) -> Round:
    """The widest range of places from `low` on in which every device's keys fit their buckets.

    A range ends before the first key that does not fit anywhere, so at least `bucket_size` keys of
    some device are sent before it: the number of rounds follows the fullest buckets.

    2 buckets of width 4 that hold one key each, this device with the keys 1, 2, 3 and 5 and the
    others with fewer. From place 0 on the buckets' keys begin at positions 0 and 3; those one
    bucket further, keys 2 and none, are at places 2 and (8 - 4 =) 4. So the range is 0 .. 1 and the
    keys 1 and 5 are sent, both at place 1; the next range is place 2 with key 2, the last is place
    3 with key 3.
    """
    first = level.width * jnp.arange(level.num_buckets, dtype=jnp.int32)
    start = jnp.searchsorted(keys, first + low, method="compare_all").astype(jnp.int32)
    over = keys.at[start + level.bucket_size].get(mode="fill", fill_value=level.num_keys)
    fits_until = jnp.minimum(jnp.min(over - first), level.width)
    high = jax.lax.pmin(fits_until, level.all_axis_names)
    end = jnp.searchsorted(keys, first + high, method="compare_all").astype(jnp.int32)
    asked = None
    if level.is_ragged:
        asked = _swap(jnp.stack([start, end - start], axis=1), level)
    return Round(low, high, start, end - start, asked)


def send_keys(
    keys: Int[Array, "capacity"], level: Level, now: Round
) -> Int[Array, "buckets bucket_size"]:
    """Places that the other devices ask of this one, a line for each of them.

    Every line is ascending; `level.width` where nothing was sent.
    """
    slot, is_sent = _slots(level, now)
    first = level.width * jnp.arange(level.num_buckets, dtype=jnp.int32)
    places = keys.at[slot].get(mode="clip") - first[:, None]
    return _swap(jnp.where(is_sent, places, level.width), level)


def send_values(
    values: Float[Array, "capacity dim"], level: Level, now: Round
) -> Float[Array, "buckets bucket_size dim"]:
    """Values that the other devices send with their keys; zeros where nothing was sent."""
    if level.is_ragged:
        return _send_filled(values, level, now)
    slot, is_sent = _slots(level, now)
    picked = values.at[slot].get(mode="clip")
    return _swap(jnp.where(is_sent[:, :, None], picked, 0), level)


def return_values(
    answers: Float[Array, "buckets bucket_size dim"],
    keys: Int[Array, "capacity"],
    level: Level,
    now: Round,
    *,
    values: Float[Array, "capacity dim"],
) -> Float[Array, "capacity dim"]:
    """`values`, in the order of `keys`, with the answers to this round's keys written into them.

    Args:
        answers: what this device answers to the lines of `send_keys`.
        keys: as given to `send_keys`.
        level: same.
        now: same.
        values: those of earlier rounds.
    """
    if level.is_ragged:  # every answer goes where its key stands at the device that asked
        return jax.lax.ragged_all_to_all(
            answers.reshape(-1, answers.shape[-1]),
            values,
            level.bucket_size * jnp.arange(level.num_buckets, dtype=jnp.int32),
            now.asked[:, 1],
            now.asked[:, 0],
            now.count,
            axis_name=level.axis_names,
        )
    returned = _swap(answers, level).reshape(-1, answers.shape[-1])
    bucket = jnp.minimum(keys // level.width, level.num_buckets - 1)
    place = keys - bucket * level.width
    position = jnp.arange(keys.shape[0], dtype=jnp.int32)
    slot = bucket * level.bucket_size + position - now.start[bucket]
    is_now = (place >= now.low) & (place < now.high)
    return jnp.where(is_now[:, None], returned.at[slot].get(mode="clip"), values)


def _slots(level: Level, now: Round):
    """Position of the key in every slot of every bucket, and whether there is one."""
    slot = jnp.arange(level.bucket_size, dtype=jnp.int32)[None, :]
    return now.start[:, None] + slot, slot < now.count[:, None]


def _send_filled(operand, level: Level, now: Round):
    """This round's part of `operand` (by key) to the keys' owners; zeros in empty places."""
    shape = (level.num_buckets * level.bucket_size, *operand.shape[1:])
    # The zero tells shard_map that what arrives differs over all devices, as the keys do.
    output = jnp.zeros(shape, operand.dtype) + (0 * now.start[0]).astype(operand.dtype)
    own_line = level.bucket_size * jax.lax.axis_index(level.axis_names)
    received = jax.lax.ragged_all_to_all(
        operand,
        output,
        now.start,
        now.count,
        jnp.full_like(now.start, own_line),
        now.asked[:, 1],
        axis_name=level.axis_names,
    )
    return received.reshape(level.num_buckets, level.bucket_size, *operand.shape[1:])


def _swap(lines, level: Level):
    """Line g to device g; the lines received are in the order of their devices."""
    return jax.lax.all_to_all(lines, level.axis_names, split_axis=0, concat_axis=0, tiled=True)
