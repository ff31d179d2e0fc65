"""Rows of a table on disk: right, and without the table in memory."""

import os
import subprocess
import sys

import numpy as np
import pytest

from hstu_jax.serving import row_table


@pytest.mark.parametrize("mapped_bytes", [2**26, 100])
def test_rows_by_id(tmp_path, monkeypatch, mapped_bytes):
    """Mapped, and read row by row."""
    monkeypatch.setattr(row_table, "_MAPPED_BYTES", mapped_bytes)
    rows = np.random.default_rng(0).normal(size=(9000, 4)).astype(np.float32)
    np.save(tmp_path / "t.npy", rows)
    table = row_table.RowTable(tmp_path / "t.npy", num_rows=9000, dim=4)
    ids = np.array([[3, -1], [8999, 3], [4, 0]])
    found = table.take(ids)
    np.testing.assert_array_equal(found[ids >= 0], rows[[3, 8999, 3, 4, 0]])
    np.testing.assert_array_equal(found[0, 1], np.zeros(4))
    every = np.tile(np.arange(9000)[::-1], 2)
    np.testing.assert_array_equal(table.take(every), rows[every])
    assert table.take(np.empty(0, np.int64)).shape == (0, 4)
    assert table.take(np.full(3, -1)).sum() == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 4)), r"holds float64 \(3, 4\), the manifest says float32 \(3, 4\)"),
        (np.zeros((3, 5), np.float32), r"holds float32 \(3, 5\), the manifest says float32"),
        (np.array([{}], dtype=object), "not an array file"),
    ],
)
def test_other_arrays_are_refused(content, message, tmp_path):
    np.save(tmp_path / "t.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        row_table.RowTable(tmp_path / "t.npy", num_rows=3, dim=4)


_RESIDENT = """
import sys
import numpy as np
from hstu_jax.serving import manifest, row_table


def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024


import pathlib
rng, largest = np.random.default_rng(0), 0
np.ones(2**20).astype(np.float32) == rng.integers(0, 9, 2**20)  # NumPy's own memory
before, file = resident(), pathlib.Path(sys.argv[1])
manifest.file_sha256(file)
table = row_table.RowTable(file, num_rows=5_000_000, dim=64)
for _ in range(200):
    ids = rng.integers(0, 5_000_000, 4096)
    assert (table.take(ids)[:, 0] == ids.astype(np.float32)).all()
    largest = max(largest, resident())
print(largest - before)
"""


@pytest.mark.long
def test_a_table_of_five_million_rows_stays_on_disk(tmp_path):
    """1.2 GiB: the hash of it and 819,200 rows take under a tenth of that in memory."""
    file = tmp_path / "t.npy"
    rows = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(5_000_000, 64))
    for start in range(0, 5_000_000, 100_000):
        rows[start : start + 100_000] = np.arange(start, start + 100_000)[:, None]
    rows.flush()
    del rows
    done = subprocess.run(
        [sys.executable, "-c", _RESIDENT, str(file)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    grown = int(done.stdout)
    print(f"resident memory grew by {grown / 2**20:.0f} MiB of {file.stat().st_size / 2**20:.0f}")
    assert grown < file.stat().st_size / 10, f"{grown:,} bytes"
