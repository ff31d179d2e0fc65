"""Public interaction files: formats, filters, order in time, and what is refused."""

import collections
import gzip

import numpy as np
import pytest

from hstu_jax import prepare
from hstu_jax.data import event_store, hard_edges, interactions, raw_interactions


def prepared(path, tmp_path, **options):
    return interactions.prepare(
        path, tmp_path / "store", options=interactions.InteractionOptions(**options)
    )


def sequences(store):
    """User id -> [(item id, time), ...] in the store's order."""
    found = collections.defaultdict(list)
    events = store.events
    for user, item, time in zip(
        events.user_index, events.item_index, events.timestamp_s, strict=True
    ):
        found[int(store.users["user_id"][user])].append((int(store.items.item_id[item]), int(time)))
    return dict(found)


LINES = {
    "movielens_100k": "7\t50\t3\t900\n7\t51\t1\t800\n7\t52\t5\t900\n3\t51\t2\t5\n",
    "movielens_1m": "7::50::3::900\n7::51::1::800\n7::52::5::900\n3::51::2::5\n",
    "movielens_20m": "userId,movieId,rating,timestamp\n7,50,3.5,900\n7,51,1,800\n7,52,5,900\n"
    "3,51,2,5\n",
    "amazon": "B,X50,3.0,900\nB,X51,1.0,800\nB,X52,5.0,900\nA,X51,2.0,5\n",
}


@pytest.mark.parametrize("raw_format", LINES)
def test_every_format_gives_the_same_events_in_order(raw_format, tmp_path):
    path = tmp_path / "raw.gz"
    path.write_bytes(gzip.compress(LINES[raw_format].encode()))
    store = prepared(path, tmp_path, raw_format=raw_format)
    # Line 3 has the second of line 1: later in the file, so it moves one second on.
    expected = {3: [(51, 5)], 7: [(51, 800), (50, 900), (52, 901)]}
    if raw_format == "amazon":  # ids are texts, numbered in their order
        expected = {0: [(1, 5)], 1: [(1, 800), (0, 900), (2, 901)]}
        assert (store.path / "user_ids.txt").read_text() == "A\nB\n"
        assert (store.path / "item_ids.txt").read_text() == "X50\nX51\nX52\n"
    assert sequences(store) == expected
    assert store.stats["events_moved"] == store.stats["largest_move_s"] == 1
    assert store.stats["leave_one_out"] == {"users_tested": 1, "users_only_trained": 1}
    assert set(store.stats["sha256_raw"]) == {"raw.gz"}


def test_without_times_the_position_is_the_time(tmp_path):
    path = tmp_path / "raw.txt"
    path.write_text("1 5\n1 9\n2 5\n1 5\n2 9\n")
    store = prepared(path, tmp_path, raw_format="sequences")
    assert sequences(store) == {1: [(5, 1), (9, 2), (5, 3)], 2: [(5, 1), (9, 2)]}
    assert store.stats["event_times"] == "position"
    assert store.stats["repeated_user_item_pairs"] == 1
    assert (store.events.action == 1).all()
    with pytest.raises(ValueError, match="was cut by leave-one-out, where training ends at another"):
        hard_edges.write_hard_edges(store, tmp_path / "edges")


def slow_core(pairs, min_user, min_item, *, repeated):
    pairs = list(pairs)
    while True:
        users = collections.Counter(u for u, _ in pairs)
        items = collections.Counter(i for _, i in pairs)
        kept = [(u, i) for u, i in pairs if users[u] >= min_user and items[i] >= min_item]
        if not repeated:
            left = collections.Counter(u for u, _ in kept)
            return [(u, i) for u, i in kept if left[u] >= min_user]
        if kept == pairs:
            return kept
        pairs = kept


def test_filters_equal_a_loop(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [(int(u), int(i)) for u, i in zip(*rng.integers(0, 25, (2, 170)), strict=True)]
    path = tmp_path / "raw.txt"
    path.write_text("".join(f"{u} {i}\n" for u, i in pairs))
    found = {}
    for core in interactions.CORES:
        options = dict(raw_format="sequences", core=core, min_user_events=5, min_item_events=5)
        store = prepared(path, tmp_path / core, **options)
        expected = collections.defaultdict(list)
        for user, item in slow_core(pairs, 5, 5, repeated=core == "repeated"):
            expected[user].append(item)
        found[core] = {u: [i for i, _ in items] for u, items in sequences(store).items()}
        assert found[core] == dict(expected)
        dropped = store.stats["dropped_events"]["of users or items with too few events"]
        assert dropped == len(pairs) - sum(map(len, expected.values())) > 0
        assert store.stats["dropped_users"] == 25 - len(expected)
    assert found["once"] != found["repeated"]


def test_distinct_times_equal_the_loop():
    rng = np.random.default_rng(1)
    user = np.sort(rng.integers(0, 6, 200))
    time = rng.integers(0, 40, 200)
    time = time[np.lexsort((time, user))]
    expected = []
    for i, t in enumerate(time.tolist()):
        after = expected[-1] + 1 if i and user[i] == user[i - 1] else t
        expected.append(max(t, after))
    assert interactions.distinct_times(user, time).tolist() == expected


@pytest.mark.parametrize(
    ("raw_format", "text", "message"),
    [
        ("sequences", "1 2\n1 x\n1 y\n", r"raw line 2: item='x': is not a whole .* \(2 lines in"),
        ("sequences", "1 2\n1\n", "is not of this format, whose columns are user, item with ' '"),
        ("sequences", "1 2 3\n", "raw: is not of this format"),
        ("movielens_20m", "user,item\n1,2\n", "whose columns are userId, movieId, rating, timest"),
        (
            "movielens_100k",
            "1\t2\t3\t978300760000\n",
            "raw line 1: timestamp=978300760000: looks like milliseconds",
        ),
        ("movielens_1m", "1::2::3::-4\n", "timestamp='-4': is not a whole number"),
        ("sequences", "1 2\n", "no user has 3 positives"),
    ],
)
def test_refused_with_file_line_and_value(raw_format, text, message, tmp_path):
    path = tmp_path / "raw"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        prepared(path, tmp_path, raw_format=raw_format)


def test_refused_options(tmp_path):
    path = tmp_path / "raw"
    path.write_text("1 2\n1 3\n1 4\n")
    with pytest.raises(ValueError, match="core='thrice': unknown; choose from"):
        interactions.InteractionOptions(raw_format="amazon", core="thrice")
    with pytest.raises(ValueError, match="min_item_events=-1: must be 0 or more"):
        interactions.InteractionOptions(raw_format="amazon", min_item_events=-1)
    with pytest.raises(ValueError, match="min_item_events=9: leave no event of the 3"):
        prepared(path, tmp_path, raw_format="sequences", min_item_events=9)
    with pytest.raises(ValueError, match="format='ml': unknown; choose from"):
        raw_interactions.read(path, raw_format="ml")
    with pytest.raises(FileNotFoundError, match="no such file; download the data set"):
        raw_interactions.read(tmp_path / "none", raw_format="amazon")


def test_command(tmp_path, capsys):
    path = tmp_path / "u.data"
    path.write_text(LINES["movielens_100k"])
    flags = ["--raw_file", str(path), "--out_dir", str(tmp_path / "o")]
    prepare.main(["interactions", *flags, "--format", "movielens_100k", "--min_user_events", "2"])
    text = capsys.readouterr().out
    assert "leave-one-out: 1 users tested, 0 with fewer than 3 positives; 1 events moved" in text
    assert "dropped users: 1" in text
    assert "dropped events: 1 of users or items with too few events" in text
    with pytest.raises(SystemExit, match="error: out_dir=.*: already holds an event store"):
        prepare.main(["interactions", *flags, "--format", "movielens_100k"])


def test_real_file(real_data_dir, tmp_path):
    path = real_data_dir / "ml_1m" / "ml-1m.txt.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    store = prepared(path, tmp_path, raw_format="sequences")
    assert (store.num_users, store.num_items, len(store.events)) == (6_040, 3_416, 999_611)
    assert store.stats["windows_per_split"] == dict.fromkeys(("train", "validation", "test"), 6_040)
    assert store.stats["positives_per_split"]["train"] == 999_611 - 2 * 6_040
    # The last line of each user is what its test window asks for.
    with gzip.open(path, "rt") as file:
        lines = [tuple(map(int, line.split())) for line in file]
    last = dict(lines)
    table = store.windows
    for window in store.windows_of_split("test")[::500]:
        (event,) = table.positives(window)
        assert event == table.history_end[window]
        user = store.users["user_id"][table.user_index[window]]
        assert store.items.item_id[store.events.item_index[event]] == last[user]
    assert event_store.open_store(store.path).fingerprint() == store.fingerprint()
