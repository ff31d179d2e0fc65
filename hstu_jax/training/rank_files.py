"""Ranks of a closing table on disk, one file beside its figures: what runs are compared by.

Here: writing and reading, and the check that two files rank the same positives among the same
items. Not here: figures and intervals of several files (`hstu_jax/report.py`).
"""

import dataclasses
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from hstu_jax.training import evaluation

FILE = "closing_ranks_{split}.npz"


@dataclasses.dataclass(frozen=True)
class RankFile:
    """Contents of a file.

    Attributes:
        split: "validation" or "test".
        step: of the model.
        cutoffs: of the metrics that were reported.
        exclude_seen: whether any positive or item was left out as seen.
        catalogue_size: items that were ranked.
        windows: as in `EvalSet`, and the next two.
        positive_offsets: same.
        positive_items: same.
        ranks: name of a ranking -> rank of every positive, 0 = left out; the model first.
        catalogue_sha256: of the mask of these items; None in files of before it was kept.
        ranks_with_seen: the same with seen items in the ranking too; None where the evaluation
            was without them (`eval.also_with_seen`).
    """

    split: str
    step: int
    cutoffs: tuple[int, ...]
    exclude_seen: bool
    catalogue_size: int
    windows: Int[np.ndarray, "W"]
    positive_offsets: Int[np.ndarray, "W_and_one"]
    positive_items: Int[np.ndarray, "positives"]
    ranks: Mapping[str, Int[np.ndarray, "positives"]]
    catalogue_sha256: str | None = None
    ranks_with_seen: Mapping[str, Int[np.ndarray, "positives"]] | None = None

    def check_same_task(self, other: "RankFile", *, names: tuple[str, str]) -> None:
        """Checks that two files rank the same positives among the same items.

        Args:
            other: the other file.
            names: of both, for the message.

        Raises:
            ValueError: they do not; names what differs.
        """
        for field in ("split", "exclude_seen", "catalogue_size", "catalogue_sha256"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if field == "catalogue_sha256" and None in (mine, theirs):
                continue
            if mine != theirs:
                raise ValueError(
                    f"{names[0]}: {field}={mine}, and {names[1]} has {theirs}: only rankings of "
                    "the same task are compared; evaluate both alike."
                )
        for field in ("windows", "positive_offsets", "positive_items"):
            if not np.array_equal(getattr(self, field), getattr(other, field)):
                raise ValueError(
                    f"{names[0]}: {field} is not that of {names[1]}: only rankings of the same "
                    "data are compared; evaluate both on one store."
                )


def write(
    path: pathlib.Path,
    rows: Mapping[str, evaluation.Evaluation],
    *,
    step: int,
) -> None:
    """Writes the ranks of every ranking of a table."""
    first = next(iter(rows.values()))
    eval_set = first.eval_set
    header = {
        "split": eval_set.split,
        "step": step,
        "cutoffs": first.cutoffs,
        "exclude_seen": len(eval_set.seen_items) > 0,
        "catalogue_size": int(np.count_nonzero(eval_set.catalogue_mask)),
        "catalogue_sha256": hashlib.sha256(np.packbits(eval_set.catalogue_mask)).hexdigest(),
        "names": list(rows),
    }
    with_seen = {}
    if all(row.with_seen is not None for row in rows.values()):
        with_seen["ranks_with_seen"] = np.stack([r.ranks.ranks_with_seen for r in rows.values()])
    np.savez_compressed(
        path,
        header=json.dumps(header),
        windows=eval_set.windows,
        positive_offsets=eval_set.positive_offsets,
        positive_items=eval_set.positive_items,
        ranks=np.stack([row.ranks.ranks for row in rows.values()]),
        **with_seen,
    )


def read(path: pathlib.Path) -> RankFile:
    """Reads a file.

    Raises:
        FileNotFoundError: no such file; names the commands that write it.
        ValueError: not such a file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; `python -m hstu_jax.train` writes it at its end, and "
            "`python -m hstu_jax.evaluate` with --ranks."
        )
    try:
        with np.load(path) as file:
            arrays = dict(file)
        header = json.loads(str(arrays.pop("header")))
        names = header.pop("names")
        for field in ("ranks", "ranks_with_seen"):
            if field == "ranks" or field in arrays:
                arrays[field] = dict(zip(names, arrays[field], strict=True))
        header["cutoffs"] = tuple(header["cutoffs"])
        return RankFile(**header, **arrays)
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: is no file of ranks ({error}); evaluate again.") from error
