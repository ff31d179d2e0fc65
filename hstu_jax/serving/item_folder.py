"""`items/` of an exported folder: every item's id and vector, bound to one version of the model.

One of the loader's files (see `manifest.py`). Here: reading. Writing is in `item_writer.py`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from hstu_jax.serving import manifest as manifest_lib

FOLDER = "items"
FILE = "items.json"
IDS, VECTORS, IS_COLD, PARQUET = "item_ids.npy", "item_vectors.npy", "is_cold.npy", "items.parquet"
PARTS = (IDS, VECTORS, IS_COLD, PARQUET)
_ATTEMPTS = 5  # a refresh takes longer than a load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """`items.json`.

    Attributes:
        format_version: as of the manifest.
        model_version: of the towers that made the vectors.
        num_items: N.
        num_cold: items without a training event.
        parts: the other files.
    """

    format_version: int
    model_version: str
    num_items: int
    num_cold: int
    parts: Mapping[str, manifest_lib.Part]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """The exported items, in the order of the item files.

    Attributes:
        ids: int64 [N], or strings.
        vectors: float32 [N, E], memory-mapped.
        is_cold: bool [N].
    """

    ids: np.ndarray
    vectors: np.ndarray
    is_cold: np.ndarray


def read(folder: pathlib.Path, *, model_version: str, verify: bool) -> Items | None:
    """Opens the items of an exported folder; None where it has none.

    All that is given is of one generation, also while a refresh replaces the folder.

    Args:
        folder: the exported folder.
        model_version: of its manifest.
        verify: compare hashes, as in `manifest.check_parts`.

    Raises:
        ValueError: a part is missing, damaged, or made by another model; names it.
    """
    items = folder / FOLDER
    for attempt in range(_ATTEMPTS):
        try:
            opened = os.open(items, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        # Files are opened by name, and a refresh gives the name to another folder. While this one
        # is open, no other can have its number: an equal one at the end says that it stayed.
        try:
            found = _read(items, model_version=model_version, verify=verify)
            if _is_still(items, opened):
                return found
        except (ValueError, OSError):
            if attempt == _ATTEMPTS - 1 or _is_still(items, opened):
                raise
        finally:
            os.close(opened)
    raise ValueError(f"{items}: replaced {_ATTEMPTS} times while it was read; load again.")


def _is_still(items: pathlib.Path, opened: int) -> bool:
    try:
        return os.path.samestat(os.stat(items), os.fstat(opened))
    except FileNotFoundError:
        return False


def _read(items: pathlib.Path, *, model_version: str, verify: bool) -> Items:
    file = items / FILE
    if not file.is_file():
        raise ValueError(f"{file}: missing part; write the items again.")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); write the items again.") from None
    record = manifest_lib.from_fields(Record, raw, where=str(file))
    if record.format_version != manifest_lib.FORMAT_VERSION:
        raise ValueError(
            f"{file}: format_version={record.format_version}: this version reads "
            f"{manifest_lib.FORMAT_VERSION}; write the items again."
        )
    if record.model_version != model_version:
        raise ValueError(
            f"{file}: model_version={record.model_version[:12]}, and the towers beside it are "
            f"{model_version[:12]}: the items are of another export; write them again."
        )
    manifest_lib.require_listed(PARTS, record.parts, where=str(file))
    manifest_lib.check_parts(items, record.parts, verify=verify)
    found = Items(
        ids=np.load(items / IDS, allow_pickle=False),
        vectors=np.load(items / VECTORS, mmap_mode="r", allow_pickle=False),
        is_cold=np.load(items / IS_COLD, allow_pickle=False),
    )
    for name, array in ((IDS, found.ids), (VECTORS, found.vectors), (IS_COLD, found.is_cold)):
        if len(array) != record.num_items:
            raise ValueError(
                f"{items / name}: {len(array)} items, and {FILE} says {record.num_items}; write "
                "the items again."
            )
    return found
