"""The report of several runs, from the files of ranks that evaluations write."""

import dataclasses

import numpy as np
import pytest

from hstu_jax import report
from hstu_jax.config import schema
from hstu_jax.metrics import baselines
from hstu_jax.training import closing, evaluation, rank_files


@pytest.fixture(scope="module")
def folders(small_store, tmp_path_factory):
    """Two runs that know the answers but for noise, and two that know less."""
    eval_set = evaluation.make_eval_set(small_store, split="test", exclude_seen=True)
    config = schema.EvalConfig(also_with_seen=True)
    popular = baselines.same_for_all(small_store.items.train_count.astype(np.float64))

    def noisy(seed, level):
        def scores(start, stop):
            rng = np.random.default_rng([seed, start])
            found = level * rng.random((stop - start, small_store.num_items))
            for row in range(start, stop):
                own = slice(*eval_set.positive_offsets[row : row + 2])
                found[row - start, eval_set.positive_items[own]] += 1
            return found

        return scores

    made = {}
    for name, level in (("good", 1.05), ("poor", 1.2)):
        for seed in (0, 1):
            rows = {"hstu": noisy(seed, level), "popularity": popular}
            table = closing.ClosingTable(
                split="test",
                step=7,
                rows={n: evaluation.rank(eval_set, s, config) for n, s in rows.items()},
                notes=(),
                num_bootstrap=2,
            )
            made[name, seed] = tmp_path_factory.mktemp(name)
            assert table.write_ranks(made[name, seed]).name == "closing_ranks_test.npz"
    return made, eval_set


def runs(made, name):
    return [str(made[name, seed]) for seed in (0, 1)]


def test_files_hold_what_was_ranked(folders):
    made, eval_set = folders
    file = rank_files.read(made["good", 0] / "closing_ranks_test.npz")
    assert (file.split, file.step, file.exclude_seen) == ("test", 7, True)
    assert list(file.ranks) == ["hstu", "popularity"]
    assert file.positive_items.tolist() == eval_set.positive_items.tolist()
    assert file.catalogue_size == np.count_nonzero(eval_set.catalogue_mask)
    assert (file.ranks["hstu"] > 0).sum() == (file.ranks["popularity"] > 0).sum() > 0
    assert list(file.ranks_with_seen) == ["hstu", "popularity"]
    for name, ranks in file.ranks_with_seen.items():
        assert (ranks >= file.ranks[name]).all() and (ranks > file.ranks[name]).any()


def test_means_deviations_and_paired_interval(folders, capsys):
    made, _ = folders
    files = [rank_files.read(made[key] / "closing_ranks_test.npz") for key in made]
    means = [
        np.mean(
            report.ranking.user_metrics(
                file.ranks["hstu"], file.positive_offsets, cutoffs=(10,)
            ).values["recall@10"]
        )
        for file in files
    ]
    flags = ["--runs", *runs(made, "good"), "--against", *runs(made, "poor")]
    report.main([*flags, "--metrics", "recall@10", "mrr"])
    first, line, mrr = capsys.readouterr().out.splitlines()
    assert "2 run(s) against 2" in first and mrr.startswith("mrr")
    assert f"{np.mean(means[:2]):.4f} sd {np.std(means[:2], ddof=1):.4f}  against" in line
    assert f"difference {np.mean(means[:2]) - np.mean(means[2:]):+.4f}, 95 % +" in line


def test_rows_of_one_run(folders, capsys):
    made, _ = folders
    report.main(["--runs", str(made["good", 0]), "--against_row", "popularity"])
    assert "difference +" in capsys.readouterr().out
    report.main(["--runs", str(made["good", 0]), "--row", "popularity", "--metrics", "ndcg@7"])
    text = capsys.readouterr().out
    assert "1 run(s)" in text and "ndcg@7  0." in text and "  95 % 0." in text


def test_figures_with_seen_items(folders, capsys):
    made, _ = folders
    report.main(["--runs", *runs(made, "good"), "--with_seen", "--metrics", "mrr"])
    first, line = capsys.readouterr().out.splitlines()
    files = [rank_files.read(made["good", n] / "closing_ranks_test.npz") for n in (0, 1)]
    means = [
        report.ranking.user_metrics(
            file.ranks_with_seen["hstu"], file.positive_offsets, cutoffs=(1,)
        ).means()["mrr"]
        for file in files
    ]
    assert first.endswith("with seen items in the ranking")
    assert f"{np.mean(means):.4f} sd {np.std(means, ddof=1):.4f}" in line


def test_catalogues_of_one_size_may_differ(folders):
    made, _ = folders
    file = rank_files.read(made["good", 0] / "closing_ranks_test.npz")
    other = dataclasses.replace(file, catalogue_sha256="0" * 64)
    with pytest.raises(ValueError, match="a: catalogue_sha256=.*, and b has 000"):
        file.check_same_task(other, names=("a", "b"))
    file.check_same_task(dataclasses.replace(file, catalogue_sha256=None), names=("a", "b"))


def test_what_cannot_be_compared_is_refused(folders, small_store, tmp_path):
    made, _ = folders
    good = str(made["good", 0])
    other = evaluation.make_eval_set(small_store, split="test", exclude_seen=False)
    flat = baselines.same_for_all(np.zeros(small_store.num_items))
    rows = {"hstu": evaluation.rank(other, flat, schema.EvalConfig())}
    rank_files.write(tmp_path / "closing_ranks_test.npz", rows, step=1)
    refused = {
        ("--against", str(tmp_path)): "exclude_seen=True, and .* has False: only rankings of the",
        ("--row", "mean"): "row='mean': .* has no such ranking; it has hstu, popularity",
        ("--metrics", "auc"): "--metrics=auc: unknown; write hit_rate@K",
        ("--metrics", "hit_rate@010"): "--metrics=hit_rate@010: unknown; write hit_rate@K",
        ("--split", "validation"): "closing_ranks_validation.npz: no such file; `python -m hstu_j",
        ("--num_bootstrap", "0"): "--num_bootstrap=0: must be at least 1",
    }
    for flags, message in refused.items():
        with pytest.raises(SystemExit, match=message):
            report.main(["--runs", good, *flags])
    with pytest.raises(SystemExit, match="--with_seen: .* holds no ranks with seen items; "):
        report.main(["--runs", str(tmp_path), "--with_seen"])
    for broken in ("not an archive", ""):
        (tmp_path / "closing_ranks_test.npz").write_text(broken)
        with pytest.raises(SystemExit, match="is no file of ranks .*; evaluate again"):
            report.main(["--runs", str(tmp_path)])
