"""The weights of the negative sampler: from training counts, or from an item table file.

Here: the reference's table `id:int64 weight:float attrs:string` -> one weight per item_index. Not
here: reading lines and writing them (`hstu_jax.data.sampler_files`) and drawing (`negatives.py`,
the next file on the path).
"""

import pathlib

import numpy as np
from jaxtyping import Float, Int, Shaped

from hstu_jax.data import refusal, sampler_files
from hstu_jax.features import sampler_inputs


def train_count_weights(
    train_count: Int[np.ndarray, "N"], *, exponent: float
) -> Float[np.ndarray, "N"]:
    """train_count ** exponent, and 0 for items without a training event.

    Args:
        train_count: training events of each item.
        exponent: 0 = uniform over the items that have events.
    """
    counts = train_count.astype(np.float64)
    return np.where(counts > 0, np.maximum(counts, 1.0) ** exponent, 0.0)


def table_weights(
    path: pathlib.Path,
    *,
    num_items: int,
    delimiter: str = "\t",
    item_key: Shaped[np.ndarray, "N"] | None = None,
) -> Float[np.ndarray, "N"]:
    """Reads one weight per item_index from an item table; items without a line get 0.

    The `attrs` column is not looked at: an item's features are columns of the data.

    Args:
        path: the file.
        num_items: N, size of the catalogue.
        delimiter: between the columns of a line.
        item_key: what the file calls each item (of list columns: the items' ids); None = its
            item_index.

    Raises:
        ValueError: another header, a line that is not an id, a weight and attributes, an id outside
            the catalogue or on two lines.

    Source: docs/model.md, "Negative samplers".
    """
    known = np.arange(num_items) if item_key is None else item_key
    table = sampler_inputs.read_table(
        path, sampler_files.ITEM_COLUMNS, delimiter=delimiter, id=known
    )
    ids = table["id"]
    index = sampler_inputs.index_of(ids, known)
    outside = f"outside 0..{num_items - 1} of the items"
    rule = outside if item_key is None else "is no item of the list columns"
    for bad, broken in (
        (index < 0, rule),
        (sampler_inputs.is_repeat(ids), "on an earlier line already"),
    ):
        refusal.refuse(
            bad,
            ids,
            place=lambda at: f"{path} entry {at + 1}",
            column="id",
            rule=broken,
            unit="such entries",
        )
    weights = np.zeros(num_items)
    weights[index] = table["weight"]
    return weights
