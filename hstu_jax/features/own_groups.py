"""The part of a batch that one process makes: some groups of a global batch, and no others.

A group depends on its number, its windows and the step alone, so processes that each make their own
groups hold together what one process would have made. Contents are in `packing.py`; which groups
are whose, `hstu_jax.training` decides by the devices of the mesh.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Int

from hstu_jax.features import packing
from hstu_jax.features.batch import Batch, BatchShape
from hstu_jax.features.windows import GroupPlan


def build(
    plans: Sequence[GroupPlan],
    groups: Sequence[int],
    *,
    source: packing.BatchSource,
    shape: BatchShape,
    group_rng: Callable[[int], np.random.Generator],
    hard_rng: Callable[[int], np.random.Generator],
) -> tuple[Batch, Int[np.ndarray, "own U"]]:
    """`packing.build_batch` of some groups: bit for bit that part of the whole batch.

    Args:
        plans: of the whole batch.
        groups: numbers of the groups to make, ascending; those without a plan are empty.
        source: as for `packing.build_batch`, as the rest.
        shape: of the whole batch.
        group_rng: generator of a group, by its number in the whole batch.
        hard_rng: same.

    Returns:
        The groups, one after the other, and the window number of every user slot.
    """
    # Groups without a plan are the last ones, and so are the last of `groups`.
    batch, window_index = packing.build_batch(
        [plans[group] for group in groups if group < len(plans)],
        source=source,
        shape=dataclasses.replace(shape, groups=len(groups)),
        group_rng=lambda place: group_rng(groups[place]),
        hard_rng=lambda place: hard_rng(groups[place]),
    )
    # Users are numbered in the whole batch: dropout reads it.
    moved = (np.array(groups) - np.arange(len(groups))) * shape.users
    user_index = np.where(batch.user_mask, batch.user_index + moved[:, None], batch.user_index)
    return dataclasses.replace(batch, user_index=user_index.astype(np.int32)), window_index


def take(batch: Batch, groups: Sequence[int]) -> Batch:
    """Some groups of a whole batch on the host."""
    return jax.tree.map(lambda leaf: leaf[list(groups)], batch)
