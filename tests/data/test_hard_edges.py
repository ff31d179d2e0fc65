"""Hard-edge tables from an event store: which events, in which order, and nothing after training."""

import dataclasses

import numpy as np
import pytest

from hstu_jax import prepare
from hstu_jax.data import event_store, hard_edges, sampler_files, schema

CLICK, HATE, LONG_VIEW = (schema.ACTION_BITS[name] for name in ("click", "hate", "long_view"))
# (user, item, time, action); the validation day begins at 100.
EVENTS = [
    (0, 0, 10, HATE),
    (0, 1, 20, LONG_VIEW),
    (0, 2, 30, 0),
    (0, 0, 40, HATE),
    (0, 1, 100, CLICK),
    (0, 2, 101, HATE),
    (1, 2, 15, CLICK | HATE),
    (1, 0, 16, HATE),
    (1, 0, 17, CLICK),
    (1, 1, 18, 0),
]


@pytest.fixture
def make_store(tmp_path, store_parts):
    """Function: events -> an opened store of two users and three items."""

    def make(rows, name="store"):
        user, item, time, action = (np.array(column) for column in zip(*rows, strict=True))
        events = dataclasses.replace(
            store_parts["events"],
            user_index=user.astype(np.int32),
            item_index=item.astype(np.int32),
            timestamp_s=time.astype(np.int64),
            action=action.astype(np.int32),
            watch_time_s=np.zeros(len(rows), np.float32),
        )
        windows = dataclasses.replace(
            store_parts["windows"],
            user_index=np.zeros(1, np.int32),
            history_start=np.zeros(1, np.int64),
            history_end=np.zeros(1, np.int64),
            request_time_s=np.array([10]),
            split=np.zeros(1, np.int8),
            positive_offsets=np.array([0, 1]),
            positive_events=np.array([0]),
        )
        stats = {
            "source": "test",
            "days": {"validation_start_s": 100},
            "window_options": {"positive_actions": ["click", "like"]},
        }
        parts = store_parts | {"events": events, "windows": windows, "stats": stats}
        return event_store.write_store(tmp_path / name, **parts)

    return make


def _edges(files):
    table = sampler_files.read_columns(
        files.folder / hard_edges.EDGES_FILE, sampler_files.EDGE_COLUMNS
    )
    return list(zip(table["userid"].tolist(), table["itemid"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("options", "expected", "num_positive"),
    [
        # User 1 clicked item 0 in another event; its click on item 2 is hated, so not positive.
        ({"kind": "hated"}, [(7, 11), (9, 13)], 1),
        ({"kind": "not_clicked"}, [(7, 11), (7, 13), (7, 12), (9, 12)], 1),
        ({"kind": "not_clicked", "max_per_user": 2}, [(7, 11), (7, 13), (9, 12)], 1),
    ],
)
def test_edges_are_the_newest_unwanted_pairs(make_store, options, expected, num_positive):
    store = make_store(EVENTS)
    files = hard_edges.write_hard_edges(store, options=hard_edges.HardEdgeOptions(**options))
    assert _edges(files) == expected
    assert (files.num_edges, files.num_users, files.num_positive) == (len(expected), 2, num_positive)
    assert files.folder == store.path / "hard_negatives"


@pytest.mark.parametrize("kind", hard_edges.EDGE_KINDS)
def test_nothing_after_training_changes_the_files(make_store, kind):
    options = hard_edges.HardEdgeOptions(kind=kind)
    written = []
    for name, changed in (("one", EVENTS), ("two", [*EVENTS[:4], (0, 0, 120, CLICK), *EVENTS[6:]])):
        files = hard_edges.write_hard_edges(make_store(changed, name), options=options)
        written.append((files.folder / hard_edges.EDGES_FILE).read_text())
    assert written[0] == written[1]


def test_users_and_items_come_with_original_ids_and_weights(make_store):
    options = hard_edges.HardEdgeOptions(item_weight_exponent=0.5)
    folder = hard_edges.write_hard_edges(make_store(EVENTS), options=options).folder
    users = sampler_files.read_columns(folder / "users.tsv", sampler_files.USER_COLUMNS)
    items = sampler_files.read_columns(folder / "items.tsv", sampler_files.ITEM_COLUMNS)
    assert users["id"].tolist() == [7, 9] and users["weight"].tolist() == [1, 1]
    assert items["id"].tolist() == [11, 12, 13] and items["attrs"].tolist() == ["11", "12", "13"]
    assert items["weight"].tolist() == [2, 1, 0]  # train_count is 4, 1, 0


def test_command_writes_prints_and_refuses(make_store, tmp_path, capsys):
    store = make_store(EVENTS)
    command = ["hard_negatives", "--store", str(store.path), "--out_dir", str(tmp_path / "out")]
    prepare.main(command)
    text = capsys.readouterr().out
    assert "2 hard edges of 2 users; 1 left out that are positive elsewhere in training" in text
    path = tmp_path / "out" / "hard_edges.tsv"
    assert f"--config.data.negative_sampler.hard_neg_edge_input_path={path}" in text
    with pytest.raises(SystemExit, match=r"hard_edges.tsv: exists; add --overwrite"):
        prepare.main(command)
    prepare.main([*command, "--overwrite", "--kind", "not_clicked", "--max_per_user", "1"])
    text = capsys.readouterr().out
    assert "2 hard edges" in text and "item_input_path" not in text
    prepare.main([*command, "--overwrite", "--item_weight_exponent", "0.5"])
    items = f" --config.data.negative_sampler.item_input_path={path.parent / 'items.tsv'}"
    assert items in capsys.readouterr().out
    # Ids of list columns made from the store: user_index and item_index.
    prepare.main([*command, "--overwrite", "--ids", "index"])
    assert path.read_text().splitlines()[1:] == ["0\t0\t1", "1\t2\t1"]
    assert (path.parent / "users.tsv").read_text().splitlines()[1:] == ["0\t1", "1\t1"]
    assert (path.parent / "items.tsv").read_text().splitlines()[1] == "0\t1\t0"
    # The two kinds of files have default folders of their own.
    prepare.main(["hard_negatives", "--store", str(store.path), "--ids", "index"])
    text = capsys.readouterr().out
    assert f"{store.path / 'hard_negatives_index'}: " in text and "source=list_columns" in text
    with pytest.raises(ValueError, match="ids='names': unknown; choose from"):
        hard_edges.HardEdgeOptions(ids="names")
    with pytest.raises(SystemExit, match="max_per_user=-1: must not be negative"):
        prepare.main([*command, "--max_per_user", "-1"])
    quiet = make_store([(0, 0, 10, CLICK), (1, 1, 120, HATE)], "quiet")
    with pytest.raises(SystemExit, match="kind='hated': .* has no such training event"):
        prepare.main(["hard_negatives", "--store", str(quiet.path)])


def test_a_store_without_days_is_refused(store_path):
    with pytest.raises(ValueError, match=r"stats.json: has no 'days'; prepare the data again"):
        hard_edges.write_hard_edges(event_store.open_store(store_path))
