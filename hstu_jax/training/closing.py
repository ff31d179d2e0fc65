"""The table that ends a run: the model beside its baselines, ranked by the same code.

Popularity and co-occurrence come from `counting.py`; mean pooling is a model of its own, trained
here with the same budget (`model.user_tower.encoder = "mean"`) in the workdir's
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
from hstu_jax.metrics import catalogue
from hstu_jax.model import match
from hstu_jax.training import counting, evaluation, loop, optimizer
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
        means = {name: row.metrics.means() for name, row in self.rows.items()}
        metrics = list(next(iter(means.values())))
        width = max(len(name) for name in metrics)
        columns = {name: max(len(name), 7) for name in means}
        lines = [
            f"{self.split} split, whole catalogue, step {self.step}",
            " " * width + "".join(f"  {name:>{size}}" for name, size in columns.items()),
        ]
        for metric in metrics:
            cells = (f"  {means[name][metric]:>{size}.4f}" for name, size in columns.items())
            lines.append(f"{metric:<{width}}" + "".join(cells))
        model_name, model = next(iter(self.rows.items()))
        for metric in metrics:
            if metric.startswith("recall@"):
                low, high = model.interval(metric, num_resamples=self.num_bootstrap)
                lines.append(
                    f"{model_name} {metric}: 95 % bootstrap interval {low:.4f} .. {high:.4f}"
                )
        return "\n".join([*lines, *self.notes])

    def figures(self) -> dict[str, dict[str, float]]:
        """Every mean by ranking."""
        return {name: row.scalars() for name, row in self.rows.items()}

    def write(self, path: pathlib.Path) -> None:
        """Writes the figures as JSON."""
        content = {"split": self.split, "step": self.step, "figures": self.figures()}
        path.write_text(json.dumps({**content, "notes": self.notes}, indent=2) + "\n")


def evaluate_beside_baselines(
    run: run_lib.Run,
    state: state_lib.TrainState,
    *,
    train_mean: bool,
    echo: Print = print,
) -> ClosingTable:
    """Evaluates a state on `eval.split`, with the baselines if `eval.baselines` asks for them.

    Args:
        run: the run.
        state: its state.
        train_mean: train the mean-pooling baseline to the state's step where the workdir does not
            hold it yet; otherwise it is shown only if a checkpoint of that very step is there.
        echo: where progress goes.
    """
    config = run.config.eval
    eval_set = evaluation.make_eval_set(
        run.store, split=config.split, exclude_seen=config.exclude_seen
    )
    rows = {run.config.model.user_tower.encoder: evaluation.evaluate(run, state, eval_set)}
    notes = list(_eval_notes(eval_set, rows))
    if config.baselines:
        if run.config.model.user_tower.encoder != "mean":
            mean = _mean_pooling(run, int(state.step), may_train=train_mean, echo=echo)
            if isinstance(mean, loop.FitResult):
                rows["mean"] = evaluation.evaluate(mean.run, mean.state, eval_set)
                notes.append(
                    f"mean: pooling in place of the STU layers, {int(mean.state.step):,} steps of "
                    "the same batches and learning rates"
                )
            else:
                notes.append(mean)
        counted, note = counting.counting_baselines(run.store, eval_set, config)
        rows |= counted
        notes.append(note)
    if config.oracle:
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
        except FileNotFoundError:
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


def _eval_notes(
    eval_set: evaluation.EvalSet, rows: Mapping[str, evaluation.Evaluation]
) -> tuple[str, ...]:
    (model,) = rows.values()
    ranks, total = model.ranks, len(eval_set.positive_items)
    num_items = int(np.count_nonzero(eval_set.catalogue_mask))
    is_cold = ~eval_set.catalogue_mask[eval_set.positive_items]
    sampled = ", ".join(f"{name} {value:.4f}" for name, value in model.sampled.items())
    return (
        f"{len(eval_set.windows):,} windows, {eval_set.num_new_user:,} of them of users without a "
        "training window",
        f"{total:,} positives: {ranks.num_ranked:,} ranked among {num_items:,} items; left out: "
        f"{ranks.num_seen:,} in the user's history, {ranks.num_cold:,} others without a training "
        f"event ({is_cold.mean() if total else 0:.1%} of all positives have none)",
        f"among sampled negatives: {sampled}",
    )
