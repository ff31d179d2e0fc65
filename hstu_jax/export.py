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

from absl import flags

from hstu_jax import cli
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
    for flag in (cli.WORKDIR, _ITEMS, _STEP):
        if flag.value is not None:
            raise ValueError(
                f"--{flag.name}={flag.value}: makes a new export; leave it out to change the one "
                "that is there."
            )
    if not _EXPORT_DIR.value:
        raise ValueError(f"--export_dir={_EXPORT_DIR.value!r}: must be given.")
    if _REFRESH.value is not None:
        there = artifact.load(_EXPORT_DIR.value)
        print(item_refresh.refresh_items(there, item_input_path=_REFRESH.value).line())


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
    seen, rows = _items(model)
    report = exporter.export(
        model, _EXPORT_DIR.value, training_items=seen, item_rows=rows, options=options, echo=print
    )
    print(f"exported  {report.folder}, model {report.manifest.model_version[:12]}")


def _items(model: trained.Trained):
    """(items with a training event, rows of all items)."""
    if _ITEMS.value == "store":
        store = cli.open_data(model.config)
        return catalogue.training_items_of_store(store), catalogue.rows_of_store(
            store, model.config
        )
    id_column = contract.make_contract(model.config).item_id_column
    seen = catalogue.training_items_of_files(_ITEMS.value, id_column=id_column)
    if seen is None:  # the data that the model was trained on knows
        seen = catalogue.training_items_of_store(cli.open_data(model.config))
    return seen, item_writer.read_rows(_ITEMS.value)


def _numbers(flag: flags.FlagHolder) -> tuple[int, ...]:
    if not all(text.isdecimal() for text in flag.value):
        raise ValueError(f"--{flag.name}={','.join(flag.value)}: must be whole numbers.")
    return tuple(map(int, flag.value))


if __name__ == "__main__":
    cli.run_without_config(main)
