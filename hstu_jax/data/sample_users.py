"""Hidden state of the generated sample's users, and how it moves and shows in what they do.

Here: one event of many users at once: state moves on with the clock, an item is shown, the user
answers, the answer changes the state. The simulation (`sample.py`) and the oracle's replays
(`sample_oracle.py`) run exactly this code, on draws that they pass in; there is no generator here.

The world in words: a user follows a few topics. Interest in a topic fades over days, grows when
items are liked, drops when they bore; a topic that has faded is followed by a related one (most
often its fixed successor). Inside a topic the user moves along a ring of items, with the clock and
with each item watched. A session keeps to a topic until it bores; boredom shows as short watches,
missing clicks and "hate", and wears off within hours. Three exposures in ten come from popularity.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from hstu_jax.data import schema
from hstu_jax.data.sample_world import NUM_CLUSTERS, NUM_TOPICS, TOPICS_PER_CLUSTER, World

NUM_SLOTS = 3  # topics that a user follows at a time

POPULAR_SHARE = 0.3  # of exposures
SESSION_GAP_DAYS = 30.0 / 1440.0  # a longer pause starts a new session
STAY = 0.75  # chance to keep to the session's topic while not bored
INTEREST_HALF_LIFE_DAYS = 2.0
BOREDOM_LIFE_DAYS = 3.0 / 24.0
FADED = 0.3  # interest below this is replaced
RING_WIDTH = 0.035  # reach of what is shown around the user's place, in turns
TASTE_WIDTH = 0.08  # reach of what the user likes
RING_AHEAD = 0.01  # the next item is a little ahead of the place
LABEL_FLIPS = 0.04
DISCOVERY = 0.15  # a clicked popular item of another topic becomes an interest

# Uniform draws of one event: four per slot, then the single ones.
_SLOT_DRAWS = 4
_SINGLE = {
    name: _SLOT_DRAWS * NUM_SLOTS + number
    for number, name in enumerate(
        ("stay", "slot", "arm", "item", "click", "flip", "hate", "like", "follow", "comment",
         "forward", "profile", "watch", "watch_spread", "discovery")
    )
}  # fmt: skip
NUM_DRAWS = _SLOT_DRAWS * NUM_SLOTS + len(_SINGLE)


@dataclasses.dataclass
class State:
    """Hidden state of some users; changed in place by `move_on` and `answer`.

    Attributes:
      home: the two clusters that a user leans to.
      topic: followed topics, a user's are distinct.
      interest: 0..1.2 per slot.
      place: place on the topic's ring, in turns, 0..1.
      boredom: 0..1 per slot.
      focus: slot of the session's topic.
      time_days: time of the last event.
    """

    home: Int64[np.ndarray, "B 2"]
    topic: Int64[np.ndarray, "B slots"]
    interest: Float64[np.ndarray, "B slots"]
    place: Float64[np.ndarray, "B slots"]
    boredom: Float64[np.ndarray, "B slots"]
    focus: Int64[np.ndarray, "B"]
    time_days: Float64[np.ndarray, "B"]

    def take(self, rows: Int64[np.ndarray, "C"]) -> "State":
        """A copy of some users' state."""
        return State(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})

    def put(self, rows: Int64[np.ndarray, "C"], part: "State") -> None:
        """Writes `part` back to the rows it was taken from."""
        for field in dataclasses.fields(self):
            getattr(self, field.name)[rows] = getattr(part, field.name)


@dataclasses.dataclass(frozen=True)
class Feed:
    """What the personal feed may show to each user.

    Attributes:
      slot: the followed topic that the feed draws from.
      items: item indices of that topic, -1 beyond its size.
      probability: chance of each; 0 for seen and padded ones; all 0 where nothing is left.
    """

    slot: Int64[np.ndarray, "B"]
    items: Int64[np.ndarray, "B width"]
    probability: Float64[np.ndarray, "B width"]

    @property
    def is_empty(self) -> Bool[np.ndarray, "B"]:
        """True where the topic has been watched to its end: the popular feed steps in."""
        return self.probability.sum(axis=1) <= 0


@dataclasses.dataclass(frozen=True)
class Answers:
    """What users did with the item shown to each."""

    action: Int32[np.ndarray, "B"]
    watch_time_s: Float32[np.ndarray, "B"]


def initial_state(num_users: int, rng: np.random.Generator, start_days: float) -> State:
    """Users before their first event: topics mostly from their two home clusters."""
    home = np.stack([rng.permutation(NUM_CLUSTERS)[:2] for _ in range(num_users)])
    topic = np.empty((num_users, NUM_SLOTS), dtype=np.int64)
    for user in range(num_users):
        weight = np.full(NUM_TOPICS, 1.0)
        for cluster in home[user]:
            weight[cluster * TOPICS_PER_CLUSTER : (cluster + 1) * TOPICS_PER_CLUSTER] = 12.0
        topic[user] = rng.choice(NUM_TOPICS, NUM_SLOTS, replace=False, p=weight / weight.sum())
    shape = (num_users, NUM_SLOTS)
    return State(
        home=home.astype(np.int64),
        topic=topic,
        interest=rng.uniform(0.4, 1.0, shape),
        place=rng.random(shape),
        boredom=np.zeros(shape),
        focus=np.zeros(num_users, dtype=np.int64),
        time_days=np.full(num_users, start_days),
    )


def move_on(
    state: State,
    world: World,
    time_days: Float64[np.ndarray, "B"],
    draws: Float64[np.ndarray, "B draws"],
) -> Float64[np.ndarray, "B slots"]:
    """Lets the clock run to the next event: interest and boredom fade, places move, topics change.

    Returns:
      Chance of each slot in the personal feed; a new session begins without a topic to stay with.
    """
    gap = (time_days - state.time_days)[:, None]
    state.time_days = time_days
    slot_draws = draws[:, : _SLOT_DRAWS * NUM_SLOTS].reshape(-1, NUM_SLOTS, _SLOT_DRAWS)
    state.interest *= 0.5 ** (gap / INTEREST_HALF_LIFE_DAYS)
    state.boredom *= np.exp(-gap / BOREDOM_LIFE_DAYS)
    wander = 0.04 * np.sqrt(gap) * (2.0 * slot_draws[..., 0] - 1.0)
    state.place = (state.place + world.speed[state.topic] * gap + wander) % 1.0
    for slot in range(NUM_SLOTS):
        _replace_faded(state, world, slot, slot_draws[:, slot])
    pull = state.interest * np.exp(-2.0 * state.boredom)
    pull /= pull.sum(axis=1, keepdims=True)
    same_session = gap[:, 0] <= SESSION_GAP_DAYS
    rows = np.arange(len(time_days))
    stay = np.where(same_session, STAY * (1.0 - state.boredom[rows, state.focus]), 0.0)
    probability = pull * (1.0 - stay)[:, None]
    probability[rows, state.focus] += stay
    return probability


def _replace_faded(
    state: State, world: World, slot: int, draws: Float64[np.ndarray, "B four"]
) -> None:
    """Gives users whose interest in a slot has faded a related topic that they do not follow."""
    rows = np.flatnonzero(state.interest[:, slot] < FADED)
    if not len(rows):
        return
    old, kind, pick = state.topic[rows, slot], draws[rows, 1], draws[rows, 2]
    cluster = np.where(kind < 0.85, old // TOPICS_PER_CLUSTER, state.home[rows, 0])
    cluster = np.where(kind >= 0.92, state.home[rows, 1], cluster)
    cluster = np.where(kind >= 0.97, (pick * 7919.0 % 1.0 * NUM_CLUSTERS).astype(int), cluster)
    related = cluster * TOPICS_PER_CLUSTER + (pick * TOPICS_PER_CLUSTER).astype(np.int64)
    new = np.where(kind < 0.6, world.successor[old], related)
    # Taken already: the successor of the proposal, at most once around the topics.
    for _ in range(NUM_SLOTS):
        taken = (state.topic[rows] == new[:, None]).any(axis=1)
        new = np.where(taken, (new + 1) % NUM_TOPICS, new)
    state.topic[rows, slot] = new
    state.interest[rows, slot] = 0.7 + 0.3 * draws[rows, 3]
    state.boredom[rows, slot] = 0.0
    # A new topic begins near the start of its ring.
    state.place[rows, slot] = 0.15 * draws[rows, 0]


def personal_feed(
    state: State,
    world: World,
    slot_probability: Float64[np.ndarray, "B slots"],
    seen: Bool[np.ndarray, "B N"],
    draws: Float64[np.ndarray, "B draws"],
) -> Feed:
    """Draws a topic for each user and weighs its unseen items around the user's place.

    Args:
      state: after `move_on`.
      world: items and rings.
      slot_probability: from `move_on`.
      seen: items that a user was shown before.
      draws: uniform draws of this event.
    """
    rows = np.arange(len(draws))
    cumulated = np.cumsum(slot_probability, axis=1)
    pick = draws[:, _SINGLE["slot"], None] * cumulated[:, -1:]
    slot = np.minimum((cumulated <= pick).sum(axis=1), NUM_SLOTS - 1)
    items = world.items_of_topic[state.topic[rows, slot]]
    ahead = ring_distance(world.ring[items], state.place[rows, slot, None] + RING_AHEAD)
    weight = np.exp(-0.5 * (ahead / RING_WIDTH) ** 2) + 0.002
    weight *= np.sqrt(world.base_popularity)[items]
    weight[(items < 0) | seen[rows[:, None], items]] = 0.0
    total = weight.sum(axis=1, keepdims=True)
    return Feed(
        slot=slot,
        items=items,
        probability=np.divide(weight, total, out=np.zeros_like(weight), where=total > 0),
    )


def ring_distance(
    to: Float64[np.ndarray, "*shape"], start: Float64[np.ndarray, "*other"]
) -> Float64[np.ndarray, "*out"]:
    """Signed shortest way round the ring, in turns, -0.5..0.5."""
    away = to - start
    return away - np.round(away)


def draw_items(
    state: State, world: World, feed: Feed, draws: Float64[np.ndarray, "B draws"]
) -> Int64[np.ndarray, "B"]:
    """Draws the item shown to each user; a personal one sets the session's topic (`focus`)."""
    cumulated = np.cumsum(feed.probability, axis=1)
    pick = draws[:, _SINGLE["item"], None] * cumulated[:, -1:]
    at = np.minimum((cumulated <= pick).sum(axis=1), cumulated.shape[1] - 1)
    personal = feed.items[np.arange(len(draws)), at]
    popular = world.draw_popular(state.time_days, draws[:, _SINGLE["item"]])
    is_popular = (draws[:, _SINGLE["arm"]] < POPULAR_SHARE) | feed.is_empty
    state.focus = np.where(is_popular, state.focus, feed.slot)
    return np.where(is_popular, popular, personal)


def positive_probability(
    state: State, world: World, items: Int64[np.ndarray, "B width"]
) -> Float64[np.ndarray, "*shape"]:
    """Chance that an item shown now becomes a positive (clicked or flipped, and not hated)."""
    match, boredom, _ = _match(state, world, items)
    click = _click_probability(match, boredom, world.appeal[items])
    click = click * (1.0 - LABEL_FLIPS) + (1.0 - click) * LABEL_FLIPS
    return click * (1.0 - _hate_probability(match, boredom))


def _match(
    state: State, world: World, items: Int64[np.ndarray, "B width"]
) -> tuple[Float64[np.ndarray, "B width"], Float64[np.ndarray, "B width"], np.ndarray]:
    """How well items suit the state, the boredom they meet, and their slot (-1: not followed)."""
    topic = world.topic_of_item[items]
    rows = np.arange(len(items))[:, None]
    # Tables by topic first: far fewer entries than items.
    slot_of_topic = np.full((len(items), NUM_TOPICS), -1)
    slot_of_topic[rows, state.topic] = np.arange(NUM_SLOTS)
    cluster = np.arange(NUM_TOPICS) // TOPICS_PER_CLUSTER
    at_home = (state.home[:, :, None] == cluster).any(axis=1)
    slot = slot_of_topic[rows, topic]
    followed = slot >= 0
    known_slot = np.maximum(slot, 0)
    away = ring_distance(world.ring[items], state.place[rows, known_slot])
    taste = 0.25 + 0.75 * np.exp(-0.5 * (away / TASTE_WIDTH) ** 2)
    elsewhere = np.where(at_home[rows, topic], 0.15, 0.0)
    match = np.where(followed, state.interest[rows, known_slot] * taste, elsewhere)
    boredom = np.where(followed, state.boredom[rows, known_slot], 0.0)
    return match, boredom, slot


def _click_probability(
    match: np.ndarray, boredom: np.ndarray, appeal: np.ndarray
) -> Float64[np.ndarray, "*shape"]:
    logit = -1.6 + 4.5 * match * (1.0 - 0.7 * boredom) + 0.4 * appeal
    return 1.0 / (1.0 + np.exp(-logit))


def _hate_probability(match: np.ndarray, boredom: np.ndarray) -> Float64[np.ndarray, "*shape"]:
    return 0.01 + 0.02 * (match < 0.05) + 0.2 * boredom**2


def answer(
    state: State,
    world: World,
    item: Int64[np.ndarray, "B"],
    draws: Float64[np.ndarray, "B draws"],
) -> Answers:
    """What each user does with the item shown, and what that does to the user."""
    match, boredom, slot = (a[:, 0] for a in _match(state, world, item[:, None]))
    u = {name: draws[:, column] for name, column in _SINGLE.items()}
    likes_it = u["click"] < _click_probability(match, boredom, world.appeal[item])
    clicked = likes_it ^ (u["flip"] < LABEL_FLIPS)
    hated = u["hate"] < _hate_probability(match, boredom)
    duration = world.duration_s[item]
    share = np.where(likes_it, 0.35 + 0.9 * match * (1.0 - boredom), 0.12) * (
        0.3 + 1.4 * u["watch"]
    )
    share = np.where(u["watch_spread"] < 0.05, 2.0 * share, share)  # some are watched again
    watch = np.where(hated, 0.15 * share, share) * duration
    flags = {
        "click": clicked,
        "like": clicked & (u["like"] < 0.02 + 0.12 * match),
        "follow": clicked & (u["follow"] < 0.01 * match),
        "comment": clicked & (u["comment"] < 0.015 * match),
        "forward": clicked & (u["forward"] < 0.008 * match),
        "hate": hated,
        # KuaiRand calls a view long when it reaches the end, or 18 seconds.
        "long_view": watch >= np.minimum(duration, 18.0),
        "profile_enter": clicked & (u["profile"] < 0.02 + 0.03 * match),
    }
    action = sum(flag.astype(np.int32) * schema.ACTION_BITS[name] for name, flag in flags.items())
    _learn(state, world, item, slot, likes_it, hated)
    _discover(state, world, item, (slot < 0) & likes_it & ~hated & (u["discovery"] < DISCOVERY))
    return Answers(action=np.asarray(action, dtype=np.int32), watch_time_s=watch.astype(np.float32))


def _learn(
    state: State,
    world: World,
    item: np.ndarray,
    slot: np.ndarray,
    likes_it: np.ndarray,
    hated: np.ndarray,
) -> None:
    """An item of a followed topic moves place, interest and boredom."""
    rows = np.flatnonzero(slot >= 0)
    slot, likes_it, hated = slot[rows], likes_it[rows], hated[rows]
    place = state.place[rows, slot]
    step = 0.5 * ring_distance(world.ring[item[rows]], place) + RING_AHEAD
    state.place[rows, slot] = np.where(likes_it, (place + step) % 1.0, place)
    interest = state.interest[rows, slot] + np.where(likes_it, 0.05, -0.06)
    interest = np.clip(interest, 0.0, 1.2) * np.where(hated, 0.4, 1.0)
    state.interest[rows, slot] = interest
    boredom = state.boredom[rows, slot] + np.where(likes_it, 0.08, 0.16) + 0.5 * hated
    state.boredom[rows, slot] = np.minimum(boredom, 1.0)


def _discover(state: State, world: World, item: np.ndarray, found: np.ndarray) -> None:
    """The topic of a liked popular item takes the slot of the weakest interest."""
    rows = np.flatnonzero(found)
    weakest = state.interest[rows].argmin(axis=1)
    state.topic[rows, weakest] = world.topic_of_item[item[rows]]
    state.interest[rows, weakest] = 0.8
    state.boredom[rows, weakest] = 0.0
    state.place[rows, weakest] = world.ring[item[rows]]
