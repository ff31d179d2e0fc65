"""`python -m hstu_jax.export`: from a run's folder alone, and what it says of wrong flags."""

import os
import pathlib
import subprocess
import sys

import numpy as np

from hstu_jax.serving import artifact

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def export(*flags):
    return subprocess.run(
        [sys.executable, "-m", "hstu_jax.export", *flags, "--compilation_cache="],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_checkpoint_is_exported_without_its_configuration(exported, live, tmp_path):
    done = export(
        f"--workdir={exported.run.workdir}",
        f"--export_dir={tmp_path / 'export'}",
        f"--item_input_path={exported.lists}/items.parquet",
        "--platforms=cpu",
        "--batch_sizes=8",
        "--history_lengths=42",
    )
    assert done.returncode == 0, done.stderr
    assert "items     1,000, 168 without a training event" in done.stdout
    assert "model     step 0 of" in done.stdout
    opened = artifact.load(tmp_path / "export")
    assert opened.manifest.model_version == exported.report.manifest.model_version
    assert opened.manifest.config == exported.model.config_text
    np.testing.assert_allclose(opened.item_vectors(), live[1], rtol=0, atol=1e-6)
    # The items' file calls them by their original ids too.
    assert (tmp_path / "export" / "items" / "items.parquet").stat().st_size > 0


def test_items_must_be_given(exported, tmp_path):
    where = [f"--workdir={exported.run.workdir}", f"--export_dir={tmp_path / 'export'}"]
    done = export(*where)
    assert done.returncode == 2
    assert "error: --item_input_path=None: says which items to embed; give parquet" in done.stderr
