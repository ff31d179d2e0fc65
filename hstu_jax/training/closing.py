"""The table that ends a run: the model beside its baselines, ranked by the same code.

Popularity, co-occurrence and item-kNN come from `counting.py`; mean pooling is a model of its own,
trained here with the same budget (`model.user_tower.encoder = "mean"`) in the workdir's
`baseline_mean`; the oracle exists for the generated sample only.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from hstu_jax.config import schema
from hstu_jax.data import event_store, sample_oracle
from hstu_jax.metrics import catalogue, ranking
from hstu_jax.model import match
from hstu_jax.training import choice, counting, evaluation, loop, optimizer, processes, rank_files
from hstu_jax.training import run as run_lib
from hstu_jax.training import state as state_lib

Print = Callable[[str], None]
# With fewer the replays' noise hides part of the bound: 32 give recall@10 .260, 256 give .272.
_ORACLE_REPLAYS = 256


@dataclasses.dataclass(frozen=True)
class ClosingTable:
    """Figures of every ranking on one split.

    Attributes:
        split: what was ranked.
        step: of the model.
        rows: name of the ranking -> its figures; the model first.
        notes: what else a reader needs to believe the figures.
        num_bootstrap: resamples of the intervals.
    """

    split: str
    step: int
    rows: Mapping[str, evaluation.Evaluation]
    notes: tuple[str, ...]
    num_bootstrap: int

    def text(self) -> str:
        """Metrics down, rankings across."""
        lines = [
            f"{self.split} split, whole catalogue, step {self.step}",
            *_table({name: row.metrics for name, row in self.rows.items()}),
        ]
        with_seen = {name: row.with_seen for name, row in self.rows.items() if row.with_seen}
        if with_seen:
            lines += ["", "the same with seen items in the ranking", *_table(with_seen)]
        model_name, model = next(iter(self.rows.items()))
        for metric in model.metrics.values:
            if metric.startswith("recall@"):
                low, high = model.interval(metric, num_resamples=self.num_bootstrap)
                lines.append(
                    f"{model_name} {metric}: 95 % bootstrap interval {low:.4f} .. {high:.4f}"
                )
        return "\n".join([*lines, *self.notes])

    def groups_text(self) -> str:
        """The model and its baselines by history length and by popularity, at one cutoff."""
        tables = {name: row.group_table() for name, row in self.rows.items()}
        cutoffs = next(iter(self.rows.values())).cutoffs
        cutoff = 10 if 10 in cutoffs else cutoffs[0]
        metric = f"recall@{cutoff}"
        counted = {"history": "events of history", "popularity": "training events of the item"}
        names = {name: max(len(name), 7) for name in tables}
        lines = []
        first = next(iter(tables.values()))
        for place, group in enumerate(first):
            if not lines or group.kind != first[place - 1].kind:
                shown = "".join(f"  {name:>{size}}" for name, size in names.items())
                lines.append(f"{metric} by {counted[group.kind]:<28}{'count':>8}{shown}")
            cells = "".join(
                f"  {table[place].means[metric]:>{names[name]}.4f}"
                for name, table in tables.items()
            )
            lines.append(f"  {group.name:<38}{group.count:>8,}{cells}")
        return "\n".join(lines)

    def figures(self) -> dict[str, dict[str, float]]:
        """Every mean by ranking."""
        return {name: row.scalars() for name, row in self.rows.items()}

    def write(self, path: pathlib.Path) -> None:
        """Writes the figures as JSON."""
        content = {"split": self.split, "step": self.step, "figures": self.figures()}
        with_seen = {n: row.with_seen.means() for n, row in self.rows.items() if row.with_seen}
        if with_seen:
            content["figures_with_seen"] = with_seen
        content["groups"] = {
            name: [dataclasses.asdict(group) for group in row.group_table()]
            for name, row in self.rows.items()
        }
        path.write_text(json.dumps({**content, "notes": self.notes}, indent=2) + "\n")

    def write_ranks(self, folder: pathlib.Path) -> pathlib.Path:
        """Writes the ranks of every ranking into a folder; `hstu_jax.report` compares runs by them.

        Returns:
            The file.
        """
        path = folder / rank_files.FILE.format(split=self.split)
        rank_files.write(path, self.rows, step=self.step)
        return path


def _table(metrics_of: Mapping[str, ranking.UserMetrics]) -> list[str]:
    means = {name: metrics.means() for name, metrics in metrics_of.items()}
    metrics = list(next(iter(means.values())))
    width = max(len(name) for name in metrics)
    columns = {name: max(len(name), 7) for name in means}
    lines = [" " * width + "".join(f"  {name:>{size}}" for name, size in columns.items())]
    for metric in metrics:
        cells = (f"  {means[name][metric]:>{size}.4f}" for name, size in columns.items())
        lines.append(f"{metric:<{width}}" + "".join(cells))
    return lines


def evaluate_beside_baselines(
    run: run_lib.Run,
    state: state_lib.TrainState,
    *,
    train_mean: bool,
    beside_best: bool = False,
    echo: Print = processes.say,
) -> ClosingTable:
    """Evaluates a state on `eval.split`, with the baselines if `eval.baselines` asks for them.

    With several processes all must call it. They get the same figures of models; what is counted on
    the host (popularity, co-occurrence, item-kNN, the oracle) is in the first one's table only.

    Args:
        run: the run.
        state: its state.
        train_mean: train the mean-pooling baseline to the state's step where the workdir does not
            hold it yet; otherwise it is shown only if a checkpoint of that very step is there.
        beside_best: evaluate the checkpoint of `train.keep_best` too, if the run keeps one.
        echo: where progress goes.
    """
    config = run.config.eval
    eval_set = evaluation.make_eval_set(
        run.store,
        split=config.split,
        exclude_seen=config.exclude_seen,
        catalogue=config.catalogue,
    )
    encoder = run.config.model.user_tower.encoder
    rows = {encoder: evaluation.evaluate(run, state, eval_set)}
    notes = list(eval_notes(eval_set, rows))
    if beside_best and run.config.train.keep_best.metric:
        try:
            best = loop.restore_state(run, step="best")
        except choice.NoCheckpoint:
            notes.append(f"{encoder} best: not shown, {run.workdir} holds no validated state yet")
        else:
            rows[f"{encoder} best"] = evaluation.evaluate(run, best, eval_set)
            notes.append(
                f"{encoder} best: step {int(best.step):,}, the best validation by "
                f"{run.config.train.keep_best.metric}"
            )
    if config.baselines:
        if config.mean_baseline and run.config.model.user_tower.encoder != "mean":
            mean = _mean_pooling(run, int(state.step), may_train=train_mean, echo=echo)
            if isinstance(mean, loop.FitResult):
                rows["mean"] = evaluation.evaluate(mean.run, mean.state, eval_set)
                notes.append(
                    f"mean: pooling in place of the {encoder} layers, "
                    f"{int(mean.state.step):,} steps of the same batches and learning rates"
                )
            else:
                notes.append(mean)
    # Work of the host alone, for whoever shows the table.
    if config.baselines and processes.is_first():
        counted, note = counting.counting_baselines(run.store, eval_set, config)
        rows |= counted
        notes += note.splitlines()
    if config.oracle and processes.is_first():
        rows["oracle"] = evaluation.rank(eval_set, _oracle(run.store, eval_set), config)
    return ClosingTable(
        split=config.split,
        step=int(state.step),
        rows=rows,
        notes=tuple(notes),
        num_bootstrap=config.num_bootstrap,
    )


def _mean_pooling(
    run: run_lib.Run, step: int, *, may_train: bool, echo: Print
) -> loop.FitResult | str:
    """The mean-pooling baseline at a step, or why it is not shown."""
    baseline = mean_config(run.config)
    devices = list(run.mesh.devices.flat)
    if not may_train:
        try:
            return loop.restore(baseline, run.store, step=step, devices=devices)
        except choice.NoCheckpoint:
            return f"mean: not shown, {baseline.workdir} has no checkpoint of step {step}"
    echo("baseline  mean pooling: the same towers, data, steps and learning rates")
    return loop.fit(
        baseline, run.store, devices=devices, echo=lambda line: echo(_indent(line, "  mean    "))
    )


def mean_config(config: schema.Config) -> schema.Config:
    """The configuration of a run's mean-pooling baseline.

    Part optimizers that take STU parameters alone have nothing to take there and are left out.
    """
    tower = dataclasses.replace(config.model.user_tower, encoder="mean")
    model = dataclasses.replace(config.model, user_tower=tower)
    modules = match.build_model(model, config.all_features, config.feature_groups)
    params = jax.eval_shape(functools.partial(match.init_params, modules), jax.random.key(0))
    dense = config.train.dense_optimizer
    patterns = tuple(part.regex_pattern for part in dense.part_optimizers)
    used = set(optimizer.part_numbers(params, patterns=patterns).values())
    parts = tuple(part for i, part in enumerate(dense.part_optimizers) if i in used)
    dense = dataclasses.replace(dense, part_optimizers=parts)
    return dataclasses.replace(
        config,
        workdir=f"{config.workdir}/baseline_mean",
        model=model,
        train=dataclasses.replace(config.train, dense_optimizer=dense),
    )


def _indent(text: str, prefix: str) -> str:
    return "\n".join(prefix + line for line in text.splitlines())


def _oracle(store: event_store.EventStore, eval_set: evaluation.EvalSet) -> catalogue.ScoreBlock:
    """The true probabilities as a block function; blocks may be asked for in any order."""

    def score_block(start: int, stop: int) -> np.ndarray:
        blocks = sample_oracle.oracle_scores(
            store, eval_set.windows[start:stop], num_replays=_ORACLE_REPLAYS
        )
        return np.concatenate([scores for _, scores in blocks])

    return score_block


def eval_notes(
    eval_set: evaluation.EvalSet, rows: Mapping[str, evaluation.Evaluation]
) -> tuple[str, ...]:
    """What was ranked, what was left out and why, and the figures among sampled negatives.

    Args:
        eval_set: windows and items.
        rows: the model's ranking, by its name.
    """
    (model,) = rows.values()
    ranks, total = model.ranks, len(eval_set.positive_items)
    num_items = int(np.count_nonzero(eval_set.catalogue_mask))
    has_none = eval_set.popularity == 0
    sampled = ", ".join(f"{name} {value:.4f}" for name, value in model.sampled.items())
    return (
        f"{len(eval_set.windows):,} windows, {eval_set.num_new_user:,} of them of users without a "
        "training window",
        f"{total:,} positives: {ranks.num_ranked:,} ranked among {num_items:,} items; left out: "
        f"{ranks.num_seen:,} in the user's history, {ranks.num_cold:,} others outside of these "
        f"({has_none.mean() if total else 0:.1%} of all positives have no training event)",
        f"among sampled negatives: {sampled}",
    )
