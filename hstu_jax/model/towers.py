"""Both towers of HSTU Match: user history -> vector, item embedding -> vector.

A tower ends with an optional Linear to the common width and, for cosine similarity, l2
normalisation. How the vectors are compared is the loss's business; `match.py` joins the towers.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from hstu_jax.features import batch as features_batch
from hstu_jax.model import dropout, encoder, linear, normalization, tower_mlp


class UserTower(nn.Module):
    """Encoder, optional Linear, optional l2 normalisation.

    Attributes:
        encoder: makes one vector per user.
        output_dim: width of an extra Linear; 0 = none.
        normalize: l2-normalise the output (cosine similarity).
    """

    encoder: encoder.HstuEncoder | encoder.MeanEncoder
    output_dim: int
    normalize: bool

    def setup(self):
        if self.output_dim:
            self.output = linear.Linear(self.output_dim)

    def __call__(
        self,
        history: Float[Array, "G R L F"],
        contextual: Float[Array, "G U C Cf"],
        batch: features_batch.Batch,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "G _ E"]:
        """One vector per user slot, zeros in unused ones; or, if the batch names the tokens that
        queries ask from, one per query, [G, Q, E], zeros where masked."""
        x = self.encoder(history, contextual, batch, dropout_key=dropout_key)
        if self.output_dim:
            x = self.output(x)
        if self.normalize:
            x = normalization.l2_normalize(x)
        mask = batch.user_mask if batch.query_slot is None else batch.query_mask
        return jnp.where(mask[..., None], x.reshape(*mask.shape, -1), 0.0)


class ItemTower(nn.Module):
    """Optional MLP, optional Linear, optional l2 normalisation of an item's embedding.

    Attributes:
        mlp: or None for the embedding itself.
        output_dim: width of an extra Linear; 0 = none.
        normalize: l2-normalise the output (cosine similarity).
    """

    mlp: tower_mlp.Mlp | None
    output_dim: int
    normalize: bool

    def setup(self):
        if self.output_dim:
            self.output = linear.Linear(self.output_dim)

    def __call__(
        self, embedding: Float[Array, "*batch Fc"], train: tower_mlp.TrainRows | None = None
    ) -> Float[Array, "*batch E"]:
        """One float32 vector per item; `train` as for the MLP, None = evaluation."""
        x = embedding if self.mlp is None else self.mlp(embedding, train)
        x = x.astype(jnp.float32)
        if self.output_dim:
            x = self.output(x)
        return normalization.l2_normalize(x) if self.normalize else x

    def parts(
        self,
        embeddings: Sequence[Float[Array, "G _ Fc"]],
        train: Sequence[tower_mlp.TrainRows] | None,
    ) -> list[Float[Array, "G _ E"]]:
        """Vectors of the parts of a batch: positives, negatives, hard negatives.

        Args:
            embeddings: of each part; in training, finite also where nothing is held.
            train: of each part, with one key; None = evaluation.
        """
        if train is None:
            return [self(embedding) for embedding in embeddings]
        if self.mlp is None or not self.mlp.needs_whole_batch:
            return [self(*part) for part in zip(embeddings, train, strict=True)]
        # Batch statistics are those of all items together.
        joined = tower_mlp.TrainRows(
            mask=_side_by_side([rows.mask for rows in train]),
            identity=dropout.TokenIdentity(
                user_index=_side_by_side([rows.identity.user_index for rows in train]),
                position=_side_by_side([rows.identity.position for rows in train]),
            ),
            dropout_key=train[0].dropout_key,
        )
        vectors = self(_side_by_side(embeddings), joined)
        ends = np.cumsum([embedding.shape[1] for embedding in embeddings])
        return jnp.split(vectors, ends[:-1], axis=1)


def _side_by_side(parts):
    """Parts joined on axis 1; empty ones, on which XLA of jax 0.11 crashes, are left out."""
    return jnp.concatenate([part for part in parts if part.shape[1] > 0], axis=1)


def item_train_rows(
    batch: features_batch.Batch, dropout_key: PRNGKeyArray
) -> tuple[tower_mlp.TrainRows, tower_mlp.TrainRows, tower_mlp.TrainRows]:
    """What the item MLP needs to know of the parts of a training batch, as in `ItemTower.parts`.

    A positive's bits come from its user's number in the global batch and its ordinal among the
    user's positives, a hard negative's from the same number and its ordinal behind all positives, a
    negative's from its group (the number of the group's first user, taken below zero) and its slot:
    none depends on packing or on devices. Negatives of a group without queries are not in use.
    """
    user, query_mask = jnp.asarray(batch.positive_user), jnp.asarray(batch.query_mask)
    user_index, user_mask = jnp.asarray(batch.user_index), jnp.asarray(batch.user_mask)
    slot = jnp.broadcast_to(jnp.arange(user.shape[1], dtype=jnp.int32)[None], user.shape)
    is_same = jnp.pad(user[:, 1:] == user[:, :-1], ((0, 0), (1, 0)))
    first_slot = jax.lax.cummax(jnp.where(is_same, 0, slot), axis=1)
    positives = tower_mlp.TrainRows(
        mask=query_mask,
        identity=dropout.TokenIdentity(
            user_index=jnp.take_along_axis(user_index, user, axis=1), position=slot - first_slot
        ),
        dropout_key=dropout_key,
    )
    largest = jnp.iinfo(user_index.dtype).max
    first_user = jnp.min(jnp.where(user_mask, user_index, largest), axis=1, keepdims=True)
    shape = batch.negative_log_q.shape
    negative_slot = jnp.arange(shape[1], dtype=jnp.int32)[None]
    negatives = tower_mlp.TrainRows(
        mask=jnp.broadcast_to(jnp.any(query_mask, axis=1, keepdims=True), shape),
        identity=dropout.TokenIdentity(
            user_index=jnp.broadcast_to(-1 - first_user, shape),
            position=jnp.broadcast_to(negative_slot, shape),
        ),
        dropout_key=dropout_key,
    )
    hard_mask = jnp.asarray(batch.hard_negative_mask)
    groups, _, num_hard = hard_mask.shape
    ordinal = user.shape[1] + jnp.arange(num_hard, dtype=jnp.int32)[None, None]
    hard_negatives = tower_mlp.TrainRows(
        mask=hard_mask.reshape(groups, -1),
        identity=dropout.TokenIdentity(
            user_index=jnp.repeat(user_index, num_hard, axis=1),
            position=jnp.broadcast_to(ordinal, hard_mask.shape).reshape(groups, -1),
        ),
        dropout_key=dropout_key,
    )
    return positives, negatives, hard_negatives
