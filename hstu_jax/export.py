"""Exports a checkpoint of a run for serving: both towers, their tables, and all items' vectors.

python -m hstu_jax.export --workdir=runs/kuairand --export_dir=export
    --item_input_path='items/*.parquet' [--checkpoint_step=N | --best]

An export that is there gets new items, or an index of them (or both), without a new training:

python -m hstu_jax.export --export_dir=export [--refresh_items='items/*.parquet']
    [--build_index=hnsw]

The configuration is read from the checkpoint. What is in the folder, and how to load it without
this package's training code, is in docs/serving.md.
"""

import pathlib
from typing import Any

from absl import flags

from hstu_jax import cli
from hstu_jax.config import schema
from hstu_jax.serving import (
    artifact,
    catalogue,
    contract,
    exporter,
    item_index,
    item_refresh,
    item_writer,
    trained,
)

_EXPORT_DIR = flags.DEFINE_string("export_dir", None, "Folder to make.")
_ITEMS = flags.DEFINE_string(
    "item_input_path",
    None,
    "Parquet files with one item a row; or the word 'store': all items of the training data.",
)
_STEP = flags.DEFINE_integer("checkpoint_step", None, "Checkpoint to export; default: the newest.")
_BEST = flags.DEFINE_bool("best", False, "Export the checkpoint of train.keep_best.")
_LENGTHS = flags.DEFINE_list(
    "history_lengths", [], "History lengths to compile for; default 64, 256, ... the longest."
)
_BATCHES = flags.DEFINE_list("batch_sizes", ["1", "8", "64"], "Users of a program.")
_PLATFORMS = flags.DEFINE_list("platforms", ["cpu", "cuda"], "Platforms of the programs.")
_IDS = flags.DEFINE_enum(
    "ids",
    "model",
    ["model", "original"],
    "Ids of the inputs: the training files' own, or (of an event store) those of the raw data.",
)
_ON_COLD = flags.DEFINE_enum(
    "on_cold_items", "count", ["count", "refuse"], "Items without a training event."
)
_REFRESH = flags.DEFINE_string(
    "refresh_items", None, "Parquet files of the whole new catalogue, for an export that is there."
)
_INDEX = flags.DEFINE_enum(
    "build_index", None, list(item_index.KINDS), "Also build an index of the items (extra `ann`)."
)


def main() -> None:
    """Exports, or changes an export, and says what was written."""
    if cli.CONFIG.value is not None:
        raise ValueError(
            "--config: is not read here, since a checkpoint has its own configuration; leave it "
            "out, and all --config.FIELD with it."
        )
    if _INDEX.value:
        item_index.import_faiss()  # before anything is written
    if _REFRESH.value is not None or (_INDEX.value and not cli.WORKDIR.value):
        _change()
    else:
        _export()
    if _INDEX.value:
        options = item_index.IndexOptions(kind=_INDEX.value)
        print(f"index     {item_index.build(artifact.load(_EXPORT_DIR.value), options=options)}")


def _change() -> None:
    for flag in (cli.WORKDIR, _ITEMS, _STEP, _BEST, _LENGTHS, _BATCHES, _PLATFORMS, _IDS):
        if flag.present:
            raise ValueError(
                f"--{flag.name}={flag.value}: makes a new export; leave it out to change the one "
                "that is there."
            )
    if not _EXPORT_DIR.value:
        raise ValueError(f"--export_dir={_EXPORT_DIR.value!r}: must be given.")
    if _ON_COLD.present and _REFRESH.value is None:
        raise ValueError(
            f"--on_cold_items={_ON_COLD.value}: is read where items are written, and an index has "
            "those that are there; leave it out."
        )
    if _REFRESH.value is not None:
        there = artifact.load(_EXPORT_DIR.value)
        refreshed = item_refresh.refresh_items(
            there,
            item_input_path=_REFRESH.value,
            on_cold=_ON_COLD.value,
            rebuild_index=_INDEX.value is None,
        )
        print(refreshed.line())


def _export() -> None:
    """Reads the checkpoint, exports, and says what was written."""
    for flag in (cli.WORKDIR, _EXPORT_DIR):
        if not flag.value:
            raise ValueError(f"--{flag.name}={flag.value!r}: must be given.")
    if not _ITEMS.value:
        raise ValueError(
            "--item_input_path=None: says which items to embed; give parquet files with one item a "
            "row ('items/*.parquet'), or the word store for all items of the training data."
        )
    if _BEST.value and _STEP.value is not None:
        raise ValueError(f"--checkpoint_step={_STEP.value}: cannot be given with --best.")
    options = exporter.ExportOptions(
        history_lengths=_numbers(_LENGTHS),
        batch_sizes=_numbers(_BATCHES),
        platforms=tuple(_PLATFORMS.value),
        on_cold=_ON_COLD.value,
    )
    wanted = "best" if _BEST.value else "latest" if _STEP.value is None else _STEP.value
    model = trained.read_checkpoint(pathlib.Path(cli.WORKDIR.value), step_number=wanted)
    print(f"model     step {model.step} of {cli.WORKDIR.value}")
    report = exporter.export(
        model, _EXPORT_DIR.value, **_of_the_data(model.config), options=options, echo=print
    )
    print(f"exported  {report.folder}, model {report.manifest.model_version[:12]}")


def _of_the_data(config: schema.Config) -> dict[str, Any]:
    """Items and what is known of them, from the item files or the training data."""
    ids, pattern = _IDS.value, _ITEMS.value
    catalogue.check_ids(config, ids)
    seen, store = None, None
    if pattern != "store":
        promises = contract.make_contract(config)
        id_column = promises.item_id_column
        kinds = {each.name: each.dtype for each in promises.item_inputs}
        item_writer.check_files(
            pattern,
            columns=tuple(kinds),
            id_column=id_column,
            must_be_integers=ids == "model" and kinds[id_column] == "id",
        )
        seen = catalogue.training_items_of_files(pattern, id_column=id_column)
    needs_maps = ids == "original" or bool(catalogue.history_features_of_items(config))
    if pattern == "store" or seen is None or needs_maps:
        store = cli.open_data(config)
    return {
        "training_items": seen or catalogue.training_items_of_store(store, ids=ids),
        "item_rows": (
            catalogue.rows_of_store(store, config, ids=ids)
            if pattern == "store"
            else item_writer.read_rows(pattern)
        ),
        "data_maps": catalogue.data_maps(store, config, ids=ids) if needs_maps else None,
    }


def _numbers(flag: flags.FlagHolder) -> tuple[int, ...]:
    if not all(text.isdecimal() for text in flag.value):
        raise ValueError(f"--{flag.name}={','.join(flag.value)}: must be whole numbers.")
    return tuple(map(int, flag.value))


if __name__ == "__main__":
    # Programs for a GPU are lowered anywhere; compared on the CPU, numbers are equal to 1e-6.
    cli.run_without_config(main, uses_devices=False)
