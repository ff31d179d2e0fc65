"""Lists, vectors, figures, new items and an endpoint over a real export."""

import json
import pathlib
import shutil
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from absl.testing import flagsaver

from examples import http_endpoint
from hstu_jax import export, hitrate, predict, retrieve
from hstu_jax.serving import (
    artifact,
    benchmark,
    benchmark_report,
    command_line,
    item_index,
    item_refresh,
    item_writer,
)
from hstu_jax.training import evaluation

HISTORY = "uih_seq__video_id"
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def rows(exported):
    """The store as list columns: `test/*.parquet` and `items.parquet`."""
    return exported.lists


@pytest.fixture(scope="module")
def export_dir(exported):
    return exported.folder


def flag_list(export_dir, *more):
    return ["--export_dir", str(export_dir), "--compilation_cache", "", *map(str, more)]


def test_hitrate_equals_evaluation_of_the_same_windows(
    exported, rows, export_dir, tmp_path, capsys
):
    output, picture = tmp_path / "figures.json", tmp_path / "figures.svg"
    hitrate.main(
        flag_list(export_dir, "--ground_truth", f"{rows}/test/*.parquet", "--batch_rows", 50,
              "--cutoffs", ",".join(map(str, exported.run.config.eval.top_k)),
              "--output", output, "--picture", picture)
    )  # fmt: skip
    run = exported.run
    eval_set = evaluation.make_eval_set(run.store, split="test", exclude_seen=True)
    expected = evaluation.evaluate(run, exported.state, eval_set)
    found = json.loads(output.read_text())
    assert found["figures"]["exact"] == {
        name: pytest.approx(value, abs=1e-9) for name, value in expected.metrics.means().items()
    }
    counts = found["counts"]
    assert counts["rows"] == len(eval_set.windows)
    assert counts["seen"] == expected.ranks.num_seen and counts["cold"] == expected.ranks.num_cold
    assert "recall@10000 by history length" in capsys.readouterr().out
    assert picture.read_text().startswith("<svg")
    # Other rules, other figures.
    hitrate.main(
        flag_list(export_dir, "--ground_truth", f"{rows}/test/*.parquet", "--show_seen",
              "--show_cold", "--cutoffs", "10,20", "--output", output)
    )  # fmt: skip
    other = json.loads(output.read_text())
    assert (other["counts"]["seen"], other["counts"]["cold"]) == (0, 0)
    assert "recall@20" in other["figures"]["exact"]


def test_retrieve_equals_a_ranking_of_everything(rows, export_dir, tmp_path, capsys):
    output = tmp_path / "top.parquet"
    arguments = flag_list(
        export_dir, "--input", f"{rows}/test/*.parquet", "--output", output, "--k", 7,
        "--exclude_seen", "--exclude_cold", "--reserved_columns", "user_id",
    )  # fmt: skip
    retrieve.main(arguments)
    opened = artifact.load(export_dir)
    table = pq.read_table(f"{rows}/test")
    users = opened.embed_users(table).astype(np.float64)
    vectors = opened.item_vectors().astype(np.float64)
    found = pq.read_table(output)
    assert found.column_names == ["user_id", "item_ids", "scores"]
    assert found["user_id"].equals(table["user_id"])
    ids = opened.item_ids()
    histories = table[HISTORY].to_pylist()
    for user, history, items in zip(users, histories, found["item_ids"].to_pylist(), strict=True):
        scores = np.where(
            opened.item_is_cold() | np.isin(ids, history), -np.inf, (vectors @ user).astype("f4")
        )
        assert items == ids[np.lexsort((ids, -scores))[:7]].tolist()
    # The longest histories are longer than the model reads: all of them is left out.
    assert max(map(len, histories)) > opened.manifest.history.max_seq_len
    assert "truncated_histories" in capsys.readouterr().out
    retrieve.main(arguments)
    assert "complete already" in capsys.readouterr().out


def test_predict_writes_both_towers(rows, export_dir, tmp_path):
    opened = artifact.load(export_dir)
    for tower, path, vectors in (
        ("user", f"{rows}/test/part-00000.parquet", None),
        ("item", f"{rows}/items.parquet", opened.item_vectors()),
    ):
        output = tmp_path / f"{tower}.parquet"
        predict.main(flag_list(export_dir, "--input", path, "--output", output, "--tower", tower))
        if vectors is None:
            vectors = opened.embed_users(pq.read_table(path))
        found = np.array(pq.read_table(output)[f"{tower}_tower_emb"].to_pylist(), np.float32)
        np.testing.assert_allclose(found, vectors, atol=1e-6, rtol=0)


@pytest.fixture
def changed(rows, export_dir, tmp_path):
    """A copy of the export with other items: 950 of the old ones, and 3 that are new."""
    folder = tmp_path / "copy"
    shutil.copytree(export_dir, folder)
    items = pq.read_table(f"{rows}/items.parquet").select(["video_id"]).slice(50)
    new = pa.table({"video_id": pa.array([1_010, 1_015, 1_020], pa.int64())})
    pq.write_table(pa.concat_tables([items, new]), tmp_path / "new.parquet")
    return folder, tmp_path / "new.parquet"


def test_refreshed_items_are_served_and_the_old_index_is_refused(rows, changed, monkeypatch):
    pytest.importorskip("faiss")
    folder, path = changed
    before = artifact.load(folder)
    item_index.build(before, options=item_index.IndexOptions(kind="flat"))
    result = item_refresh.refresh_items(before, item_input_path=str(path))
    after = artifact.load(folder)
    assert (result.num_added, result.num_removed, result.num_items) == (3, 50, 953)
    assert result.index == "flat" and "3 added, 50 removed; flat index rebuilt" in result.line()
    assert after.item_is_cold()[-3:].all() and result.num_cold == after.item_is_cold().sum()
    np.testing.assert_allclose(
        after.item_vectors()[:950], before.item_vectors()[50:], atol=1e-6, rtol=0
    )
    assert after.manifest.model_version == before.manifest.model_version
    item_index.AnnSearch(after)  # the new index is of the new items
    with pytest.raises(ValueError, match="the index is of other items"):
        item_index.AnnSearch(before)
    # Without a rebuilt one, nothing is served from the old index.
    monkeypatch.setattr(item_index, "build", lambda items, options: None)
    item_refresh.refresh_items(after, item_input_path=f"{rows}/items.parquet")
    with pytest.raises(ValueError, match=r"the index is of other items.*--build_index=hnsw"):
        item_index.AnnSearch(artifact.load(folder))


def test_export_refreshes_items_and_builds_an_index_by_flags(changed, capsys):
    pytest.importorskip("faiss")
    folder, path = changed
    flags.FLAGS.mark_as_parsed()
    given = {"export_dir": str(folder), "refresh_items": str(path), "build_index": "flat"}
    with flagsaver.as_parsed(**given):
        export.main()
    text = capsys.readouterr().out
    assert (
        "items     953, 165 of them cold; 3 added, 50 removed; no index" in text
        and "index.json" in text
    )
    assert item_index.AnnSearch(artifact.load(folder)).options.kind == "flat"
    for more, message in (
        ({"workdir": "runs/a"}, "--workdir=runs/a: makes a new export; leave it out to change the"),
        ({"batch_sizes": "1,8"}, "--batch_sizes="),
        ({"on_cold_items": "refuse"}, "new.parquet column video_id: item .* no training event"),
    ):
        with flagsaver.as_parsed(**given, **more), pytest.raises(ValueError, match=message):
            export.main()
    index_alone = {"export_dir": str(folder), "build_index": "flat", "on_cold_items": "refuse"}
    with (
        flagsaver.as_parsed(**index_alone),
        pytest.raises(ValueError, match="--on_cold_items=refuse: is read where items are written"),
    ):
        export.main()


def test_errors_end_a_command_as_messages(export_dir, tmp_path, capsys):
    output = str(tmp_path / "out.parquet")
    arguments = flag_list(export_dir, "--input", "no/where", "--output", output)
    with pytest.raises(SystemExit) as end:
        command_line.run(lambda: retrieve.main(arguments))
    assert end.value.code == 2
    assert "error: --input='no/where': no such file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--cutoffs=1,x: must be whole numbers"):
        hitrate.main(flag_list(export_dir, "--ground_truth", "x", "--cutoffs", "1,x"))


def test_a_failing_refresh_changes_nothing(changed, tmp_path):
    folder, path = changed
    pq.write_table(pa.table({"video_id": [1, 2, 1]}), tmp_path / "twice.parquet")
    opened = artifact.load(folder)
    with pytest.raises(ValueError, match="twice.parquet column video_id: id 1 is on two rows"):
        item_refresh.refresh_items(opened, item_input_path=str(tmp_path / "twice.parquet"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        item_refresh.refresh_items(opened, item_input_path="no/where.parquet")
    assert len(artifact.load(folder).item_ids()) == 1_000


@pytest.mark.parametrize("can_exchange", [True, False])
def test_there_are_items_at_every_moment_of_a_refresh(changed, monkeypatch, can_exchange):
    """A kill after the items' names changed finds the new ones; before, the old ones."""
    folder, path = changed
    opened, there = artifact.load(folder), []
    exchange = item_writer.exchange

    def watched(one, other):
        there.append(len(artifact.load(folder, verify=False).item_ids()))
        done = exchange(one, other) if can_exchange else False
        there.append(len(artifact.load(folder, verify=False).item_ids()))
        return done

    monkeypatch.setattr(item_writer, "exchange", watched)
    item_refresh.refresh_items(opened, item_input_path=str(path))
    is_linux = sys.platform == "linux" and can_exchange
    assert there == [1_000, 953 if is_linux else 1_000]
    assert len(artifact.load(folder).item_ids()) == 953
    assert not [name for name in folder.iterdir() if name.name.startswith(".")]


def test_the_http_endpoint_answers(rows, export_dir):
    opened = artifact.load(export_dir)
    server = http_endpoint.make_server(opened)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        with urllib.request.urlopen(url) as answer:
            described = json.load(answer)
        assert described["model_version"] == opened.manifest.model_version
        table = pq.read_table(f"{rows}/test").slice(0, 2).select(list(described["user_inputs"]))
        request = {"columns": table.to_pydict(), "k": 60, "exclude_seen": True}

        def post(content, path="/top_k"):
            body = json.dumps(content).encode()
            with urllib.request.urlopen(f"{url}{path}", body) as answer:
                return json.load(answer)

        found = post(request)
        assert [len(items) for items in found["item_ids"]] == [60, 60]
        assert not set(found["item_ids"][0]) & set(table[HISTORY][0].as_py())
        assert post({**request, "exclude_seen": False})["item_ids"] != found["item_ids"]
        for content, path, status in (
            ({**request, "k": 0}, "/top_k", 400),
            ({}, "/top_k", 400),
            (request, "/other", 404),
        ):
            with pytest.raises(urllib.error.HTTPError) as error:
                post(content, path)
            assert error.value.code == status
            error.value.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_benchmarks_say_what_they_measured(export_dir, tmp_path, capsys):
    pytest.importorskip("faiss")
    file = tmp_path / "figures.json"

    def measured(command, **flags):
        given = [f"--{name}={value}" for name, value in flags.items()]
        benchmark.main([command, *given, f"--json={file}"])
        return json.loads(file.read_text()), capsys.readouterr().out

    latency, text = measured("latency", export_dir=export_dir, lengths="3,5000", repeats=2,
                             endpoint=http_endpoint.__file__)  # fmt: skip
    assert "history   5,000 events" in text and text.count("p99") == 6 and "MiB" in text
    read = [(own["events"], own["read"], own["vector"]["calls"]) for own in latency["lengths"]]
    assert read == [(3, 3, 2), (5_000, 42, 2)]
    search, text = measured("search", users=20, items=500, dim=8, k=10)
    assert "exact     top 10 of 500 items of width 8 for 20 users" in text
    index, text = measured("index", items=500, dim=8, users=5, k=5, kinds="flat")
    assert "flat      recall@5 1.0000" in text
    lines = benchmark_report.report({"sample": latency}, search, [index])
    assert [line.count("|") for line in lines if line.startswith("| sample | 5,000 (42)")] == [12]
    assert any(line.startswith("| `flat` | 500 | 1.0000 @5") for line in lines)


def test_a_short_time_ends_the_repeats_of_a_slow_call(export_dir, tmp_path, capsys):
    flags = ["--lengths", "3", "--seconds", "0", "--json", str(tmp_path / "figures.json")]
    benchmark.main(["latency", "--export_dir", str(export_dir), *flags])
    (own,) = json.loads((tmp_path / "figures.json").read_text())["lengths"]
    assert own["vector"]["calls"] == 20


@pytest.mark.long
def test_the_whole_report_of_small_sizes(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    benchmark_report.main(
        ["--lengths", "8,128", "--repeats", "2", "--users", "20", "--items", "2000",
         "--ivf_items", "2000", "--hnsw_items", "2000", "--wide_length", "128",
         "--wide_layers", "1"]
    )  # fmt: skip
    text = capsys.readouterr().out
    for start in ("| sample | 8 (8)", "| sample | 128 (26)", "| wide | 128 (128)", "| `ivf` |"):
        assert f"\n{start}" in text


@pytest.mark.long
def test_recall_of_the_indexes_at_the_defaults_on_many_items(capsys):
    """The size that runs in minutes on two cores; `benchmark index` takes a million."""
    pytest.importorskip("faiss")
    benchmark.main(["index", "--items", "200000", "--kinds", "ivf,hnsw"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "recall@100" in line]
    recalls = [float(line.split()[2].rstrip(",")) for line in lines]
    assert len(recalls) == 2 and min(recalls) >= 0.95
