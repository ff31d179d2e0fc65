"""Approximate search: a faiss index of an export's items, built and searched.

Not here: its files, and what binds them to the items and the model (`index_folder.py`). faiss
(extra `ann`) is imported where it is used. Candidates of any index are scored and ordered as those
of exact search (`search_catalogue.py`): equal scores for the same items, ties by lower id.

Kinds: `flat` goes through all items, with the proof of exact search, so that its lists are the same
however close the scores; `ivf` goes through the lists nearest to the user, `hnsw` walks a graph. It
is built for neighbours, not for products: where the vectors differ in length, every item gets
one more number, sqrt(max |v|^2 - |v|^2), which makes the greatest product the least distance,
|(u, 0) - (v, a)|^2 = |u|^2 + max |v|^2 - 2 u.v.
"""

import pathlib
import warnings
from collections.abc import Iterator

import numpy as np

from hstu_jax.serving import index_folder
from hstu_jax.serving.index_folder import IndexOptions, Items
from hstu_jax.serving.search_catalogue import (
    Catalogue,
    Exclusions,
    TopK,
    concatenate,
    user_blocks,
)

KINDS = index_folder.KINDS
_SPARE = 32  # candidates beyond k: faiss's float32 order is not quite the exact one
_USER_BLOCK = 1024
_BLOCK_CANDIDATES = 2**20
_ROWS = 65_536
_SEED = 1234
# Lengths that differ by less are rounding of normalised vectors.
_SAME_LENGTH = 1e-3


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
    described = {"is_augmented": is_augmented, "asked": asked, "options": options}
    return index_folder.write(
        items,
        lambda file: faiss.write_index(index, str(file)),
        **described,
        faiss_version=faiss.__version__,
    )


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


class AnnSearch:
    """Approximate top-k, with the signature of `top_k.ExactSearch`.

    Args:
        items: the export whose folder holds the index.
        item_mask: bool [N] in the export's order, items that may be shown; None is all.

    Raises:
        FileNotFoundError: the export has no index.
        ImportError: faiss is absent or does not load.
        ValueError: the index is another model's or of other items, or a file of it is damaged.
    """

    def __init__(self, items: Items, *, item_mask: np.ndarray | None = None) -> None:
        description = index_folder.read(items)
        file = index_folder.checked_file(items, description)
        self._faiss = import_faiss()
        self._index = self._faiss.read_index(str(file))
        self._is_augmented = description.is_augmented
        self.options = description.options
        self.catalogue = Catalogue(items.item_ids(), items.item_vectors())
        self._is_shown = np.ones(self.catalogue.num_items, bool)
        if item_mask is not None:
            self._is_shown = item_mask[np.argsort(items.item_ids(), kind="stable")]
        self._num_shown = int(np.count_nonzero(item_mask)) if item_mask is not None else None

    def check_k(self, k: int) -> None:
        """Raises ValueError unless k is 1 .. the number of items that may be shown."""
        self.catalogue.check_k(k, num_shown=self._num_shown)

    def search(
        self, user_vectors: np.ndarray, *, k: int, exclusions: Exclusions | None = None
    ) -> TopK:
        """The k best items that the index finds for every user; see `ExactSearch.search`.

        Where ivf or hnsw find fewer than k although more may be shown, they search on twice as wide
        until they do. Only hnsw can end with fewer, where its graph does not reach all items.
        """
        catalogue = self.catalogue
        users = catalogue.check_users(
            user_vectors, k=k, exclusions=exclusions, num_shown=self._num_shown
        )
        num_kept = min(k + _SPARE, catalogue.num_items)
        most = int(np.clip(_BLOCK_CANDIDATES // num_kept, 1, _USER_BLOCK))
        blocks = list(user_blocks(exclusions, len(users), most=most))
        parts = []
        for own in blocks:
            hidden = catalogue.excluded_positions(
                exclusions.take(own) if exclusions else None, len(own)
            )
            products, positions = self._candidates(users[own], hidden, num_kept=num_kept, k=k)
            part = catalogue.order(users[own], positions, is_candidate=positions >= 0, k=k)
            if self.options.kind == "flat" and num_kept < catalogue.num_items:
                least = np.where(positions[:, -1] >= 0, products[:, -1], -np.inf)
                masked = np.flatnonzero(~self._is_shown)
                part = catalogue.proven(
                    part, users[own], k=k, least=least, hidden=hidden, masked=masked
                )
            parts.append(part)
        return concatenate(parts, catalogue, blocks=blocks, k=k)

    def _candidates(
        self, users: np.ndarray, hidden: np.ndarray, *, num_kept: int, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """faiss's products or distances, and positions in the id order, -1 after the last found."""
        queries = np.ascontiguousarray(np.pad(users, ((0, 0), (0, int(self._is_augmented)))))
        is_plain = (hidden < 0).all(axis=1) & self._is_shown.all()
        found = np.full((len(users), num_kept), -np.inf, np.float32)
        positions = np.full((len(users), num_kept), -1, np.int64)
        if is_plain.any():
            found[is_plain], positions[is_plain] = self._find(
                queries[is_plain], None, num_kept=num_kept, wanted=k
            )
        for row in np.flatnonzero(~is_plain):
            own = self._is_shown.copy()
            own[hidden[row][hidden[row] >= 0]] = False
            bits = np.packbits(own, bitorder="little")
            selector, wanted = self._faiss.IDSelectorBitmap(bits), min(k, int(own.sum()))
            found[row], positions[row] = self._find(
                queries[row : row + 1], selector, num_kept=num_kept, wanted=wanted
            )
        return found, positions

    def _find(self, queries: np.ndarray, selector, *, num_kept: int, wanted: int):
        """What faiss finds, with those who have fewer than `wanted` searched again, wider."""
        found = np.empty((len(queries), num_kept), np.float32)
        positions = np.empty((len(queries), num_kept), np.int64)
        is_short = np.ones(len(queries), bool)
        for width in self._widths(num_kept):
            parameters = self._parameters(selector, width)
            found[is_short], positions[is_short] = self._index.search(
                queries[is_short], num_kept, params=parameters
            )
            is_short = (positions >= 0).sum(axis=1) < wanted
            if not is_short.any():
                break
        return found, positions

    def _widths(self, num_kept: int) -> Iterator[int]:
        """Lists of ivf or candidates of hnsw to go through: the option, doubled up to all."""
        width, most = {
            "flat": (1, 1),
            "ivf": (self.options.nprobe, self.options.nlist),
            "hnsw": (max(self.options.ef_search, num_kept), self.catalogue.num_items),
        }[self.options.kind]
        yield width
        while width < most:
            width = min(2 * width, most)
            yield width

    def _parameters(self, selector, width: int):
        more = {} if selector is None else {"sel": selector}
        if self.options.kind == "ivf":
            return self._faiss.SearchParametersIVF(nprobe=width, **more)
        if self.options.kind == "hnsw":
            return self._faiss.SearchParametersHNSW(efSearch=width, **more)
        return self._faiss.SearchParameters(**more) if more else None


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
