"""What is to be found and what is left out, event by event; the text of the table."""

import numpy as np
import pytest

from hstu_jax.config import schema
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
    assert "truth recall@5: 95 % bootstrap interval" in table.text()
    assert table.text().endswith("a note")
    assert table.figures()["truth"]["mrr"] == 1.0


def test_counting_baselines_use_training_data_only(small_store):
    config = schema.EvalConfig()
    found = evaluation.make_eval_set(small_store, split="test", exclude_seen=True)
    rows, note = counting.counting_baselines(small_store, found, config)
    assert list(rows) == ["co-occurrence", "last-day", "popularity"]
    assert "best of 48 variants on validation" in note
    # By hand: the most popular item of the training positives is ranked first for everybody.
    table = small_store.windows
    is_train = np.repeat(table.split == 0, np.diff(table.positive_offsets))
    items = small_store.events.item_index[table.positive_events[is_train]]
    best = int(np.argmax(np.bincount(items, minlength=small_store.num_items)))
    is_best = found.positive_items == best
    ranks = rows["popularity"].ranks.ranks[is_best]
    assert set(ranks.tolist()) <= {0, 1}
