"""What is to be found and what is left out, event by event; the text of the table."""

import json

import numpy as np
import pytest

from hstu_jax.config import schema
from hstu_jax.data import interactions
from hstu_jax.metrics import baselines
from hstu_jax.training import closing, counting, evaluation


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_eval_set_equals_a_loop_over_windows(small_store, exclude_seen):
    found = evaluation.make_eval_set(small_store, split="test", exclude_seen=exclude_seen)
    events, table = small_store.events, small_store.windows
    assert found.windows.tolist() == np.flatnonzero(table.split == 2).tolist()
    for number, window in enumerate(found.windows):
        own = slice(*found.positive_offsets[number : number + 2])
        expected = [int(events.item_index[event]) for event in table.positives(window)]
        assert found.positive_items[own].tolist() == expected
        seen = found.seen_items[slice(*found.seen_offsets[number : number + 2])]
        history = slice(table.history_start[window], table.history_end[window])
        assert seen.tolist() == (events.item_index[history].tolist() if exclude_seen else [])
        assert (events.timestamp_s[history] < table.request_time_s[window]).all()


def test_ragged_positions():
    positions = evaluation.ragged_positions(np.array([5, 0, 9]), np.array([2, 0, 3]))
    assert positions.tolist() == [5, 6, 9, 10, 11]


def test_a_perfect_ranking_finds_everything(small_store):
    config = schema.EvalConfig(num_bootstrap=10)
    found = evaluation.make_eval_set(small_store, split="test", exclude_seen=True)

    def truth(start, stop):
        scores = np.zeros((stop - start, small_store.num_items))
        for row in range(start, stop):
            own = slice(*found.positive_offsets[row : row + 2])
            scores[row - start, found.positive_items[own]] = 1 + np.arange(own.stop - own.start)
        return scores

    result = evaluation.rank(found, truth, config)
    means = result.metrics.means()
    assert means["recall@100"] == means["ndcg@5"] == means["mrr"] == 1.0
    ranks = result.ranks
    assert ranks.num_ranked + ranks.num_seen + ranks.num_cold == len(found.positive_items)
    table = closing.ClosingTable(
        split="test", step=3, rows={"truth": result}, notes=("a note",), num_bootstrap=10
    )
    assert "test split, whole catalogue, step 3" in table.text()
    assert "seen items in the ranking" not in table.text()
    assert "truth recall@5: 95 % bootstrap interval" in table.text()
    assert table.text().endswith("a note")
    assert table.figures()["truth"]["mrr"] == 1.0


def test_counting_baselines_use_training_data_only(small_store):
    config = schema.EvalConfig()
    found = evaluation.make_eval_set(small_store, split="test", exclude_seen=True)
    rows, note = counting.counting_baselines(small_store, found, config)
    assert list(rows) == ["co-occurrence", "item-knn", "last-day", "popularity"]
    lines = note.splitlines()
    num = int(np.count_nonzero(small_store.windows.split == 1))
    assert 0 < num <= 1000
    assert lines[0].startswith(f"co-occurrence: best of 48 variants on {num} validation")
    assert lines[1].startswith(f"item-knn: best of 45 variants on {num} validation")
    # By hand: the most popular item of the training positives is ranked first for everybody.
    table = small_store.windows
    is_train = np.repeat(table.split == 0, np.diff(table.positive_offsets))
    items = small_store.events.item_index[table.positive_events[is_train]]
    best = int(np.argmax(np.bincount(items, minlength=small_store.num_items)))
    is_best = found.positive_items == best
    ranks = rows["popularity"].ranks.ranks[is_best]
    assert set(ranks.tolist()) <= {0, 1}


def test_the_catalogue_may_hold_items_that_nobody_had_in_training(small_store):
    arguments = dict(split="test", exclude_seen=True)
    trained = evaluation.make_eval_set(small_store, **arguments)
    every = evaluation.make_eval_set(small_store, catalogue="all", **arguments)
    assert 0 < np.count_nonzero(~trained.catalogue_mask) and every.catalogue_mask.all()
    flat = baselines.same_for_all(np.zeros(small_store.num_items))
    cold = evaluation.rank(trained, flat, schema.EvalConfig()).ranks
    ranked = evaluation.rank(every, flat, schema.EvalConfig()).ranks
    assert cold.num_cold > 0 == ranked.num_cold
    assert ranked.num_ranked == cold.num_ranked + cold.num_cold


@pytest.mark.parametrize("which", ["trained", "all"])
def test_the_share_without_a_training_event_is_that_of_the_data(small_store, which):
    found = evaluation.make_eval_set(small_store, split="test", exclude_seen=True, catalogue=which)
    flat = baselines.same_for_all(np.zeros(small_store.num_items))
    row = evaluation.rank(found, flat, schema.EvalConfig())
    _, line, _ = closing.eval_notes(found, {"hstu": row})
    share = np.mean(small_store.items.train_count[found.positive_items] == 0)
    assert 0 < share < 1 and f"({share:.1%} of all positives have no training event)" in line
    assert f"{row.ranks.num_cold:,} others outside of these (" in line


def test_both_rules_of_seen_items_in_one_evaluation(small_store):
    scores = np.random.default_rng(0).random((1, small_store.num_items))
    block = baselines.same_for_all(scores[0])
    config = schema.EvalConfig(also_with_seen=True, top_k=(1, 5, 200), num_bootstrap=2)
    without, plain = (
        evaluation.make_eval_set(small_store, split="test", exclude_seen=flag)
        for flag in (True, False)
    )
    both = evaluation.rank(without, block, config)
    alone = evaluation.rank(plain, block, schema.EvalConfig(exclude_seen=False, top_k=(1, 5, 200)))
    assert both.with_seen.means() == alone.metrics.means() != both.metrics.means()
    assert alone.with_seen is None
    assert set(both.metrics.means()) == {
        "mrr",
        *(f"{kind}@{k}" for kind in ("hit_rate", "recall", "ndcg") for k in (1, 5, 200)),
    }
    table = closing.ClosingTable(
        split="test", step=3, rows={"any": both}, notes=(), num_bootstrap=2
    )
    _, rest = table.text().split("the same with seen items in the ranking")
    shown = f"{both.with_seen.means()['recall@200']:.4f}"
    assert next(line for line in rest.splitlines() if line.startswith("recall@200"))[-6:] == shown


def test_groups_are_written_and_add_up(small_store, tmp_path):
    found = evaluation.make_eval_set(small_store, split="test", exclude_seen=True)
    table_of = small_store.windows
    lengths = (table_of.history_end - table_of.history_start)[found.windows]
    assert found.history_len.tolist() == lengths.tolist()
    assert (found.popularity == small_store.items.train_count[found.positive_items]).all()
    popular = baselines.same_for_all(small_store.items.train_count.astype(np.float64))
    result = evaluation.rank(found, popular, schema.EvalConfig())
    table = closing.ClosingTable(
        split="test", step=3, rows={"popularity": result}, notes=(), num_bootstrap=2
    )
    table.write(tmp_path / "closing.json")
    written = json.loads((tmp_path / "closing.json").read_text())["groups"]["popularity"]
    for kind, total in (("history", result.metrics.num_users), ("popularity", 0)):
        rows = [row for row in written if row["kind"] == kind]
        assert sum(row["count"] for row in rows) == (total or result.ranks.num_ranked)
    weighted = sum(r["count"] * r["means"]["mrr"] for r in written if r["kind"] == "history")
    assert weighted / result.metrics.num_users == pytest.approx(result.metrics.means()["mrr"])
    text = table.groups_text()
    assert "recall@10 by events of history" in text and "by training events of the item" in text
    # Popular items are what popularity finds.
    found_rate = [r["means"]["hit_rate@100"] for r in written if r["kind"] == "popularity"]
    assert found_rate[-1] > found_rate[0]


def test_leave_one_out_data_has_its_own_baselines(tmp_path):
    path = tmp_path / "raw.txt"
    # Item i + 1 follows item i, so what co-occurs next is always right.
    rows = [(user, (user + step) % 40) for user in range(60) for step in range(12)]
    path.write_text("".join(f"{user} {item}\n" for user, item in rows))
    options = interactions.InteractionOptions(raw_format="sequences")
    store = interactions.prepare(path, tmp_path / "store", options=options)
    found = evaluation.make_eval_set(store, split="test", exclude_seen=True)
    rows, note = counting.counting_baselines(store, found, schema.EvalConfig())
    assert list(rows) == ["co-occurrence", "item-knn", "popularity"]
    assert "pairs of runs of 1 events" in note
    assert rows["co-occurrence"].metrics.means()["hit_rate@1"] == 1.0
    assert rows["popularity"].metrics.means()["hit_rate@1"] < 0.5
