"""The generated sample: size, determinism, honest windows, and an oracle that is calibrated."""

import dataclasses

import numpy as np
import pytest

from hstu_jax.data import event_store, sample, sample_oracle, schema, windowing
from hstu_jax.data.sample_world import NUM_TOPICS, SampleOptions, build_world

SMALL = SampleOptions(seed=3, num_users=300, num_items=1_000, num_days=5)


@pytest.fixture(scope="module")
def default_store(tmp_path_factory):
    return sample.prepare(tmp_path_factory.mktemp("sample") / "default")


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    return sample.prepare(tmp_path_factory.mktemp("sample") / "small", options=SMALL)


def test_size_of_the_default(default_store):
    store = default_store
    assert store.stats["source"] == "generated sample"
    assert store.num_users >= 2_000
    assert store.num_items >= 5_000
    assert 200_000 <= len(store.events) <= 400_000
    days = (store.events.timestamp_s + windowing.UTC_PLUS_8_S) // windowing.SECONDS_PER_DAY
    assert len(np.unique(days)) == 12
    test_positives = store.stats["positives_per_split"]["test"]
    assert 5 <= test_positives / store.stats["windows_per_split"]["test"] <= 10
    counts = np.sort(np.bincount(store.events.item_index, minlength=store.num_items))[::-1]
    assert counts[: store.num_items // 10].sum() > 0.3 * counts.sum()  # popularity skew
    hours = (store.events.timestamp_s + windowing.UTC_PLUS_8_S) // 3_600 % 24
    by_hour = np.bincount(hours, minlength=24)
    assert by_hour[19:23].mean() > 5 * by_hour[2:6].mean()  # day rhythm
    event_store.open_store(store.path, verify=True)


def test_no_history_reaches_its_request(default_store):
    windows, events = default_store.windows, default_store.events
    has_history = windows.history_end > windows.history_start
    last = windows.history_end[has_history] - 1
    assert (events.timestamp_s[last] < windows.request_time_s[has_history]).all()
    sizes = np.diff(windows.positive_offsets)
    request = np.repeat(windows.request_time_s, sizes)
    assert (events.timestamp_s[windows.positive_events] >= request).all()
    # The event after the history is the window's first: nothing before it was left out.
    assert (events.timestamp_s[windows.history_end] == windows.request_time_s).all()
    # Splits follow the day of the request.
    day = (windows.request_time_s + windowing.UTC_PLUS_8_S) // windowing.SECONDS_PER_DAY
    assert (windows.split == np.clip(day - (day.max() - 2), 0, 2)).all()
    action = events.action[windows.positive_events]
    assert ((action & schema.action_mask(["hate"])) == 0).all()
    assert ((action & 31) != 0).all()


def test_actions_and_watch_times_depend_on_interest(default_store):
    events = default_store.events
    clicked = (events.action & 1) != 0
    hated = (events.action & 32) != 0
    assert events.watch_time_s[clicked].mean() > 1.5 * events.watch_time_s[~clicked].mean()
    assert events.watch_time_s[hated].mean() < 0.5 * events.watch_time_s[~hated].mean()
    assert all(default_store.stats["action_counts"][name] > 100 for name in schema.ACTION_BITS)


def test_interests_drift(default_store):
    """A user's clicked topics of one day look like the next day's, less like those a week on."""
    events = default_store.events
    topic = build_world(SampleOptions()).topic_of_item[events.item_index]
    day = (events.timestamp_s + windowing.UTC_PLUS_8_S) // windowing.SECONDS_PER_DAY
    day -= day.min()
    use = (events.action & 1) != 0
    profile = np.zeros((default_store.num_users, 12, NUM_TOPICS))
    np.add.at(profile, (events.user_index[use], day[use], topic[use]), 1.0)
    norm = np.linalg.norm(profile, axis=2)

    def similarity(apart, other=0):
        """Mean cosine of a user's day with a later day of the user this many rows on."""
        later, later_norm = np.roll(profile, -other, axis=0), np.roll(norm, -other, axis=0)
        dots = (profile[:, :-apart] * later[:, apart:]).sum(axis=2)
        both = norm[:, :-apart] * later_norm[:, apart:]
        return (dots[both > 0] / both[both > 0]).mean()

    next_day, next_week, stranger = similarity(1), similarity(7), similarity(1, other=1)
    assert next_day > 2 * next_week  # interests drift
    assert next_week > 1.2 * stranger  # but users stay themselves


def test_same_seed_same_store(tmp_path, small_store):
    again = sample.prepare(tmp_path / "again", options=SMALL)
    assert again.fingerprint() == small_store.fingerprint()
    assert again.stats["sha256_written"] == small_store.stats["sha256_written"]
    other = sample.prepare(tmp_path / "other", options=dataclasses.replace(SMALL, seed=4))
    assert other.fingerprint() != small_store.fingerprint()


def all_scores(store, windows, **options):
    blocks = list(sample_oracle.oracle_scores(store, windows, **options))
    np.testing.assert_array_equal(np.concatenate([block for block, _ in blocks]), windows)
    return np.concatenate([scores for _, scores in blocks])


def hit_rate(store, windows, scores, k=10):
    """Mean share of positives among the k best unseen items; positives that were seen are out."""
    found = []
    for window, row in zip(windows, scores, strict=True):
        start, end = store.windows.history_start[window], store.windows.history_end[window]
        row = row.astype(np.float64)
        row[store.events.item_index[start:end]] = -np.inf
        positives = store.events.item_index[store.windows.positives(window)]
        positives = positives[np.isfinite(row[positives])]
        if len(positives):
            found.append(np.isin(np.argsort(-row)[:k], positives).sum() / len(positives))
    return np.mean(found)


def test_oracle_is_calibrated_and_beats_popularity(small_store):
    store = small_store
    windows = store.windows_of_split("test")
    # Few replays leave noise that makes high scores too high and low ones too low.
    scores = all_scores(store, windows, num_replays=256, block_windows=32)
    truth = np.zeros_like(scores)
    for number, window in enumerate(windows):
        truth[number, store.events.item_index[store.windows.positives(window)]] = 1.0
    # Windows without a positive are not in the store, so the truth lies a little above.
    assert 0.95 < scores.sum() / truth.sum() < 1.05
    for low, high in ((0.02, 0.1), (0.1, 0.3), (0.3, 1.0)):
        chosen = (scores >= low) & (scores < high)
        excess = (chosen * (scores - truth)).sum(axis=1, dtype=np.float64)
        deviations = excess.mean() / (excess.std() / np.sqrt(len(windows)))
        assert abs(deviations) < 4, (low, high, deviations)
        assert abs(truth[chosen].mean() / scores[chosen].mean() - 1) < 0.15, (low, high)
    popularity = np.broadcast_to(store.items.train_count, scores.shape)
    oracle = hit_rate(store, windows, scores)
    assert oracle > 3 * hit_rate(store, windows, popularity)
    # Planted wrong oracle: another user's state.
    assert oracle > 3 * hit_rate(store, windows, np.roll(scores, 1, axis=0))


def test_oracle_does_not_depend_on_blocks(small_store):
    windows = small_store.windows_of_split("test")[:9]
    options = {"num_replays": 4}
    whole = all_scores(small_store, windows, **options)
    backwards = all_scores(small_store, windows[::-1], block_windows=2, **options)
    np.testing.assert_allclose(whole, backwards[::-1], rtol=1e-6)


def test_oracle_refuses_other_stores(tmp_path, small_store, store_path):
    other = event_store.open_store(store_path)
    with pytest.raises(ValueError, match="source='test': only the generated sample has true"):
        next(sample_oracle.oracle_scores(other, np.array([1])))
    with pytest.raises(ValueError, match=r"window_indices=0: not a test window \(1 in all\)"):
        next(sample_oracle.oracle_scores(small_store, np.array([0])))
    options = dataclasses.replace(SMALL, windows=windowing.WindowOptions(mode="events"))
    by_events = sample.prepare(tmp_path / "events", options=options)
    with pytest.raises(ValueError, match="window_mode='events': the oracle knows the state"):
        next(sample_oracle.oracle_scores(by_events, by_events.windows_of_split("test")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_users": 0}, "num_users=0: must be at least 1"),
        ({"num_items": 10}, "num_items=10: must be at least 960"),
        ({"num_days": 2}, "num_days=2: must be at least 3"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        SampleOptions(**changes)


def test_smallest_sample(tmp_path):
    options = SampleOptions(num_users=40, num_items=960, num_days=3)
    store = sample.prepare(tmp_path / "tiny", options=options)
    assert store.stats["windows_per_split"]["test"] > 0
    assert SampleOptions.from_dict(store.stats["options"]) == options
