"""Whole-catalogue evaluation: for every window, all items of the catalogue are ranked.

What is to be found and what may be shown (`EvalSet`), the vectors of a state, and the figures with
a bootstrap interval. The ranking itself is `hstu_jax.metrics.catalogue`; what stands beside the
result is made in `closing.py`.
"""

import dataclasses
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from hstu_jax.config import schema
from hstu_jax.data import event_store
from hstu_jax.features import packing
from hstu_jax.metrics import catalogue, groups, ranking
from hstu_jax.training import partition, placement
from hstu_jax.training import run as run_lib
from hstu_jax.training import state as state_lib

_ITEM_BLOCK = 16_384  # items whose vectors a device computes at once
_BOOTSTRAP_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSet:
    """What is to be found, and what may be shown, for every window of a split.

    Attributes:
        split: "validation" or "test".
        windows: window numbers in the store.
        positive_offsets: positives of window w are `positive_offsets[w]:positive_offsets[w + 1]`.
        positive_items: item_index of every positive.
        seen_offsets: as `positive_offsets`.
        seen_items: items not to be shown again: all of the history, however long; empty if seen
            items may be shown.
        catalogue_mask: items that are ranked: those with a training event, or all.
        num_new_user: windows whose user has no training window.
        history_len: events of every window's history, however long.
        popularity: training events of the item of every positive.
    """

    split: str
    windows: Int[np.ndarray, "W"]
    positive_offsets: Int[np.ndarray, "W_and_one"]
    positive_items: Int[np.ndarray, "positives"]
    seen_offsets: Int[np.ndarray, "W_and_one"]
    seen_items: Int[np.ndarray, "seen"]
    catalogue_mask: Bool[np.ndarray, "N"]
    num_new_user: int
    history_len: Int[np.ndarray, "W"]
    popularity: Int[np.ndarray, "positives"]

    def ranks(self, score_block: catalogue.ScoreBlock) -> catalogue.CatalogueRanks:
        """Ranks of the positives by blocks of scores against all items."""
        return catalogue.ranks_from_scores(
            score_block,
            num_items=len(self.catalogue_mask),
            positive_offsets=self.positive_offsets,
            positive_items=self.positive_items,
            excluded_offsets=self.seen_offsets,
            excluded_items=self.seen_items,
            catalogue_mask=self.catalogue_mask,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of one ranking.

    Attributes:
        metrics: values per query-user.
        ranks: ranks of the positives, and how many were dropped.
        sampled: loss and recall among the sampled negatives; empty for baselines.
        eval_set: what was ranked.
        with_seen: values if seen items are ranked too; None = not asked for.
        cutoffs: of the metrics.
    """

    metrics: ranking.UserMetrics
    ranks: catalogue.CatalogueRanks
    sampled: dict[str, float]
    eval_set: EvalSet
    with_seen: ranking.UserMetrics | None
    cutoffs: tuple[int, ...]

    def scalars(self) -> dict[str, float]:
        """Every mean, for the metric log."""
        return {**self.metrics.means(), **self.sampled}

    def group_table(self) -> list[groups.Group]:
        """Figures by length of the history and by popularity of the positive."""
        return groups.group_table(
            self.ranks.ranks,
            self.eval_set.positive_offsets,
            history_len=self.eval_set.history_len,
            popularity=self.eval_set.popularity,
            cutoffs=self.cutoffs,
        )

    def line(self) -> str:
        """Recall and NDCG at every cutoff, for the screen."""
        shown = {n: v for n, v in self.metrics.means().items() if n.startswith(("recall", "ndcg"))}
        return "  ".join(f"{name} {value:.4f}" for name, value in shown.items())

    def interval(self, name: str, *, num_resamples: int) -> tuple[float, float]:
        """95 % bootstrap interval over query-users of one metric."""
        return ranking.bootstrap_interval(
            self.metrics.values[name], seed=_BOOTSTRAP_SEED, num_resamples=num_resamples
        )


def make_eval_set(
    store: event_store.EventStore,
    *,
    split: str,
    exclude_seen: bool,
    catalogue: Literal["trained", "all"] = "trained",
) -> EvalSet:
    """Reads a split's windows.

    Args:
        store: event store.
        split: "validation" or "test".
        exclude_seen: leave a user's earlier items out of the ranking, and out of the positives.
        catalogue: "trained" ranks the items with a training event, "all" every item.
    """
    windows = store.windows_of_split(split)
    table = store.windows
    counts = np.diff(table.positive_offsets)[windows]
    positions = ragged_positions(table.positive_offsets[windows], counts)
    positive_items = store.events.item_index[table.positive_events[positions]]
    history_len = (table.history_end[windows] - table.history_start[windows]).astype(np.int64)
    seen_counts = history_len if exclude_seen else np.zeros(len(windows), np.int64)
    seen = ragged_positions(table.history_start[windows], seen_counts)
    train_users = np.unique(table.user_index[store.windows_of_split("train")])
    return EvalSet(
        split=split,
        windows=windows,
        positive_offsets=_offsets(counts),
        positive_items=positive_items.astype(np.int64),
        seen_offsets=_offsets(seen_counts),
        seen_items=store.events.item_index[seen].astype(np.int64),
        catalogue_mask=(store.items.train_count > 0) | (catalogue == "all"),
        num_new_user=int(np.count_nonzero(~np.isin(table.user_index[windows], train_users))),
        history_len=history_len,
        popularity=store.items.train_count[positive_items],
    )


def evaluate(run: run_lib.Run, state: state_lib.TrainState, eval_set: EvalSet) -> Evaluation:
    """Ranks the catalogue by a state's vectors, and scores it on sampled negatives too.

    By its averaged parameters where the run keeps them, unless `eval.use_dense_ema` is off.
    """
    state = state_lib.for_evaluation(state, use_ema=run.config.eval.use_dense_ema)
    users, sampled = user_vectors(run, state, eval_set)
    items = item_vectors(run, state)
    # Behind the last item there are rows to split evenly: the block is that of the items.
    user_block = catalogue.default_user_block(run.store.num_items)
    scores = catalogue.vector_scores(users, items, user_block=user_block)
    return rank(eval_set, scores, run.config.eval, sampled=sampled)


def rank(
    eval_set: EvalSet,
    score_block: catalogue.ScoreBlock,
    config: schema.EvalConfig,
    *,
    sampled: dict[str, float] | None = None,
) -> Evaluation:
    """Figures of any ranking of the catalogue: a model's, a baseline's, the oracle's."""
    ranks = eval_set.ranks(score_block)

    def metrics(of_ranks):
        return ranking.user_metrics(of_ranks, eval_set.positive_offsets, cutoffs=config.top_k)

    return Evaluation(
        metrics=metrics(ranks.ranks),
        ranks=ranks,
        sampled=sampled or {},
        eval_set=eval_set,
        with_seen=metrics(ranks.ranks_with_seen) if config.also_with_seen else None,
        cutoffs=config.top_k,
    )


def user_vectors(
    run: run_lib.Run, state: state_lib.TrainState, eval_set: EvalSet
) -> tuple[Float[np.ndarray, "W E"], dict[str, float]]:
    """Vectors of the eval set's windows, and loss and recall among sampled negatives."""
    place = {int(window): number for number, window in enumerate(eval_set.windows)}
    vectors: np.ndarray | None = None
    sums = np.zeros(2 + len(run.config.metrics.recall_at_k))
    with run.pipeline.eval_batches(eval_set.split, device_put=run.put) as batches:
        for item in batches:
            metrics, found = run.eval_step(state, item.batch)
            # Each process knows the windows of its own groups.
            window_index = run.put(item.window_index.astype(np.int32))
            metrics, found, window_index = placement.to_host((metrics, found, window_index))
            sums += [metrics.loss_sum, metrics.num_queries, *metrics.recall_hits]
            is_used = window_index >= 0
            if vectors is None:
                vectors = np.zeros((len(eval_set.windows), found.shape[-1]), np.float32)
            rows = [place[int(window)] for window in window_index[is_used]]
            vectors[rows] = found[is_used]
    queries = max(sums[1], 1.0)
    sampled = {"loss": float(sums[0] / queries)}
    for k, hits in zip(run.config.metrics.recall_at_k, sums[2:], strict=True):
        sampled[f"sampled_recall@{k}"] = float(hits / queries)
    return vectors, sampled


def item_vectors(run: run_lib.Run, state: state_lib.TrainState) -> Float[jax.Array, "padded E"]:
    """Vectors of all items of the store, by item_index, split over the devices of the mesh.

    No device or process holds them all. Rows behind the last item are zeros.
    """
    num_items, num_devices = run.store.num_items, run.mesh.size
    # Blocks of one size, as many on every device: one compilation.
    num_blocks = -(-num_items // (_ITEM_BLOCK * num_devices))
    block = -(-num_items // (num_blocks * num_devices))
    first_of_device = np.arange(num_devices) * block * num_blocks
    own = partition.own_groups(num_devices, run.mesh)
    if own is not None:
        first_of_device = first_of_device[list(own)]
    write = partition.place_block_write(run.mesh)
    vectors = None
    for number in range(num_blocks):
        items = (first_of_device[:, None] + number * block + np.arange(block)).reshape(-1)
        valid = items < num_items
        index = np.where(valid, items, 0)
        batch = run.put((packing.item_values(run.pipeline.source.columns, index), valid))
        found = run.item_step(state, batch)
        if vectors is None:
            vectors = partition.split_zeros((num_blocks * found.shape[0], found.shape[1]), run.mesh)
        vectors = write(vectors, found, batch[1], number)
    return vectors


def ragged_positions(
    starts: Int[np.ndarray, "W"], counts: Int[np.ndarray, "W"]
) -> Int[np.ndarray, "_"]:
    """Positions starts[w], starts[w] + 1, ..., counts[w] of them, one window after the other."""
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + np.arange(int(counts.sum())) - before


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
