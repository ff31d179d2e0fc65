"""The configurations of public benchmarks, cut down, from a raw file to the closing table."""

import json

import jax
import pytest

from configs import ml_1m
from hstu_jax import prepare, report
from hstu_jax.config import resolve
from hstu_jax.data import event_store
from hstu_jax.training import closing, loop


@pytest.fixture(scope="module")
def raw_files(tmp_path_factory):
    """Lines `user item` of items that follow each other, and the same as ratings with ties."""
    folder = tmp_path_factory.mktemp("raw")
    rows = [(u, (7 * u + step) % 48 + 1, step) for u in range(1, 41) for step in range(5 + u % 9)]
    (folder / "sequences.txt").write_text("".join(f"{u} {i}\n" for u, i, _ in rows))
    times = [978_300_000 + 500 * u + 40 * (step // 2) for u, _, step in rows]
    lines = [f"{u}::{i}::3::{t}\n" for (u, i, _), t in zip(rows, times, strict=True)]
    (folder / "ratings.dat").write_text("".join(lines))
    return folder


def small(variant, store, workdir):
    raw = ml_1m.get_config(variant)
    raw.data.path, raw.workdir = str(store), str(workdir)
    raw.data.batch_size, raw.data.block_len, raw.data.negative_sampler.num_sample = 16, 8, 16
    for name in raw.features:
        raw.features[name].embedding_dim, raw.features[name].num_buckets = 8, 64
    tower = raw.model.user_tower
    tower.max_seq_len, tower.hstu.attn_num_layers, tower.sasrec.num_blocks = 8, 1, 1
    stu = tower.hstu.stu
    stu.embedding_dim, stu.hidden_dim, stu.attention_dim = 8, 8, 8
    tower.hstu.positional_encoder.num_position_buckets = 8
    raw.train.num_epochs, raw.train.num_steps = 0, 40
    raw.train.save_checkpoints_steps = raw.eval.every_num_steps = 20
    raw.train.dense_optimizer.lr = raw.train.sparse_optimizer.lr = 0.03
    raw.train.use_tensorboard = False
    raw.eval.num_bootstrap = 10
    return resolve.resolve(raw)


@pytest.mark.parametrize(
    ("variant", "raw_format", "file"),
    [
        ("hstu_times", "movielens_1m", "ratings.dat"),
        pytest.param("sasrec", "sequences", "sequences.txt", marks=pytest.mark.long),
    ],
)
def test_from_raw_file_to_closing_table(variant, raw_format, file, raw_files, tmp_path, capsys):
    out_dir = tmp_path / "store"
    flags = ["--raw_file", str(raw_files / file), "--out_dir", str(out_dir)]
    prepare.main(["interactions", "--format", raw_format, *flags])
    store = event_store.open_store(out_dir)
    # Two events a second: their order is kept by moving the second one.
    assert (store.stats["events_moved"] > 100) == (variant == "hstu_times")
    config = small(variant, out_dir, tmp_path / "run")
    result = loop.fit(config, store, devices=jax.devices()[:1])
    table = closing.evaluate_beside_baselines(
        result.run, result.state, train_mean=True, beside_best=True
    )
    encoder = config.model.user_tower.encoder
    rows = [encoder, f"{encoder} best", "co-occurrence", "item-knn"]
    rows += ["last-day"] * (variant == "hstu_times") + ["popularity"]
    assert list(table.rows) == rows
    means = table.rows[encoder].metrics.means()
    assert {f"{kind}@{k}" for kind in ("hit_rate", "ndcg") for k in (1, 5, 10, 50, 100, 200)} < {
        *means
    }
    # One item a user, all of it ranked; what follows what is learned, and order is not popularity.
    assert table.rows[encoder].metrics.num_users == table.rows[encoder].ranks.num_ranked == 40
    assert means["hit_rate@5"] > table.rows["popularity"].metrics.means()["hit_rate@5"] + 0.2
    # Seen items in the ranking can only push the answer down.
    assert table.rows[encoder].with_seen.means()["mrr"] <= means["mrr"]
    table.write(tmp_path / "closing.json")
    written = json.loads((tmp_path / "closing.json").read_text())
    assert set(written["figures_with_seen"]) == set(rows)
    table.write_ranks(tmp_path / "run")
    capsys.readouterr()
    report.main(["--runs", str(tmp_path / "run"), "--against_row", "popularity"])
    assert f"hit_rate@10   {means['hit_rate@10']:.4f}  against 0." in capsys.readouterr().out
