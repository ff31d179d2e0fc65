"""The command lines: what they print, and that a wrong call ends with a message and status 2."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import pytest
from absl import app, flags
from absl.testing import flagsaver

from hstu_jax import benchmark, cli, evaluate, train
from hstu_jax.config import schema, train_schema
from hstu_jax.training import closing as closing_lib
from hstu_jax.training import loop, rank_files
from tests.training.small_config import small_config, with_two_tables


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_doctor_prints_versions_devices_and_kernel():
    result = run("-m", "hstu_jax.doctor")
    assert result.returncode == 0, result.stderr
    assert "backend: cpu" in result.stdout
    assert "attention kernel for 'auto': xla" in result.stdout


# Arguments of a wrong call, its exit status and what it says.
WRONG_CALLS = (
    (["--config.train.num_stepz=3"], 2, "num_stepz"),
    (["--config.trian.num_steps=3"], 2, 'Did you mean "train" instead of "trian"?'),
    (["--config.model.temperature=-1"], 2, "model.temperature=-1.0: must be positive."),
    (
        ["--config.data.source=event_store", "--config.data.path=no/where"],
        2,
        "make it with `python -m hstu_jax.prepare kuairand --raw_dir",
    ),
    (["step"], 1, "before the flags"),
)
# What `python -m hstu_jax.train` does, for every call in a process that has its imports already.
_FORKED = """
import json, os, runpy, sys
from hstu_jax import train  # its modules, before the forks

folder, calls = sys.argv[1:]
for number, arguments in enumerate(json.loads(calls)):
    child = os.fork()
    if child == 0:
        file = os.open(f"{folder}/{number}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = ["train", *arguments]
        del sys.modules["hstu_jax.train"]
        runpy.run_module("hstu_jax.train", run_name="__main__")
        sys.exit("the command came back")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_wrong_calls_end_with_a_message(tmp_path):
    calls = [["--config=configs/kuairand.py", *arguments] for arguments, *_ in WRONG_CALLS]
    result = run("-c", _FORKED, str(tmp_path), json.dumps(calls))
    assert result.returncode == 0, result.stderr
    found = map(int, result.stdout.split())
    for number, (status, (_, expected, message)) in enumerate(zip(found, WRONG_CALLS, strict=True)):
        text = (tmp_path / str(number)).read_text()
        assert message in text and "Traceback" not in text
        assert status == expected, text


@pytest.mark.parametrize("words", [[], ["steps"], ["step", "scaling"]])
def test_a_word_chooses_between_programs(words, monkeypatch):
    monkeypatch.setattr(cli.flags, "mark_flag_as_required", lambda name: None)
    monkeypatch.setattr(cli.app, "run", lambda program: program(["benchmark", *words]))
    with pytest.raises(app.UsageError, match=r"before the flags: expected one of \['step', 'sca"):
        cli.run_main({"step": print, "scaling": print})


@pytest.mark.parametrize(
    ("platforms", "gpus", "uses_devices", "is_told"),
    [
        ("cpu", 8, True, True),
        ("cpu", 8, False, False),
        ("cuda,cpu", 0, True, False),
        (None, 8, True, False),
        (None, 0, True, True),
    ],
)
def test_programs_on_a_cpu_keep_freed_memory(
    platforms, gpus, uses_devices, is_told, trained, monkeypatch
):
    told = []
    monkeypatch.setattr(cli.host_memory, "keep_freed_memory", lambda: told.append("memory"))
    monkeypatch.setattr(cli.flags, "mark_flag_as_required", lambda name: None)
    monkeypatch.setattr(cli.app, "run", lambda program: program(["train"]))
    monkeypatch.setattr(cli.launchers, "installed_gpus", lambda: gpus)
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(cli, "CONFIG", mock.Mock())
    monkeypatch.setattr(cli, "WORKDIR", mock.Mock(value=None))
    monkeypatch.setattr(cli.resolve, "resolve", lambda raw: trained)
    for name in ("refuse_launcher", "set_up_jax", "_stay_on_the_cpu"):
        monkeypatch.setattr(cli, name, lambda **kwargs: None)
    monkeypatch.setattr(cli, "_platforms", lambda: platforms)
    cli.run_main(lambda config: told.append("main"), uses_devices=uses_devices)
    assert told == ["memory"] * is_told + ["main"]


def test_unknown_variant_lists_the_known_ones():
    result = run("-m", "hstu_jax.train", "--config=configs/kuairand.py:2k")
    assert result.returncode != 0
    assert "variant='2k': unknown; available: sample" in result.stderr


@pytest.fixture(scope="module")
def trained(small_store, tmp_path_factory) -> schema.Config:
    config = with_two_tables(small_config(small_store, tmp_path_factory.mktemp("commands")))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source="event_store", num_groups=2),
        eval=dataclasses.replace(config.eval, baselines=True, every_num_steps=4),
        train=dataclasses.replace(
            config.train, keep_best=train_schema.KeepBestConfig(metric="ndcg@100")
        ),
    )
    flags.FLAGS.mark_as_parsed()  # the mains read their other flags at the defaults
    train.main(config)
    return config


def test_train_writes_the_closing_table(trained, capsys):
    with open(f"{trained.workdir}/closing_test.json") as file:
        closing = json.load(file)
    names = ["hstu", "hstu best", "mean", "co-occurrence", "item-knn", "last-day", "popularity"]
    assert list(closing["figures"]) == names
    for figures in closing["figures"].values():
        assert 0 <= figures["recall@10"] <= figures["recall@100"] <= 1
    with open(f"{trained.workdir}/metrics.jsonl") as file:
        kinds = [json.loads(line)["kind"] for line in file]
    assert kinds == ["train", "train", "validation", "train", "validation"]
    assert set(closing["groups"]) == set(names)
    ranks = rank_files.read(pathlib.Path(trained.workdir) / "closing_ranks_test.npz")
    assert list(ranks.ranks) == names and ranks.step == 6
    # The best validation of two, evaluated beside the last step.
    (note,) = [note for note in closing["notes"] if note.startswith("hstu best: step ")]
    best = loop.restore(trained, cli.open_data(trained), step="best")
    assert f"step {int(best.state.step)}, the best validation by ndcg@100" in note
    alone = closing_lib.evaluate_beside_baselines(best.run, best.state, train_mean=False)
    assert alone.figures()["hstu"]["mrr"] == closing["figures"]["hstu best"]["mrr"]
    assert "hstu best" not in alone.rows


def test_the_trained_baseline_can_be_left_out(trained):
    without = dataclasses.replace(trained.eval, mean_baseline=False, also_with_seen=True)
    result = loop.restore(dataclasses.replace(trained, eval=without), cli.open_data(trained))
    table = closing_lib.evaluate_beside_baselines(result.run, result.state, train_mean=True)
    assert list(table.rows) == ["hstu", "co-occurrence", "item-knn", "last-day", "popularity"]
    assert not any(note.startswith("mean") for note in table.notes)
    assert "the same with seen items in the ranking" in table.text()


def test_evaluate_gives_the_same_table_and_trains_nothing(trained, capsys, tmp_path):
    ranks = pathlib.Path(trained.workdir) / "closing_ranks_test.npz"
    ranks.unlink()
    with flagsaver.flagsaver(groups=True, ranks=True):
        evaluate.main(trained)
    text = capsys.readouterr().out
    assert "test split, whole catalogue, step 6" in text
    with open(f"{trained.workdir}/closing_test.json") as file:
        expected = json.load(file)["figures"]["mean"]["recall@50"]
    (row,) = [line for line in text.splitlines() if line.startswith("recall@50")]
    assert float(row.split()[3]) == pytest.approx(expected, abs=1e-4)
    assert "hstu best: step" in text and "recall@10 by events of history" in text
    assert f"ranks     {ranks}" in text and ranks.is_file()


def test_the_checkpoint_flag():
    assert evaluate.checkpoint_step("latest") is None
    assert evaluate.checkpoint_step("best") == "best"
    assert evaluate.checkpoint_step("40") == 40
    with pytest.raises(ValueError, match=r"--checkpoint='bst': must be 'latest', 'best' or a step"):
        evaluate.checkpoint_step("bst")


def test_benchmark_refuses_steps_of_several_batches(trained):
    accumulating = dataclasses.replace(trained.train, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2: the benchmark times st"):
        benchmark.main(dataclasses.replace(trained, train=accumulating))


@pytest.mark.long
def test_benchmark_names_the_parts(trained, capsys):
    benchmark.main(trained)
    text = capsys.readouterr().out
    for part in (
        "lookup",
        "attention, all layers",
        "loss",
        "table update",
        "whole step",
        "norms, gates, dropout, one layer",
    ):
        assert part in text
    assert "same bits twice" in text and "NO" not in text
    # The figure that decides about fusing (docs/performance.md).
    (share,) = re.findall(r"norms, gates, dropout, all layers +([\d.]+)% of the step", text)
    assert float(share) > 0
