"""The commands that docs/performance.md lists for 20 minutes at a GPU, tried where there is none.

Each is read from the page. Its own flags are parsed, then it runs on the CPU with sizes of a few
tokens put behind them; training and the step are tried up to their configuration (what they do
beyond it is tested in `test_commands.py`). A command that is new on the page needs an entry here.
"""

import functools
import importlib.util
import pathlib
import re
import shlex
import sys

import pytest
from absl import flags

from hstu_jax import benchmark as step_benchmark
from hstu_jax import cli, doctor
from hstu_jax.config import resolve
from hstu_jax.tables import benchmark as tables_benchmark
from pallas_kernels.hstu_attention import api, benchmark, benchmark_baselines
from tests import conftest

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "performance.md"
TINY_ATTENTION = (
    "--lengths 16 --batch 2 --heads 1 --widths 4 --runs 1 --passes forward --dtype float32 "
    "--implementations xla"
).split()
TINY_TABLES = "--rows 300 --small_rows 100 --dim 4 --ids 8 --steps 2 --blocks 1".split()


def _section():
    text = PAGE.read_text("utf-8")
    start = text.index("When a GPU is at hand for 20 minutes")
    return text[start : text.index("\n## ", start)]


def _commands():
    """Every whole command of the list, as words; line breaks inside are spaces."""
    quoted = re.findall(r"`([^`]+)`", _section())
    words = [shlex.split(" ".join(text.split())) for text in quoted]
    return [w for w in words if w[:2] == ["python", "-m"] or w[0] in ("pytest", "cmp")]


def _of(module):
    return [words[3:] for words in _commands() if words[:3] == ["python", "-m", module]]


def test_every_command_is_tried_here():
    tried = {
        "hstu_jax.doctor",
        "pallas_kernels.hstu_attention.benchmark",
        "hstu_jax.benchmark",
        "hstu_jax.tables.benchmark",
        "hstu_jax.train",
    }
    assert {words[2] for words in _commands() if words[0] == "python"} == tried
    assert [words for words in _commands() if words[0] == "pytest"] == [["pytest", "-m", "gpu"]]


def test_doctor():
    assert _of("hstu_jax.doctor") == [[]]
    assert "attention kernel for 'auto'" in doctor.report()


def test_the_attention_benchmarks(tmp_path, monkeypatch, capsys):
    """The sets of sizes are for accelerators only: a kernel is pretended, `xla` runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "auto_implementation", lambda: "pallas_triton")
    # Seconds on a CPU, and no flag of these commands changes it.
    monkeypatch.setattr(benchmark_baselines, "matmul_tflops", lambda dtype: 1.0)
    commands = _of("pallas_kernels.hstu_attention.benchmark")
    assert sum("--quick" in words for words in commands) == 1
    # Flags that follow one on the page, without the command itself.
    more = re.findall(r"`(--all [^`]+)`", _section())
    commands += [shlex.split(" ".join(text.split())) for text in more]
    assert len(commands) >= 4
    for words in commands:
        benchmark.main([*words, *TINY_ATTENTION])
        assert " xla " in capsys.readouterr().out
        if "--json" in words:
            assert (tmp_path / words[words.index("--json") + 1]).stat().st_size > 0


def test_the_table_benchmark(monkeypatch, capsys):
    (words,) = _of("hstu_jax.tables.benchmark")
    sizes = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    assert sizes["--rows"] * sizes["--dim"] > 2**31
    monkeypatch.setattr(sys, "argv", ["benchmark", *words, *TINY_TABLES])
    tables_benchmark.main()
    assert "large / small" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["hstu_jax.benchmark", "hstu_jax.train"])
def test_the_configurations(module):
    commands = _of(module)
    assert commands
    for words in commands:
        if module == "hstu_jax.benchmark":
            assert words.pop(0) == "step"
        flags = dict(word.removeprefix("--").split("=", 1) for word in words)
        assert flags.pop("workdir", "runs/x").startswith("runs/")
        path, _, variant = flags.pop("config").partition(":")
        raw = _load(path).get_config(variant)
        for name, value in flags.items():
            value = int(value) if value.isdecimal() else value
            raw.update_from_flattened_dict({name.removeprefix("config."): value})
        config = resolve.resolve(raw)
        if variant == "seed":
            assert max(f.num_buckets for f in config.features.values()) == 10_000_000


def _load(path):
    """The configuration file, as a module."""
    spec = importlib.util.spec_from_file_location("config", PAGE.parent.parent / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_names_what_it_must():
    text = " ".join(_section().split())
    for words in (
        "norms, gates, dropout, all layers",
        "Above 25 %",
        "beyond 2^31 elements",
        "same bits twice",
        "cmp runs/one/closing_test.json runs/two/closing_test.json",
    ):
        assert words in text
    assert conftest.environment({}, "gpu") == {}


def _many_gpus(text):
    """The section's commands in order, each as words with the table rows behind it, and its list.

    Rows hold their headings, and their order counts: a row or a column in another's place is no
    equal row of the same table.
    """
    section = text[text.index("## Many GPUs") :]
    parts = re.split(r"^    python -m hstu_jax\.(.+(?:(?<=\\)\n.+)*)$", section, flags=re.M)
    tables = [
        (shlex.split(command.replace("\\\n", " ")), _starting_with("| ", behind))
        for command, behind in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return [each for each in tables if each[0][:2] == ["benchmark", "scaling"]], _starting_with(
        "- ", section
    )


def _starting_with(mark, text):
    return [line for line in text.splitlines() if line.startswith(mark)]


def test_a_table_of_many_gpus_with_a_row_or_a_column_moved_is_another():
    text = PAGE.read_text("utf-8")
    (first, second), _ = _many_gpus(text)
    assert len(first[1]) == len(second[1]) == 6
    assert "--config.mesh.chip=8" in second[0] and "--config.mesh.chip=8" not in first[0]
    heading, *rows = first[1]
    assert heading.startswith("| devices | mesh |")
    other_heading = heading.replace("| exchange ms | step ms |", "| step ms | exchange ms |")
    assert other_heading != heading
    for one, other in [
        (rows[0], rows[1]),  # within a table
        (rows[0], second[1][1]),  # between both
        (heading, other_heading),  # in the first, while the second table keeps its own
    ]:
        moved = text.replace(one, "<here>", 1).replace(other, one, 1).replace("<here>", other, 1)
        assert moved != text
        assert _many_gpus(moved)[0] != [first, second]


@pytest.mark.long
def test_the_tables_of_many_gpus_are_what_the_commands_print(small_store, monkeypatch, capsys):
    """The data count only by their columns: lengths and batches are the configuration's."""
    tables, items = _many_gpus(PAGE.read_text("utf-8"))
    assert len(tables) == 2
    monkeypatch.setattr(cli, "open_data", lambda config: small_store)
    flags.FLAGS.mark_as_parsed()
    for words, rows in tables:
        step_benchmark.model_many_devices(_config_of(words[2:]))
        printed = capsys.readouterr().out
        assert _starting_with("| ", printed) == rows
        assert _starting_with("- ", printed) == items


def _config_of(words):
    """The configuration that a command's flags ask for."""
    values = dict(word.removeprefix("--").split("=", 1) for word in words)
    path, _, variant = values.pop("config").partition(":")
    raw = _load(path).get_config(variant)
    for name, value in values.items():
        name = name.removeprefix("config.")
        kind = type(functools.reduce(getattr, name.split("."), raw))
        raw.update_from_flattened_dict({name: kind(value)})
    return resolve.resolve(raw)
