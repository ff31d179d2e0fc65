"""The recorded text of every configuration is read back as the same configuration."""

import dataclasses

import pytest

from configs import kuairand
from hstu_jax.config import config_text, resolve, train_schema
from hstu_jax.config.feature_schema import IdFeature, NormalizerConfig, RawFeature


@pytest.mark.parametrize("variant", ["sample", "seed", "27k"])
def test_text_and_back(variant):
    config = resolve.resolve(kuairand.get_config(variant))
    assert config_text.parse(resolve.to_text(config), where="record") == config


def test_nested_sections_and_odd_values():
    config = resolve.resolve(kuairand.get_config("sample"))
    features = {**config.features, "tag": IdFeature(vocab_list=("a = b", "c'\n"), separator="\x1d")}
    raw = {"age": RawFeature(normalizer=NormalizerConfig(method="log10", default=-3.5))}
    width = config.features["user_id"].embedding_dim
    features["tag"] = dataclasses.replace(features["tag"], embedding_dim=width)
    raw["age"] = dataclasses.replace(raw["age"], boundaries=(0.5, 1e30), embedding_dim=width)
    groups = {**config.feature_groups}
    groups["contextual"] = (*groups["contextual"], "tag", "age")
    optimizer = config.train.dense_optimizer
    part = train_schema.PartOptimizerConfig(regex_pattern=r"a\.b = .*")
    optimizer = dataclasses.replace(optimizer, part_optimizers=(part,))
    config = dataclasses.replace(
        config,
        features=features,
        raw_features=raw,
        feature_groups=groups,
        train=dataclasses.replace(config.train, dense_optimizer=optimizer),
    )
    assert config_text.parse(resolve.to_text(config), where="record") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed 3", "record: line 'seed 3' of the configuration is no `path = value`"),
        ("seed = open('x')", "record: seed has an unreadable value"),
        ("seed = 1 +", "record: seed has an unreadable value"),
        ("sede = 3", "record: this version refuses the recorded configuration: sede=3: there is"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        config_text.parse(text, where="record")
