"""A small configuration for the training tests: KuaiRand's features, a model of width 16."""

import dataclasses

import ml_collections

from configs import kuairand
from hstu_jax.config import resolve, schema


def small_config(store, workdir, **overrides) -> schema.Config:
    """The sample's configuration cut down; `overrides` are dotted paths with `__` for dots."""
    return resolve.resolve(small_raw(store.path, workdir, **overrides))


def small_raw(store_path, workdir, **overrides) -> ml_collections.ConfigDict:
    """The same before it is resolved, as a configuration file gives it."""
    raw = kuairand.get_config("sample")
    raw.workdir = str(workdir)
    raw.data.path = str(store_path)
    raw.data.batch_size, raw.data.block_len = 16, 16
    raw.data.queries_per_group = 120
    raw.data.negative_sampler.num_sample = 24
    raw.model.user_tower.max_seq_len = 42
    stu = raw.model.user_tower.hstu.stu
    stu.embedding_dim, stu.num_heads, stu.hidden_dim, stu.attention_dim = 16, 2, 8, 8
    stu.output_dropout_ratio = 0.1
    hstu = raw.model.user_tower.hstu
    hstu.input_dropout_ratio, hstu.attn_num_layers = 0.1, 2
    hstu.positional_encoder.num_position_buckets = 64
    hstu.positional_encoder.num_time_buckets = 64
    raw.model.item_tower.mlp.hidden_units = (16,)
    for name in ("uih_seq__video_id", "cand_seq__video_id"):
        raw.features[name].embedding_dim = 16
        raw.features[name].num_buckets = 1_024
    for name in raw.feature_groups.contextual:
        raw.features[name].embedding_dim = 8
    raw.features.user_id.num_buckets = 256
    raw.train.num_epochs, raw.train.num_steps = 0, 6
    raw.train.log_step_count_steps, raw.train.save_checkpoints_steps = 2, 3
    raw.train.use_tensorboard = False
    raw.eval.baselines = False
    for path, value in overrides.items():
        *sections, name = path.split("__")
        section = raw
        for part in sections:
            section = section[part]
        section[name] = value
    return raw


def one_table_split(store, workdir, **overrides) -> schema.Config:
    """For two devices: the table of items is split, that of users is not; it compiles fastest."""
    config = small_config(
        store,
        workdir,
        data__num_groups=2,
        data__source="event_store",
        mesh__replicated_table_bytes=40_000,
        model__user_tower__encoder="mean",
        **overrides,
    )
    return with_two_tables(config)


def with_two_tables(config: schema.Config) -> schema.Config:
    """The same with user_id as its only contextual feature: it compiles in a third of the time."""
    groups = {**config.feature_groups, "contextual": ("user_id",)}
    used = {name for names in groups.values() for name in names}
    features = {name: value for name, value in config.features.items() if name in used}
    return dataclasses.replace(config, features=features, feature_groups=groups)
