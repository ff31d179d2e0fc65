"""Figures of an export's search against loops over rows."""

import json
import xml.etree.ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_jax.serving import bar_chart, hitrate, item_index
from hstu_jax.serving.hitrate import HitrateOptions
from tests.serving.stand_in import HISTORY, POSITIVES, StandIn, write_users


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return StandIn(tmp_path_factory.mktemp("export"), num_items=200)


@pytest.fixture(scope="module")
def rows(export, tmp_path_factory):
    """Rows whose positives are sometimes seen, cold, unknown or none."""
    rng = np.random.default_rng(5)
    ids = export.item_ids()
    histories = [rng.choice(ids, size).tolist() for size in rng.integers(0, 60, 40)]
    positives = [rng.choice(ids, size, replace=False).tolist() for size in rng.integers(0, 6, 40)]
    histories[0] = []
    positives[1] = [*histories[1][:1], *positives[1]]
    positives[2] = [777_777, *positives[2]]
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    lists = {POSITIVES: pa.array(positives, pa.list_(pa.int64()))}
    return write_users(path, histories, **lists), histories, positives


def measured(export, path, **options):
    options = HitrateOptions(**{"cutoffs": (1, 10, 50), "batch_rows": 7, **options})
    return hitrate.hitrate(export, ground_truth=path, options=options, echo=lambda line: None)


def loop(export, histories, positives, *, seen=True, cold=True):
    """(ranks of every row's positives that count, length of its history, their ids)."""
    users = export.embed_users({HISTORY: pa.array(histories, pa.list_(pa.int64()))})
    ids, vectors, is_cold = export.item_ids(), export.item_vectors(), export.item_is_cold()
    result = []
    for user, history, wanted in zip(users, histories, positives, strict=True):
        hidden = set(history if seen else []) | set(ids[is_cold].tolist() if cold else [])
        shown = np.array([item not in hidden for item in ids])
        scores = vectors @ user
        own = [item for item in wanted if item in ids and item not in hidden]
        ranks = [int(np.sum(scores[shown] >= scores[ids == item][0])) for item in own]
        if ranks:
            result.append((ranks, len(history), own))
    return result


@pytest.mark.parametrize(("seen", "cold"), [(True, True), (False, True), (True, False)])
def test_figures_equal_a_loop_and_the_rules_change_them(export, rows, seen, cold):
    path, histories, positives = rows
    found = measured(export, path, exclude_seen=seen, exclude_cold=cold)
    truth = loop(export, histories, positives, seen=seen, cold=cold)
    for k in (1, 10, 50):
        recall = [np.mean([rank <= k for rank in ranks]) for ranks, _, _ in truth]
        hit = [any(rank <= k for rank in ranks) for ranks, _, _ in truth]
        assert found.figures["exact"][f"recall@{k}"] == pytest.approx(np.mean(recall))
        assert found.figures["exact"][f"hit_rate@{k}"] == pytest.approx(np.mean(hit))
    assert found.counts["rows"] == 40
    assert found.counts["rows_with_something_to_find"] == len(truth)
    assert found.counts["positives"] == sum(map(len, positives))
    assert found.counts["not_in_catalogue"] == 1
    assert (found.counts["seen"] > 0, found.counts["cold"] > 0) == (seen, cold)
    left_out = sum(found.counts[name] for name in ("seen", "cold", "not_in_catalogue"))
    assert found.counts["ranked"] + left_out == found.counts["positives"]


def test_groups_by_history_and_popularity(export, rows):
    path, histories, positives = rows
    found = measured(export, path)
    truth = loop(export, histories, positives)
    by_length = found.by_length["exact"]
    assert list(by_length) == ["0", "1-9", "10-49", "50-199"]
    some = [ranks for ranks, length, _ in truth if 10 <= length < 50]
    recall = np.mean([np.mean([rank <= 50 for rank in ranks]) for ranks in some])
    assert by_length["10-49"]["rows"] == len(some)
    assert by_length["10-49"]["recall@50"] == pytest.approx(recall)
    groups = found.by_popularity["exact"]
    assert sum(group["positives"] for group in groups.values()) == found.counts["ranked"]
    label = list(groups)[-1]
    low = int(label.rstrip("+").split("-")[0])
    own = [
        rank <= 50
        for ranks, _, items in truth
        for rank, item in zip(ranks, items, strict=True)
        if 1 + (item % 7) ** 2 >= low
    ]
    assert groups[label]["positives"] == len(own)
    assert groups[label]["recall@50"] == pytest.approx(np.mean(own))
    cold = measured(export, path, exclude_cold=False).by_popularity["exact"]
    assert next(iter(cold)) == "0"  # items that training has not seen are a group of their own


def test_an_index_stands_beside(export, rows):
    pytest.importorskip("faiss")
    path, _, _ = rows
    item_index.build(export, options=item_index.IndexOptions(kind="flat"))
    found = measured(export, path, index="faiss")
    exact, flat = found.figures["exact"], found.figures["faiss flat"]
    assert found.overlap == 1.0 and "mrr" not in flat
    assert flat == {name: pytest.approx(value) for name, value in exact.items() if name != "mrr"}
    assert found.by_length["faiss flat"]["1-9"]["recall@50"] == pytest.approx(
        found.by_length["exact"]["1-9"]["recall@50"]
    )
    options = item_index.IndexOptions(kind="ivf", nlist=20, nprobe=1)
    item_index.build(export, options=options)
    worse = measured(export, path, index="faiss")
    assert worse.overlap < 1 and worse.figures["exact"] == exact
    ivf = worse.figures["faiss ivf"]  # of full lists, so that a few figures may be the same
    assert ivf != {name: pytest.approx(exact[name]) for name in ivf}
    assert "faiss ivf finds" in worse.text()


def test_table_json_and_picture(export, rows):
    path, _, _ = rows
    found = measured(export, path)
    text = found.text()
    assert "recall@50 by history length" in text and "recall@50 by training events" in text
    (line,) = [line for line in text.splitlines() if line.startswith("recall@10 ")]
    assert float(line.split()[1]) == pytest.approx(found.figures["exact"]["recall@10"], abs=1e-4)
    content = json.loads(found.to_json())
    assert content["figures"]["exact"] == dict(found.figures["exact"])
    root = xml.etree.ElementTree.fromstring(found.picture())
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "recall by k" in words and "@50" in words
    value = found.figures["exact"]["recall@50"]
    assert f"{value:.3f}".removeprefix("0") in words


def test_bars_are_as_high_as_their_values():
    panel = bar_chart.Panel("a < b", ["x", "y\n3 rows"], {"one": [0.4, float("nan")]})
    root = xml.etree.ElementTree.fromstring(bar_chart.svg("title", [panel]))
    heights = [
        float(element.get("height")) for element in root.iter() if element.get("width") == "150.4"
    ]
    assert heights == [0.4 / 0.5 * 180, 0.0]


def test_wrong_calls_are_refused(export, rows, tmp_path):
    path, histories, _ = rows
    with pytest.raises(ValueError, match=r"--cutoffs=\[0\]: must be different numbers of 1 or"):
        HitrateOptions(cutoffs=(0,))
    with pytest.raises(ValueError, match="--index='scann': unknown"):
        HitrateOptions(index="scann")
    with pytest.raises(ValueError, match="rows.parquet column positives: missing; the file has"):
        measured(export, path, positives_column="positives")
    with pytest.raises(FileNotFoundError, match="the export has no index"):
        measured(StandIn(tmp_path), path, index="faiss")
    seen = {POSITIVES: pa.array([history[:1] for history in histories], pa.list_(pa.int64()))}
    seen_path = write_users(tmp_path / "seen.parquet", histories, **seen)
    with pytest.raises(ValueError, match="40 rows have nothing to find: {'ranked': 0, 'seen'"):
        measured(export, seen_path)
    pq.write_table(pa.table({HISTORY: [[10]], POSITIVES: [[None]]}), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match=f"null.parquet, rows counted from 0: column {POSITIVES}"):
        measured(export, str(tmp_path / "null.parquet"))
