"""`Lookups`: the embedding rows the model reads, one array per feature group.

Tables live outside the dense parameters (docs/design.md): the training step gathers the rows of a
batch, concatenates the id features of a group on the last axis and differentiates with respect to
these arrays. Made by `hstu_jax.training` and `hstu_jax.serving`, read by `match.py`.
"""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookups:
    """Embeddings of one shard's G groups; slots that hold nothing may hold anything.

    Fields are `Any`: trees of this shape also hold specs. The towers check the shapes.

    Attributes:
        history: [G, R, L, F] embedding of the item in every token slot.
        contextual: [G, U, C, Cf] embeddings of each user's C contextual features.
        positive: [G, Q, Fc] embedding of every positive.
        negative: [G, M, Fc] embedding of every negative.
        hard_negative: [G, U, Hn, Fc] embedding of every user's own hard negatives.
    """

    history: Any
    contextual: Any
    positive: Any
    negative: Any
    hard_negative: Any
