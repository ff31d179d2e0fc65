"""An embedding table on disk of which only the rows that are asked for are read.

One of the loader's files (see `manifest.py`).
"""

import os
import pathlib
import weakref

import numpy as np

# Smaller tables are mapped. Larger ones are read row by row, 1 to 2 us each: a mapping counts as
# the process's memory by the pages that were touched, and Linux maps up to 2 MiB around each.
_MAPPED_BYTES = 2**26


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
            rows = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{file}: not an array file ({error}).") from None
        found = (rows.dtype, rows.shape, rows.flags.c_contiguous)
        if found != (np.float32, (num_rows, dim), True):
            raise ValueError(
                f"{file}: holds {found[0]} {found[1]}, the manifest says float32 {num_rows, dim}."
            )
        self.dim = dim
        self._rows = rows if rows.nbytes <= _MAPPED_BYTES else None
        self._first_byte = file.stat().st_size - rows.nbytes
        if self._rows is None:
            self._descriptor = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """float32 [*ids, dim] rows of the ids; zeros for an id of -1."""
        flat = ids.reshape(-1)
        if self._rows is not None:
            rows = np.take(self._rows, np.maximum(flat, 0), axis=0)
        else:
            distinct, place = np.unique(np.maximum(flat, 0), return_inverse=True)
            rows = self._read(distinct)[place]
        rows = np.asarray(rows)
        rows[flat < 0] = 0.0
        return rows.reshape(*ids.shape, self.dim)

    def _read(self, ids: np.ndarray) -> np.ndarray:
        """Rows of ascending ids, neighbours in one go."""
        rows = np.empty((len(ids), self.dim), np.float32)
        if not len(ids):
            return rows
        size, target = 4 * self.dim, memoryview(rows).cast("B")
        starts = np.concatenate([[0], np.flatnonzero(np.diff(ids) > 1) + 1])
        ends = np.concatenate([starts[1:], [len(ids)]]) * size
        offsets = self._first_byte + ids[starts].astype(np.int64) * size
        for start, end, offset in zip(
            (starts * size).tolist(), ends.tolist(), offsets.tolist(), strict=True
        ):
            while start < end:  # a read may give less than it was asked for
                count = os.preadv(self._descriptor, [target[start:end]], offset)
                if not count:
                    raise ValueError("a table became shorter while it was open; copy it again.")
                start, offset = start + count, offset + count
        return rows
