"""`python -m hstu_jax.export`: from a run's folder alone, and what it says of wrong flags."""

import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from absl.testing import flagsaver

from hstu_jax import export
from hstu_jax.serving import artifact, exporter, live_check, trained

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def _parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


@pytest.fixture
def given(exported, tmp_path):
    return {
        "workdir": str(exported.run.workdir),
        "export_dir": str(tmp_path / "export"),
        "item_input_path": f"{exported.lists}/items.parquet",
        "platforms": "cpu",
        "batch_sizes": "8",
        "history_lengths": "42",
    }


def test_a_checkpoint_is_exported_without_its_configuration(exported, live, given, capsys):
    with flagsaver.as_parsed(**given):
        export.main()
    text = capsys.readouterr().out
    assert "model     step 4 of" in text
    assert "items     1,000, 168 without a training event" in text
    opened = artifact.load(given["export_dir"])
    assert opened.manifest.model_version == exported.report.manifest.model_version
    assert opened.manifest.config == exported.model.config_text
    np.testing.assert_allclose(opened.item_vectors(), live[1], rtol=0, atol=1e-6)
    # The items are called by their original ids too.
    table = pq.read_table(f"{given['export_dir']}/items/items.parquet")
    original = exported.run.store.items.item_id
    np.testing.assert_array_equal(table["original_id"].to_numpy(), original)


def test_the_best_checkpoint_is_exported(exported, given, tmp_path):
    """It is an earlier one here, with other vectors."""
    items = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(f"{exported.lists}/items.parquet").slice(0, 50), items)
    with flagsaver.as_parsed(**given | {"item_input_path": str(items)}, best="true"):
        export.main()
    opened = artifact.load(given["export_dir"])
    (best,) = (int(each.name) for each in (exported.run.workdir / "best").iterdir())
    assert best == 2 and opened.manifest.source_step == best
    model = trained.read_checkpoint(exported.run.workdir, step_number="best")
    ids = opened.item_ids()
    expected = live_check.item_vectors(model, opened.manifest, {"video_id": pa.array(ids)})
    np.testing.assert_allclose(opened.item_vectors(), expected, rtol=0, atol=1e-6)
    newest = artifact.load(exported.folder, verify=False).item_vectors()[:50]
    assert np.abs(opened.item_vectors() - newest).max() > 1e-3


def test_wrong_items_are_refused_before_anything_is_lowered(given, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "export", None)
    items = tmp_path / "twice.parquet"
    pq.write_table(pa.table({"video_id": [3, 3], "train_count": [1, 1]}), items)
    flags_given = given | {"item_input_path": str(items)}
    with (
        flagsaver.as_parsed(**flags_given),
        pytest.raises(ValueError, match="twice.parquet' column video_id: id 3 is on two rows"),
    ):
        export.main()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"item_input_path": None}, ValueError, "--item_input_path=None: says which items to emb"),
        ({"workdir": None}, ValueError, "--workdir=None: must be given"),
        ({"export_dir": None}, ValueError, "--export_dir=None: must be given"),
        ({"item_input_path": "no/*.parquet"}, FileNotFoundError, "item_input_path='no.*no such f"),
        ({"checkpoint_step": "7"}, FileNotFoundError, r"no checkpoint of step 7; there are \[2"),
        ({"best": True, "workdir": "no"}, FileNotFoundError, "best: no such folder; train first"),
        ({"best": True, "checkpoint_step": "0"}, ValueError, "cannot be given with --best"),
        ({"batch_sizes": "8,many"}, ValueError, "--batch_sizes=8,many: must be whole numbers"),
        ({"history_lengths": "8"}, ValueError, "the longest must be .*max_seq_len=42"),
        ({"platforms": "cuda"}, ValueError, "must include 'cpu'"),
    ],
)
def test_wrong_flags_are_refused(given, changed, error, message):
    """Before anything is written."""
    flags_given = {name: value for name, value in (given | changed).items() if value is not None}
    for name in flags_given:
        if flags_given[name] is True:
            flags_given[name] = "true"
    with flagsaver.as_parsed(**flags_given), pytest.raises(error, match=message):
        export.main()
    assert not pathlib.Path(given["export_dir"]).exists()


def test_a_configuration_is_refused(monkeypatch):
    monkeypatch.setattr(export.cli, "CONFIG", types.SimpleNamespace(value=object()))
    with pytest.raises(ValueError, match="--config: is not read here, since a checkpoint has its"):
        export.main()


def test_an_error_is_a_message_and_status_2():
    done = subprocess.run(
        [sys.executable, "-m", "hstu_jax.export", "--workdir=a", "--export_dir=b"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: --item_input_path=None: says which items to embed; give parquet" in done.stderr
