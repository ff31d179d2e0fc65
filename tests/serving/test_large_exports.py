"""Exports in processes of their own: a table of five million rows, and kills that cannot be caught.

All long. The table's memory is that of the loader's process alone, so the export is another one.
"""

import os
import signal
import subprocess
import sys

import pytest

from hstu_jax.serving import artifact

ROWS, DIM = 5_000_000, 64

_EXPORT = """
import sys
import numpy as np
import pyarrow as pa
from configs import kuairand
from hstu_jax.config import resolve
from hstu_jax.serving import exporter, trained
from hstu_jax.training import run as run_lib

folder, num_rows, dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
raw = kuairand.get_config("sample")
for name in ("uih_seq__video_id", "cand_seq__video_id"):
    raw.features[name].num_buckets, raw.features[name].embedding_dim = num_rows, dim
stu = raw.model.user_tower.hstu.stu
stu.embedding_dim, stu.hidden_dim = dim, 16
raw.model.item_tower.mlp.hidden_units = (dim,)
config = resolve.resolve(raw)
state = run_lib.untrained_state(config)
ids = np.arange(1, 2001)
exporter.export(
    trained.from_state(config, state, recorded=resolve.to_text(config)),
    folder,
    training_items=exporter.TrainingItems(ids=ids, counts=np.ones_like(ids)),
    item_rows=[("items", pa.RecordBatch.from_pydict({"video_id": ids}))],
    options=exporter.ExportOptions(batch_sizes=(8,), item_batch_sizes=(64,), platforms=("cpu",)),
    echo=lambda line: print(line, flush=True),
)
"""

_LOAD = """
import sys
import jax
import numpy as np
from hstu_jax.serving import artifact


def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024


# What JAX, its compiler and the threads of Orbax take is not the table's.
jax.jit(lambda x: jax.numpy.sort(x @ x.T, axis=0))(np.ones((64, 64), np.float32))
before = resident()
opened = artifact.load(sys.argv[1])
rng, num_rows = np.random.default_rng(0), int(sys.argv[2])
columns = {}
for each in opened.manifest.user_inputs:
    columns[each.name] = [
        rng.integers(1, 5, 20).tolist() if each.name.startswith("uih_seq") else 1_650_000_000
        for _ in range(400)
    ]
columns[opened.manifest.history_column] = rng.integers(1, num_rows, (400, 20)).tolist()
columns["uih_seq__action_timestamp"] = [list(range(1_640_000_000, 1_640_000_020))] * 400
for name in columns:
    if not name.startswith("uih_seq") and name != "request_time":
        columns[name] = [1] * 400
vectors = opened.embed_users(columns)
assert vectors.shape == (400, opened.manifest.dim) and np.isfinite(vectors).all()
assert len(np.unique(vectors.round(6), axis=0)) > 390
items = opened.embed_items({"video_id": rng.integers(1, num_rows, 4096)})
assert np.isfinite(items).all()
print(resident() - before)
"""


def _environment():
    return {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}


@pytest.mark.long
def test_five_million_rows_are_exported_and_loaded_row_by_row(tmp_path):
    folder = tmp_path / "export"
    sizes = [str(folder), str(ROWS), str(DIM)]
    subprocess.run([sys.executable, "-c", _EXPORT, *sizes], env=_environment(), check=True)
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(folder), str(ROWS)],
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    grown, table = int(done.stdout), ROWS * DIM * 4
    print(f"resident memory grew by {grown / 2**20:.0f} MiB; the table has {table / 2**20:.0f}")
    assert grown < table / 10, f"{grown:,} bytes"


@pytest.mark.long
@pytest.mark.parametrize("stage", ["tables", "programs", "compared", "items"])
def test_an_export_killed_at_any_stage_leaves_nothing_that_loads(stage, tmp_path):
    folder = tmp_path / "export"
    command = [sys.executable, "-c", _EXPORT, str(folder), "2048", "16"]
    with subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, text=True
    ) as running:
        for line in running.stdout:
            if line.startswith(stage):
                running.send_signal(signal.SIGKILL)
                break
        running.wait()
    assert running.returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f".export-{running.pid}{artifact.UNFINISHED}"]
    with pytest.raises(FileNotFoundError, match="no finished export"):
        artifact.load(folder)
    with pytest.raises(ValueError, match="left by an export that was interrupted"):
        artifact.load(tmp_path / left[0])
    if stage == "items":  # once: the next export clears the way and is whole
        subprocess.run(command, env=_environment(), check=True)
        assert [path.name for path in tmp_path.iterdir()] == ["export"]
        assert artifact.load(folder).item_ids().size == 2_000
