"""The generated sample's oracle: the test day's items ranked by their true probabilities.

Here: replays of each user's test day from the true hidden state before it, with the code that made
the sample. It bounds what any model can reach on the sample. Not here: the metrics of the ranking
(`metrics/ranking.py`).
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Float64, Int64, Shaped

from hstu_jax.data import sample_users, windowing
from hstu_jax.data.event_store import EventStore
from hstu_jax.data.sample import ORACLE_FILE, SOURCE
from hstu_jax.data.sample_world import START_S, SampleOptions, World, build_world


def oracle_scores(
    store: EventStore,
    window_indices: Shaped[np.ndarray, "_"],
    *,
    num_replays: int = 64,
    block_windows: int = 64,
) -> Iterator[tuple[Int64[np.ndarray, "W"], Float32[np.ndarray, "W N"]]]:
    """True expected number of positive events of every item on each window's day.

    score(w, i) = sum over the day's events of P(item i is shown and becomes a positive | hidden
    state at the request). Items are hardly ever shown twice, so this is the probability that i
    becomes a positive. The expectation is over replays of the day; inside a replayed event the
    items' probabilities are added exactly, not drawn. The times of the day's events are given:
    they do not depend on any interest, only the number of scored events does depend on them.

    Deterministic: a window's replays depend on the seed and the window's user only, not on blocks.

    Args:
      store: a generated sample with day windows.
      window_indices: test windows, in any order.
      num_replays: more is closer to the truth and slower. Too few leave noise in the ranking: on
        a fifth of the default sample's test day recall@10 was .259 with 32 (10 ms a window), .268
        with 128 and .272 with 256 (70 ms). Report a bound with 256.
      block_windows: windows scored at once (memory: replays * windows * items bytes).

    Yields:
      A block of `window_indices` and its scores; seen items are not removed.

    Raises:
      ValueError: not a generated sample, not day windows in the test split, or not a test window.
    """
    if store.stats.get("source") != SOURCE:
        raise ValueError(
            f"{store.path}: source={store.stats.get('source')!r}: only the generated sample has "
            "true probabilities; leave the oracle out."
        )
    options = SampleOptions.from_dict(store.stats["options"])
    if options.windows.mode not in ("day", "train_events"):
        raise ValueError(
            f"window_mode={options.windows.mode!r}: the oracle knows the state before each test "
            "day; prepare the sample with day windows."
        )
    bad = window_indices[store.windows.split[window_indices] != 2]
    if len(bad):
        raise ValueError(f"window_indices={bad[0]}: not a test window ({len(bad)} in all).")
    world = build_world(options)
    with np.load(store.path / ORACLE_FILE) as file:
        columns = dict(file)
    test_user = columns.pop("test_user")
    state = sample_users.State(**columns)
    for begin in range(0, len(window_indices), block_windows):
        block = window_indices[begin : begin + block_windows].astype(np.int64)
        rows = np.searchsorted(test_user, store.windows.user_index[block])
        yield block, _score_block(store, options, world, state.take(rows), block, num_replays)


def _score_block(
    store: EventStore,
    options: SampleOptions,
    world: World,
    state: sample_users.State,
    block: np.ndarray,
    num_replays: int,
) -> Float32[np.ndarray, "W N"]:
    users = store.windows.user_index[block]
    begin = store.windows.history_end[block]  # the first event of the test day
    end = np.searchsorted(store.events.user_index, users, side="right")
    scores = np.zeros((len(block), options.num_items))
    # Replay r of window w is row w * num_replays + r.
    state = state.take(np.repeat(np.arange(len(block)), num_replays))
    seen = np.zeros((len(block), options.num_items), dtype=bool)
    for row, window in enumerate(block):
        start, stop = store.windows.history_start[window], store.windows.history_end[window]
        seen[row, store.events.item_index[start:stop]] = True
    seen = np.repeat(seen, num_replays, axis=0)
    generators = [np.random.default_rng([options.seed, 3, int(user)]) for user in users]
    for number in range(int((end - begin).max())):
        live = np.flatnonzero(begin + number < end)
        time_s = store.events.timestamp_s[begin[live] + number]
        time_days = (time_s - START_S) / windowing.SECONDS_PER_DAY
        rows = (live[:, None] * num_replays + np.arange(num_replays)).ravel()
        draws = np.concatenate(
            [generators[w].random((num_replays, sample_users.NUM_DRAWS)) for w in live]
        )
        part = state.take(rows)
        slots = sample_users.move_on(part, world, np.repeat(time_days, num_replays), draws)
        feed = sample_users.personal_feed(part, world, slots, seen[rows], draws)
        _add_personal(scores, live, num_replays, part, world, feed)
        scores[live] += _popular_scores(part, world, feed, num_replays)
        item = sample_users.draw_items(part, world, feed, draws)
        sample_users.answer(part, world, item, draws)
        seen[rows, item] = True
        state.put(rows, part)
    return scores.astype(np.float32)


def _add_personal(
    scores: Float64[np.ndarray, "W N"],
    live: np.ndarray,
    num_replays: int,
    state: sample_users.State,
    world: World,
    feed: sample_users.Feed,
) -> None:
    """Adds the personal feed's share of one event, averaged over replays, in place."""
    chance = sample_users.positive_probability(state, world, feed.items) * feed.probability
    chance *= (1.0 - sample_users.POPULAR_SHARE) / num_replays
    window = np.repeat(live, num_replays)
    flat = (window[:, None] * scores.shape[1] + np.maximum(feed.items, 0)).ravel()
    added = np.bincount(flat, weights=chance.ravel(), minlength=scores.size)
    scores += added.reshape(scores.shape)


def _popular_scores(
    state: sample_users.State, world: World, feed: sample_users.Feed, num_replays: int
) -> Float64[np.ndarray, "C N"]:
    """The popular feed's share of one event.

    The chance of a click is that of each window's first replay: it changes little between replays
    and the whole catalogue for all of them would take most of the time.
    """
    num_items = len(world.ring)
    first = state.take(np.arange(0, len(feed.slot), num_replays))
    items = np.broadcast_to(np.arange(num_items), (len(first.focus), num_items))
    share = sample_users.POPULAR_SHARE + (1.0 - sample_users.POPULAR_SHARE) * feed.is_empty.reshape(
        -1, num_replays
    ).mean(axis=1)
    popularity = world.popularity[np.floor(first.time_days * 24.0).astype(np.int64)]
    positive = sample_users.positive_probability(first, world, items)
    return share[:, None] * popularity * positive
