"""The weights of the negative sampler: from training counts, or from an item table file's text.

Here: the reference's tab-separated `id:int64 weight:float attrs:string` table -> one weight per
item_index. Not here: opening the file (`pipeline.py`), writing one (`hstu_jax.data`) and drawing
(`negatives.py`, the next file on the path).
"""

import io

import numpy as np
from jaxtyping import Float, Int, Shaped

from hstu_jax.data import refusal

_HEADER = ("id:int64", "weight:float", "attrs:string")


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
    file: io.TextIOBase,
    *,
    num_items: int,
    path: str,
    item_key: Shaped[np.ndarray, "N"] | None = None,
) -> Float[np.ndarray, "N"]:
    """Reads one weight per item_index from an item table; items without a line get 0.

    The `attrs` column is not read: an item's features are columns of the event store.

    Args:
        file: the open table.
        num_items: N, size of the catalogue.
        path: shown in messages.
        item_key: what the file calls each item (of list columns: the items' ids); None = its
            item_index.

    Raises:
        ValueError: another header, a line that is not an id and a weight, an id outside the
            catalogue or on two lines.

    Source: docs/model.md, "Negative samplers".
    """
    is_text = item_key is not None and item_key.dtype.kind == "U"
    expected = ["id:string" if is_text else _HEADER[0], *_HEADER[1:]]
    header = file.readline().rstrip("\r\n").split("\t")
    if header != expected:
        raise ValueError(
            f"{path} line 1: header {header}: must be {expected}, separated by tabs; "
            "`python -m hstu_jax.prepare` writes such a file as item_table.tsv."
        )
    ids, table = _read_lines([line for line in file if line.strip()], path, is_text=is_text)
    if item_key is None:
        outside = (ids < 0) | (ids >= num_items)
        _refuse(outside, ids, path, f"outside 0..{num_items - 1} of the items")
        index = ids
    else:
        order = np.argsort(item_key, kind="stable")
        place = np.minimum(np.searchsorted(item_key, ids, sorter=order), max(num_items - 1, 0))
        index = order[place]
        _refuse(item_key[index] != ids, ids, path, "is no item of the list columns")
    is_repeat = np.ones(len(ids), dtype=bool)
    is_repeat[np.unique(ids, return_index=True)[1]] = False
    _refuse(is_repeat, ids, path, "on an earlier line already")
    weights = np.zeros(num_items)
    weights[index] = table
    return weights


def _read_lines(
    lines: list[str], path: str, *, is_text: bool
) -> tuple[Shaped[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """(ids, weights) of the lines behind the header."""
    try:
        if is_text:  # loadtxt would cut strings at a fixed width
            cells = [line.rstrip("\r\n").split("\t") for line in lines]
            weights = np.array([float(cell[1]) for cell in cells], dtype=np.float64)
            return np.array([cell[0] for cell in cells], dtype=np.str_), weights
        table = np.loadtxt(
            lines or ["0\t0\t"],
            dtype=[("id", np.int64), ("weight", np.float64)],
            delimiter="\t",
            usecols=(0, 1),
            comments=None,
            ndmin=1,
        )[: len(lines)]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: a line is not `id<TAB>weight<TAB>attrs` ({error}).") from error
    return table["id"], table["weight"]


def _refuse(bad: np.ndarray, ids: np.ndarray, path: str, rule: str) -> None:
    refusal.refuse(
        bad,
        ids,
        place=lambda at: f"{path} entry {at + 1}",
        column="id",
        rule=rule,
        unit="such lines",
    )
