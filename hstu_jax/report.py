"""Figures of several runs: mean and standard deviation over seeds, and paired intervals.

    python -m hstu_jax.report --runs runs/a_seed0 runs/a_seed1 --against runs/b_seed0 runs/b_seed1
    python -m hstu_jax.report --runs runs/a_seed0 --against_row item-knn

Reads the ranks that a run's closing evaluation leaves in its workdir. A query-user's value of a
metric is its mean over the runs of one side; the interval is a bootstrap over query-users, drawn
with both sides' values. It holds for these trained models: how much seeds differ is the standard
deviation beside it.
"""

import argparse
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from hstu_jax import launchers
from hstu_jax.metrics import ranking
from hstu_jax.training import rank_files

_METRICS = ("hit_rate@10", "ndcg@10", "hit_rate@50", "ndcg@50", "hit_rate@200", "ndcg@200", "mrr")
_SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, reads the files, prints the table.

    Args:
        argv: flags; None for the command line's.

    Raises:
        SystemExit: wrong flags, or files that cannot be read or compared.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hstu_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", nargs="+", required=True, help="workdirs, one a seed")
    parser.add_argument("--against", nargs="+", help="workdirs of the other side")
    parser.add_argument("--row", help="ranking of the files; default the model, their first")
    parser.add_argument("--against_row", help="of the other side; default --row")
    parser.add_argument(
        "--with_seen",
        action="store_true",
        help="figures with seen items in the ranking, of runs with eval.also_with_seen=True",
    )
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--metrics", nargs="+", default=_METRICS, help="name@k, or mrr")
    parser.add_argument("--num_bootstrap", type=int, default=1000)
    flags = launchers.parse_alone(parser, argv)
    try:
        print(_report(flags))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def _report(flags: argparse.Namespace) -> str:
    if flags.num_bootstrap < 1:
        raise ValueError(f"--num_bootstrap={flags.num_bootstrap}: must be at least 1.")
    files = {folder: _read(folder, flags.split) for folder in flags.runs + (flags.against or [])}
    first, *others = files
    for other in others:
        files[first].check_same_task(files[other], names=(first, other))
    cutoffs = tuple(sorted({_cutoff(name) for name in flags.metrics} - {0})) or (1,)
    options = {"cutoffs": cutoffs, "with_seen": flags.with_seen}
    left = [_values(files, folder, flags.row, **options) for folder in flags.runs]
    right = None
    if flags.against or flags.against_row:
        row = flags.against_row or flags.row
        right = [_values(files, folder, row, **options) for folder in flags.against or flags.runs]
    num_users = left[0].num_users
    lines = [f"{flags.split} split, {num_users:,} query-users; {len(left)} run(s)"]
    if right:
        lines[0] += f" against {len(right)}"
        for values in (*left, *right):
            if not np.array_equal(values.users, left[0].users):
                raise ValueError("--runs: rank other query-users than --against; evaluate again.")
    if flags.with_seen:
        lines[0] += "; with seen items in the ranking"
    width = max(map(len, flags.metrics))
    for name in flags.metrics:
        lines.append(f"{name:<{width}}  {_line(name, left, right, flags.num_bootstrap)}")
    return "\n".join(lines)


def _line(
    name: str,
    left: list[ranking.UserMetrics],
    right: list[ranking.UserMetrics] | None,
    num_resamples: int,
) -> str:
    mine = _of_users(name, left)
    options = {"seed": _SEED, "num_resamples": num_resamples}
    if right is None:
        low, high = ranking.bootstrap_interval(mine, **options)
        return f"{_mean_and_deviation(name, left)}  95 % {low:.4f} .. {high:.4f}"
    theirs = _of_users(name, right)
    low, high = ranking.paired_interval(mine, theirs, **options)
    return (
        f"{_mean_and_deviation(name, left)}  against {_mean_and_deviation(name, right)}  "
        f"difference {float(np.mean(mine - theirs)):+.4f}, 95 % {low:+.4f} .. {high:+.4f}"
    )


def _mean_and_deviation(name: str, runs: list[ranking.UserMetrics]) -> str:
    means = [values.means()[name] for values in runs]
    deviation = f" sd {np.std(means, ddof=1):.4f}" if len(means) > 1 else ""
    return f"{np.mean(means):.4f}{deviation}"


def _of_users(name: str, runs: list[ranking.UserMetrics]) -> Float[np.ndarray, "users"]:
    """Mean over the runs, for every query-user."""
    return np.mean([values.values[name] for values in runs], axis=0)


def _read(folder: str, split: str) -> rank_files.RankFile:
    return rank_files.read(pathlib.Path(folder) / rank_files.FILE.format(split=split))


def _values(
    files: dict[str, rank_files.RankFile],
    folder: str,
    row: str | None,
    *,
    cutoffs: tuple[int, ...],
    with_seen: bool,
) -> ranking.UserMetrics:
    file = files[folder]
    if with_seen and file.ranks_with_seen is None:
        raise ValueError(
            f"--with_seen: {folder} holds no ranks with seen items; evaluate with "
            "--config.eval.also_with_seen=True."
        )
    row = row or next(iter(file.ranks))
    if row not in file.ranks:
        raise ValueError(
            f"row={row!r}: {folder} has no such ranking; it has {', '.join(file.ranks)}."
        )
    ranks = file.ranks_with_seen if with_seen else file.ranks
    return ranking.user_metrics(ranks[row], file.positive_offsets, cutoffs=cutoffs)


def _cutoff(name: str) -> int:
    """The k of a metric's name; 0 for mrr.

    Raises:
        ValueError: not a metric's name.
    """
    kind, _, cutoff = name.partition("@")
    if name == "mrr":
        return 0
    is_number = cutoff.isdecimal() and str(int(cutoff)) == cutoff and cutoff != "0"
    if kind not in ("hit_rate", "recall", "ndcg") or not is_number:
        raise ValueError(
            f"--metrics={name}: unknown; write hit_rate@K, recall@K or ndcg@K, or mrr."
        )
    return int(cutoff)


if __name__ == "__main__":
    main()
