"""The generated KuaiRand-shaped sample: when users come, the simulation, and the event store.

Here: schedules, the loop over events, user categories, writing. Not here: the world
(`sample_world.py`), behaviour (`sample_users.py`), true probabilities (`sample_oracle.py`). The
same options always give the same store.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from hstu_jax.data import event_store, sample_users, windowing
from hstu_jax.data.records import Events, ItemTable
from hstu_jax.data.sample_world import START_S, SampleOptions, World, build_world

ORACLE_FILE = "oracle.npz"
DEFAULT_DIR = "data/kuairand_sample"
SOURCE = "generated sample"  # `stats["source"]` of an event store made here

# Share of sessions, hour of the peak, spread in hours.
_DAY_RHYTHM = ((0.2, 8.0, 1.2), (0.25, 12.5, 1.0), (0.55, 20.5, 1.8))


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Everything that happened, and the hidden state before each user's test day.

    Attributes:
      events: sorted by user, then time.
      test_user: users with events on the last day, ascending.
      test_state: their hidden state before the first event of that day.
      activity: hidden activity of each user (mean 0, spread 1).
      home: home clusters of each user.
    """

    events: Events
    test_user: Int64[np.ndarray, "W"]
    test_state: sample_users.State
    activity: Float64[np.ndarray, "users"]
    home: Int64[np.ndarray, "users 2"]


def prepare(
    out_dir: str | pathlib.Path,
    *,
    options: SampleOptions | None = None,
    overwrite: bool = False,
) -> event_store.EventStore:
    """Generates the sample and writes it as an event store, with the oracle's hidden states.

    Args:
      out_dir: folder to make.
      options: size and seed; None for the defaults.
      overwrite: replace an event store that is already there.

    Returns:
      The opened store; `stats["source"]` is "generated sample".

    Raises:
      FileExistsError: `out_dir` exists and is not to be replaced.
    """
    options = options or SampleOptions()
    event_store.check_target(pathlib.Path(out_dir), overwrite=overwrite)
    world = build_world(options)
    simulation = simulate(options, world)
    events = simulation.events
    windowed = windowing.build_windows(events, options=options.windows)
    train_items = events.item_index[windowed.is_training_event]
    rng = np.random.default_rng([options.seed, 2])
    item_id = np.sort(rng.choice(10 * options.num_items, options.num_items, replace=False))
    items = ItemTable(
        item_id=item_id.astype(np.int64),
        train_count=np.bincount(train_items, minlength=options.num_items).astype(np.int64),
    )
    users, vocabularies = _user_categories(options, simulation, rng)
    stats = {
        "source": SOURCE,
        "options": dataclasses.asdict(options),
        **windowed.stats,
        "dropped_events": {},
        "mended_events": {},
        "users_without_features": 0,
        "sha256_raw": {},
    }

    def write_oracle(path: pathlib.Path) -> None:
        np.savez(path, test_user=simulation.test_user, **vars(simulation.test_state))

    return event_store.write_store(
        out_dir,
        events=events,
        windows=windowed.windows,
        users=users,
        items=items,
        vocabularies=vocabularies,
        stats=stats,
        item_weight_exponent=options.item_weight_exponent,
        extra_files={ORACLE_FILE: write_oracle},
        overwrite=overwrite,
    )


def recorded_options(options: SampleOptions | None = None) -> dict[str, Any]:
    """`stats["options"]` of a sample with these options (None for the defaults), as read back."""
    return json.loads(json.dumps(dataclasses.asdict(options or SampleOptions())))


def simulate(options: SampleOptions, world: World) -> Simulation:
    """Runs all users' events in their own time order, one event of every user at a time."""
    rng = np.random.default_rng([options.seed, 1])
    activity = rng.normal(size=options.num_users)
    user, time_s = _schedule(options, activity, rng)
    time_days = (time_s - START_S) / windowing.SECONDS_PER_DAY
    counts = np.bincount(user, minlength=options.num_users)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    on_test_day = np.flatnonzero(time_days >= options.num_days - 1)
    opens_test = np.zeros(len(user), dtype=bool)
    test_user, opening_event = np.unique(user[on_test_day], return_index=True)
    opens_test[on_test_day[opening_event]] = True
    state = sample_users.initial_state(options.num_users, rng, 0.0)
    before_test = state.take(np.arange(options.num_users))
    seen = np.zeros((options.num_users, options.num_items), dtype=bool)
    item = np.empty(len(user), dtype=np.int64)
    action = np.empty(len(user), dtype=np.int32)
    watch = np.empty(len(user), dtype=np.float32)
    # Busy users first, so that the users who still have events are always a prefix.
    by_count = np.argsort(-counts, kind="stable")
    for number in range(int(counts.max())):
        rows = by_count[: int((counts > number).sum())]
        at = first[rows] + number
        opening = np.flatnonzero(opens_test[at])
        before_test.put(rows[opening], state.take(rows[opening]))
        part = state.take(rows)
        draws = rng.random((len(rows), sample_users.NUM_DRAWS))
        slots = sample_users.move_on(part, world, time_days[at], draws)
        feed = sample_users.personal_feed(part, world, slots, seen[rows], draws)
        item[at] = sample_users.draw_items(part, world, feed, draws)
        answers = sample_users.answer(part, world, item[at], draws)
        action[at], watch[at] = answers.action, answers.watch_time_s
        seen[rows, item[at]] = True
        state.put(rows, part)
    return Simulation(
        events=Events(
            user_index=user.astype(np.int32),
            item_index=item.astype(np.int32),
            timestamp_s=time_s,
            action=action,
            watch_time_s=watch,
        ),
        test_user=test_user,
        test_state=before_test.take(test_user),
        activity=activity,
        home=state.home,
    )


def _schedule(
    options: SampleOptions, activity: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Users and times (Unix seconds) of all events, sorted; does not depend on any interest."""
    num_users, num_days = options.num_users, options.num_days
    weekend = np.isin((np.arange(num_days) + 4) % 7, (5, 6))  # 8 April 2022 was a Friday
    day_logit = 0.3 + 0.6 * activity[:, None] + 0.4 * weekend[None, :]
    is_active = rng.random((num_users, num_days)) < 1.0 / (1.0 + np.exp(-day_logit))
    # Every user comes at least twice before the last two days, so that all have a history.
    early = np.argsort(rng.random((num_users, max(num_days - 2, 1))), axis=1)[:, :2]
    is_active[np.arange(num_users)[:, None], early] = True
    user, day = np.nonzero(is_active)
    sessions = 1 + rng.poisson(0.8 * np.exp(0.3 * activity[user]))
    user, day = np.repeat(user, sessions), np.repeat(day, sessions)
    chosen = rng.choice(len(_DAY_RHYTHM), size=len(user), p=[share for share, _, _ in _DAY_RHYTHM])
    peak = np.array([hour for _, hour, _ in _DAY_RHYTHM])[chosen]
    spread = np.array([hours for _, _, hours in _DAY_RHYTHM])[chosen]
    shift = rng.normal(scale=1.0, size=num_users)  # early and late people
    hour = np.clip(peak + shift[user] + spread * rng.normal(size=len(user)), 0.0, 23.9)
    lengths = rng.geometric(1.0 / (5.0 * np.exp(0.2 * activity[user])))
    start = day * windowing.SECONDS_PER_DAY + np.floor(hour * 3_600)
    number = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    gap = np.floor(np.exp(rng.normal(3.2, 0.8, size=len(number))))
    # Some events share their second with the one before, as 11 % of KuaiRand's do.
    gap[(rng.random(len(number)) < 0.08) | (number == 0)] = 0.0
    passed = np.cumsum(gap)
    passed -= np.repeat(passed[number == 0], lengths)
    time = (np.repeat(start, lengths) + passed).astype(np.int64)
    user = np.repeat(user, lengths)
    inside = time < num_days * windowing.SECONDS_PER_DAY
    user, time = user[inside], time[inside]
    order = np.lexsort((time, user))
    return user[order], time[order] + START_S


def _user_categories(
    options: SampleOptions, simulation: Simulation, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """KuaiRand's category columns; each leans a little on activity or on the home clusters."""
    num_users = options.num_users
    lean = {
        "user_active_degree": simulation.activity,
        "follow_user_num_range": simulation.home[:, 0] / 4.0 - 1.0,
        "fans_user_num_range": np.zeros(num_users),
        "friend_user_num_range": simulation.home[:, 1] / 4.0 - 1.0,
        "register_days_range": 0.5 * simulation.activity,
    }
    vocabularies = {name: sorted(words) for name, words in _CATEGORY_WORDS.items()}
    user_id = np.sort(rng.choice(27_000 + num_users, num_users, replace=False)).astype(np.int64)
    users: dict[str, np.ndarray] = {"user_id": user_id}
    for name, words in _CATEGORY_WORDS.items():
        value = lean[name] + rng.normal(scale=0.7, size=num_users)
        rank = np.argsort(np.argsort(value, kind="stable"), kind="stable")
        level = rank * len(words) // num_users
        ids = np.array([vocabularies[name].index(word) + 1 for word in words], dtype=np.int32)
        column = ids[level]
        column[rng.random(num_users) < 0.02] = 0  # some profiles have gaps
        users[name] = column
    return users, vocabularies


# Levels from low to high, in KuaiRand's spelling.
_CATEGORY_WORDS = {
    "user_active_degree": ("low_active", "middle_active", "high_active", "full_active"),
    "follow_user_num_range": ("0", "(0,10]", "(10,50]", "(50,100]", "(100,150]", "(150,250]",
                              "(250,500]", "500+"),
    "fans_user_num_range": ("0", "[1,10)", "[10,100)", "[100,1k)", "[1k,5k)"),
    "friend_user_num_range": ("0", "[1,5)", "[5,30)", "[30,60)", "[60,120)", "250+"),
    "register_days_range": ("31-60", "61-90", "91-180", "181-365", "366-730", "730+"),
}  # fmt: skip
