"""Parts of an output survive a kill, are skipped when whole and refused when not theirs."""

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_jax.serving import parquet_parts
from hstu_jax.serving.parquet_parts import Job


class Killed(BaseException):
    """As an interrupt: not an error that is caught anywhere."""


@pytest.fixture
def files(tmp_path):
    """Two files: row groups of 4, 4 and 2 rows, and of 5; numbers from 0 and from 100."""
    for name, first, num, group in (("a", 0, 10, 4), ("b", 100, 5, 5)):
        table = pa.table({"x": np.arange(first, first + num), "name": [name] * num})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=group)
    return parquet_parts.expand(f"{tmp_path}/?.parquet", flag="--input")


def make_job(output, *, kill_after=None, calls=None, **changes):
    """Squares of x; `kill_after` batches end the process."""

    def process(table):
        if kill_after is not None and len(calls) == kill_after:
            raise Killed
        if calls is not None:
            calls.append(table["x"].to_pylist())
        return {"square": pa.array(table["x"].to_numpy() ** 2)}

    job = Job(
        output=pathlib.Path(output),
        identity={"command": "square", "k": 1},
        process=process,
        columns=["x"],
        reserved=["name"],
        part_rows=4,
        batch_rows=3,
    )
    return dataclasses.replace(job, **changes)


def test_parts_are_joined_in_order_with_reserved_columns(files, tmp_path):
    lines, calls = [], []
    summary = parquet_parts.run(
        files, make_job(tmp_path / "out" / "o.parquet", calls=calls), echo=lines.append
    )
    assert (summary.rows, summary.made, summary.skipped) == (15, 4, 0)
    table = pq.read_table(tmp_path / "out" / "o.parquet")
    x = [*range(10), *range(100, 105)]
    assert table.column_names == ["name", "square"]
    assert table["square"].to_pylist() == [value**2 for value in x]
    assert table["name"].to_pylist() == ["a"] * 10 + ["b"] * 5
    assert max(map(len, calls)) == 3  # a batch, not a part, is in memory
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["o.parquet"]
    assert lines[-1].startswith("rows      15 of 15")


def test_a_killed_run_goes_on_after_its_last_whole_part(files, tmp_path):
    straight = tmp_path / "straight.parquet"
    parquet_parts.run(files, make_job(straight), echo=print)
    # Batches of the four parts: 2, 2, 1 and 2. Killed before each of them in turn.
    for kill_after, whole in enumerate([0, 0, 1, 1, 2, 3, 3]):
        output, calls = tmp_path / f"{kill_after}.parquet", []
        with pytest.raises(Killed):
            job = make_job(output, kill_after=kill_after, calls=calls)
            parquet_parts.run(files, job, echo=print)
        assert not output.exists()
        calls = []
        summary = parquet_parts.run(files, make_job(output, calls=calls), echo=print)
        assert (summary.skipped, summary.made) == (whole, 4 - whole)
        assert len(calls) == 7 - [0, 2, 4, 5][whole]  # what was done is not done again
        assert output.read_bytes() == straight.read_bytes()
    again = parquet_parts.run(files, make_job(output), echo=print)
    assert (again.made, again.skipped) == (0, 4)


def interrupted(files, output):
    """Leaves one whole part."""
    calls = []
    with pytest.raises(Killed):
        parquet_parts.run(files, make_job(output, kill_after=3, calls=calls), echo=print)
    return output.with_name(output.name + ".parts")


def test_parts_of_another_run_are_refused(files, tmp_path):
    output = tmp_path / "o.parquet"
    folder = interrupted(files, output)
    assert len(list(folder.glob("*.done"))) == 1
    for changes, message in (
        ({"identity": {"command": "square", "k": 2}}, "parts of another run, k=1 there and 2 now"),
        ({"reserved": []}, r"reserved_columns=\['name'\] there and \[\] now"),
        ({"part_rows": 5}, "part_rows=4 there and 5 now"),
    ):
        with pytest.raises(FileExistsError, match=message):
            parquet_parts.run(files, make_job(output, **changes), echo=print)
    with pytest.raises(FileExistsError, match="parts of another run, input="):
        parquet_parts.run(files[:1], make_job(output), echo=print)
    # A part of another run put among them.
    (marker,) = folder.glob("*.done")
    content = json.loads(marker.read_text())
    marker.write_text(json.dumps({**content, "run": "another"}))
    with pytest.raises(FileExistsError, match=r"part-\S+.done: of another run; remove the folder"):
        parquet_parts.run(files, make_job(output), echo=print)
    (folder / "run.json").unlink()
    with pytest.raises(FileExistsError, match="has parts, but no run.json"):
        parquet_parts.run(files, make_job(output), echo=print)


def test_a_truncated_part_is_named(files, tmp_path):
    output = tmp_path / "o.parquet"
    (part,) = interrupted(files, output).glob("part-*.parquet")
    assert part.name == "part-00000-000000000-000000004.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=f"{part.name}: missing, truncated or changed since it was"
    ):
        parquet_parts.run(files, make_job(output), echo=print)


def test_an_output_of_another_run_is_kept(files, tmp_path):
    output = tmp_path / "o.parquet"
    parquet_parts.run(files, make_job(output), echo=print)
    other = make_job(output, identity={"command": "square", "k": 2})
    with pytest.raises(FileExistsError, match="exists, and was not made by this call"):
        parquet_parts.run(files, other, echo=print)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(FileExistsError, match="foreign.parquet: exists, and was not made by this"):
        parquet_parts.run(files, make_job(tmp_path / "foreign.parquet"), echo=print)


def test_wrong_input_is_named(files, tmp_path):
    def refused(kind, message, input_files=files, **changes):
        with pytest.raises(kind, match=message):
            parquet_parts.run(input_files, make_job(tmp_path / "o.parquet", **changes), echo=print)

    refused(ValueError, r"a.parquet column nme: missing \(did you mean 'name'\?\); the file has",
            reserved=["nme"])  # fmt: skip
    refused(ValueError, "a.parquet column y: missing; the file has", columns=["y"])
    with pytest.raises(FileNotFoundError, match="--input='no/where/\\*': no such file"):
        parquet_parts.expand("no/where/*", flag="--input")
    (tmp_path / "text").write_text("not parquet at all")
    refused(ValueError, "text: not a whole parquet file", (str(tmp_path / "text"),))
    pq.write_table(pa.table({"x": pa.array([], pa.int64()), "name": pa.array([], pa.string())}),
                   tmp_path / "empty")  # fmt: skip
    refused(ValueError, r"empty: no rows in 1 file\(s\)", (str(tmp_path / "empty"),))
    with pytest.raises(ValueError, match="batch_rows=0: must be 1 or more"):
        make_job(tmp_path / "o.parquet", batch_rows=0)

    def fails(table):
        if table["x"][0].as_py() == 3:
            raise pa.ArrowInvalid("row 0: bad")
        return {"square": table["x"]}

    refused(ValueError, "a.parquet, rows counted from 3: row 0: bad", process=fails)
    clash = {"process": lambda table: {"name": table["x"]}}
    refused(ValueError, "--reserved_columns=name: is a column of the result", **clash,
            input_files=files[1:])  # fmt: skip


def test_input_with_other_early_rows_is_another_run(tmp_path):
    """The last 64 KiB of both files, and their sizes, are the same."""
    for name, first in (("now", 1), ("before", 0)):
        numbers = np.arange(40_000)
        numbers[0] = first
        table = pa.table({"x": numbers, "name": ["a"] * len(numbers)})
        kinds = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(table, tmp_path / name, **kinds)
    file, output = tmp_path / "input", tmp_path / "o.parquet"
    shutil.copy(tmp_path / "before", file)
    large = {"part_rows": 40_000, "batch_rows": 40_000}
    parquet_parts.run([str(file)], make_job(output, **large), echo=print)
    assert (tmp_path / "now").read_bytes()[-70_000:] == file.read_bytes()[-70_000:]
    shutil.copy(tmp_path / "now", file)
    with pytest.raises(FileExistsError, match="not made by this call"):
        parquet_parts.run([str(file)], make_job(output, **large), echo=print)


def test_input_that_changes_while_it_is_read_is_refused(files, tmp_path):
    output = tmp_path / "o.parquet"

    def process(table):
        if table["x"][0].as_py() == 100:  # the first file has been read
            pq.write_table(pa.table({"x": [7] * 10, "name": ["c"] * 10}), files[0])
        return {"square": table["x"]}

    with pytest.raises(ValueError, match="a.parquet: changed while it was read; remove the folder"):
        parquet_parts.run(files, make_job(output, process=process), echo=print)
    assert not output.exists()
    with pytest.raises(FileExistsError, match="parts of another run, input="):
        parquet_parts.run(files, make_job(output), echo=print)


def test_a_second_call_meanwhile_is_refused(files, tmp_path):
    output = tmp_path / "o.parquet"

    def process(table):
        with pytest.raises(FileExistsError, match="o.parquet: another process is making it"):
            parquet_parts.run(files, make_job(output), echo=print)
        return {"square": table["x"]}

    summary = parquet_parts.run(files, make_job(output, process=process), echo=print)
    assert summary.made == 4 and not (tmp_path / ".o.parquet.lock").exists()
    (tmp_path / ".o.parquet.lock").touch()  # of a process that was killed
    parquet_parts.run(files, make_job(output), echo=print)


@pytest.mark.parametrize("moment", ["before the output has its name", "after", "in removing"])
def test_a_kill_at_the_end_leaves_nothing_that_binds(files, tmp_path, monkeypatch, moment):
    output, replace = tmp_path / "o.parquet", os.replace

    def killing_replace(source, target):
        if pathlib.Path(target) == output:
            if moment != "before the output has its name":
                replace(source, target)
            raise Killed
        replace(source, target)

    def killing_rmtree(folder):
        (folder / "run.json").unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "in removing":
            patch.setattr(shutil, "rmtree", killing_rmtree)
        else:
            patch.setattr(os, "replace", killing_replace)
        parquet_parts.run(files, make_job(output), echo=print)
    folder, other = tmp_path / "o.parquet.parts", {"identity": {"command": "square", "k": 2}}
    assert folder.exists()
    if moment == "before the output has its name":
        with pytest.raises(FileExistsError, match="parts of another run, k=1 there and 2 now"):
            parquet_parts.run(files, make_job(output, **other), echo=print)
    calls = []
    summary = parquet_parts.run(files, make_job(output, calls=calls), echo=print)
    assert (summary.made, summary.skipped, calls) == (0, 4, [])
    assert not folder.exists() and pq.read_table(output).num_rows == 15
    # The same kill, the output removed by hand, then other flags.
    if moment != "before the output has its name":
        folder.mkdir()
        (folder / "run.json").write_text("{}")
        output.unlink()
        assert parquet_parts.run(files, make_job(output, **other), echo=print).made == 4


def test_reserved_columns_of_several_types(tmp_path):
    def run_with(*values):
        for number, own in enumerate(values):
            pq.write_table(pa.table({"x": [1], "name": own}), tmp_path / f"{number}")
        calls, output = [], tmp_path / "o.parquet"
        output.unlink(missing_ok=True)
        files = [str(tmp_path / f"{number}") for number in range(len(values))]
        try:
            parquet_parts.run(files, make_job(output, calls=calls), echo=print)
        finally:
            assert calls or not list(tmp_path.glob("*.parts"))  # refused before anything is made
        return pq.read_table(output)["name"]

    narrow, wide = pa.array([5], pa.int32()), pa.array([2**40])
    assert run_with(narrow, wide, pa.nulls(1)).to_pylist() == [5, 2**40, None]
    words = pa.array(["a"])
    assert run_with(words.dictionary_encode(), words).to_pylist() == ["a", "a"]
    with pytest.raises(TypeError, match="1 column name: type string, and int64 in the files befo"):
        run_with(wide, words)
