"""The whole path on a small generated sample, and what must not be learnable."""

import jax
import pytest

from configs import kuairand
from hstu_jax.config import resolve
from hstu_jax.data import sample, sample_world
from hstu_jax.training import closing, counting, evaluation, loop


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    options = sample_world.SampleOptions(num_users=600, num_items=1_000, num_days=6)
    return sample.prepare(tmp_path_factory.mktemp("data") / "sample", options=options)


def train(store, workdir, *, ablation):
    raw = kuairand.get_config("sample")
    raw.workdir, raw.data.path, raw.data.ablation = str(workdir), str(store.path), ablation
    raw.data.batch_size, raw.data.negative_sampler.num_sample = 128, 256
    raw.train.num_epochs, raw.train.use_tensorboard = 4, False
    # Half the sample's width: enough for the margins below, in two thirds of the time.
    stu = raw.model.user_tower.hstu.stu
    stu.embedding_dim, stu.hidden_dim = 64, 16
    raw.model.item_tower.mlp.hidden_units = (64,)
    for name in ("uih_seq__video_id", "cand_seq__video_id"):
        raw.features[name].embedding_dim = 64
    # Mean pooling is another training: what it costs here is spent on the check below instead.
    raw.eval.baselines = False
    config = resolve.resolve(raw)
    lines = []
    result = loop.fit(config, store, devices=jax.devices()[:1], echo=lines.append)
    return config, result


@pytest.mark.long
def test_hstu_beats_popularity_and_shuffled_targets_do_not(store, tmp_path):
    recalls = {}
    for ablation in ("none", "shuffled_targets"):
        config, result = train(store, tmp_path / ablation, ablation=ablation)
        table = closing.evaluate_beside_baselines(result.run, result.state, train_mean=False)
        recalls[ablation] = table.figures()["hstu"]["recall@50"]
    eval_set = evaluation.make_eval_set(store, split="test", exclude_seen=True)
    counted, _ = counting.counting_baselines(store, eval_set, config.eval)
    popularity = counted["popularity"].metrics.means()["recall@50"]
    # Seen on the small sample: see the margins in the assertion's message if it fails.
    assert recalls["none"] > 1.3 * popularity, (recalls, popularity)
    assert recalls["shuffled_targets"] < 1.15 * popularity, (recalls, popularity)
