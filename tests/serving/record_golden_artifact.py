"""Writes `tests/golden_artifact`: a small export, and the vectors that it must go on giving.

    python tests/serving/record_golden_artifact.py      # from the repository's root

Only to be run again when the format of exports changes, and then beside a folder of the old one.
"""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pyarrow as pa

from configs import kuairand
from hstu_jax.config import resolve
from hstu_jax.model import match
from hstu_jax.serving import artifact, exporter, trained
from hstu_jax.tables import spec as table_spec
from hstu_jax.training import schedules, step

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "golden_artifact"
NUM_ITEMS = 40
REQUEST_S = 1_650_000_000


def users() -> dict:
    """Three users: without history, with one event, with more than the model reads."""
    items = [[], [3], [int(n) for n in np.arange(12) * 7 % NUM_ITEMS]]
    return {
        "uih_seq__video_id": items,
        "uih_seq__action_timestamp": [
            [REQUEST_S - 3600 * (len(row) - i) for i in range(len(row))] for row in items
        ],
        "uih_seq__action_weight": [[1 + n % 5 for n in row] for row in items],
        "uih_seq__watch_time": [[0.5 * n for n in row] for row in items],
        "request_time": [REQUEST_S] * 3,
        "user_id": [1, 2, 15],
    }


def model() -> trained.Trained:
    """A model of width 8 with random values."""
    raw = kuairand.get_config("sample")
    raw.model.user_tower.max_seq_len = 8
    hstu = raw.model.user_tower.hstu
    hstu.attn_num_layers = 2
    stu = hstu.stu
    stu.embedding_dim, stu.num_heads, stu.hidden_dim, stu.attention_dim = 8, 2, 4, 4
    hstu.positional_encoder.num_position_buckets = 16
    hstu.positional_encoder.num_time_buckets = 16
    hstu.input_preprocessor.uih_preprocessor.action_mlp.simple_mlp.hidden_dim = 8
    raw.model.item_tower.mlp.hidden_units = (8,)
    for name in ("uih_seq__video_id", "cand_seq__video_id"):
        raw.features[name].embedding_dim, raw.features[name].num_buckets = 8, 64
    with raw.unlocked():
        for name in raw.feature_groups.contextual[1:]:
            del raw.features[name]
        raw.feature_groups.contextual = ("user_id",)
    raw.features.user_id.embedding_dim, raw.features.user_id.num_buckets = 4, 16
    raw.data.block_len = 16
    config = resolve.resolve(raw)
    program = step.make_program(config, run_length=schedules.RunLength(num_steps=1))
    key = jax.random.key(0)
    return trained.Trained(
        config=config,
        config_text=resolve.to_text(config),
        step=0,
        variables=match.init_variables(program.model, key),
        uses_average=False,
        weights={
            spec.name: table_spec.init_weights(
                dataclasses.replace(spec, init_bound=0.5), jax.random.fold_in(key, number)
            )
            for number, spec in enumerate(program.specs)
        },
        specs=program.specs,
    )


def main() -> None:
    """Writes the folder, and its vectors beside it."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    items = pa.record_batch({"video_id": np.arange(NUM_ITEMS)})
    report = exporter.export(
        model(),
        FOLDER,
        training_items=exporter.TrainingItems(ids=np.arange(30), counts=np.full(30, 2)),
        item_rows=[("items", items)],
        options=exporter.ExportOptions(
            batch_sizes=(4,), item_batch_sizes=(64,), platforms=("cpu",)
        ),
    )
    opened = artifact.load(report.folder)
    np.savez(
        FOLDER.parent / "golden_artifact_vectors.npz",
        users=opened.embed_users(users()),
        items=opened.embed_items(items),
    )


if __name__ == "__main__":
    main()
