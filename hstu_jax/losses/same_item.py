"""Which negatives are items that a query or a user has as a positive: they are not among its own.

Items are compared by all values that the item tower reads of them. Used by both losses.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

# Comparisons of a block of queries, over all groups.
_BLOCK = 2**20
# Candidate feature -> its values, for items [G, Q, ...] or [G, M, ...].
ItemValues = dict[str, Num[Array, "G _ ..."]]


def is_same_item(positive_item: ItemValues, negative_item: ItemValues) -> Bool[Array, "G q M"]:
    """Whether all values of a positive and of a negative are equal; at least one feature."""
    is_same = None
    for name, positive in positive_item.items():
        groups, queries = positive.shape[:2]
        left = positive.reshape(groups, queries, 1, -1)
        right = negative_item[name].reshape(groups, 1, -1, left.shape[-1])
        is_equal = jnp.all(left == right, axis=-1)
        is_same = is_equal if is_same is None else is_same & is_equal
    return is_same


def positives_of_users(
    *,
    positive_item: ItemValues,
    negative_item: ItemValues,
    positive_user: Int[Array, "G Q"],
    query_mask: Bool[Array, "G Q"],
    num_users: int,
    block: int = _BLOCK,
) -> Bool[Array, "G U M"]:
    """Which negatives are a positive of one of a user's queries.

    A block of queries at a time is compared: the matrix of queries by negatives is never made.

    Args:
        positive_item: of every positive; anything where masked.
        negative_item: of every negative.
        positive_user: user slot of each query, 0..U-1.
        query_mask: queries in use.
        num_users: U.
        block: comparisons of a block, about; changes memory only.
    """
    groups, queries = query_mask.shape
    num_negatives = next(iter(negative_item.values())).shape[1]
    size = min(max(block // max(groups * num_negatives, 1), 1), queries)
    group = jnp.arange(groups)[:, None]

    def add(found, inputs):
        user, is_query, items = inputs
        is_same = is_same_item(items, negative_item) & is_query[..., None]
        return found.at[group, user].max(is_same), None

    def cut(x):  # [G, Q, ...] -> [blocks, G, size, ...]; no query where padded
        padding = ((0, 0), (0, -queries % size), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(groups, -1, size, *x.shape[2:]), 1, 0)

    nobody = jnp.zeros((groups, num_users, num_negatives), bool)
    inputs = (positive_user, query_mask, positive_item)
    if size == queries:
        return add(nobody, inputs)[0]
    found, _ = jax.lax.scan(add, nobody, jax.tree.map(cut, inputs))
    return found
