"""An export is whole or absent, the same bytes every time, and refuses what it cannot serve."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hstu_jax.serving import (
    artifact,
    catalogue,
    contract,
    exporter,
    item_writer,
    live_check,
    part_writer,
    row_table,
    trained,
    unfinished,
)
from hstu_jax.serving import manifest as manifest_lib
from tests.serving.conftest import OPTIONS

SMALL = dataclasses.replace(
    OPTIONS, history_lengths=(42,), batch_sizes=(8,), platforms=("cpu",), item_batch_sizes=(64,)
)


def export(exported, folder, **settings):
    store = exported.run.store
    settings = {
        "item_rows": catalogue.rows_of_store(store, exported.model.config),
        "options": SMALL,
        **settings,
    }
    return exporter.export(
        exported.model,
        folder,
        training_items=catalogue.training_items_of_store(store),
        **settings,
    )


def files(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_two_exports_are_equal_but_for_the_time(exported, tmp_path, monkeypatch):
    """From another working directory, into a folder of another name."""
    monkeypatch.chdir(tmp_path)
    _stand_in(monkeypatch, live_check, "compare")
    second = export(exported, tmp_path / "elsewhere" / "two", options=OPTIONS)
    one, two = files(exported.folder), files(second.folder)
    manifests = [json.loads(each.pop("manifest.json")) for each in (one, two)]
    assert one == two
    for each in manifests:
        assert each.pop("created")
    assert manifests[0] == manifests[1]
    assert second.manifest.model_version == exported.report.manifest.model_version
    # Nothing of this machine is in them.
    paths = [str(tmp_path).encode(), str(pathlib.Path(exporter.__file__).parents[2]).encode()]
    assert not [name for name, content in two.items() if any(path in content for path in paths)]


STAGES = [
    (part_writer, "write_tables"),
    (part_writer, "write_parameters"),
    (part_writer, "write_arrays"),
    (part_writer, "write_programs"),
    (live_check, "compare"),
    (exporter, "write_items"),
    (manifest_lib, "to_json"),
    (item_writer, "sync_tree"),
]


@pytest.mark.parametrize("at", range(len(STAGES)))
def test_an_export_that_is_killed_leaves_nothing_that_loads(exported, tmp_path, monkeypatch, at):
    """Every stage fails, before or behind what it writes; removal of the rest fails too."""
    module, name = STAGES[at]
    for earlier_module, earlier in STAGES[:at]:
        if earlier in ("write_programs", "compare", "write_items"):
            _stand_in(monkeypatch, earlier_module, earlier)
    original = getattr(module, name)

    def killed(*arguments, **options):
        if name not in ("compare", "write_items"):
            original(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)
    with pytest.raises(KeyboardInterrupt):
        export(exported, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1 and left[0].name.endswith(".unfinished")
    with pytest.raises((ValueError, FileNotFoundError), match="interrupted; remove it"):
        artifact.load(left[0])
    # Also under another name: the manifest is the last file.
    if name != "sync_tree":
        left[0].rename(tmp_path / "renamed")
        with pytest.raises(FileNotFoundError, match="no finished export"):
            artifact.load(tmp_path / "renamed")


def _stand_in(monkeypatch, module, name):
    """Stages that were tried before and take long: nothing later depends on them."""
    results = {
        "write_programs": (),
        "compare": live_check.Differences(0.0, 0.0, 0, 0),
        "write_items": item_writer.Written(num_items=0, num_cold=0),
    }
    monkeypatch.setattr(module, name, lambda *a, **k: results[name])
    if name == "write_programs":
        monkeypatch.setattr(artifact, "open_parts", lambda *a: None)


def test_the_next_export_removes_what_a_killed_one_left(exported, tmp_path, monkeypatch):
    """And nothing of exports that run, or of other names."""
    (tmp_path / ".export-123.unfinished").mkdir()
    (tmp_path / ".export-v2-999.unfinished").mkdir()
    for module, name in STAGES[3:6]:
        _stand_in(monkeypatch, module, name)
    with unfinished.held(tmp_path / ".export-124.unfinished"):
        export(exported, tmp_path / "export")
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".export-124.unfinished", ".export-v2-999.unfinished", "export"]


def test_a_used_folder_is_refused(exported):
    with pytest.raises(FileExistsError, match="exists and is not empty; choose another"):
        export(exported, exported.folder)


def test_an_export_that_differs_is_refused(exported, opened, monkeypatch):
    """The rows of a table are read one place beside where they lie."""
    monkeypatch.setattr(
        row_table.RowTable,
        "take",
        lambda self, ids, take=row_table.RowTable.take: take(self, np.maximum(ids - 1, 0)),
    )
    with pytest.raises(ValueError, match="the exported user tower differs from the live model by"):
        live_check.compare(exported.model, opened)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history_lengths": (8, 8, 42)}, "history_lengths=.*: must be positive and ascending"),
        ({"batch_sizes": ()}, "batch_sizes=.*: must be positive and ascending"),
        ({"item_batch_sizes": (0, 4)}, "item_batch_sizes=.*: must be positive and ascending"),
        ({"platforms": ("cpu", "tpu")}, "platforms=.*: must be some of"),
        ({"platforms": ("cuda",)}, "platforms=.*: must include 'cpu', on which an export is comp"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        exporter.ExportOptions(**options)


def test_the_longest_length_is_the_models(exported, tmp_path):
    options = dataclasses.replace(SMALL, history_lengths=(16, 64))
    with pytest.raises(ValueError, match=r"the longest must be .*max_seq_len=42"):
        export(exported, tmp_path / "export", options=options)
    assert exporter.default_lengths(4096) == (64, 256, 1024, 4096)
    assert exporter.default_lengths(50) == (50,)


def test_sizes_and_platforms_are_in_the_manifest(exported):
    manifest = exported.report.manifest
    assert [(size.length, size.batches) for size in manifest.sizes] == [(8, (1, 16)), (42, (1, 16))]
    assert {program.platform for program in manifest.programs} == {"cpu", "cuda"}
    attention = {(p.tower, p.platform): p.attention for p in manifest.programs}
    assert attention["user", "cpu"] == "xla" and attention["item", "cpu"] == ""
    assert attention["user", "cuda"] in ("xla", "pallas_triton")


def test_parameters_lie_in_orbax_folders_of_their_towers(exported):
    for tower in ("user", "item"):
        name = f"{tower}_tower"
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(exported.folder / name)
        trees = (tree["params"], exported.state.params)
        found, live = (jax.tree.leaves(each[name]) for each in trees)
        for one, other in zip(found, live, strict=True):
            np.testing.assert_array_equal(one, other)


def test_each_table_is_there_once_in_the_order_of_ids(exported):
    tables = exported.report.manifest.tables
    assert set(tables) == {spec.name for spec in exported.model.specs}
    # Both towers read one table of items.
    uses = [
        feature.table
        for feature in (
            *exported.report.manifest.history_features,
            *exported.report.manifest.candidate_features,
        )
    ]
    assert uses == ["video_id_emb", "video_id_emb"]
    rows = np.load(exported.folder / tables["video_id_emb"].file)
    live = np.asarray(exported.model.weights["video_id_emb"])
    np.testing.assert_array_equal(rows, live[:1024])  # few rows: id = row


def test_averaged_parameters_are_exported_where_evaluation_takes_them(exported):
    model, state = exported.model, exported.state
    assert not exported.report.manifest.uses_average
    average = jax.tree.map(lambda leaf: leaf + 1, state.params)
    state = dataclasses.replace(state, ema=average)
    averaged = trained.from_state(model.config, state, recorded="")
    assert averaged.uses_average and averaged.variables["params"] is average
    evaluation = dataclasses.replace(model.config.eval, use_dense_ema=False)
    config = unchecked(model.config, eval=evaluation)
    last = trained.from_state(config, state, recorded="")
    assert not last.uses_average and last.variables["params"] is state.params


def test_checkpoints_are_found_or_named(exported, tmp_path):
    workdir = exported.run.workdir
    read = trained.read_checkpoint(workdir)
    assert read.step == 4 and read.config == exported.model.config
    for name, weights in exported.model.weights.items():
        np.testing.assert_array_equal(read.weights[name], weights)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3; there are \[2, 4\]"):
        trained.read_checkpoint(workdir, step_number=3)
    with pytest.raises(FileNotFoundError, match="best: no such folder; train first with .*keep_b"):
        trained.read_checkpoint(tmp_path, step_number="best")


def test_a_model_whose_items_have_no_id_is_refused(exported):
    config = exported.model.config
    names = ("user_id",)
    groups = {**config.feature_groups, "candidate": names, "uih": names}
    wrong = unchecked(config, feature_groups=groups)
    with pytest.raises(ValueError, match="no feature reads the item id 'video_id'"):
        contract.make_contract(wrong)


def unchecked(config, **changes):
    """A configuration with other fields whose relations are not checked."""
    changed = object.__new__(type(config))
    for field in dataclasses.fields(config):
        value = changes.get(field.name, getattr(config, field.name))
        object.__setattr__(changed, field.name, value)
    return changed


def test_an_ablation_is_not_exported(exported):
    config = exported.model.config
    data = dataclasses.replace(config.data, ablation="no_actions")
    with pytest.raises(ValueError, match="data.ablation='no_actions': cannot be exported"):
        contract.make_contract(dataclasses.replace(config, data=data))


def test_a_part_from_another_export_is_refused(exported, tmp_path):
    """Equal in size, not in content."""
    copy = shutil.copytree(exported.folder, tmp_path / "copy")
    name = "tables/user_id_emb.npy"
    other = np.load(copy / name) + 1
    np.save(copy / name, other)
    with pytest.raises(ValueError, match=f"{name}: hash"):
        artifact.load(copy)
