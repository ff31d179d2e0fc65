"""The files of an export's index: what it is of, its options, and that they are whole.

    EXPORT/index/index.json          what it is of: model version, hash of the items, parameters
    EXPORT/index/KIND-HASH.faiss     faiss's own file

`index.json` is replaced last and in one step, so that there is always one whole index or none.
Next on the path: `item_index.py`, which builds and searches it. Imports are the loader's.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hstu_jax.serving.search_catalogue import as_ids

KINDS = ("flat", "ivf", "hnsw")
FOLDER = "index"
_FILE = "index.json"
_FORMAT_VERSION = 1
_ROWS = 65_536
_TEXTS = ("model_version", "items_sha256", "file", "file_sha256")


@runtime_checkable
class Items(Protocol):
    """What is read of an export (`artifact.Artifact`)."""

    path: pathlib.Path
    manifest: Any

    def item_ids(self) -> np.ndarray: ...
    def item_vectors(self) -> np.ndarray: ...
    def item_is_cold(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How an index is built and searched; 0 takes the value that fits the number of items.

    Attributes:
        kind: one of `KINDS`.
        nlist: ivf: lists; 0 = 4 sqrt(N), with 40 items a list at least.
        nprobe: ivf: lists that a search goes through, more where these hold too few items; 0 = a
            sixteenth of them, a quarter where lengths differ, 32 at least.
        hnsw_m: hnsw: links of an item.
        ef_construction: hnsw: width of the search that finds an item's links.
        ef_search: hnsw: width of a user's search; 0 = 256, and 1024 where lengths differ.
    """

    kind: str = "hnsw"
    nlist: int = 0
    nprobe: int = 0
    hnsw_m: int = 32
    ef_construction: int = 200
    ef_search: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"index kind={self.kind!r}: unknown; available: {', '.join(KINDS)}.")
        for name in ("nlist", "nprobe", "ef_search"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 (automatic) or more.")
        for name, least in (("hnsw_m", 2), ("ef_construction", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} or more.")

    def fitted(self, num_items: int, *, same_length: bool) -> "IndexOptions":
        """The same with every 0 replaced."""
        nlist = self.nlist or int(4 * num_items**0.5)
        nlist = max(1, min(nlist, num_items // 40 if not self.nlist else num_items))
        return dataclasses.replace(
            self,
            nlist=nlist,
            nprobe=min(self.nprobe or max(32, nlist // (16 if same_length else 4)), nlist),
            ef_search=self.ef_search or (256 if same_length else 1024),
        )


def items_sha256(items: Items) -> str:
    """Hash of the ids and vectors of an export's items, in the order of the ids."""
    digest = hashlib.sha256()
    ids = as_ids(items.item_ids())
    order, vectors = np.argsort(ids, kind="stable"), items.item_vectors()
    for start in range(0, len(ids), _ROWS):
        rows = order[start : start + _ROWS]
        digest.update("\n".join(map(str, ids[rows].tolist())).encode())
        digest.update(np.asarray(vectors[rows], "<f4").tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """The content of `index.json` that is read again.

    Attributes:
        model_version: of the export.
        items_sha256: of its items.
        is_augmented: whether vectors have the number that makes them equally long.
        asked: options as they were given.
        options: the same with every 0 replaced.
        file: name of faiss's file.
        file_sha256: its hash.
    """

    model_version: str
    items_sha256: str
    is_augmented: bool
    asked: IndexOptions
    options: IndexOptions
    file: str
    file_sha256: str


def write(
    items: Items,
    write_index: Callable[[pathlib.Path], None],
    *,
    is_augmented: bool,
    asked: IndexOptions,
    options: IndexOptions,
    faiss_version: str,
) -> pathlib.Path:
    """Writes an index into an export's folder, in place of the one that is there.

    Args:
        items: the export.
        write_index: writes faiss's file.
        is_augmented: see `Description`, as the others.
        asked: options as they were given.
        options: the same with every 0 replaced.
        faiss_version: for the reader of the file.

    Returns:
        The `index.json` written.
    """
    folder = pathlib.Path(items.path) / FOLDER
    folder.mkdir(exist_ok=True)
    _remove_unfinished(folder)
    temporary = folder / f".building-{os.getpid()}"
    try:
        write_index(temporary)
        sha256 = file_sha256(temporary)
        file = folder / f"{options.kind}-{sha256[:12]}.faiss"
        os.replace(temporary, file)
        content = {
            "format_version": _FORMAT_VERSION,
            "model_version": items.manifest.model_version,
            "items_sha256": items_sha256(items),
            "num_items": len(items.item_ids()),
            "is_augmented": is_augmented,
            "asked": dataclasses.asdict(asked),
            "options": dataclasses.asdict(options),
            "file": file.name,
            "file_sha256": sha256,
            "faiss": faiss_version,
        }
        described = folder / _FILE
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, described)
    finally:
        temporary.unlink(missing_ok=True)
    for other in folder.glob("*.faiss"):
        if other != file:
            other.unlink()
    return described


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Removes what builds left whose process was killed; those that run go on."""
    for file in folder.glob(".building-*"):
        process = file.name.removeprefix(".building-")
        if process.isdecimal() and not _is_running(int(process)):
            file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def built_options(items: Items) -> IndexOptions | None:
    """The options that an export's index was asked for, current or not; None without an index.

    Raises:
        ValueError: `index.json` is damaged.
    """
    file = pathlib.Path(items.path) / FOLDER / _FILE
    return _parse(items, file).asked if file.is_file() else None


def read(items: Items) -> Description:
    """The content of an export's `index.json`, checked against the export.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another model or other items, or damaged.
    """
    file = pathlib.Path(items.path) / FOLDER / _FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the export has no index; {_rebuild(items)}")
    description = _parse(items, file)
    for name, own in (
        ("model_version", items.manifest.model_version),
        ("items_sha256", items_sha256(items)),
    ):
        if getattr(description, name) != own:
            what = "another model" if name == "model_version" else "other items"
            raise ValueError(
                f"{file}: {name}={getattr(description, name)}: the index is of {what}, the export "
                f"has {own}; {_rebuild(items)}"
            )
    return description


def checked_file(items: Items, description: Description) -> pathlib.Path:
    """faiss's file.

    Raises:
        ValueError: it is not the one that was written.
    """
    file = pathlib.Path(items.path) / FOLDER / description.file
    if not file.is_file() or file_sha256(file) != description.file_sha256:
        raise ValueError(
            f"{file}: missing, truncated or changed since it was built; {_rebuild(items)}"
        )
    return file


def _parse(items: Items, file: pathlib.Path) -> Description:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{file}: not whole JSON, truncated or changed ({error}); {_rebuild(items)}"
        ) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{file}: format_version={version}: this version reads {_FORMAT_VERSION}; "
            f"{_rebuild(items)}"
        )
    kinds = dict.fromkeys(_TEXTS, str) | {"is_augmented": bool, "asked": dict, "options": dict}
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{file}: {name}={content.get(name)!r}: damaged; {_rebuild(items)}")
    return Description(
        **{name: content[name] for name in kinds if kinds[name] is not dict},
        **{name: _options(items, file, name, content[name]) for name in ("asked", "options")},
    )


def _options(items: Items, file: pathlib.Path, name: str, values: dict[str, Any]) -> IndexOptions:
    try:
        return IndexOptions(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {name}: damaged ({error}); {_rebuild(items)}") from error


def _rebuild(items: Items) -> str:
    return (
        f"build it with `python -m hstu_jax.export --build_index=hnsw --export_dir {items.path}`."
    )


def file_sha256(file: pathlib.Path) -> str:
    """Hash of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
