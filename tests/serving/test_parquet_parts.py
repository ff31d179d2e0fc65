"""Parts of an output survive a kill, are skipped when whole and refused when not theirs."""

import dataclasses
import json
import pathlib

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
