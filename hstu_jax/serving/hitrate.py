"""An export against rows whose answers are known: hit rate, recall and NDCG of its search.

Rules are those of evaluation (`hstu_jax.training.evaluation`), so that the figures of one split are
the same: a row's whole history is neither shown nor looked for, the catalogue is the items with a
training event, equal scores count against the model, figures are means over rows that have
something to find. Beside them, with an index, the same figures for its lists, where an item that is
not in the list is not found (and a score's other items are those of the list).

Not part of the loader: this reads `hstu_jax.metrics`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hstu_jax.metrics import catalogue, ranking
from hstu_jax.serving import bar_chart, item_index, parquet_parts, retrieval, top_k
from hstu_jax.serving.artifact import Artifact
from hstu_jax.serving.search_catalogue import Exclusions

_LENGTHS = (0, 1, 10, 50, 200, 1000)  # first history length of each group
_POPULARITY = (0.5, 0.8, 0.95)  # shares of the items, from the rarest, that end a group


@dataclasses.dataclass(frozen=True, kw_only=True)
class HitrateOptions:
    """What is measured.

    Attributes:
        cutoffs: the k.
        positives_column: list column of the items to be found; "" = `cand_seq__` and the item id.
        exclude_seen: leave the history's items out.
        exclude_cold: leave items without a training event out.
        index: "exact", or "faiss" for both side by side.
        batch_rows: rows at a time.
    """

    cutoffs: tuple[int, ...] = ranking.CUTOFFS
    positives_column: str = ""
    exclude_seen: bool = True
    exclude_cold: bool = True
    index: str = "exact"
    batch_rows: int = 1024

    def __post_init__(self) -> None:
        if not self.cutoffs or min(self.cutoffs) < 1 or len(set(self.cutoffs)) < len(self.cutoffs):
            raise ValueError(
                f"--cutoffs={list(self.cutoffs)}: must be different numbers of 1 or more."
            )
        if self.index not in retrieval.INDEXES:
            raise ValueError(
                f"--index={self.index!r}: unknown; available: {', '.join(retrieval.INDEXES)}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hitrate:
    """The figures.

    Attributes:
        figures: search -> metric -> mean over rows.
        by_length: search -> length of the history -> metric -> mean; "rows" counts them.
        by_popularity: search -> training events of the item -> "recall@k" over positives;
            "positives" counts them.
        overlap: share of the exact lists, at the largest k, that the index finds; None without.
        counts: rows and positives, and what was left out.
        options: what was asked.
        model_version: of the export.
    """

    figures: Mapping[str, Mapping[str, float]]
    by_length: Mapping[str, Mapping[str, Mapping[str, float | int]]]
    by_popularity: Mapping[str, Mapping[str, Mapping[str, float | int]]]
    overlap: float | None
    counts: Mapping[str, int]
    options: HitrateOptions
    model_version: str

    def text(self) -> str:
        """The table for the screen."""
        names = list(self.figures)
        lines = [" " * 22 + "".join(f"{name:>14}" for name in names)]
        for metric in self.figures[names[0]]:
            cells = (self.figures[name].get(metric) for name in names)
            lines.append(f"{metric:<22}" + "".join(_cell(value) for value in cells))
        metric = f"recall@{max(self.options.cutoffs)}"
        for title, groups, unit in (
            ("history length", self.by_length, "rows"),
            ("training events", self.by_popularity, "positives"),
        ):
            lines.append(f"{metric} by {title}")
            for label, values in groups[names[0]].items():
                cells = "".join(_cell(groups[name][label][metric]) for name in names)
                lines.append(f"  {label:<20}{cells}  {values[unit]:,} {unit}")
        if self.overlap is not None:
            largest = max(self.options.cutoffs)
            lines.append(f"{names[1]} finds {self.overlap:.4f} of the exact top {largest}")
        lines.append(", ".join(f"{value:,} {name}" for name, value in self.counts.items()))
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def picture(self) -> str:
        """SVG: recall by k, by history length and by popularity."""
        metric = f"recall@{max(self.options.cutoffs)}"
        names = list(self.figures)
        by_cutoff = {
            name: [self.figures[name][f"recall@{k}"] for k in self.options.cutoffs]
            for name in names
        }
        panels = [
            bar_chart.Panel("recall by k", [f"@{k}" for k in self.options.cutoffs], by_cutoff)
        ]
        for title, groups, unit in (
            ("history length", self.by_length, "rows"),
            ("training events of the item", self.by_popularity, "positives"),
        ):
            labels = [f"{k}\n{v[unit]:,} {unit}" for k, v in groups[names[0]].items()]
            values = {name: [v[metric] for v in groups[name].values()] for name in names}
            panels.append(bar_chart.Panel(f"{metric} by {title}", labels, values))
        return bar_chart.svg(f"Model {self.model_version[:12]}", panels)


def hitrate(
    artifact: Artifact,
    *,
    ground_truth: str,
    options: HitrateOptions,
    echo: Callable[[str], None] = print,
) -> Hitrate:
    """Measures an export's search.

    Args:
        artifact: the export.
        ground_truth: parquet rows of users with the items to be found, as a pattern.
        options: what to measure.
        echo: where progress goes.

    Raises:
        FileNotFoundError: no rows, no items, no index.
        ValueError, TypeError: a column that is missing or breaks a rule.
    """
    files = parquet_parts.expand(ground_truth, flag="--ground_truth")
    column = options.positives_column or f"cand_seq__{artifact.manifest.item_id_column}"
    wanted = list(dict.fromkeys([*retrieval.user_columns(artifact), column]))
    measure = _Measure(artifact, options)
    for file, start, table in parquet_parts.rows_of(files, wanted, batch_rows=options.batch_rows):
        try:
            positives = retrieval.list_items(artifact, table, column)
            measure.add(
                artifact.embed_users(table), positives, retrieval.seen_items(artifact, table)
            )
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{file}, rows counted from {start}: {error}") from error
        echo(f"rows      {measure.num_rows:,}")
    return measure.result()


class _Measure:
    """Ranks of all positives, a batch of rows at a time."""

    def __init__(self, artifact: Artifact, options: HitrateOptions) -> None:
        self._options, self._artifact = options, artifact
        ids = np.asarray(artifact.item_ids())
        self._order = np.argsort(ids, kind="stable")
        self._ids = ids[self._order]
        self._vectors = np.asarray(artifact.item_vectors())[self._order]
        is_cold = artifact.item_is_cold()[self._order]
        self._mask = ~is_cold if options.exclude_cold else np.ones(len(ids), bool)
        largest = max(options.cutoffs)
        self._ranks: dict[str, list[np.ndarray]] = {"exact": []}
        self._searches: list[retrieval.Search] = []
        if options.index == "faiss":
            mask = ~artifact.item_is_cold() if options.exclude_cold else None
            ann = item_index.AnnSearch(artifact, item_mask=mask)
            ann.check_k(largest)
            self._ann_name = f"faiss {ann.options.kind}"
            self._ranks[self._ann_name] = []
            exact = top_k.ExactSearch(ids, artifact.item_vectors(), item_mask=mask)
            self._searches = [exact, ann]
        self._sizes: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._items: list[np.ndarray] = []
        self._shared = self._listed = 0
        self._counts = dict.fromkeys(("ranked", "seen", "cold", "not_in_catalogue"), 0)
        self.num_rows = 0

    def add(self, users: np.ndarray, positives: Exclusions, history: Exclusions) -> None:
        """Ranks the positives of some rows."""
        positives, num_unknown = self._places(positives)
        seen = history
        if not self._options.exclude_seen:
            seen = Exclusions(np.zeros_like(history.offsets), history.ids[:0])
        excluded, _ = self._places(seen)
        found = catalogue.positive_ranks(
            users,
            self._vectors,
            positive_offsets=positives.offsets,
            positive_items=positives.ids,
            excluded_offsets=excluded.offsets,
            excluded_items=excluded.ids,
            catalogue_mask=self._mask,
        )
        self._ranks["exact"].append(found.ranks)
        if self._searches:
            self._add_lists(users, positives, seen, found.ranks > 0)
        self._sizes.append(np.diff(positives.offsets))
        self._lengths.append(np.diff(history.offsets))
        self._items.append(positives.ids)
        self._counts["ranked"] += found.num_ranked
        self._counts["seen"] += found.num_seen
        self._counts["cold"] += found.num_cold
        self._counts["not_in_catalogue"] += num_unknown
        self.num_rows += len(users)

    def _places(self, lists: Exclusions) -> tuple[Exclusions, int]:
        """(places in the id order, ids left out because the catalogue lacks them)."""
        place = np.minimum(np.searchsorted(self._ids, lists.ids), len(self._ids) - 1)
        is_known = self._ids[place] == lists.ids
        row = np.repeat(np.arange(lists.offsets.size - 1), np.diff(lists.offsets))[is_known]
        sizes = np.bincount(row, minlength=lists.offsets.size - 1)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        known = Exclusions(offsets, place[is_known].astype(np.int64))
        return known, int(np.count_nonzero(~is_known))

    def _add_lists(self, users, positives, seen, is_ranked) -> None:
        largest = max(self._options.cutoffs)
        # One more than is asked: it says whether the last score goes on, and ties count against.
        num = min(largest + 1, int(np.count_nonzero(self._mask)))
        exact, ann = (search.search(users, k=num, exclusions=seen) for search in self._searches)
        row = np.repeat(np.arange(len(users)), np.diff(positives.offsets))
        is_own = ann.ids[row] == self._ids[positives.ids][:, None]
        is_own &= np.arange(num) < ann.counts[row][:, None]
        score = np.max(ann.scores[row], axis=1, where=is_own, initial=-np.inf)
        rank = np.sum(ann.scores[row] >= score[:, None], axis=1)
        rank = np.where(is_own.any(axis=1), rank, len(self._ids) + 1)
        self._ranks[self._ann_name].append(np.where(is_ranked, rank, 0))
        counts = np.minimum(exact.counts, largest)
        for one, other, count in zip(exact.ids, ann.ids, counts, strict=True):
            self._shared += np.intersect1d(one[:count], other[:count]).size
        self._listed += int(counts.sum())

    def result(self) -> Hitrate:
        """The figures of all rows so far."""
        sizes = np.concatenate([np.empty(0, np.int64), *self._sizes])
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if not self._counts["ranked"]:
            raise ValueError(
                f"{self.num_rows:,} rows have nothing to find: {self._counts}; check the items' "
                "ids and the positives' column."
            )
        lengths = np.concatenate([np.empty(0, np.int64), *self._lengths])
        items = np.concatenate([np.empty(0, np.int64), *self._items])
        figures: dict[str, Any] = {}
        by_length: dict[str, Any] = {}
        by_popularity: dict[str, Any] = {}
        for name, parts in self._ranks.items():
            ranks = np.concatenate([np.empty(0, np.int64), *parts])
            metrics = ranking.user_metrics(ranks, offsets, cutoffs=self._options.cutoffs)
            means = metrics.means()
            if name != "exact":  # a list does not say where the others are
                del means["mrr"]
            figures[name] = means
            row = np.repeat(np.arange(len(sizes)), sizes)
            of_rows = lengths[np.unique(row[ranks > 0])]
            by_length[name] = _length_groups(metrics, of_rows)
            by_popularity[name] = self._popularity_groups(ranks, items)
        counts = {
            "rows": self.num_rows,
            "rows_with_something_to_find": metrics.num_users,
            "positives": int(sizes.sum()) + self._counts["not_in_catalogue"],
            **self._counts,
        }
        return Hitrate(
            figures=figures,
            by_length=by_length,
            by_popularity=by_popularity,
            overlap=self._shared / max(self._listed, 1) if self._searches else None,
            counts=counts,
            options=self._options,
            model_version=self._artifact.manifest.model_version,
        )

    def _popularity_groups(self, ranks: np.ndarray, items: np.ndarray) -> dict[str, Any]:
        count = train_counts(self._artifact, self._ids)
        seen = np.sort(count[count > 0])
        edges = [0]  # a group is the items of more training events than its edge
        if seen.size:
            edges += [int(np.quantile(seen, share, method="lower")) for share in _POPULARITY]
        edges = sorted(set(edges))
        ranks, of_item = ranks[ranks > 0], count[items[ranks > 0]]
        groups = {}
        for low, high in zip([-1, *edges], [*edges, None], strict=True):
            own = of_item > low if high is None else (of_item > low) & (of_item <= high)
            label = "0" if high == 0 else f"{low + 1}-{high}" if high is not None else f"{low + 1}+"
            if not own.any():
                continue
            share = {f"recall@{k}": float(np.mean(ranks[own] <= k)) for k in self._options.cutoffs}
            groups[label] = {"positives": int(own.sum()), **share}
        return groups


def _length_groups(metrics: ranking.UserMetrics, lengths: np.ndarray) -> dict[str, Any]:
    groups = {}
    for low, high in zip(_LENGTHS, [*_LENGTHS[1:], None], strict=True):
        own = (lengths >= low) & (lengths < high) if high is not None else lengths >= low
        if not own.any():
            continue
        label = f"{low}+" if high is None else str(low) if high == low + 1 else f"{low}-{high - 1}"
        means = {name: float(values[own].mean()) for name, values in metrics.values.items()}
        groups[label] = {"rows": int(own.sum()), **means}
    return groups


def train_counts(artifact: Artifact, ids: np.ndarray) -> np.ndarray:
    """int64 [n]: training events of items; 0 for those that training has not seen."""
    files = artifact.manifest.training_items
    known = np.load(pathlib.Path(artifact.path) / files.ids, allow_pickle=False)
    counts = np.load(pathlib.Path(artifact.path) / files.counts, allow_pickle=False)
    if not len(known):
        return np.zeros(len(ids), np.int64)
    place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[place] == ids, counts[place], 0).astype(np.int64)


def _cell(value: float | None) -> str:
    return f"{'-':>14}" if value is None else f"{value:>14.4f}"
