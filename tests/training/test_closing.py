"""The configuration of the mean-pooling baseline beside a run's result."""

import dataclasses

from hstu_jax.config import train_schema
from hstu_jax.training import closing
from tests.training.small_config import small_config


def test_the_mean_baseline_leaves_out_parts_that_take_nothing_there(small_store, tmp_path):
    config = small_config(small_store, tmp_path)
    patterns = ("user_tower/encoder/stack/.*", "item_tower/.*", ".*_stu_layers.*")
    parts = tuple(
        train_schema.PartOptimizerConfig(regex_pattern=pattern, kind="sgd") for pattern in patterns
    )
    dense = dataclasses.replace(config.train.dense_optimizer, part_optimizers=parts)
    train = dataclasses.replace(config.train, dense_optimizer=dense)
    mean = closing.mean_config(dataclasses.replace(config, train=train))
    assert mean.model.user_tower.encoder == "mean"
    assert mean.workdir == f"{config.workdir}/baseline_mean"
    assert mean.train.dense_optimizer.part_optimizers == parts[1:2]


def test_a_sasrec_run_has_the_same_mean_baseline(small_store, tmp_path):
    config = small_config(small_store, tmp_path, model__user_tower__encoder="sasrec")
    mean = closing.mean_config(config)
    assert mean.model.user_tower.encoder == "mean"
    assert mean.model.user_tower.sasrec == config.model.user_tower.sasrec
