"""Age of an event -> row of the time table, exactly as float32 arithmetic in the reference.

XLA turns a division by a constant into a multiplication, which moves events near a bucket's edge to
the neighbour (docs/design.md). So the edges are computed once, in numpy, and the device only
compares. Used by `positional_encoder.py`.
"""

import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BucketFn = Literal["sqrt", "log"]
_MIN_GAP_S = np.float32(1e-6)


def bucket_rule(
    gap_s: Float[np.ndarray, "..."], *, num_time_buckets: int, increments: float, fn: BucketFn
) -> Int[np.ndarray, "..."]:
    """The definition: int(clip(fn(max(gap, 1e-6) / increments) / T, 0, 1) * T), step by step.

    Args:
        gap_s: float32 seconds from the event to the request; negative gaps count as 1e-6.
        num_time_buckets: T.
        increments: seconds.
        fn: "sqrt" or "log".

    Returns:
        Buckets 0..T.

    Source: TorchEasyRec 1.3.16, HSTU positional encoder; docs/model.md.
    """
    num_buckets = np.float32(num_time_buckets)
    with np.errstate(over="ignore"):  # the largest gaps by increments below 1: infinity is right
        scaled = np.maximum(gap_s.astype(np.float32), _MIN_GAP_S) / np.float32(increments)
    if fn == "sqrt":
        curved = np.sqrt(scaled)
    else:
        # Through float64, so that the result is the correctly rounded one on every machine;
        # numpy's float32 logarithm depends on the CPU.
        curved = np.log(scaled.astype(np.float64)).astype(np.float32)
    share = np.clip(curved / num_buckets, np.float32(0), np.float32(1))
    return (share * num_buckets).astype(np.int32)


@functools.lru_cache(maxsize=16)
def bucket_edges(num_time_buckets: int, increments: float, fn: BucketFn) -> Float[np.ndarray, "T"]:
    """The smallest float32 gap of each bucket 1..T, +inf where no gap reaches the bucket.

    `bucket_rule` never falls when the gap rises, and positive floats are ordered like their bit
    patterns, so each edge is a bisection over 31 bits.
    """
    rule = functools.partial(
        bucket_rule, num_time_buckets=num_time_buckets, increments=increments, fn=fn
    )
    buckets = np.arange(1, num_time_buckets + 1)
    # Invariant: bucket(low) < k, and bucket(high) >= k or high is infinite.
    low = np.zeros(num_time_buckets, dtype=np.int32)
    high = np.full(num_time_buckets, np.float32(np.inf).view(np.int32), dtype=np.int32)
    while np.any(high - low > 1):
        middle = low + (high - low) // 2
        is_reached = rule(middle.view(np.float32)) >= buckets
        low, high = np.where(is_reached, low, middle), np.where(is_reached, middle, high)
    return high.view(np.float32)


def time_buckets(
    gap_s: Float[Array, "*tokens"], *, num_time_buckets: int, increments: float, fn: BucketFn
) -> Int[Array, "*tokens"]:
    """Bucket 0..T of every gap; equal to `bucket_rule` for every float32 gap."""
    edges = jnp.asarray(bucket_edges(num_time_buckets, increments, fn))
    return jnp.searchsorted(edges, gap_s, side="right").astype(jnp.int32)
