"""Tokens of a batch -> one vector per user, or per query: the HSTU encoder and the mean baseline.

preprocess -> positions and times -> dropout -> STU stack -> last token -> postprocess; the formulas
are in docs/model.md. The mean encoder leaves the stack out and averages instead; `sasrec.py` has
other layers. Batches of the next-item objective name a token per query, and have a vector for each.
Next: `towers.py`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from hstu_jax.features import batch as features_batch
from hstu_jax.model import (
    dropout,
    linear,
    normalization,
    positional_encoder,
    preprocessor,
    relative_bias,
    stu,
)
from pallas_kernels.hstu_attention import bias as attention_bias
from pallas_kernels.hstu_attention import layout as attention_layout

# Uses of dropout here; `match.py` has the item tower's.
_INPUT, _STACK, _CONTEXTUAL = 0, 1, 2


def build_sequence(
    layout: attention_layout.SequenceLayout, user_index: Int[Array, "S"]
) -> tuple[stu.Sequence, Int[Array, "R L"]]:
    """Derives what the layers need from the layout, and the segment of each slot (-1 = padding)."""
    segment = attention_layout.token_segments(layout)
    starts, lengths = jnp.asarray(layout.starts), jnp.asarray(layout.lengths)
    num_slots = layout.num_rows * layout.row_len
    sequence = stu.Sequence(
        layout=layout,
        tokens=dropout.TokenIdentity(
            user_index=user_index[jnp.maximum(segment, 0)],
            position=attention_layout.token_positions(layout),
        ),
        last=dropout.TokenIdentity(user_index=user_index, position=jnp.maximum(lengths - 1, 0)),
        last_slot=jnp.where(lengths > 0, starts + lengths - 1, num_slots),
    )
    return sequence, segment


def build_tail(
    sequence: stu.Sequence, layout: attention_layout.SequenceLayout, *, contextual_len: int
) -> stu.Tail:
    """The sequence behind a truncation, and where each of its tokens comes from.

    Args:
        sequence: the full one.
        layout: where the cut segments lie; segment s is segment s of `sequence` without the tokens
            between its first `contextual_len` and the newest that its length leaves room for.
        contextual_len: C, tokens that are never cut.
    """
    segment = attention_layout.token_segments(layout)
    owner, position = jnp.maximum(segment, 0), attention_layout.token_positions(layout)
    lengths, full = jnp.asarray(layout.lengths), sequence.layout
    dropped = (jnp.asarray(full.lengths) - lengths)[owner]
    position = jnp.where(position < contextual_len, position, position + dropped)
    starts = jnp.asarray(layout.starts)
    source = jnp.where(
        segment >= 0,
        jnp.asarray(full.starts)[owner] + position,
        full.num_rows * full.row_len,
    )
    return stu.Tail(
        sequence=stu.Sequence(
            layout=layout,
            tokens=dropout.TokenIdentity(
                user_index=sequence.last.user_index[owner], position=position
            ),
            last=sequence.last,
            last_slot=jnp.where(
                lengths > 0, starts + lengths - 1, layout.num_rows * layout.row_len
            ),
            num_targets=sequence.num_targets,
            time_s=_at(sequence.time_s, source),
            next_time_s=_at(sequence.next_time_s, source),
        ),
        source=source,
    )


def _at(time, source):
    """Times of the slots that a shorter sequence keeps; its padding has none."""
    if time is None:
        return None
    return time.reshape(-1).at[source].get(mode="fill", fill_value=attention_bias.NO_TIME)


class Encoder(nn.Module):
    """What all encoders share: tokens with positions, and the postprocessor.

    Attributes:
        preprocess: makes the tokens.
        positions: adds positions and times.
        input_dropout_ratio: dropout of the encoded tokens.
        postprocessor: applied to the output vector. (The reference applies it at every position
            and then takes the last: the same.)
    """

    preprocess: preprocessor.UihPreprocessor
    positions: positional_encoder.PositionalEncoder
    input_dropout_ratio: float
    postprocessor: Literal["l2norm", "layernorm", "timestamp_layernorm"]

    def setup(self):
        if self.postprocessor == "timestamp_layernorm":
            self.time_combiner = linear.Linear(self.preprocess.output_dim, init="xavier")
        if self.postprocessor != "l2norm":
            self.output_norm = normalization.LayerNorm()

    def embed(
        self,
        history: Float[Array, "G R L F"],
        contextual: Float[Array, "G U C Cf"],
        batch: features_batch.Batch,
        *,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "GR L D"], stu.Sequence, Int[Array, "GR L"]]:
        """Tokens as the first layer reads them (zeros in padding), their sequence and segments."""
        groups, rows, row_len, _ = history.shape
        num_users = groups * contextual.shape[1]
        layout = batch.sequence_layout()
        sequence, segment = build_sequence(layout, batch.user_index.reshape(-1))
        time_s, next_time_s = relative_bias.token_times(
            layout,
            None if batch.age_s is None else batch.age_s.reshape(-1, row_len),
            contextual_len=self.preprocess.contextual_len,
        )
        sequence = dataclasses.replace(sequence, time_s=time_s, next_time_s=next_time_s)
        token_mask = segment >= 0
        input_key, contextual_key = _fold(dropout_key, _INPUT), _fold(dropout_key, _CONTEXTUAL)
        tokens = self.preprocess(
            history.reshape(groups * rows, *history.shape[2:]),
            contextual.reshape(num_users, *contextual.shape[2:]),
            action=batch.action.reshape(-1, row_len),
            watch_time_s=batch.watch_time_s.reshape(-1, row_len),
            layout=layout,
            history_mask=token_mask & (sequence.tokens.position >= self.preprocess.contextual_len),
            users=dropout.TokenIdentity(
                user_index=sequence.last.user_index,
                position=jnp.zeros_like(sequence.last.position),
            ),
            dropout_key=contextual_key,
        )
        tokens = self.positions(
            tokens,
            position=sequence.tokens.position,
            segment_len=jnp.asarray(layout.lengths)[jnp.maximum(segment, 0)],
            time_gap_s=self._read_gaps(batch).reshape(-1, row_len),
            token_mask=token_mask,
        )
        tokens = dropout.dropout(
            tokens, rate=self.input_dropout_ratio, key=input_key, identity=sequence.tokens
        )
        return tokens, sequence, segment

    def _read_gaps(self, batch: features_batch.Batch) -> Float[Array, "G R L"]:
        positions = self.positions
        if positions.counting == "reference" or not positions.use_time_encoding:
            return batch.time_gap_s
        if batch.step_gap_s is None:
            raise ValueError(
                "batch.step_gap_s=None: the next-item objective reads gaps between events; make "
                "the batches with the model's own configuration."
            )
        return batch.step_gap_s

    def postprocess(
        self, x: Float[Array, "S D"], phase: Float[Array, "S P"]
    ) -> Float[Array, "S D"]:
        """Vectors behind the postprocessor.

        "l2norm": x / max(|x|, 1e-6). "layernorm": LayerNorm(x), eps 1e-5. "timestamp_layernorm":
        LayerNorm(Linear([x, cos(p_1), sin(p_1), ..., cos(p_P), sin(p_P)])).

        Args:
            x: vectors.
            phase: p, radians of the vector's time in every period; P = 0 but for the last kind.

        Source: TorchEasyRec 1.3.16, output postprocessors.
        """
        if self.postprocessor == "l2norm":
            return normalization.l2_normalize(x)
        if self.postprocessor == "timestamp_layernorm":
            waves = jnp.stack([jnp.cos(phase), jnp.sin(phase)], axis=-1)  # [S, P, 2]
            x = self.time_combiner(jnp.concatenate([x, waves.reshape(x.shape[0], -1)], axis=-1))
        return self.output_norm(x)

    def finish(
        self, x: Float[Array, "S D"], sequence: stu.Sequence, batch: features_batch.Batch
    ) -> Float[Array, "S D"]:
        """Postprocessed float32 vectors; exact zeros for users without a single token."""
        x = x.astype(jnp.float32)
        x = self.postprocess(x, batch.last_phase.reshape(x.shape[0], -1))
        is_used = jnp.asarray(sequence.layout.lengths) > 0
        return jnp.where(is_used[:, None], x, 0.0)

    def finish_queries(
        self, x: Float[Array, "GR L D"], batch: features_batch.Batch
    ) -> Float[Array, "GQ D"]:
        """Postprocessed float32 vectors of the tokens that queries ask from; zeros where masked.

        Args:
            x: the encoder's output at every position; output i must depend on tokens up to i only.
            batch: of the next-item objective.
        """
        groups, rows, row_len = batch.time_gap_s.shape
        num_slots = rows * row_len
        slot = batch.query_slot + num_slots * jnp.arange(groups, dtype=jnp.int32)[:, None]
        slot = jnp.where(batch.query_mask, slot, groups * num_slots).reshape(-1)
        x = x.reshape(-1, x.shape[-1]).at[slot].get(mode="fill", fill_value=0)
        x = self.postprocess(x.astype(jnp.float32), jnp.zeros((slot.shape[0], 0)))
        return jnp.where(batch.query_mask.reshape(-1, 1), x, 0.0)


class HstuEncoder(Encoder):
    """The STU stack's output at each user's last token.

    Attributes:
        stack: the layers.
        last_layer: compute the last layer at all positions, or only where it is read. The same
            numbers; "all_positions" is a check. Batches whose queries have tokens of their own
            need all positions anyway.

    Source: TorchEasyRec 1.3.16, HSTU match encoder; docs/model.md.
    """

    stack: stu.StuStack
    last_layer: Literal["last_position", "all_positions"] = "last_position"

    def __call__(
        self,
        history: Float[Array, "G R L F"],
        contextual: Float[Array, "G U C Cf"],
        batch: features_batch.Batch,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "S D"]:
        """One vector per user slot, or per query if the batch names their tokens; groups flat."""
        x, sequence, _ = self.embed(history, contextual, batch, dropout_key=dropout_key)
        tail = None
        if batch.tail is not None:
            contextual_len = self.preprocess.contextual_len
            layout = batch.tail.sequence_layout()
            tail = build_tail(sequence, layout, contextual_len=contextual_len)
        options = dict(tail=tail, dropout_key=stack_key(dropout_key))
        if batch.query_slot is not None:
            return self.finish_queries(self.stack(x, sequence, **options), batch)
        if self.last_layer == "last_position":
            x = self.stack.last_position(x, sequence, **options)
        else:
            last_sequence = sequence if tail is None else tail.sequence
            x = stu.take_last(self.stack(x, sequence, **options), last_sequence)
        return self.finish(x, sequence, batch)


class MeanEncoder(Encoder):
    """The mean of a user's tokens: what a model without sequence layers can do with the inputs.

    For queries with tokens of their own: of the tokens up to that one.
    """

    def __call__(
        self,
        history: Float[Array, "G R L F"],
        contextual: Float[Array, "G U C Cf"],
        batch: features_batch.Batch,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "S D"]:
        """One vector per user slot, or per query if the batch names their tokens; groups flat."""
        x, sequence, segment = self.embed(history, contextual, batch, dropout_key=dropout_key)
        if batch.query_slot is not None:
            return self.finish_queries(_running_means(x, sequence.tokens.position), batch)
        lengths = jnp.asarray(sequence.layout.lengths)
        num_users = lengths.shape[0]
        # Padding goes to a bin of its own, past the users.
        bins = jnp.where(segment >= 0, segment, num_users).reshape(-1)
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        total = jax.ops.segment_sum(flat, bins, num_segments=num_users + 1)[:num_users]
        return self.finish(total / jnp.maximum(lengths, 1)[:, None], sequence, batch)


def _running_means(x: Float[Array, "R L D"], position: Int[Array, "R L"]) -> Float[Array, "R L D"]:
    """Mean of each token and those before it in its segment, in float32; padding means nothing.

    A scan that starts anew where a segment does: differences of a plain running sum would carry
    rounding, and gradients, from one segment into the next.
    """

    def add(left, right):
        (left_starts, left_sum), (right_starts, right_sum) = left, right
        total = jnp.where(right_starts, right_sum, left_sum + right_sum)
        return left_starts | right_starts, total

    starts = (position == 0)[..., None]
    _, total = jax.lax.associative_scan(add, (starts, x.astype(jnp.float32)), axis=1)
    return total / (position + 1)[..., None]


def stack_key(dropout_key: PRNGKeyArray | None) -> PRNGKeyArray | None:
    """The key of the layers between tokens and postprocessor; each folds in its number."""
    return _fold(dropout_key, _STACK)


def _fold(dropout_key, number):
    """The key of one use of dropout."""
    return None if dropout_key is None else jax.random.fold_in(dropout_key, number)
