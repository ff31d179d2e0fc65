"""The parts of an exported folder, each from its values alone: equal models, equal bytes.

Tables, parameters, arrays and programs. Only the exporter reads this file (`exporter.py`).
"""

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from hstu_jax.serving import contract, lowering, tower_parameters, trained
from hstu_jax.serving import manifest as manifest_lib
from hstu_jax.tables import spec as table_spec

_BLOCK_BYTES = 2**24  # of a table, written at a time


def write_tables(model: trained.Trained, folder: pathlib.Path) -> dict[str, manifest_lib.Table]:
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
                ids = jnp.arange(start, min(start + block, spec.num_rows), dtype=jnp.int32)
                rows = np.asarray(table_spec.rows_of(spec, ids, jnp.ones(ids.shape, bool)))
                target.write(weights[rows].tobytes())
        tables[spec.name] = manifest_lib.Table(file=file, num_rows=spec.num_rows, dim=spec.dim)
    return tables


def write_parameters(
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
                    sha256=tower_parameters.array_sha256(array),
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
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # Orbax warns that there is nothing of OCDBT to merge
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))
    finally:
        logger.setLevel(level)
    record = folder / "_CHECKPOINT_METADATA"
    fields = json.loads(record.read_text())
    fields |= {name: 0 for name in fields if name.endswith("_timestamp_nsecs")}
    record.write_text(json.dumps(fields, sort_keys=True))
    note = folder / "commit_success.txt"  # says where it was written
    if note.exists():
        note.write_text("Checkpoint commit was successful.")


def write_arrays(arrays: Mapping[str, np.ndarray], folder: pathlib.Path) -> None:
    """Arrays by file name, as `.npy` that needs no pickle."""
    for file, values in arrays.items():
        (folder / file).parent.mkdir(exist_ok=True)
        np.save(folder / file, values, allow_pickle=False)


def write_programs(
    model: trained.Trained,
    folder: pathlib.Path,
    sizes: tuple[manifest_lib.Size, ...],
    *,
    platforms: tuple[str, ...],
) -> tuple[manifest_lib.Program, ...]:
    """A program for every tower, platform and size; the item program takes any number of rows."""
    config, programs = model.config, []
    has_attention = config.model.user_tower.encoder == "hstu"
    user, item = (tower_variables(model.variables, tower) for tower in ("user", "item"))

    def save(exported: jax.export.Exported, **described: Any) -> None:
        program = manifest_lib.Program(**described)
        (folder / program.file).write_bytes(exported.serialize())
        programs.append(program)

    for platform in platforms:
        place = f"programs/{platform}"
        (folder / place).mkdir(parents=True)
        attention = lowering.attention_for(config, platform, user, length=sizes[-1].length)
        functions = lowering.TowerFunctions(config, attention)
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
                attention=attention if has_attention else "",
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
