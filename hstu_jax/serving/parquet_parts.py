"""Parquet files in, one parquet file out, in parts that survive a kill.

While it runs, `OUTPUT.parts/` holds a part per range of input rows (whole row groups) and, once the
part is whole, its marker:

    OUTPUT.parts/run.json                                   what is computed, from which files
    OUTPUT.parts/part-00000-000000000-000065536.parquet     file number, first row, end of its rows
    OUTPUT.parts/part-00000-000000000-000065536.done        its hash; written by a rename

    OUTPUT.parts/joined.parquet                             all parts, once it is whole

The same call again skips parts with a marker. In the end the parts are joined in the order of the
input, renamed to OUTPUT, and the folder is removed. Parts of another run are refused, as are parts
and input that were changed. `.OUTPUT.lock` is held meanwhile, so that no second call does the same.

Not here: what is computed (`retrieval.py`, `prediction.py`). Imports are the loader's.
"""

import dataclasses
import difflib
import glob
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hstu_jax.serving import output_lock

_METADATA = b"hstu_jax.run"
_JOINED, _DESCRIBED = "joined.parquet", "run.json"
_PROGRESS_SECONDS = 5.0

# Columns of the output from a batch of the input.
Process = Callable[[pa.Table], Mapping[str, pa.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is computed, and how it is cut.

    Attributes:
        output: file to make.
        identity: everything that decides the output besides the input's files; JSON values.
        process: the computation.
        columns: that it reads.
        reserved: columns copied from the input, in front of the computed ones.
        part_rows: rows of a part at least, in whole row groups.
        batch_rows: rows given to `process` at a time.
    """

    output: pathlib.Path
    identity: Mapping[str, Any]
    process: Process
    columns: Sequence[str]
    reserved: Sequence[str] = ()
    part_rows: int = 65_536
    batch_rows: int = 1024

    def __post_init__(self) -> None:
        for name in ("part_rows", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did: all rows of the output, and how many parts were made and found."""

    rows: int
    made: int
    skipped: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    file: str
    file_number: int
    groups: tuple[int, ...]
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"part-{self.file_number:05d}-{self.start:09d}-{self.stop:09d}"


def expand(pattern: str, *, flag: str) -> tuple[str, ...]:
    """Files of a pattern, by name.

    Raises:
        FileNotFoundError: there is none.
    """
    files = tuple(sorted(glob.glob(pattern)))
    if not files:
        raise FileNotFoundError(f"{flag}={pattern!r}: no such file; give parquet files.")
    return files


def run(files: Sequence[str], job: Job, *, echo: Callable[[str], None] = print) -> Summary:
    """Computes the output, or what is missing of it.

    Args:
        files: parquet files, in the order of the output.
        job: what to do.
        echo: where the progress line goes.

    Raises:
        FileExistsError: the output, or parts of it, are of another run; or another process is
            making it.
        ValueError, TypeError: a missing column, reserved columns whose types do not go together,
            a damaged part, input that changed meanwhile, no rows, or what `process` raises; names
            the file.
    """
    _plan(files, job)  # refuses what cannot be done before the files are hashed
    with output_lock.locked(job.output):
        return _run(files, job, echo)


def _run(files: Sequence[str], job: Job, echo: Callable[[str], None]) -> Summary:
    identity = {**job.identity, "reserved_columns": list(job.reserved), "part_rows": job.part_rows}
    identity["input"] = [_describe(file) for file in files]
    run_hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    parts, types = _plan(files, job)
    total = sum(part.stop - part.start for part in parts)
    folder = job.output.with_name(job.output.name + ".parts")
    if job.output.exists():
        _check_output(job.output, run_hash)
        _remove_rest(folder)
        echo(f"{job.output}: complete already ({total:,} rows)")
        return Summary(rows=total, made=0, skipped=len(parts))
    _open_folder(folder, identity)
    progress = _Progress(total, echo)
    made = 0
    if not (folder / _JOINED).exists():
        for part in parts:
            if _is_done(folder, part, run_hash):
                progress.add(part.stop - part.start, is_new=False)
                continue
            _make(folder, part, job, types, run_hash, progress)
            made += 1
        _check_input(files, identity["input"], folder)
        _join(folder, parts, run_hash)
    _remove_parts(folder)
    os.replace(folder / _JOINED, job.output)
    shutil.rmtree(folder)
    progress.show()
    return Summary(rows=total, made=made, skipped=len(parts) - made)


def rows_of(
    files: Sequence[str], columns: Sequence[str], *, batch_rows: int
) -> Iterator[tuple[str, int, pa.Table]]:
    """(file, first row, rows) of parquet files, a batch at a time.

    Raises:
        ValueError: a missing column, or no parquet file.
    """
    for file in files:
        with _open(file) as source:
            _check_columns(source, file, columns)
            yield from _batches(source, file, None, columns, batch_rows, 0)


def _batches(source, file, groups, columns, batch_rows, start):
    batches = source.iter_batches(batch_size=batch_rows, row_groups=groups, columns=list(columns))
    for batch in batches:
        if batch.num_rows:
            yield file, start, pa.Table.from_batches([batch])
            start += batch.num_rows


def _plan(files: Sequence[str], job: Job) -> tuple[list[_Part], dict[str, pa.DataType]]:
    """The parts, and one type for each reserved column, to which all files' can be cast."""
    parts: list[_Part] = []
    types: dict[str, pa.DataType] = {}
    for number, file in enumerate(files):
        with _open(file) as source:
            _check_columns(source, file, [*job.reserved, *job.columns])
            for name in job.reserved:
                own = source.schema_arrow.field(name).type
                types[name] = _common_type(types.get(name, own), own, f"{file} column {name}")
            metadata = source.metadata
            groups, start, stop = [], 0, 0
            for group in range(metadata.num_row_groups):
                groups.append(group)
                stop += metadata.row_group(group).num_rows
                is_last = group == metadata.num_row_groups - 1
                if stop > start and (stop - start >= job.part_rows or is_last):
                    own = {"file": file, "file_number": number, "groups": tuple(groups)}
                    parts.append(_Part(**own, start=start, stop=stop))
                    groups, start = [], stop
    if not parts:
        raise ValueError(f"{files[0]}: no rows in {len(files)} file(s); give some.")
    return parts, types


def _common_type(before: pa.DataType, own: pa.DataType, where: str) -> pa.DataType:
    if before == own:
        return own
    plain = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (before, own)]
    schemas = [pa.schema({"column": kind}) for kind in plain]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowTypeError as error:
        raise TypeError(
            f"{where}: type {own}, and {before} in the files before it; a reserved column needs "
            "one type."
        ) from error


def _open(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a whole parquet file ({error}).") from error


def _check_columns(source: pq.ParquetFile, file: str, columns: Sequence[str]) -> None:
    names = source.schema_arrow.names
    for column in columns:
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"{file} column {column}: missing{hint}; the file has {sorted(names)}."
            )


def _describe(file: str) -> dict[str, Any]:
    """What tells a file's content."""
    return {
        "file": os.path.abspath(file),
        "size_bytes": os.path.getsize(file),
        "sha256": _sha256(pathlib.Path(file)),
    }


def _check_input(
    files: Sequence[str], described: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> None:
    for file, before in zip(files, described, strict=True):
        if _describe(file) != before:
            raise ValueError(
                f"{file}: changed while it was read; remove the folder {folder} and run again."
            )


def _check_output(output: pathlib.Path, run_hash: str) -> None:
    found = None
    if output.is_file():
        with _open(str(output)) as source:
            found = (source.schema_arrow.metadata or {}).get(_METADATA)
    if found != run_hash.encode():
        raise FileExistsError(
            f"{output}: exists, and was not made by this call (other model, flags or input); "
            "remove it or choose another name."
        )


def _open_folder(folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
    described = folder / _DESCRIBED
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob("part-*.done")) and not (folder / _JOINED).exists():  # nothing is lost
        _write_text(described, json.dumps(identity, indent=1))
        return
    if not described.is_file():
        raise FileExistsError(f"{folder}: has parts, but no run.json; remove the folder.")
    there = json.loads(described.read_text())
    for name in sorted({*there, *identity}):
        if there.get(name) != identity.get(name):
            raise FileExistsError(
                f"{folder}: parts of another run, {name}={there.get(name)} there and "
                f"{identity.get(name)} now; finish that run, or remove the folder."
            )


def _is_done(folder: pathlib.Path, part: _Part, run_hash: str) -> bool:
    marker, file = folder / f"{part.name}.done", folder / f"{part.name}.parquet"
    if not marker.exists():
        return False
    content = json.loads(marker.read_text())
    if content["run"] != run_hash:
        raise FileExistsError(f"{marker}: of another run; remove the folder {folder}.")
    if not file.is_file() or _sha256(file) != content["sha256"]:
        raise ValueError(
            f"{file}: missing, truncated or changed since it was finished; remove it and its "
            ".done, and it is made again."
        )
    return True


def _make(
    folder: pathlib.Path,
    part: _Part,
    job: Job,
    types: Mapping[str, pa.DataType],
    run_hash: str,
    progress: "_Progress",
) -> None:
    file, temporary = folder / f"{part.name}.parquet", folder / f".{part.name}.writing"
    wanted = list(dict.fromkeys([*job.reserved, *job.columns]))
    writer = None
    try:
        with _open(part.file) as source:
            batches = _batches(source, part.file, part.groups, wanted, job.batch_rows, part.start)
            for _, start, table in batches:
                result = _result(table, start, part.file, job, types)
                writer = writer or pq.ParquetWriter(temporary, result.schema)
                writer.write_table(result)
                progress.add(table.num_rows, is_new=True)
    finally:
        if writer is not None:
            writer.close()
    os.replace(temporary, file)
    content = {"run": run_hash, "rows": part.stop - part.start, "sha256": _sha256(file)}
    _write_text(folder / f"{part.name}.done", json.dumps(content))


def _result(
    table: pa.Table, start: int, file: str, job: Job, types: Mapping[str, pa.DataType]
) -> pa.Table:
    try:
        reserved = {name: table[name].cast(types[name]) for name in job.reserved}
        computed = job.process(table)
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{file}, rows counted from {start}: {error}") from error
    clash = sorted(set(reserved) & set(computed))
    if clash:
        raise ValueError(f"--reserved_columns={clash[0]}: is a column of the result; leave it out.")
    return pa.table({**reserved, **computed})


def _join(folder: pathlib.Path, parts: Sequence[_Part], run_hash: str) -> None:
    temporary = folder / ".joined.writing"
    with _open(str(folder / f"{parts[0].name}.parquet")) as source:
        schema = source.schema_arrow.with_metadata({_METADATA: run_hash.encode()})
    with pq.ParquetWriter(temporary, schema) as writer:
        for part in parts:
            with _open(str(folder / f"{part.name}.parquet")) as source:
                for group in range(source.num_row_groups):
                    writer.write_table(source.read_row_group(group).cast(schema))
    os.replace(temporary, folder / _JOINED)


def _remove_parts(folder: pathlib.Path) -> None:
    """Before the output has its name: what a kill leaves after that binds no later run."""
    for pattern in ("part-*.done", "part-*.parquet"):
        for file in folder.glob(pattern):
            file.unlink()


def _remove_rest(folder: pathlib.Path) -> None:
    """Removes a folder whose output has its name already; one with parts of another run stays."""
    if folder.is_dir() and not any(folder.glob("part-*.done")) and not (folder / _JOINED).exists():
        shutil.rmtree(folder)


def _write_text(file: pathlib.Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.writing")
    temporary.write_text(text + "\n")
    os.replace(temporary, file)


def _sha256(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Progress:
    """A line every few seconds: rows done of all, rows a second, and the rest in minutes."""

    def __init__(self, total: int, echo: Callable[[str], None]) -> None:
        self._total, self._echo = total, echo
        self._done = self._new = 0
        self._start = self._shown = time.monotonic()

    def add(self, rows: int, *, is_new: bool) -> None:
        self._done += rows
        self._new += rows if is_new else 0
        if time.monotonic() - self._shown > _PROGRESS_SECONDS:
            self.show()

    def show(self) -> None:
        self._shown = time.monotonic()
        line = f"rows      {self._done:,} of {self._total:,}"
        if self._new:
            rate = self._new / max(self._shown - self._start, 1e-9)
            left = (self._total - self._done) / rate / 60
            line += f"  {rate:,.0f} rows/s  {left:.1f} min left"
        self._echo(line)
