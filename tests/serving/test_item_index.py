"""The faiss index against exact search, and what binds it to an export."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from hstu_jax.serving import index_folder, item_index, top_k
from hstu_jax.serving.item_index import AnnSearch, IndexOptions
from tests.serving.stand_in import StandIn
from tests.serving.test_top_k import exclusions, rows


@pytest.fixture
def faiss():
    module = pytest.importorskip("faiss", reason="faiss-cpu (extra `ann`) is not installed")
    module.omp_set_num_threads(1)  # waiting threads of several test workers slow each other down
    return module


def users_of(items, num_users, *, seed=1):
    rng = np.random.default_rng(seed)
    vectors = items.item_vectors()[rng.integers(0, len(items.item_ids()), num_users)]
    return (vectors + 0.1 * rng.normal(size=vectors.shape)).astype(np.float32)


def recall(found, exact):
    shared = [np.intersect1d(a, b).size for a, b in zip(found.ids, exact.ids, strict=True)]
    return np.mean(shared) / exact.ids.shape[1]


@pytest.mark.parametrize("spread", [0.0, 0.4], ids=["one length", "lengths differ"])
@pytest.mark.parametrize("kind", item_index.KINDS)
def test_recall_at_the_defaults(faiss, tmp_path, kind, spread):
    items = StandIn(tmp_path, num_items=6_000, dim=16, spread=spread)
    # Half of the usual width: at this size no more is needed, and linking takes the time.
    item_index.build(items, options=IndexOptions(kind=kind, ef_construction=100))
    users = users_of(items, 50)
    exact = top_k.ExactSearch(items.item_ids(), items.item_vectors()).search(users, k=100)
    found = AnnSearch(items).search(users, k=100)
    if kind == "flat":
        assert rows(found) == rows(exact)
    assert recall(found, exact) >= 0.95
    # Scores are those of exact search, in its order.
    place = {int(item): score for item, score in zip(exact.ids[0], exact.scores[0], strict=True)}
    shared = [(item, score) for item, score in zip(*rows(found)[0], strict=True) if item in place]
    assert shared == [(item, score) for item, score in place.items() if item in dict(shared)]


@pytest.mark.parametrize("kind", item_index.KINDS)
def test_exclusions_and_mask_as_in_exact_search(faiss, tmp_path, kind):
    items = StandIn(tmp_path, num_items=400)
    item_index.build(items, options=IndexOptions(kind=kind))
    users, ids, mask = users_of(items, 4), items.item_ids(), ~items.item_is_cold()
    exact = top_k.ExactSearch(ids, items.item_vectors(), item_mask=mask)
    best = exact.search(users, k=30).ids
    hidden = exclusions([best[0], [], ids, [7, *best[3, :3]]])
    expected = exact.search(users, k=20, exclusions=hidden)
    found = AnnSearch(items, item_mask=mask).search(users, k=20, exclusions=hidden)
    assert rows(found) == rows(expected)  # so few items that every kind finds them all
    assert found.counts.tolist() == [20, 20, 0, 20]
    with pytest.raises(ValueError, match="k=321: the catalogue has 320 items to show"):
        AnnSearch(items, item_mask=mask).search(users, k=321)
    unmasked = AnnSearch(items).search(users, k=20, exclusions=hidden)
    assert rows(unmasked) != rows(expected)


def test_search_options_are_used(faiss, tmp_path):
    items = StandIn(tmp_path, num_items=3_000)
    users = users_of(items, 40)
    exact = top_k.ExactSearch(items.item_ids(), items.item_vectors()).search(users, k=50)

    def found_with(**options):
        item_index.build(items, options=IndexOptions(**options))
        return recall(AnnSearch(items).search(users, k=50), exact)

    ivf = {"kind": "ivf", "nlist": 60}
    assert found_with(**ivf, nprobe=1) < 0.9 < found_with(**ivf, nprobe=60)
    assert found_with(kind="ivf", nlist=1, nprobe=1) == 1
    hnsw = {"kind": "hnsw", "hnsw_m": 2, "ef_construction": 2}
    narrow = found_with(**hnsw, ef_search=1)
    assert narrow < found_with(**hnsw, ef_search=400)
    assert narrow < found_with(**{**hnsw, "hnsw_m": 16}, ef_search=1)
    assert narrow < found_with(**{**hnsw, "ef_construction": 100}, ef_search=1)


def test_the_index_is_of_one_model_and_one_set_of_items(faiss, tmp_path):
    items = StandIn(tmp_path)
    with pytest.raises(FileNotFoundError, match="the export has no index; build it with `python"):
        AnnSearch(items)
    described = item_index.build(items, options=IndexOptions(kind="flat"))
    item_index.build(items, options=IndexOptions(kind="flat"))
    assert len(list(described.parent.iterdir())) == 2  # one index, nothing left behind
    with pytest.raises(ValueError, match="model_version=model-a: the index is of another model"):
        AnnSearch(StandIn(tmp_path, version="model-b"))
    with pytest.raises(ValueError, match=r"items_sha256=\w+: the index is of other items"):
        AnnSearch(StandIn(tmp_path, seed=5))
    content = json.loads(described.read_text())
    file = described.parent / content["file"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"flat-\w+.faiss: missing, truncated or changed since"):
        AnnSearch(items)
    described.write_text(json.dumps({**content, "format_version": 9}))
    with pytest.raises(ValueError, match="format_version=9: this version reads 1"):
        AnnSearch(items)


def test_flat_equals_exact_search_where_rounding_decides(faiss, tmp_path):
    items = StandIn(tmp_path, num_items=3_000)
    rng = np.random.default_rng(4)
    items._vectors = (1 + 1e-7 * rng.normal(size=(3_000, 8))).astype(np.float32)
    item_index.build(items, options=IndexOptions(kind="flat"))
    users, ids, mask = np.ones((3, 8), np.float32) / 3, items.item_ids(), ~items.item_is_cold()
    for item_mask in (None, mask):
        exact = top_k.ExactSearch(ids, items.item_vectors(), item_mask=item_mask)
        hidden = exclusions([exact.search(users, k=3).ids[0], [], ids])
        expected = exact.search(users, k=5, exclusions=hidden)
        found = AnnSearch(items, item_mask=item_mask).search(users, k=5, exclusions=hidden)
        assert rows(found) == rows(expected)
        assert found.num_exhaustive == 2  # who has seen everything needs no proof


def test_lists_are_filled_by_searching_wider(faiss, tmp_path):
    items = StandIn(tmp_path, num_items=3_000)
    users, ids = users_of(items, 3), items.item_ids()
    hidden = exclusions([[], ids[:2_000], ids[:-7]])
    for options in (
        IndexOptions(kind="ivf", nlist=60, nprobe=1),  # a list holds 50
        IndexOptions(kind="hnsw", ef_search=1, ef_construction=40),
    ):
        item_index.build(items, options=options)
        found = AnnSearch(items).search(users, k=500, exclusions=hidden)
        assert found.counts.tolist() == [500, 500, 7]
        assert not np.isin(found.ids[1], ids[:2_000]).any()
        assert sorted(found.ids[2, :7]) == sorted(ids[-7:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "not whole JSON, truncated or changed"),
        (lambda text: text.replace('"items_sha256"', '"items"'), "items_sha256=None: damaged"),
        (lambda text: text.replace('"asked"', '"ask"'), "asked=None: damaged"),
        (lambda text: text.replace('"nlist"', '"lists"'), "asked: damaged .*'lists'"),
        (lambda text: "[]", "format_version=None: this version reads 1"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, damage, message):
    items = StandIn(tmp_path)
    options = IndexOptions(kind="flat")
    given = {"is_augmented": False, "asked": options, "options": options, "faiss_version": "1"}
    described = index_folder.write(items, lambda file: file.write_text("faiss"), **given)
    assert index_folder.built_options(items) == index_folder.read(items).options == options
    described.write_text(damage(described.read_text()))
    for read in (index_folder.read, index_folder.built_options):
        with pytest.raises(ValueError, match=f"index.json: {message}.*; build it with"):
            read(items)


def test_what_a_killed_build_left_is_removed(tmp_path):
    items, options = StandIn(tmp_path), IndexOptions(kind="flat")
    given = {"is_augmented": False, "asked": options, "options": options, "faiss_version": "1"}
    (tmp_path / "index").mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, alive = (tmp_path / f"index/.building-{pid}" for pid in (ended.pid, os.getppid()))
    dead.touch()
    alive.touch()
    described = index_folder.write(items, lambda file: file.write_text("faiss"), **given)
    assert not dead.exists() and alive.exists()
    before = sorted(described.parent.iterdir())

    def fails(file):
        file.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        index_folder.write(items, fails, **given)
    assert sorted(described.parent.iterdir()) == before


def test_an_absent_or_broken_faiss_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"faiss: not installed; `pip install 'hstu_jax\[ann\]'`"):
        item_index.build(StandIn(tmp_path), options=IndexOptions(kind="flat"))

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "faiss":
                raise OSError("libgomp.so.1: cannot open shared object file")
            return None

    monkeypatch.delitem(sys.modules, "faiss")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"does not load \(libgomp.so.1.*--index=exact"):
        item_index.import_faiss()
    assert isinstance(item_index, types.ModuleType)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lsh"}, "index kind='lsh': unknown; available: flat, ivf, hnsw"),
        ({"nprobe": -1}, "nprobe=-1: must be 0"),
        ({"hnsw_m": 1}, "hnsw_m=1: must be 2 or more"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IndexOptions(**options)
