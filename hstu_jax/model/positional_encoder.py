"""Scales the tokens and adds where and when they stand (docs/model.md).

With time encoding, positions count backwards from the newest event and a second table is read at
the event's age (`time_buckets.py`); without, positions count from the front. Where every position
is trained they count from the front in both cases, and the second table is read at a gap between
neighbouring events: from the front a token does not tell how many follow. Used by `encoder.py`.
"""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from hstu_jax.model import linear, time_buckets


def forward_positions(
    position: Int[Array, "*tokens"],
    history_end: Int[Array, "*tokens"],
    *,
    num_position_buckets: int,
) -> Int[Array, "*tokens"]:
    """Table row without time encoding: min(i, e, P - 1), contextual tokens included.

    Args:
        position: i, from the segment's first token.
        history_end: e, tokens of the token's segment without its targets, which all stand there.
        num_position_buckets: P.
    """
    return jnp.minimum(jnp.minimum(position, history_end), num_position_buckets - 1)


def backward_positions(
    position: Int[Array, "*tokens"],
    history_end: Int[Array, "*tokens"],
    *,
    contextual_len: int,
    num_position_buckets: int,
) -> Int[Array, "*tokens"]:
    """Table row with time encoding: i for contextual tokens, else min(e - min(i, e) + C, P - 1).

    The newest history token stands at C + 1; older ones count up and saturate at P - 1. Targets
    stand at C.

    Args:
        position: i, from the segment's first token.
        history_end: e, tokens of the token's segment, contextual ones included, targets not.
        contextual_len: C.
        num_position_buckets: P.
    """
    backward = history_end - jnp.minimum(position, history_end) + contextual_len
    backward = jnp.minimum(backward, num_position_buckets - 1)
    return jnp.where(position < contextual_len, position, backward)


class PositionalEncoder(nn.Module):
    """sqrt(D) * x + (time row + position row).

    Attributes:
        num_position_buckets: P, rows of the position table.
        num_time_buckets: T; the time table has T + 1 rows.
        use_time_encoding: count positions backwards and add the time row.
        time_bucket_fn: how ages are compressed.
        time_bucket_increments: seconds.
        contextual_len: C.
        counting: "reference" as above, or "forward" with time encoding too.

    Source: TorchEasyRec 1.3.16, tzrec/modules/gr/positional_encoder.py; docs/model.md. Positions of
    contextual tokens past the table saturate here and fail there. "forward" is ours.
    """

    num_position_buckets: int
    num_time_buckets: int
    use_time_encoding: bool
    time_bucket_fn: time_buckets.BucketFn
    time_bucket_increments: float
    contextual_len: int
    counting: Literal["reference", "forward"] = "reference"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L D"],
        *,
        position: Int[Array, "R L"],
        segment_len: Int[Array, "R L"],
        time_gap_s: Float[Array, "R L"],
        token_mask: Bool[Array, "R L"],
        num_targets: Int[Array, "R L"] | None = None,
    ) -> Float[Array, "R L D"]:
        """Encodes the tokens.

        Args:
            x: tokens; padding holds finite values.
            position: position of each slot in its segment.
            segment_len: length of each slot's segment.
            time_gap_s: request time minus event time; the request time itself for contextual slots.
                With "forward", `Batch.step_gap_s`.
            token_mask: slots that hold a token.
            num_targets: targets at the end of each slot's segment; None = none (HSTU Match).

        Returns:
            Encoded tokens, zeros in padding.
        """
        width = x.shape[-1]
        num_positions = self.num_position_buckets
        positions = self.param(
            "position_embedding",
            linear.symmetric_uniform(num_positions**-0.5),
            (num_positions, width),
        )
        history_end = segment_len if num_targets is None else segment_len - num_targets
        if self.use_time_encoding and self.counting == "reference":
            row = backward_positions(
                position,
                history_end,
                contextual_len=self.contextual_len,
                num_position_buckets=num_positions,
            )
        else:
            row = forward_positions(position, history_end, num_position_buckets=num_positions)
        added = positions.at[row].get(mode="clip")
        if self.use_time_encoding:
            times = self.param(
                "time_embedding",
                linear.symmetric_uniform(self.num_time_buckets**-0.5),
                (self.num_time_buckets + 1, width),
            )
            bucket = time_buckets.time_buckets(
                time_gap_s,
                num_time_buckets=self.num_time_buckets,
                increments=self.time_bucket_increments,
                fn=self.time_bucket_fn,
            )
            added = times.at[bucket].get(mode="clip") + added
        encoded = (width**0.5 * x + added).astype(x.dtype)
        return jnp.where(token_mask[..., None], encoded, 0.0)
