"""`manifest.json` of an exported folder: its fields, its parts, and the checks before it is used.

One of the loader's files: it needs the standard library alone, and the whole loader nothing but
jax, numpy, orbax-checkpoint, flatbuffers and pyarrow. What is in the folder is in docs/serving.md;
`exporter.py` writes it, `artifact.py` reads it.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from hstu_jax.serving import json_fields

from_fields = json_fields.from_fields
FORMAT_VERSION = 1
FILE = "manifest.json"
_HASH_BLOCK = 2**20  # bytes read at a time: a part may be larger than memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """A column that a tower reads.

    Attributes:
        name: of the column.
        kind: "sequence" (a list, or a delimited string, per row) or "value" (one, or a list that is
            pooled).
        dtype: "id" (integers), "key" (integers or strings), "int64", "float32" or "number".
        shape: of one row: [] one value, ["history"] one an event, ["values"] any number.
        padding: what stands behind the values inside the programs.
        unit: what a value counts.
        is_null_allowed: whether a value may be missing.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[str, ...]
    padding: str
    unit: str
    is_null_allowed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translation:
    """Original ids -> the model's: key i of `keys` has number i of `numbers`.

    Attributes:
        keys: file of ascending integers, or of strings.
        numbers: file of integers.
        unlisted: number of a key that is not listed; -1 = unknown.
    """

    keys: str
    numbers: str
    unlisted: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """How a column becomes a vector.

    Attributes:
        name: of the feature.
        column: that it reads.
        table: where its ids are looked up; None = the numbers are the vector.
        width: of the vector.
        pooling: "sum" or "mean" of several values.
        value_dim: values of a row, exactly; 0 = any number.
        separator: between the values of a row that is a string; "" = strings are not split.
        translation: name of the `Translation` of original ids that comes first, or None.
        item_values: file with the feature's ids or numbers of every item of `item_keys`, and
            those of an item that is not among them in the last place; None = from the rows.
        rule: kind ("num_buckets", "hash", "vocabulary", "number" or "boundaries") and its settings;
            `feature_values.py` has the rules.
    """

    name: str
    column: str
    table: str | None
    width: int
    pooling: str
    value_dim: int
    separator: str
    translation: str | None
    item_values: str | None
    rule: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """The history's columns by what they are for; None = not read.

    Attributes:
        items: item ids.
        timestamp: seconds.
        action: bits.
        watch_time: seconds.
        request_time: the row's own time, or None (then the newest event's).
        sequence_length: newest entries of a row that are read; 0 = all.
        sequence_delim: between the values of a string; "" = lists.
        newest_first: rows run from the newest entry to the oldest.
        max_seq_len: newest entries that the model reads.
        periods: (unit in seconds, units) of the phases that the output reads.
        step_time: gap that an event reads in place of its age: "next_request" (to the next event,
            of the newest to the request), "own" (from the event before), or None.
    """

    items: str
    timestamp: str | None
    action: str | None
    watch_time: str | None
    request_time: str | None
    sequence_length: int
    sequence_delim: str
    newest_first: bool
    max_seq_len: int
    periods: tuple[tuple[int, int], ...]
    step_time: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """An embedding table: row i of the file is id i."""

    file: str
    num_rows: int
    dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingItems:
    """Items with a training event: file of their ids, ascending, and of their training events."""

    ids: str
    counts: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Programs of one history length: the batch sizes to call them with, ascending."""

    length: int
    batches: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A serialized program.

    Attributes:
        tower: "user" or "item".
        platform: "cpu" or "cuda".
        length: history slots; 0 for items.
        batch: rows; 0 = any number (the batch is symbolic).
        attention: implementation that was lowered; "" for items.
        file: of the program.
    """

    tower: str
    platform: str
    length: int
    batch: int
    attention: str
    file: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """A dense parameter: where it is in its tower's tree, and what it holds."""

    tower: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A file of the folder."""

    sha256: str
    size_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an exported folder says of itself.

    Attributes:
        format_version: of the folder.
        model_version: SHA-256 over the inputs, features, outputs, parameters and tables: equal for
            two exports of one checkpoint, whatever wrote the programs.
        created: UTC; the only field in which two exports of a checkpoint differ.
        dim: E, width of both towers' vectors.
        similarity: "COSINE" or "INNER_PRODUCT"; a score is the inner product in both cases.
        normalized: whether vectors have length 1.
        outputs: tower -> name of its output.
        ids: "model" (ids as the training files had them) or "original" (as the raw data had them).
        user_inputs: columns of `embed_users`.
        item_inputs: columns of `embed_items`.
        history_column: list column with the history's item ids.
        item_id_column: item ids in the item rows.
        history: what the history's columns are for.
        history_features: features of every history position, side by side.
        contextual_features: features of the row, a token each.
        candidate_features: features of an item, side by side.
        translations: name -> files of original ids.
        training_items: item ids that have a training event.
        item_keys: file of the item ids, ascending, that `Feature.item_values` are of, or None.
        tables: embedding tables by name.
        sizes: history lengths and their batch sizes.
        item_batches: batch sizes of the item program.
        programs: serialized programs.
        parameters: dense parameters.
        source_step: optimizer steps of the checkpoint.
        uses_average: whether the dense parameters are the averaged ones.
        config: of the training run, one `path = value` a line.
        versions: package -> version that exported.
        parts: file -> hash and size; everything but this file and `items/`.
    """

    format_version: int
    model_version: str
    created: str
    dim: int
    similarity: str
    normalized: bool
    outputs: Mapping[str, str]
    ids: str
    user_inputs: tuple[Input, ...]
    item_inputs: tuple[Input, ...]
    history_column: str
    item_id_column: str
    history: History
    history_features: tuple[Feature, ...]
    contextual_features: tuple[Feature, ...]
    candidate_features: tuple[Feature, ...]
    translations: Mapping[str, Translation]
    training_items: TrainingItems
    item_keys: str | None
    tables: Mapping[str, Table]
    sizes: tuple[Size, ...]
    item_batches: tuple[int, ...]
    programs: tuple[Program, ...]
    parameters: tuple[Array, ...]
    source_step: int
    uses_average: bool
    config: str
    versions: Mapping[str, str]
    parts: Mapping[str, Part]


# Not part of the model's identity: when and by what it was exported, and its programs.
_FREE_FIELDS = (
    "model_version", "created", "sizes", "item_batches", "programs", "config", "versions", "parts",
)  # fmt: skip


def model_version(manifest: Manifest) -> str:
    """SHA-256 over everything that decides a vector."""
    fields = dataclasses.asdict(manifest)
    files = [table.file for table in manifest.tables.values()]
    files += [f for each in manifest.translations.values() for f in (each.keys, each.numbers)]
    files += [manifest.training_items.ids, manifest.training_items.counts]
    files += [f for f in manifest.parts if f.startswith(("vocabularies/", "item_values/"))]
    contract = {name: value for name, value in fields.items() if name not in _FREE_FIELDS}
    contract["files"] = {name: manifest.parts[name].sha256 for name in sorted(set(files))}
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()


def to_json(manifest: Manifest) -> str:
    """The text of `manifest.json`."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True) + "\n"


def read(folder: pathlib.Path) -> Manifest:
    """Reads and checks `manifest.json`; the other parts are checked by `check_parts`.

    Raises:
        FileNotFoundError: no such folder, or no manifest in it.
        ValueError: not JSON, another format version, other fields, fields that were changed, or a
            file in use that no hash covers.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file, so this is no finished export; make one with "
            "`python -m hstu_jax.export`."
        )
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); export again.") from None
    found = raw.get("format_version") if isinstance(raw, dict) else None
    if found != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format_version={found!r}: this version reads {FORMAT_VERSION}; export again."
        )
    manifest = from_fields(Manifest, raw, where=str(file))
    require_listed(referenced_files(manifest), manifest.parts, where=str(file))
    if manifest.model_version != model_version(manifest):
        raise ValueError(
            f"{file}: model_version={manifest.model_version[:12]}: does not belong to the other "
            "fields: they were changed, or are of another export; export again."
        )
    return manifest


def referenced_files(manifest: Manifest) -> list[str]:
    """Files that the towers read; of a folder of parameters its name with a `/` behind it."""
    features = (
        *manifest.history_features, *manifest.contextual_features, *manifest.candidate_features,
    )  # fmt: skip
    files = [table.file for table in manifest.tables.values()]
    files += [program.file for program in manifest.programs]
    files += [f for each in manifest.translations.values() for f in (each.keys, each.numbers)]
    files += [manifest.training_items.ids, manifest.training_items.counts]
    files += [manifest.item_keys, *(feature.item_values for feature in features)]
    files += [feature.rule.get("file") for feature in features]
    files += [f"{array.tower}_tower/" for array in manifest.parameters]
    return sorted({file for file in files if file is not None})


def require_listed(files: Iterable[str], parts: Mapping[str, Part], *, where: str) -> None:
    """Checks that files in use are parts, whose hashes are known.

    Args:
        files: names, as of `referenced_files`.
        parts: of a manifest or record.
        where: the file that has the parts, for messages.

    Raises:
        ValueError: a file is not listed; names it.
    """
    for file in files:
        is_listed = file in parts
        if file.endswith("/"):
            is_listed = any(name.startswith(file) for name in parts)
        if not is_listed:
            raise ValueError(
                f"{where}: parts does not list {file}, which is in use, so that no hash covers it; "
                "copy the folder again."
            )


def check_parts(folder: pathlib.Path, parts: Mapping[str, Part], *, verify: bool) -> None:
    """Checks that every part is there, whole, and of this export.

    Args:
        folder: that holds them.
        parts: from a manifest.
        verify: also read every byte and compare hashes; False compares sizes only.

    Raises:
        ValueError: a part is missing, of another size, or of another export; names it.
    """
    for name, part in parts.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: missing part; the export is not whole: copy it again.")
        size = file.stat().st_size
        if size != part.size_bytes:
            raise ValueError(
                f"{file}: {size} bytes, and the manifest says {part.size_bytes}: truncated or of "
                "another export; copy the folder again."
            )
        if verify and (found := file_sha256(file)) != part.sha256:
            raise ValueError(
                f"{file}: hash {found[:12]}, and the manifest says {part.sha256[:12]}: damaged or "
                "of another export; parts of two exports must not be mixed: copy the folder again."
            )


def describe_part(file: pathlib.Path) -> Part:
    """Hash and size of a file."""
    return Part(sha256=file_sha256(file), size_bytes=file.stat().st_size)


def file_sha256(file: pathlib.Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while block := source.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
