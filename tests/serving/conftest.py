"""One small model, trained and exported once a session, and rows to compare its vectors on."""

import dataclasses
import pathlib

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu_jax.config import resolve
from hstu_jax.data import list_export
from hstu_jax.serving import artifact, catalogue, exporter, trained
from hstu_jax.training import evaluation, loop
from hstu_jax.training import run as run_lib
from tests.training.small_config import small_config, with_two_tables

OPTIONS = exporter.ExportOptions(
    history_lengths=(8, 42), batch_sizes=(1, 16), item_batch_sizes=(16, 512)
)


@dataclasses.dataclass(frozen=True)
class Exported:
    """A run, its state, the folder that was exported of it and rows of its data."""

    run: run_lib.Run
    state: object
    model: trained.Trained
    folder: pathlib.Path
    lists: pathlib.Path
    report: exporter.Report

    def rows(self, split: str) -> pa.Table:
        return pq.read_table(self.lists / split / "part-00000.parquet")


@pytest.fixture(scope="session")
def exported(small_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    # All ranks are below 10,000: the first of equal validations is the best, not the newest step.
    config = small_config(
        small_store,
        folder / "run",
        data__block_len=8,
        train__num_steps=4,
        train__save_checkpoints_steps=2,
        train__keep_best__metric="recall@10000",
        train__dense_optimizer__lr=0.02,
        train__sparse_optimizer__lr=0.5,
        eval__every_num_steps=2,
        eval__top_k=(1, 5, 10, 50, 100, 10_000),
    )
    config, devices = with_two_tables(config), jax.devices()[:1]
    result = loop.fit(config, small_store, devices=devices, echo=lambda line: None)
    run, state = result.run, result.state
    list_export.export(small_store, folder / "lists", options=list_export.ExportOptions())
    model = trained.from_state(config, state, recorded=resolve.to_text(config))
    report = exporter.export(
        model,
        folder / "export",
        training_items=catalogue.training_items_of_store(small_store),
        item_rows=catalogue.rows_of_store(small_store, config),
        options=OPTIONS,
    )
    return Exported(run, state, model, folder / "export", folder / "lists", report)


@pytest.fixture(scope="session")
def opened(exported):
    return artifact.load(exported.folder)


@pytest.fixture(scope="session")
def live(exported):
    """Vectors of the training windows and of all items, by the pipeline and the compiled steps."""
    store = exported.run.store
    eval_set = evaluation.make_eval_set(store, split="train", exclude_seen=False)
    users, _ = evaluation.user_vectors(exported.run, exported.state, eval_set)
    items = evaluation.item_vectors(exported.run, exported.state)
    return users, np.asarray(items)[: exported.run.store.num_items]


def one_user(**columns) -> dict:
    """A row of three events, with `columns` in place of some."""
    row = {
        "uih_seq__video_id": [[5, 6, 7]],
        "uih_seq__action_timestamp": [[1_650_000_000, 1_650_000_060, 1_650_000_120]],
        "uih_seq__action_weight": [[1, 2, 3]],
        "uih_seq__watch_time": [[0.5, 1.5, 2.0]],
        "request_time": [1_650_000_500],
        "user_id": [7],
    }
    return row | columns
