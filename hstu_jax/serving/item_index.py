"""Approximate search: a faiss index of an export's items, bound to them and to the model.

    EXPORT/index/index.json          what it is of: model version, hash of the items, parameters
    EXPORT/index/KIND-HASH.faiss     faiss's own file

`index.json` is replaced last and in one step, so that there is always one whole index or none.
faiss (extra `ann`) is imported where it is used. Candidates of any index are scored and ordered as
those of exact search (`search_catalogue.py`): equal scores for the same items, ties by lower id.

Kinds: `flat` goes through all items, `ivf` through the lists nearest to the user, `hnsw` walks a
graph. The graph is built for neighbours, not for products: where the vectors differ in length,
every item gets one more number, sqrt(max |v|^2 - |v|^2), which makes the greatest product the least
distance, |(u, 0) - (v, a)|^2 = |u|^2 + max |v|^2 - 2 u.v.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hstu_jax.serving.search_catalogue import (
    Catalogue,
    Exclusions,
    TopK,
    as_ids,
    concatenate,
)

KINDS = ("flat", "ivf", "hnsw")
FOLDER = "index"
_FILE = "index.json"
_FORMAT_VERSION = 1
_SPARE = 32  # candidates beyond k: faiss's float32 order is not quite the exact one
_USER_BLOCK = 1024
_ROWS = 65_536
_SEED = 1234
# Lengths that differ by less are rounding of normalised vectors.
_SAME_LENGTH = 1e-3


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
        nprobe: ivf: lists that a search goes through; 0 = a sixteenth of them, a quarter where
            lengths differ, 32 at least.
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


def build(items: Items, *, options: IndexOptions) -> pathlib.Path:
    """Builds the index of an export and writes it into the export's folder.

    Args:
        items: the export.
        options: kind and parameters.

    Returns:
        The `index.json` written.

    Raises:
        ImportError: faiss is absent or does not load.
        ValueError: vectors that cannot be searched.
    """
    faiss = import_faiss()
    catalogue = Catalogue(items.item_ids(), items.item_vectors())
    lengths = catalogue.lengths()
    longest = float(lengths.max())
    same_length = bool(longest - lengths.min() <= _SAME_LENGTH * longest)
    asked, options = options, options.fitted(catalogue.num_items, same_length=same_length)
    is_augmented = options.kind == "hnsw" and not same_length
    index = _empty_index(faiss, options, catalogue.dim + is_augmented, is_augmented)
    if options.kind == "ivf":
        index.train(_training_rows(catalogue, options.nlist))
    for start in range(0, catalogue.num_items, _ROWS):
        rows = np.arange(start, min(start + _ROWS, catalogue.num_items))
        vectors = catalogue.vectors(rows)
        if is_augmented:
            extra = np.sqrt(np.maximum(longest**2 - lengths[rows] ** 2, 0.0))
            vectors = np.concatenate([vectors, extra[:, None].astype(np.float32)], axis=1)
        index.add(np.ascontiguousarray(vectors))
    return _write(faiss, index, items, asked, options, is_augmented)


def _empty_index(faiss, options: IndexOptions, dim: int, is_augmented: bool):
    if options.kind == "flat":
        return faiss.IndexFlatIP(dim)
    if options.kind == "ivf":
        quantizer = faiss.IndexFlatIP(dim)
        index = faiss.IndexIVFFlat(quantizer, dim, options.nlist, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.niter = _SEED, 10
        index.cp.min_points_per_centroid = 1  # else faiss prints advice to the screen
        return index
    metric = faiss.METRIC_L2 if is_augmented else faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexHNSWFlat(dim, options.hnsw_m, metric)
    index.hnsw.efConstruction = options.ef_construction
    return index


def _training_rows(catalogue: Catalogue, nlist: int) -> np.ndarray:
    """64 items a list: more did not find better lists, and take their time."""
    size = min(catalogue.num_items, 64 * nlist)
    rows = np.random.default_rng(_SEED).choice(catalogue.num_items, size, replace=False)
    return np.ascontiguousarray(catalogue.vectors(np.sort(rows)))


def _write(faiss, index, items, asked, options, is_augmented) -> pathlib.Path:
    folder = pathlib.Path(items.path) / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = folder / f".building-{os.getpid()}"
    faiss.write_index(index, str(temporary))
    sha256 = file_sha256(temporary)
    file = folder / f"{options.kind}-{sha256[:12]}.faiss"
    os.replace(temporary, file)
    content = {
        "format_version": _FORMAT_VERSION,
        "model_version": items.manifest.model_version,
        "items_sha256": items_sha256(items),
        "num_items": int(index.ntotal),
        "is_augmented": is_augmented,
        "asked": dataclasses.asdict(asked),
        "options": dataclasses.asdict(options),
        "file": file.name,
        "file_sha256": sha256,
        "faiss": faiss.__version__,
    }
    described = folder / _FILE
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, described)
    for other in folder.glob("*.faiss"):
        if other != file:
            other.unlink()
    return described


class AnnSearch:
    """Approximate top-k, with the signature of `top_k.ExactSearch`.

    Args:
        items: the export whose folder holds the index.
        item_mask: bool [N] in the export's order, items that may be shown; None is all.

    Raises:
        FileNotFoundError: the export has no index.
        ImportError: faiss is absent or does not load.
        ValueError: the index is another model's or of other items, or its file is damaged.
    """

    def __init__(self, items: Items, *, item_mask: np.ndarray | None = None) -> None:
        folder = pathlib.Path(items.path) / FOLDER
        content = read_description(items)
        file = folder / content["file"]
        if not file.is_file() or file_sha256(file) != content["file_sha256"]:
            raise ValueError(
                f"{file}: missing, truncated or changed since it was built; {_rebuild(items)}"
            )
        self._faiss = import_faiss()
        self._index = self._faiss.read_index(str(file))
        self._is_augmented = content["is_augmented"]
        self.options = IndexOptions(**content["options"])
        self.catalogue = Catalogue(items.item_ids(), items.item_vectors())
        self._is_shown = None
        if item_mask is not None and not item_mask.all():
            self._is_shown = item_mask[np.argsort(items.item_ids(), kind="stable")]
        self._num_shown = int(np.count_nonzero(item_mask)) if item_mask is not None else None

    def check_k(self, k: int) -> None:
        """Raises ValueError unless k is 1 .. the number of items that may be shown."""
        self.catalogue.check_k(k, num_shown=self._num_shown)

    def search(
        self, user_vectors: np.ndarray, *, k: int, exclusions: Exclusions | None = None
    ) -> TopK:
        """The k best items that the index finds for every user; see `ExactSearch.search`.

        A list may be shorter than k where the index finds fewer; `counts` says so.
        """
        catalogue = self.catalogue
        users = catalogue.check_users(
            user_vectors, k=k, exclusions=exclusions, num_shown=self._num_shown
        )
        parts = []
        for start in range(0, len(users), _USER_BLOCK):
            stop = min(start + _USER_BLOCK, len(users))
            hidden = exclusions.rows(start, stop) if exclusions else None
            positions = self._candidates(users[start:stop], k, hidden)
            own = np.arange(start, stop)
            parts.append(catalogue.order(users[own], positions, is_candidate=positions >= 0, k=k))
        return concatenate(parts, catalogue, k=k)

    def _candidates(self, users: np.ndarray, k: int, exclusions: Exclusions | None) -> np.ndarray:
        """int64 [W, C] positions in the id order, -1 where the index has no more."""
        queries = np.ascontiguousarray(np.pad(users, ((0, 0), (0, int(self._is_augmented)))))
        num_kept = min(k + _SPARE, self.catalogue.num_items)
        hidden = self.catalogue.excluded_positions(exclusions, len(users))
        is_plain = (
            (hidden < 0).all(axis=1) if self._is_shown is None else np.zeros(len(users), bool)
        )
        positions = np.full((len(users), num_kept), -1, np.int64)
        if is_plain.any():
            parameters = self._parameters(None, num_kept)
            _, positions[is_plain] = self._index.search(
                queries[is_plain], num_kept, params=parameters
            )
        shown = (
            np.ones(self.catalogue.num_items, bool) if self._is_shown is None else self._is_shown
        )
        for row in np.flatnonzero(~is_plain):
            own = shown.copy()
            own[hidden[row][hidden[row] >= 0]] = False
            bits = np.packbits(own, bitorder="little")
            selector = self._faiss.IDSelectorBitmap(bits)
            _, found = self._index.search(
                queries[row : row + 1], num_kept, params=self._parameters(selector, num_kept)
            )
            positions[row] = found[0]
        return positions

    def _parameters(self, selector, num_kept: int):
        more = {} if selector is None else {"sel": selector}
        if self.options.kind == "ivf":
            return self._faiss.SearchParametersIVF(nprobe=self.options.nprobe, **more)
        if self.options.kind == "hnsw":
            width = max(self.options.ef_search, num_kept)
            return self._faiss.SearchParametersHNSW(efSearch=width, **more)
        return self._faiss.SearchParameters(**more) if more else None


def built_options(items: Items) -> IndexOptions | None:
    """The options that an export's index was asked for, current or not; None without an index."""
    file = pathlib.Path(items.path) / FOLDER / _FILE
    if not file.is_file():
        return None
    return IndexOptions(**json.loads(file.read_text())["asked"])


def read_description(items: Items) -> dict[str, Any]:
    """The content of an export's `index.json`, checked against the export.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another model or other items.
    """
    file = pathlib.Path(items.path) / FOLDER / _FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the export has no index; {_rebuild(items)}")
    content = json.loads(file.read_text())
    if content.get("format_version") != _FORMAT_VERSION:
        raise ValueError(
            f"{file}: format_version={content.get('format_version')}: this version reads "
            f"{_FORMAT_VERSION}; {_rebuild(items)}"
        )
    for name, own in (
        ("model_version", items.manifest.model_version),
        ("items_sha256", items_sha256(items)),
    ):
        if content[name] != own:
            what = "another model" if name == "model_version" else "other items"
            raise ValueError(
                f"{file}: {name}={content[name]}: the index is of {what}, the export has {own}; "
                f"{_rebuild(items)}"
            )
    return content


def _rebuild(items: Items) -> str:
    return (
        f"build it with `python -m hstu_jax.export --build_index=hnsw --export_dir {items.path}`."
    )


def file_sha256(file: pathlib.Path) -> str:
    """Hash of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def import_faiss():
    """The module, imported at its first use.

    Raises:
        ImportError: absent, or installed and broken.
    """
    try:
        with warnings.catch_warnings():  # SWIG's types on Python 3.12
            warnings.simplefilter("ignore", DeprecationWarning)
            import faiss
    except ModuleNotFoundError as error:
        if error.name != "faiss":
            raise ImportError(_BROKEN.format(error)) from error
        raise ImportError(
            "faiss: not installed; `pip install 'hstu_jax[ann]'`, or search with --index=exact."
        ) from error
    except Exception as error:  # a native library may fail to load in any way
        raise ImportError(_BROKEN.format(error)) from error
    return faiss


_BROKEN = (
    "faiss: installed, but it does not load ({}); reinstall faiss-cpu, or search with "
    "--index=exact."
)
