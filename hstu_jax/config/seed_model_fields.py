"""The table of the reference's fields: the model, its losses and metrics.

Source: the protobuf messages of TorchEasyRec 1.3.16 that an HSTU Match model can contain.
"""

from hstu_jax.config.seed_entry import SeedField, SeedValue, refused, renamed, same

_STU = "model_config.hstu_match.user_tower.hstu.stu"
_HSTU = "model_config.hstu_match.user_tower.hstu"
_UIH = f"{_HSTU}.input_preprocessor.uih_preprocessor"
_OUR_HSTU = "model.user_tower.hstu"
_OUR_UIH = f"{_OUR_HSTU}.input_preprocessor.uih_preprocessor"
_RANKING = "belongs to the ranking models; HSTU Match has no target tokens"
_SAME_NUMBERS = "changes memory or speed only there"

MODEL = (
    *same(
        _STU,
        f"{_OUR_HSTU}.stu",
        "embedding_dim num_heads hidden_dim attention_dim output_dropout_ratio use_group_norm "
        "max_attn_len attn_alpha scaling_seqlen contextual_seq_len sla_k1 sla_k2 "
        "recompute_normed_x recompute_uvqk recompute_y",
    ),
    *refused(
        _STU,
        {
            "sort_by_length": f"{_SAME_NUMBERS}, and here the block schedule visits no padding in "
            "any order; leave it out"
        },
    ),
    *same(
        _HSTU,
        _OUR_HSTU,
        "input_dropout_ratio attn_num_layers attn_truncation_split_layer attn_truncation_tail_len",
    ),
    *refused(_HSTU, {"name": "renames the keys of feature groups, which are fixed; leave it out"}),
    *same(
        f"{_HSTU}.positional_encoder",
        f"{_OUR_HSTU}.positional_encoder",
        "num_position_buckets num_time_buckets use_time_encoding time_bucket_fn "
        "time_bucket_increments",
    ),
    *same(
        f"{_UIH}.action_encoder.simple_action_encoder",
        f"{_OUR_UIH}.action_encoder.simple_action_encoder",
        "action_embedding_dim action_weights watchtime_to_action_thresholds "
        "watchtime_to_action_weights",
    ),
    *refused(
        f"{_UIH}.action_encoder.simple_action_encoder",
        {
            "embedding_init_std": "is read but has no effect there: its table always starts as "
            "N(0, 0.1); leave it out"
        },
    ),
    *same(f"{_UIH}.action_mlp.simple_mlp", f"{_OUR_UIH}.action_mlp.simple_mlp", "hidden_dim"),
    *same(
        f"{_UIH}.action_mlp.parameterized_mlp",
        f"{_OUR_UIH}.action_mlp.parameterized_mlp",
        "hidden_dim contextual_dropout_ratio",
    ),
    *refused(
        f"{_HSTU}.input_preprocessor",
        {
            "contextual_preprocessor": f"{_RANKING}; use uih_preprocessor",
            "contextual_interleave_preprocessor": f"{_RANKING}; use uih_preprocessor",
        },
    ),
    *(
        field
        for preprocessor in ("contextual_preprocessor", "contextual_interleave_preprocessor")
        for field in refused(
            f"{_HSTU}.input_preprocessor.{preprocessor}",
            {
                "content_encoder": f"{_RANKING}; leave it out",
                "content_encoder.slice_content_encoder": f"{_RANKING}; leave it out",
                "content_encoder.pad_content_encoder": f"{_RANKING}; leave it out",
                "content_encoder.mlp_content_encoder": f"{_RANKING}; leave it out",
                "content_encoder.mlp_content_encoder.uih_mlp": f"{_RANKING}; leave it out",
                "content_encoder.mlp_content_encoder.target_mlp": f"{_RANKING}; leave it out",
                "content_mlp": f"{_RANKING}; leave it out",
            },
        )
    ),
    *refused(
        f"{_HSTU}.input_preprocessor.contextual_interleave_preprocessor",
        {"enable_interleaving": f"{_RANKING}; leave it out"},
    ),
    *renamed(
        f"{_HSTU}.output_postprocessor",
        _OUR_HSTU,
        {
            "l2norm_postprocessor": ("output_postprocessor", "the value 'l2norm'"),
            "layernorm_postprocessor": ("output_postprocessor", "the value 'layernorm'"),
            "timestamp_layernorm_postprocessor": (
                "output_postprocessor",
                "the value 'timestamp_layernorm'",
            ),
        },
    ),
    *same(
        f"{_HSTU}.output_postprocessor.timestamp_layernorm_postprocessor",
        f"{_OUR_HSTU}.timestamp_layernorm",
        "time_duration_period_units time_duration_units_per_period",
    ),
    *same("model_config.hstu_match.user_tower", "model.user_tower", "input max_seq_len"),
    *same("model_config.hstu_match.item_tower", "model.item_tower", "input"),
    *same(
        "model_config.hstu_match.item_tower.mlp",
        "model.item_tower.mlp",
        "hidden_units dropout_ratio activation use_bn bias use_ln",
    ),
    *same(
        "model_config.hstu_match",
        "model",
        "output_dim similarity temperature",
    ),
    SeedField(
        "model_config.hstu_match.sequence_timestamp_is_ascending",
        "same",
        "model.sequence_timestamp_is_ascending",
        "False is refused: rows from newest to oldest are turned when they are read, with "
        "sequences.<s>.newest_first",
    ),
    *refused(
        "model_config.hstu_match",
        {"in_batch_negative": "is rejected there too; negatives come from data.negative_sampler"},
    ),
    *renamed(
        "model_config",
        "",
        {
            "kernel": ("model.kernel", "TRITON is 'auto', PYTORCH is 'xla', CUTLASS is refused"),
            "feature_groups.group_name": ("feature_groups.*", "a group's name is its key"),
            "feature_groups.feature_names": ("feature_groups.*", "the value of a group"),
            "losses.softmax_cross_entropy": ("loss.*", "the only loss, so it needs no name"),
            "metrics.recall_at_k.top_k": ("metrics.recall_at_k", "all cutoffs in one tuple"),
            "train_metrics.recall_at_k.top_k": ("train_metrics.recall_at_k", "likewise"),
            "train_metrics.decay_rate": ("train_metrics.decay_rate", ""),
            "train_metrics.decay_step": ("train_metrics.decay_step", ""),
        },
    ),
    *refused(
        "model_config",
        {
            "feature_groups.group_type": "follows from the group's name here; leave it out",
            "feature_groups.sequence_groups": "no part of HSTU Match; leave it out",
            "feature_groups.sequence_encoders": "no part of HSTU Match; leave it out",
            "feature_groups.embedding_name_suffix": "give the features another embedding_name",
            "losses.softmax_cross_entropy.label_smoothing": "is read but has no "
            "effect there; leave it out",
            "num_class": "no part of a retrieval model; leave it out",
            "variational_dropout": "selects features in ranking models; leave it out",
            "use_pareto_loss_weight": "weighs several losses, and there is one; leave it out",
        },
    ),
)

MODEL_VALUES = (
    SeedValue("model.kernel", "TRITON", "write 'auto', which takes the fastest one that is there"),
    SeedValue("model.kernel", "PYTORCH", "write 'xla', the path without a kernel of its own"),
    SeedValue("model.kernel", "CUTLASS", "there is no such kernel here; write 'auto'"),
    SeedValue(
        "model.similarity",
        "EUCLID",
        "it computes inner products there; write 'INNER_PRODUCT' for the same, or 'COSINE'",
    ),
)
