"""A trained model -> a folder that serves it: tables, parameters, programs, manifest, items.

Written beside its name and renamed when it is whole, after it was loaded and compared with the live
model (`live_check.py`). The folder is described in docs/serving.md and read by `artifact.py`.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Int, Shaped

from hstu_jax.serving import (
    artifact,
    contract,
    item_writer,
    live_check,
    lowering,
    part_writer,
    trained,
    unfinished,
)
from hstu_jax.serving import manifest as manifest_lib

write_items = item_writer.write_items
PLATFORMS = ("cpu", "cuda")
_SHORTEST = 64  # of the default history lengths, each four times the one before
_MAX_TOKENS = 2**17  # of a program's batch
_PACKAGES = ("hstu_jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "pyarrow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported beside the model itself.

    Attributes:
        history_lengths: that there are programs for, ascending; the longest is what the model
            reads. () = 64, 256, 1024, ... up to that.
        batch_sizes: users that a program takes at once, ascending.
        item_batch_sizes: the same of items.
        platforms: "cpu" and "cuda".
        on_cold: what to do with items that training has not seen.
    """

    history_lengths: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    item_batch_sizes: tuple[int, ...] = (1, 64, 4096)
    platforms: tuple[str, ...] = PLATFORMS
    on_cold: Literal["count", "refuse"] = "count"

    def __post_init__(self):
        for name in ("history_lengths", "batch_sizes", "item_batch_sizes"):
            value = getattr(self, name)
            is_ascending = tuple(sorted(set(value))) == value and all(n > 0 for n in value)
            if not is_ascending or (not value and name != "history_lengths"):
                raise ValueError(f"{name}={value}: must be positive and ascending.")
        unknown = [name for name in self.platforms if name not in PLATFORMS]
        if unknown or not self.platforms:
            raise ValueError(f"platforms={self.platforms}: must be some of {PLATFORMS}.")
        if "cpu" not in self.platforms:
            raise ValueError(
                f"platforms={self.platforms}: must include 'cpu', on which an export is compared "
                "with the live model."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingItems:
    """Items that the training has seen, and how often.

    Attributes:
        ids: as the artefact's inputs have them; ascending.
        counts: training events of each, positive.
    """

    ids: Shaped[np.ndarray, "n"]
    counts: Int[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataMaps:
    """What the training data knows and a row does not say.

    Attributes:
        translations: column -> (original ids ascending, the model's id of each, that of an
            original id that is not among them; -1 = none). Empty = inputs hold the model's ids.
        item_keys: item ids, ascending, that `item_values` are of; as the inputs have them.
        item_values: feature of the history -> its ids or numbers of these items, and in the last
            place those of any other item.
    """

    translations: Mapping[str, tuple[np.ndarray, np.ndarray, int]] = dataclasses.field(
        default_factory=dict
    )
    item_keys: Shaped[np.ndarray, "n"] | None = None
    item_values: Mapping[str, Shaped[np.ndarray, "n_and_one"]] = dataclasses.field(
        default_factory=dict
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What an export wrote and compared.

    Attributes:
        folder: of the artefact.
        manifest: of the artefact.
        check: differences from the live model.
        items: of the item files, or None without any.
    """

    folder: pathlib.Path
    manifest: manifest_lib.Manifest
    check: live_check.Differences
    items: item_writer.Written | None


def export(
    model: trained.Trained,
    folder: str | os.PathLike[str],
    *,
    training_items: TrainingItems,
    item_rows: Iterable[tuple[str, pa.RecordBatch]] | None,
    data_maps: DataMaps | None = None,
    options: ExportOptions | None = None,
    echo: Callable[[str], None] = lambda line: None,
) -> Report:
    """Exports a model.

    The folder appears under its name when it is whole, loaded and compared. One that was killed
    leaves `.<name>-<process>.unfinished` beside it, which nothing loads and the next one removes;
    those of exports that run are left alone.

    Args:
        model: from a checkpoint.
        folder: to make; must not exist, or be empty.
        training_items: items with a training event.
        item_rows: all items, as `write_items` takes them; None writes none.
        data_maps: original ids, and what histories look up by item.
        options: sizes and platforms.
        echo: told of every stage.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: the model has something that an export cannot serve, the items break a rule, or
            the export does not compute what the live model does.
    """
    options, data_maps = options or ExportOptions(), data_maps or DataMaps()
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"export_dir={folder}: exists and is not empty; choose another.")
    promises = contract.make_contract(
        model.config,
        translated={
            column: "key" if keys.dtype.kind == "U" else "id"
            for column, (keys, _, _) in data_maps.translations.items()
        },
        of_items=tuple(data_maps.item_values),
    )
    ending = re.escape(artifact.UNFINISHED)
    unfinished.remove_abandoned(folder.parent, rf"\.{re.escape(folder.name)}-\d+{ending}")
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}{artifact.UNFINISHED}")
    with unfinished.held(temporary):
        manifest = _write(model, promises, temporary, training_items, data_maps, options, echo)
        text = manifest_lib.to_json(manifest)
        read_back = manifest_lib.from_fields(
            manifest_lib.Manifest, json.loads(text), where=str(temporary)
        )
        opened = artifact.open_parts(temporary, read_back)
        check = live_check.compare(model, opened)
        echo(f"compared  {check.line()}")
        written = None
        if item_rows is not None:
            written = write_items(opened, item_rows, temporary, on_cold=options.on_cold)
            echo(f"items     {written.num_items:,}, {written.num_cold:,} without a training event")
        # Last: without it nothing loads.
        (temporary / manifest_lib.FILE).write_text(text)
        item_writer.sync_tree(temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    return Report(folder=folder, manifest=manifest, check=check, items=written)


def default_lengths(max_seq_len: int) -> tuple[int, ...]:
    """64, 256, 1024, ..., and the longest history that the model reads."""
    lengths = []
    while (length := _SHORTEST * 4 ** len(lengths)) < max_seq_len:
        lengths.append(length)
    return (*lengths, max_seq_len)


def _write(
    model, promises, folder, training_items, data_maps, options, echo
) -> manifest_lib.Manifest:
    """Everything but the items; the manifest is returned."""
    sizes = _sizes(promises.history.max_seq_len, options)
    tables = part_writer.write_tables(model, folder)
    size = sum(table.num_rows * table.dim * 4 for table in tables.values())
    echo(f"tables    {len(tables)}, {size / 2**20:,.1f} MiB")
    parameters = part_writer.write_parameters(model, folder)
    translations = {
        column: manifest_lib.Translation(
            keys=f"translations/{contract.file_name(column)}_keys.npy",
            numbers=f"translations/{contract.file_name(column)}_numbers.npy",
            unlisted=unlisted,
        )
        for column, (_, _, unlisted) in data_maps.translations.items()
    }
    part_writer.write_arrays(_arrays(promises, training_items, data_maps, translations), folder)
    programs = part_writer.write_programs(model, folder, sizes, platforms=options.platforms)
    lengths = tuple(size.length for size in sizes)
    echo(f"programs  {len(programs)} for {', '.join(options.platforms)}; histories of {lengths}")
    functions = lowering.TowerFunctions(model.config, "xla")
    item_input = jax.ShapeDtypeStruct((1, model.config.group_width("candidate")), np.float32)
    vector = jax.eval_shape(functions.item, model.variables, item_input)
    manifest = manifest_lib.Manifest(
        format_version=manifest_lib.FORMAT_VERSION,
        model_version="",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        dim=vector.shape[1],
        similarity=model.config.model.similarity,
        normalized=model.config.model.similarity == "COSINE",
        outputs={"user": "user_tower_emb", "item": "item_tower_emb"},
        ids="original" if translations else "model",
        **promises.fields(),
        translations=translations,
        training_items=_TRAINING_ITEMS,
        item_keys=None if data_maps.item_keys is None else contract.ITEM_KEYS,
        tables=tables,
        sizes=sizes,
        item_batches=options.item_batch_sizes,
        programs=programs,
        parameters=parameters,
        source_step=model.step,
        uses_average=model.uses_average,
        config=model.config_text,
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        parts={
            str(file.relative_to(folder)): manifest_lib.describe_part(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        },
    )
    return dataclasses.replace(manifest, model_version=manifest_lib.model_version(manifest))


_TRAINING_ITEMS = manifest_lib.TrainingItems(
    ids="training_items/ids.npy", counts="training_items/counts.npy"
)


def _arrays(promises, training_items, data_maps, translations) -> dict[str, np.ndarray]:
    """File -> array: vocabularies, original ids, and what is known of items."""
    arrays = {file: np.array(words, dtype=np.str_) for file, words in promises.vocabularies.items()}
    for column, files in translations.items():
        keys, numbers, _ = data_maps.translations[column]
        arrays |= {files.keys: keys, files.numbers: numbers}
    arrays[_TRAINING_ITEMS.ids] = training_items.ids
    arrays[_TRAINING_ITEMS.counts] = training_items.counts
    if data_maps.item_keys is not None:
        arrays[contract.ITEM_KEYS] = data_maps.item_keys
        for name, values in data_maps.item_values.items():
            arrays[contract.item_values_file(name)] = values
    return arrays


def _sizes(max_seq_len: int, options: ExportOptions) -> tuple[manifest_lib.Size, ...]:
    """History lengths, each with those batches whose tokens a program may take at once."""
    lengths = options.history_lengths or default_lengths(max_seq_len)
    if lengths[-1] != max_seq_len:
        raise ValueError(
            f"history_lengths={lengths}: the longest must be model.user_tower.max_seq_len="
            f"{max_seq_len}, which the model was trained with; end with it."
        )
    batches = options.batch_sizes
    return tuple(
        manifest_lib.Size(
            length=length,
            batches=tuple(n for n in batches if n * length <= _MAX_TOKENS or n == batches[0]),
        )
        for length in lengths
    )
