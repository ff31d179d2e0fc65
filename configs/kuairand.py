"""HSTU Match on KuaiRand, the data set of the reference's sample configuration.

    python -m hstu_jax.train --config=configs/kuairand.py           # generated sample, on a CPU
    python -m hstu_jax.train --config=configs/kuairand.py:subset    # prepared real rows

The sample's run takes 2 to 3 minutes on two CPU cores, half of it for the mean-pooling baseline,
and 1.2 GiB; expect recall@10 near .090 on its test day (`docs/results.md`). The small variants for
real data share its settings, which were chosen on generated data: tune them on yours.

Variants after the colon: `sample` (default), `subset`, `1k`, `pure`, `27k` (prepared real data: the
error for missing data has the command that makes it) and `seed` (the reference's sample
configuration at its full size: 512 wide, 3 layers, 4096 items, 10 M buckets; needs a GPU).
"""

import ml_collections

from hstu_jax.config import feature_schema, model_schema, resolve, schema

# Category features with the reference's bucket counts, which `seed` keeps. Preparation numbers the
# strings that it meets from 1 (0 = unknown), and real data has more of them: 16 elsewhere.
_CONTEXTUAL = {
    "user_id": None,  # as many buckets as users
    "user_active_degree": 8,
    "follow_user_num_range": 9,
    "fans_user_num_range": 9,
    "friend_user_num_range": 8,
    "register_days_range": 8,
}
# variant -> (folder, users, items): the bucket counts of user_id and video_id
_DATA = {
    "sample": ("data/kuairand_sample", 8_192, 16_384),
    "subset": ("data/kuairand_subset", 1_024, 16_384),
    "1k": ("data/kuairand_1k", 1_024, 4_400_000),
    "pure": ("data/kuairand_pure", 27_500, 7_600),
    "27k": ("data/kuairand_27k", 27_500, 32_100_000),
    "seed": ("data/kuairand_1k", 10_000_000, 10_000_000),
}


def get_config(variant: str = "sample") -> ml_collections.ConfigDict:
    """The configuration of one variant.

    Args:
        variant: a name of the module docstring; "" is `sample`.
    """
    variant = variant or "sample"
    if variant not in _DATA:
        raise ValueError(f"variant={variant!r}: unknown; available: {', '.join(_DATA)}.")
    folder, users, items = _DATA[variant]
    c = resolve.defaults()
    c.workdir = f"runs/kuairand_{variant}"
    c.data.path = folder
    if variant == "seed":
        sizes = dict(item_dim=512, item_bound=0.0, contextual_dim=32, categories=None)
        _features(c, users=users, items=items, **sizes)
        _seed(c)
    else:
        sizes = dict(item_dim=128, item_bound=0.5, contextual_dim=16, categories=16)
        _features(c, users=users, items=items, **sizes)
        _small(c)
        if variant == "sample":
            c.data.source = "sample"
    return c


def _features(
    c,
    *,
    users: int,
    items: int,
    item_dim: int,
    item_bound: float,
    contextual_dim: int,
    categories: int | None,
) -> None:
    video = schema.IdFeature(
        expression="item:video_id",
        num_buckets=items,
        embedding_dim=item_dim,
        embedding_name="video_id_emb",
        init_bound=item_bound,
    )
    features = {"uih_seq__video_id": video, "cand_seq__video_id": video}
    for name, buckets in _CONTEXTUAL.items():
        features[name] = schema.IdFeature(
            expression=f"user:{name}",
            num_buckets=users if name == "user_id" else categories or buckets,
            embedding_dim=contextual_dim,
        )
    with c.unlocked():
        c.features = {name: resolve.section(feature) for name, feature in features.items()}
        c.feature_groups = dict(
            contextual=tuple(_CONTEXTUAL),
            uih=("uih_seq__video_id",),
            candidate=("cand_seq__video_id",),
            uih_action=("uih_seq__action_weight",),
            uih_watchtime=("uih_seq__watch_time",),
            uih_timestamp=("uih_seq__action_timestamp",),
            query_time=("request_time",),
        )
        # Read with data.source=list_columns; listed so that they can be set on the command line.
        names = ("uih_seq", "cand_seq")
        c.sequences = {n: resolve.section(feature_schema.SequenceConfig()) for n in names}


def _small(c) -> None:
    """A small model that trains in a minute on two CPU cores; each value is measured in
    `docs/results.md`."""
    stu = c.model.user_tower.hstu.stu
    stu.embedding_dim, stu.num_heads, stu.hidden_dim, stu.attention_dim = 128, 4, 32, 16
    stu.output_dropout_ratio, stu.use_group_norm, stu.qk_bias_init = 0.2, True, 1.0
    # Short rows of a narrow layer fit any memory; time is what counts.
    stu.recompute_normed_x, stu.recompute_uvqk = False, False
    hstu = c.model.user_tower.hstu
    hstu.input_dropout_ratio, hstu.attn_num_layers = 0.0, 1
    c.model.user_tower.max_seq_len = 26  # with 6 contextual tokens: rows of one attention block
    c.model.item_tower.mlp = resolve.section(
        model_schema.MlpConfig(hidden_units=(128,), activation="")
    )
    c.model.similarity, c.model.temperature = "COSINE", 0.15
    c.model.initialization = "aligned"
    c.data.negative_sampler.num_sample = 2048
    c.data.batch_size, c.data.block_len = 256, 32
    c.train.num_epochs = 3
    c.train.dense_optimizer.lr, c.train.dense_optimizer.beta2 = 3e-3, 0.98
    c.train.sparse_optimizer.lr = 1.0
    c.train.dense_optimizer.learning_rate.schedule = "cosine_annealing"
    c.train.sparse_optimizer.learning_rate.schedule = "cosine_annealing"


def _seed(c) -> None:
    """The reference's sample configuration; what it leaves open is its documented default."""
    hstu = c.model.user_tower.hstu
    stu = hstu.stu
    stu.embedding_dim, stu.num_heads, stu.hidden_dim, stu.attention_dim = 512, 4, 128, 128
    stu.output_dropout_ratio, stu.use_group_norm = 0.1, True
    hstu.input_dropout_ratio, hstu.attn_num_layers = 0.2, 3
    hstu.positional_encoder.num_position_buckets = 8192
    hstu.positional_encoder.num_time_buckets = 2048
    c.model.user_tower.max_seq_len = 4096
    c.model.item_tower.mlp = resolve.section(
        model_schema.MlpConfig(hidden_units=(512,), activation="")
    )
    c.model.similarity, c.model.temperature = "COSINE", 0.05
    c.loss.log_q_correction = False
    # Where the plain columns are; their names say the same.
    names = ("action_timestamp", "action_weight", "watch_time")
    columns = {f"uih_seq__{name}": name for name in names} | {"request_time": "request_time"}
    with c.unlocked():
        c.raw_features = {
            name: resolve.section(feature_schema.RawFeature(expression=f"user:{column}"))
            for name, column in columns.items()
        }
    c.data.label_fields = ("cand_seq__action_weight", "cand_seq__watch_time")
    c.data.negative_sampler.num_sample = 128
    c.data.batch_size = 64
    c.train.num_epochs = 1
    c.train.dense_optimizer.lr, c.train.dense_optimizer.beta2 = 1e-3, 0.98
    c.train.sparse_optimizer.lr = 1e-3
