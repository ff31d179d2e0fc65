"""The learned biases of an STU layer's logits, by distance and by time (docs/model.md).

Here: the tables, and the times that tokens have. How a bias reaches the logits without an [L, L]
array is `pallas_kernels/hstu_attention/bias.py`. Used by `stu.py` and `encoder.py`.
"""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Int

from pallas_kernels.hstu_attention import bias as attention_bias
from pallas_kernels.hstu_attention import layout as attention_layout

_FIRST_SPREAD = 0.02


class RelativeBias(nn.Module):
    """by_distance[min(|i - j|, P - 1)] + by_interval[bucket(query time of i - time of j)].

    bucket(t) = min(floor(log(max(|t|, 1)) / 0.301), T), t in seconds. Every head gets the same. A
    pair with a contextual token in it has the first term only.

    Attributes:
        num_distances: P; 0 = no term by distance.
        num_time_buckets: T, for T + 1 values; 0 = no term by time.
        time_query: when a query asks: at the next event, or at its own.

    Source: Zhai et al. 2024, "Actions Speak Louder than Words", and their public code, whose first
    values are N(0, 0.02) too.
    """

    num_distances: int
    num_time_buckets: int
    time_query: Literal["next_request", "own"]

    @nn.compact
    def __call__(
        self, time_s: Int[Array, "R L"] | None, next_time_s: Int[Array, "R L"] | None
    ) -> attention_bias.AttentionBias:
        """What attention adds to its logits.

        Args:
            time_s: see `token_times`; None = unknown.
            next_time_s: see there.

        Raises:
            ValueError: a term by time without times.
        """
        first = nn.initializers.normal(_FIRST_SPREAD)
        by_distance = None
        if self.num_distances:
            by_distance = self.param("by_distance", first, (self.num_distances,))
        if not self.num_time_buckets:
            return attention_bias.AttentionBias(by_distance=by_distance)
        if time_s is None or next_time_s is None:
            raise ValueError(
                f"num_time_buckets={self.num_time_buckets}: a bias by time needs the tokens' "
                "times, and time_s or next_time_s is None; give them, or set it to 0."
            )
        return attention_bias.AttentionBias(
            by_distance=by_distance,
            by_interval=self.param("by_interval", first, (self.num_time_buckets + 1,)),
            query_time_s=time_s if self.time_query == "own" else next_time_s,
            key_time_s=time_s,
        )


def token_times(
    layout: attention_layout.SequenceLayout,
    age_s: Int[Array, "R L"] | None,
    *,
    contextual_len: int,
) -> tuple[Int[Array, "R L"], Int[Array, "R L"]] | tuple[None, None]:
    """(time, next time) of every slot, in whole seconds before the request of its user.

    `time_j = -age_j`. The next time is that of the token behind, and 0, the request, for the last
    one of a segment.

    Args:
        layout: where the segments lie.
        age_s: request time minus event time; anything in padding and in contextual slots. None =
            not known.
        contextual_len: C, first tokens of every segment, which have no time.

    Returns:
        `NO_TIME` for both where a slot holds no history token; None for both without ages.
    """
    if age_s is None:
        return None, None
    segment = attention_layout.token_segments(layout)
    position = attention_layout.token_positions(layout)
    length = jnp.asarray(layout.lengths)[jnp.maximum(segment, 0)]
    is_timed = (segment >= 0) & (position >= contextual_len)
    following = jnp.where(position == length - 1, 0, jnp.roll(age_s, -1, axis=1))
    none = attention_bias.NO_TIME
    return jnp.where(is_timed, -age_s, none), jnp.where(is_timed, -following, none)
