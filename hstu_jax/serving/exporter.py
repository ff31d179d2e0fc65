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
import shutil
from collections.abc import Callable, Iterable
from typing import Any, Literal

import flax.traverse_util
import jax
import jax.export
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
from jaxtyping import Int, Shaped

from hstu_jax.serving import (
    artifact,
    contract,
    item_writer,
    live_check,
    lowering,
    trained,
)
from hstu_jax.serving import manifest as manifest_lib
from hstu_jax.tables import spec as table_spec

write_items = item_writer.write_items
PLATFORMS = ("cpu", "cuda")
_BLOCK_BYTES = 2**24  # of a table, written at a time
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
    options: ExportOptions | None = None,
    echo: Callable[[str], None] = lambda line: None,
) -> Report:
    """Exports a model.

    Args:
        model: from a checkpoint.
        folder: to make; must not exist, or be empty.
        training_items: items with a training event.
        item_rows: all items, as `write_items` takes them; None writes none.
        options: sizes and platforms.
        echo: told of every stage.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: the model has something that an export cannot serve, the items break a rule, or
            the export does not compute what the live model does.
    """
    options = options or ExportOptions()
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"export_dir={folder}: exists and is not empty; choose another.")
    promises = contract.make_contract(model.config)
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        manifest = _write(model, promises, temporary, training_items, options, echo)
        # The manifest comes last: without it nothing loads.
        (temporary / manifest_lib.FILE).write_text(manifest_lib.to_json(manifest))
        opened = artifact.load(temporary)
        check = live_check.compare(model, opened)
        echo(f"compared  {check.line()}")
        written = None
        if item_rows is not None:
            written = write_items(opened, item_rows, temporary, on_cold=options.on_cold)
            echo(f"items     {written.num_items:,}, {written.num_cold:,} without a training event")
        item_writer.sync_tree(temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Report(folder=folder, manifest=manifest, check=check, items=written)


def default_lengths(max_seq_len: int) -> tuple[int, ...]:
    """64, 256, 1024, ..., and the longest history that the model reads."""
    lengths = []
    while (length := _SHORTEST * 4 ** len(lengths)) < max_seq_len:
        lengths.append(length)
    return (*lengths, max_seq_len)


def _write(model, promises, folder, training_items, options, echo) -> manifest_lib.Manifest:
    """Everything but the manifest and the items."""
    tables = _write_tables(model, folder)
    size = sum(table.num_rows * table.dim * 4 for table in tables.values())
    echo(f"tables    {len(tables)}, {size / 2**20:,.1f} MiB")
    parameters = _write_parameters(model, folder)
    _write_arrays(promises, training_items, folder)
    lengths = options.history_lengths or default_lengths(promises.history.max_seq_len)
    if lengths[-1] != promises.history.max_seq_len:
        raise ValueError(
            f"history_lengths={lengths}: the longest must be model.user_tower.max_seq_len="
            f"{promises.history.max_seq_len}; end with it."
        )
    sizes = tuple(
        manifest_lib.Size(length=length, batches=_batches(length, options.batch_sizes))
        for length in lengths
    )
    programs = _write_programs(model, folder, sizes, options)
    echo(f"programs  {len(programs)}, lengths {lengths}")
    functions = lowering.TowerFunctions(model.config, "xla")
    item_input = jax.ShapeDtypeStruct((1, model.config.group_width("candidate")), np.float32)
    vector = jax.eval_shape(functions.item, model.variables, item_input)
    parts = {
        str(file.relative_to(folder)): manifest_lib.describe_part(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = manifest_lib.Manifest(
        format_version=manifest_lib.FORMAT_VERSION,
        model_version="",
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        dim=vector.shape[1],
        similarity=model.config.model.similarity,
        normalized=model.config.model.similarity == "COSINE",
        outputs={"user": "user_tower_emb", "item": "item_tower_emb"},
        ids="model",
        **promises.fields(),
        translations={},
        training_items=_TRAINING_ITEMS,
        tables=tables,
        sizes=sizes,
        item_batches=options.item_batch_sizes,
        programs=programs,
        parameters=parameters,
        source_step=model.step,
        uses_average=model.uses_average,
        config=model.config_text,
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        parts=parts,
    )
    return dataclasses.replace(manifest, model_version=manifest_lib.model_version(manifest))


_TRAINING_ITEMS = manifest_lib.TrainingItems(
    ids="training_items/ids.npy", counts="training_items/counts.npy"
)


def _batches(length: int, batch_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Those whose tokens a program may take at once."""
    return tuple(n for n in batch_sizes if n * length <= _MAX_TOKENS or n == batch_sizes[0])


def _write_tables(model: trained.Trained, folder: pathlib.Path) -> dict[str, manifest_lib.Table]:
    """Every table once, row i for id i, a block at a time."""
    (folder / "tables").mkdir()
    tables = {}
    for spec in model.specs:
        file = f"tables/{contract.file_name(spec.name)}.npy"
        weights = np.asarray(model.weights[spec.name])  # on the CPU a view
        header = {"descr": "<f4", "fortran_order": False, "shape": (spec.num_rows, spec.dim)}
        block = max(_BLOCK_BYTES // (4 * spec.dim), 1)
        with (folder / file).open("wb") as target:
            np.lib.format.write_array_header_1_0(target, header)
            for start in range(0, spec.num_rows, block):
                ids = np.arange(start, min(start + block, spec.num_rows), dtype=np.int32)
                rows = np.asarray(table_spec.rows_of(spec, jax.numpy.asarray(ids), ids >= 0))
                target.write(weights[rows].tobytes())
        tables[spec.name] = manifest_lib.Table(file=file, num_rows=spec.num_rows, dim=spec.dim)
    return tables


def _write_parameters(
    model: trained.Trained, folder: pathlib.Path
) -> tuple[manifest_lib.Array, ...]:
    """`user_tower/` and `item_tower/`: each tower's variables as an Orbax tree."""
    described = []
    for tower in ("user", "item"):
        tree = jax.tree.map(np.asarray, tower_variables(model.variables, tower))
        flat = flax.traverse_util.flatten_dict(tree, sep="/")
        if not flat:  # an item tower may be the embedding itself
            continue
        _save(folder / f"{tower}_tower", tree)
        for name, array in sorted(flat.items()):
            described.append(
                manifest_lib.Array(
                    tower=tower,
                    name=name,
                    shape=array.shape,
                    dtype=str(array.dtype),
                    sha256=artifact.array_sha256(array),
                )
            )
    return tuple(described)


def tower_variables(variables: dict[str, Any], tower: str) -> dict[str, Any]:
    """The collections of one tower, under the names that the whole model gives them."""
    name = f"{tower}_tower"
    return {kind: {name: tree[name]} for kind, tree in variables.items() if tree.get(name)}


def _save(folder: pathlib.Path, tree: dict[str, Any]) -> None:
    """An Orbax tree whose files depend on the values alone."""
    # Without OCDBT, whose files have random names.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))
    record = folder / "_CHECKPOINT_METADATA"
    fields = json.loads(record.read_text())
    fields |= {name: 0 for name in fields if name.endswith("_timestamp_nsecs")}
    record.write_text(json.dumps(fields, sort_keys=True))
    note = folder / "commit_success.txt"  # says where it was written
    if note.exists():
        note.write_text("Checkpoint commit was successful.")


def _write_arrays(promises, training_items, folder) -> None:
    for file, words in promises.vocabularies.items():
        (folder / file).parent.mkdir(exist_ok=True)
        np.save(folder / file, np.array(words, dtype=np.str_), allow_pickle=False)
    (folder / "training_items").mkdir()
    np.save(folder / _TRAINING_ITEMS.ids, training_items.ids, allow_pickle=False)
    np.save(folder / _TRAINING_ITEMS.counts, training_items.counts, allow_pickle=False)


def _write_programs(model, folder, sizes, options) -> tuple[manifest_lib.Program, ...]:
    """A program for every tower, platform and size; the item program takes any number of rows."""
    config, programs = model.config, []
    has_attention = config.model.user_tower.encoder == "hstu"
    functions = lowering.TowerFunctions(config, "xla")
    user, item = (tower_variables(model.variables, tower) for tower in ("user", "item"))

    def save(exported: jax.export.Exported, **described: Any) -> None:
        program = manifest_lib.Program(**described)
        (folder / program.file).write_bytes(exported.serialize())
        programs.append(program)

    for platform in options.platforms:
        place = f"programs/{platform}"
        (folder / place).mkdir(parents=True)
        for length, batch in ((size.length, n) for size in sizes for n in size.batches):
            # Static, since the segments of the layout are searched by binary search, whose number
            # of steps JAX takes from the batch.
            shapes = lowering.user_shapes(config, batch=batch, length=length)
            save(
                lowering.export(functions.user, platform, user, shapes),
                tower="user",
                platform=platform,
                length=length,
                batch=batch,
                attention=functions.attention if has_attention else "",
                file=f"{place}/user_{length:05d}_{batch:04d}.bin",
            )
        (rows,) = jax.export.symbolic_shape("b")
        shape = jax.ShapeDtypeStruct((rows, config.group_width("candidate")), np.float32)
        save(
            lowering.export(functions.item, platform, item, shape),
            tower="item",
            platform=platform,
            length=0,
            batch=0,
            attention="",
            file=f"{place}/item.bin",
        )
    return tuple(programs)
