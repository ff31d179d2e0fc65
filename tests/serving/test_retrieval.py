"""Users in files -> lists of items and vectors: options, order of rows, and what is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_jax.serving import item_index, parquet_parts, prediction, retrieval
from hstu_jax.serving.prediction import PredictOptions
from hstu_jax.serving.retrieval import RetrieveOptions
from tests.serving.stand_in import HISTORY, StandIn, write_users


@pytest.fixture
def export(tmp_path):
    return StandIn(tmp_path, num_items=60)


@pytest.fixture
def histories(export):
    """Ten users: none of history, an item that is not exported, and everything among them."""
    rng = np.random.default_rng(2)
    ids = export.item_ids()
    lists = [rng.choice(ids, size).tolist() for size in (3, 1, 0, 12, 40, 7, 2, 5, 4, 9)]
    lists[6] = ids.tolist()
    lists[8] = [*lists[8], 999_999]
    return lists


def run(export, path, output, **options):
    summary = retrieval.retrieve(
        export,
        input_path=path,
        output_path=str(output),
        options=RetrieveOptions(**{"k": 8, "batch_rows": 3, "part_rows": 4, **options}),
        echo=print,
    )
    return pq.read_table(output).to_pydict(), summary


def expected(export, histories, *, seen=False, cold=False, k=8):
    """A loop over users in float64."""
    users = export.embed_users({HISTORY: pa.array(histories, pa.list_(pa.int64()))})
    ids, vectors = export.item_ids(), export.item_vectors()
    lists = []
    for user, history in zip(users, histories, strict=True):
        hidden = np.isin(ids, history) if seen else np.zeros(len(ids), bool)
        if cold:
            hidden |= export.item_is_cold()
        scores = (vectors.astype(np.float64) @ user.astype(np.float64)).astype(np.float32)
        place = np.lexsort((ids, -scores))
        lists.append(ids[[row for row in place if not hidden[row]][:k]].tolist())
    return lists


def test_lists_equal_a_loop_and_every_flag_changes_them(export, histories, tmp_path):
    path = write_users(tmp_path / "users.parquet", histories)
    results = []
    for number, (seen, cold) in enumerate([(False, False), (True, False), (False, True)]):
        found, summary = run(
            export, path, tmp_path / f"{number}", exclude_seen=seen, exclude_cold=cold
        )
        assert list(found) == ["item_ids", "scores"]
        assert found["item_ids"] == expected(export, histories, seen=seen, cold=cold)
        assert all(scores == sorted(scores, reverse=True) for scores in found["scores"])
        assert (summary.empty, summary.short) == ((1, 1) if seen else (0, 0))
        results.append(found["item_ids"])
    assert results[1][6] == []  # who has seen everything
    assert results[0] != results[1] != results[2] != results[0]
    fewer, _ = run(export, path, tmp_path / "k", k=3)
    assert fewer["item_ids"] == [own[:3] for own in results[0]]


def test_several_files_delimited_histories_and_reserved_columns(export, histories, tmp_path):
    plain = write_users(tmp_path / "plain.parquet", histories)
    found, _ = run(export, plain, tmp_path / "out", exclude_seen=True,
                   reserved_columns=("user_id", HISTORY))  # fmt: skip
    assert list(found) == ["user_id", HISTORY, "item_ids", "scores"]
    assert found["user_id"] == list(range(10)) and found[HISTORY] == histories
    folder = tmp_path / "two"
    folder.mkdir()
    write_users(folder / "a.parquet", histories[:7], delimiter="|")
    write_users(folder / "b.parquet", histories[7:], delimiter="|")
    other = StandIn(tmp_path, num_items=60, delimiter="|")
    again, _ = run(other, f"{folder}/*.parquet", tmp_path / "again", exclude_seen=True)
    assert again["item_ids"] == found["item_ids"] and again["scores"] == found["scores"]
    with pytest.raises(TypeError, match=f"column {HISTORY}: type string: must be lists"):
        retrieval.seen_items(export, pq.read_table(folder / "a.parquet"))


def test_a_faiss_index_gives_the_same_and_its_rebuilding_is_another_run(
    export, histories, tmp_path
):
    pytest.importorskip("faiss")
    item_index.build(export, options=item_index.IndexOptions(kind="flat"))
    path = write_users(tmp_path / "users.parquet", histories)
    exact, _ = run(export, path, tmp_path / "exact", exclude_seen=True)
    found, summary = run(export, path, tmp_path / "ann", exclude_seen=True, index="faiss")
    assert found == exact and summary.empty == 1
    item_index.build(export, options=item_index.IndexOptions(kind="hnsw"))
    with pytest.raises(FileExistsError, match="not made by this call"):
        run(export, path, tmp_path / "ann", exclude_seen=True, index="faiss")


def test_short_lists_are_explained_by_what_was_searched():
    parts = parquet_parts.Summary(rows=9, made=1, skipped=0)
    summary = retrieval.RetrieveSummary(parts=parts, short=3, empty=1)
    exact = summary.short_line(RetrieveOptions(k=8))
    assert exact.endswith("3 users have fewer than 8 items, 1 of them none: they may be shown no m"
                          "ore")  # fmt: skip
    assert "or the index found no more" in summary.short_line(RetrieveOptions(k=8, index="faiss"))
    full = retrieval.RetrieveSummary(parts=parts, short=0, empty=0)
    assert full.short_line(RetrieveOptions(k=8)) == ""


def test_wrong_calls_are_refused(export, histories, tmp_path):
    path = write_users(tmp_path / "users.parquet", histories)

    def refused(kind, message, at=export, input_path=path, **options):
        with pytest.raises(kind, match=message):
            run(at, input_path, tmp_path / "out.parquet", **options)

    refused(ValueError, "--k=0: must be 1 or more", k=0)
    refused(ValueError, "k=61: the catalogue has 60 items to show; give a k of 60", k=61)
    refused(ValueError, "k=50: the catalogue has 4[89] items", k=50, exclude_cold=True)
    refused(ValueError, "--index='ivf': unknown; available: exact, faiss", index="ivf")
    refused(FileNotFoundError, "the export has no index", index="faiss")
    refused(ValueError, "users.parquet column nme: missing", reserved_columns=("nme",))
    pq.write_table(pa.table({"user_id": [1]}), tmp_path / "short.parquet")
    refused(ValueError, f"short.parquet column {HISTORY}: missing; the file has",
            input_path=str(tmp_path / "short.parquet"))  # fmt: skip
    run(export, path, tmp_path / "out.parquet")
    refused(FileExistsError, "not made by this call", k=5)
    refused(FileExistsError, "not made by this call", exclude_seen=True)
    refused(FileExistsError, "not made by this call", exclude_cold=True)
    other = StandIn(tmp_path, num_items=60, version="model-b")
    refused(FileExistsError, "other model, flags or input", at=other)


@pytest.mark.parametrize("tower", prediction.TOWERS)
def test_vectors_of_both_towers(export, histories, tmp_path, tower):
    path = write_users(
        tmp_path / "rows.parquet", histories, video_id=export.item_ids()[:10].tolist()
    )
    options = PredictOptions(tower=tower, reserved_columns=("user_id",), batch_rows=3, part_rows=4)
    output = tmp_path / "vectors.parquet"
    summary = prediction.predict(
        export, input_path=path, output_path=str(output), options=options, echo=print
    )
    table = pq.read_table(output)
    assert summary.rows == 10 and table.column_names == ["user_id", f"{tower}_tower_emb"]
    assert table.schema.field(1).type == pa.list_(pa.float32())
    embed = export.embed_users if tower == "user" else export.embed_items
    found = np.array(table[f"{tower}_tower_emb"].to_pylist(), np.float32)
    np.testing.assert_array_equal(found, embed(pq.read_table(path)))
    assert table["user_id"].to_pylist() == list(range(10))


def test_an_unknown_tower_is_refused():
    with pytest.raises(ValueError, match="--tower='both': unknown; available: user, item"):
        PredictOptions(tower="both")
