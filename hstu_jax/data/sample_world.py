"""The fixed part of the generated sample's world: options, items, topics, and how they relate.

Here: what does not change while users watch. Not here: users' hidden state and behaviour
(`sample_users.py`, the next file on the path), times and files (`sample.py`).
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from hstu_jax.data import windowing

# Midnight of 8 April 2022 in UTC+8, KuaiRand's first day.
START_S = 1_649_347_200

NUM_CLUSTERS = 8
TOPICS_PER_CLUSTER = 6
NUM_TOPICS = NUM_CLUSTERS * TOPICS_PER_CLUSTER


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Size and seed of the generated sample.

    Attributes:
      seed: same seed, same sample.
      num_users: at least 1.
      num_items: at least 20 a topic.
      num_days: at least 3 (training, validation, test).
      item_weight_exponent: weight in `item_table.tsv` = train_count ** exponent.
      windows: how events become windows.
    """

    seed: int = 2022
    num_users: int = 4_000
    num_items: int = 5_000
    num_days: int = 12
    item_weight_exponent: float = 0.0
    # Short training windows give more and fresher contexts an event: measured in docs/results.md.
    windows: windowing.WindowOptions = windowing.WindowOptions(
        mode="train_events", window_events=4
    )

    def __post_init__(self) -> None:
        if self.num_users < 1:
            raise ValueError(f"num_users={self.num_users}: must be at least 1.")
        if self.num_items < 20 * NUM_TOPICS:
            raise ValueError(f"num_items={self.num_items}: must be at least {20 * NUM_TOPICS}.")
        if self.num_days < 3:
            raise ValueError(
                f"num_days={self.num_days}: must be at least 3 (training, validation, test)."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SampleOptions":
        """The options that `dataclasses.asdict` (and `stats.json`) recorded."""
        windows = dict(values["windows"])
        windows["positive_actions"] = tuple(windows["positive_actions"])
        return cls(**{**values, "windows": windowing.WindowOptions(**windows)})


@dataclasses.dataclass(frozen=True)
class World:
    """Items on rings, one ring a topic; topics in clusters.

    Attributes:
      topic_of_item: 0..topics-1.
      ring: place of each item on its topic's ring, in turns, 0..1.
      appeal: mean 0, spread 1; makes a click more or less likely.
      base_popularity: positive, skewed.
      duration_s: length of each video.
      items_of_topic: item indices by topic, padded with -1.
      successor: the topic that most often follows each topic (a cycle inside its cluster).
      speed: turns a day by which a user's place on each topic's ring moves on.
      popularity: chance of each item in the popular feed, by hour since the start.
      popular_cumulated: hour plus cumulated popularity, flat and ascending, so that one sorted
        search draws for any hour.
    """

    topic_of_item: Int64[np.ndarray, "N"]
    ring: Float64[np.ndarray, "N"]
    appeal: Float64[np.ndarray, "N"]
    base_popularity: Float64[np.ndarray, "N"]
    duration_s: Float64[np.ndarray, "N"]
    items_of_topic: Int64[np.ndarray, "topics width"]
    successor: Int64[np.ndarray, "topics"]
    speed: Float64[np.ndarray, "topics"]
    popularity: Float64[np.ndarray, "hours N"]
    popular_cumulated: Float64[np.ndarray, "flat"]

    def draw_popular(
        self, time_days: Float64[np.ndarray, "B"], draws: Float64[np.ndarray, "B"]
    ) -> Int64[np.ndarray, "B"]:
        """Items of the popular feed at given times (days since the start), one a draw."""
        hour = np.floor(time_days * 24.0)
        flat = np.searchsorted(self.popular_cumulated, hour + draws, side="right")
        num_items = len(self.ring)
        return np.clip(flat - hour.astype(np.int64) * num_items, 0, num_items - 1)


def build_world(options: SampleOptions) -> World:
    """The world of a seed; quick, so that the oracle builds it again instead of storing it."""
    rng = np.random.default_rng([options.seed, 0])
    num_items = options.num_items
    # Topics differ in size; every topic gets a floor so that no ring is almost empty.
    shares = rng.dirichlet(np.full(NUM_TOPICS, 6.0))
    floor = num_items // (2 * NUM_TOPICS)
    sizes = floor + rng.multinomial(num_items - floor * NUM_TOPICS, shares)
    # Shuffled: an item's number says nothing about its topic.
    topic_of_item = rng.permutation(np.repeat(np.arange(NUM_TOPICS), sizes))
    items_of_topic = np.full((NUM_TOPICS, sizes.max()), -1, dtype=np.int64)
    for topic in range(NUM_TOPICS):
        items_of_topic[topic, : sizes[topic]] = np.flatnonzero(topic_of_item == topic)
    cluster = np.arange(NUM_TOPICS) // TOPICS_PER_CLUSTER
    place = np.arange(NUM_TOPICS) % TOPICS_PER_CLUSTER
    base_popularity = np.exp(rng.normal(scale=1.4, size=num_items))
    # Three items in ten have a bump of popularity around a day of their own.
    peak_day = rng.uniform(-2.0, options.num_days + 2.0, size=num_items)
    height = np.where(rng.random(num_items) < 0.3, rng.uniform(1.0, 8.0, num_items), 0.0)
    hours = np.arange(options.num_days * 24)[:, None]
    bump = np.exp(-0.5 * ((hours / 24.0 - peak_day) / 1.5) ** 2)
    popularity = base_popularity * (1.0 + height * bump)
    popularity /= popularity.sum(axis=1, keepdims=True)
    cumulated = np.minimum(np.cumsum(popularity, axis=1), 1.0)
    return World(
        topic_of_item=topic_of_item,
        ring=rng.random(num_items),
        appeal=rng.normal(size=num_items),
        base_popularity=base_popularity,
        duration_s=np.clip(np.exp(rng.normal(3.2, 0.7, num_items)), 5.0, 300.0),
        items_of_topic=items_of_topic,
        successor=cluster * TOPICS_PER_CLUSTER + (place + 1) % TOPICS_PER_CLUSTER,
        speed=rng.uniform(0.04, 0.12, size=NUM_TOPICS),
        popularity=popularity,
        popular_cumulated=(hours + cumulated).ravel(),
    )
