"""An embedding table on disk of which only the rows that are asked for are read.

One of the loader's files (see `manifest.py`).
"""

import mmap
import pathlib

import numpy as np

_PAGE = mmap.PAGESIZE
# Pages of a table that stay mapped, at most, as a share of it: a fraction of a tenth in all.
_KEPT_SHARE = 32
_ALWAYS_KEPT = 2**22


class RowTable:
    """Rows by id.

    Args:
        file: `.npy`, row i is id i.
        num_rows: expected.
        dim: expected.

    Raises:
        ValueError: not an array of that shape in float32.
    """

    def __init__(self, file: pathlib.Path, *, num_rows: int, dim: int):
        try:
            self._rows = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{file}: not an array file ({error}).") from None
        found = (self._rows.dtype, self._rows.shape)
        if found != (np.float32, (num_rows, dim)):
            raise ValueError(
                f"{file}: holds {found[0]} {found[1]}, the manifest says float32 {num_rows, dim}."
            )
        self.dim = dim
        self._touched = 0
        self._limit = max(self._rows.nbytes // _KEPT_SHARE, _ALWAYS_KEPT)
        self._map = getattr(self._rows, "_mmap", None)
        if self._map is not None:
            self._map.madvise(mmap.MADV_RANDOM)  # without it the kernel reads 128 KiB for a row

    def take(self, ids: np.ndarray) -> np.ndarray:
        """float32 [*ids, dim] rows of the ids; zeros for an id of -1."""
        flat = ids.reshape(-1)
        rows = np.empty((len(flat), self.dim), np.float32)
        row_pages = max(_PAGE, rows.itemsize * self.dim)
        block = max(self._limit // row_pages, 1)
        for start in range(0, len(flat), block):
            some = flat[start : start + block]
            np.take(self._rows, np.maximum(some, 0), axis=0, out=rows[start : start + block])
            rows[start : start + block][some < 0] = 0.0
            self._touched += len(some) * row_pages
            if self._touched > self._limit and self._map is not None:
                # The pages stay in the system's cache; they stop counting as this process's.
                self._map.madvise(mmap.MADV_DONTNEED)
                self._touched = 0
        return rows.reshape(*ids.shape, self.dim)
