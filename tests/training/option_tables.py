"""Every field of the configuration, and what it changes: the tables of `test_every_option.py`."""

_HSTU = "model.user_tower.hstu"
_STU = f"{_HSTU}.stu"
_POSITIONS = f"{_HSTU}.positional_encoder"
_UIH = f"{_HSTU}.input_preprocessor.uih_preprocessor"
_ACTIONS = f"{_UIH}.action_encoder.simple_action_encoder"
_MLP = "model.item_tower.mlp"
_PHASES = f"{_HSTU}.timestamp_layernorm"
_SPARSE, _DENSE = "train.sparse_optimizer", "train.dense_optimizer"
_REFERENCE = {"model.initialization": "reference"}
_WAVES = {
    **_REFERENCE,
    f"{_HSTU}.output_postprocessor": "timestamp_layernorm",
    f"{_PHASES}.time_duration_period_units": (3600,),
    f"{_PHASES}.time_duration_units_per_period": (24,),
}
_WATCH_TIME = {
    f"{_ACTIONS}.watchtime_to_action_thresholds": (10.0,),
    f"{_ACTIONS}.watchtime_to_action_weights": (256,),
}
_TWO_LAYERS = {f"{_HSTU}.attn_num_layers": 2}
_CUT = {
    **_TWO_LAYERS,
    f"{_HSTU}.attn_truncation_split_layer": 1,
    f"{_HSTU}.attn_truncation_tail_len": 8,
}


def _rates(section):
    """The fields of a learning-rate schedule: (value, settings that it needs)."""
    rate = f"{section}.learning_rate"

    def given(schedule, **fields):
        fields = {f"{rate}.{name}": value for name, value in fields.items()}
        return {f"{rate}.schedule": schedule, **fields}

    decay = given("exponential_decay", decay_size=2, decay_factor=0.5)
    warm = given("cosine_annealing", warmup_size=3)
    manual = given("manual_step", schedule_sizes=(1,), learning_rates=(0.5,))
    fields = {
        "schedule": ("cosine_annealing", {}),
        "by_epoch": (True, decay),
        "warmup_size": (2, decay),
        "warmup_learning_rate": (0.5, warm),
        "min_learning_rate": (0.25, warm),
        "decay_size": (1, decay),
        "decay_factor": (0.25, decay),
        "staircase": (False, decay),
        "schedule_sizes": ((2,), manual),
        "learning_rates": ((0.25,), manual),
        "warmup": (True, manual),
        "T_max": (2, given("cosine_annealing")),
        "T_0": (3, given("cosine_annealing_warm_restarts", T_0=2)),
        "T_mult": (2, given("cosine_annealing_warm_restarts", T_0=1)),
    }
    return {f"{rate}.{name}": entry for name, entry in fields.items()}


PLAIN = {
    f"{_SPARSE}.learning_rate.schedule": "constant",
    f"{_DENSE}.learning_rate.schedule": "constant",
    f"{_DENSE}.beta2": 0.999,
    f"{_HSTU}.attn_num_layers": 1,  # traced in half the time
}

# Field -> (another value, settings under which it is read[, settings that go with the value]).
CHANGES_BATCH = {
    "seed": (1, {}),
    "data.batch_size": (8, {}),
    "data.num_groups": (2, {}),
    "data.layout": ("padded", {}),
    "data.tokens_per_group": (96, {}),
    "data.row_lens": ((42, 48), {"data.layout": "padded"}),
    "data.queries_per_group": (130, {}),
    "data.block_len": (8, {}),
    "data.ablation": ("no_actions", {}),
    "data.negative_sampler.num_sample": (16, {}),
    "data.negative_sampler.weight_exponent": (1.0, {}),
    "model.user_tower.max_seq_len": (12, {}),
    f"{_PHASES}.time_duration_period_units": ((60,), _WAVES),
    f"{_PHASES}.time_duration_units_per_period": ((12,), _WAVES),
    f"{_HSTU}.attn_truncation_split_layer": (
        1,
        _TWO_LAYERS,
        {f"{_HSTU}.attn_truncation_tail_len": 8},
    ),
    f"{_HSTU}.attn_truncation_tail_len": (4, _CUT),
    # These change the schedule of attention's blocks.
    f"{_STU}.max_attn_len": (2, {"data.block_len": 4}),
    f"{_STU}.sla_k1": (2, {"data.block_len": 4}),
    f"{_STU}.sla_k2": (24, {"data.block_len": 4, f"{_STU}.sla_k1": 2}),
}
CHANGES_TOWERS = {
    "model.user_tower.encoder": ("mean", {}),
    f"{_STU}.embedding_dim": (8, _REFERENCE, {f"{_MLP}.hidden_units": (8,)}),
    f"{_STU}.num_heads": (1, {}),
    f"{_STU}.hidden_dim": (4, _REFERENCE),
    f"{_STU}.attention_dim": (4, {}),
    f"{_STU}.output_dropout_ratio": (0.2, {}),
    f"{_STU}.use_group_norm": (False, {}),
    f"{_STU}.attn_alpha": (0.5, {}),
    f"{_STU}.scaling_seqlen": (7, {}),
    f"{_STU}.contextual_seq_len": (0, {}),
    f"{_HSTU}.input_dropout_ratio": (0.2, {}),
    f"{_HSTU}.attn_num_layers": (2, {}),
    f"{_HSTU}.output_postprocessor": ("layernorm", {"model.similarity": "INNER_PRODUCT"}),
    f"{_POSITIONS}.num_position_buckets": (8, {}),
    f"{_POSITIONS}.num_time_buckets": (8, {}),
    f"{_POSITIONS}.use_time_encoding": (False, {}),
    f"{_POSITIONS}.time_bucket_fn": ("log", {}),
    f"{_POSITIONS}.time_bucket_increments": (5.0, {}),
    f"{_ACTIONS}.action_embedding_dim": (4, {}),
    f"{_ACTIONS}.action_weights": ((1, 2, 4), {}),
    f"{_ACTIONS}.watchtime_to_action_thresholds": ((40.0,), _WATCH_TIME),
    f"{_ACTIONS}.watchtime_to_action_weights": ((1,), _WATCH_TIME),
    f"{_UIH}.action_encoder": (None, _REFERENCE, {f"{_UIH}.action_mlp": None}),
    f"{_UIH}.action_mlp": (
        dict(simple_mlp=None, parameterized_mlp=dict(hidden_dim=8)),
        _REFERENCE,
    ),
    f"{_UIH}.action_mlp.simple_mlp.hidden_dim": (8, {}),
    f"{_MLP}.hidden_units": ((12, 16), {}),
    f"{_MLP}.activation": ("nn.ReLU", _REFERENCE),
    f"{_MLP}.dropout_ratio": ((0.5,), {}),
    f"{_MLP}.use_ln": (True, _REFERENCE),
    f"{_MLP}.use_bn": (True, _REFERENCE),
    f"{_MLP}.bias": (False, {}),
    "model.item_tower.mlp": (None, _REFERENCE),
    "model.output_dim": (16, _REFERENCE),
    "model.similarity": ("INNER_PRODUCT", {f"{_HSTU}.output_postprocessor": "l2norm"}),
    "model.temperature": (0.5, {}),
    "loss.log_q_correction": (False, {"data.negative_sampler.weight_exponent": 1.0}),
    "metrics.recall_at_k": ((1, 3), {}),
}
_DECAY = {f"{_SPARSE}.weight_decay": 0.25, f"{_SPARSE}.weight_decay_mode": "l2"}
_SGD = {f"{_DENSE}.kind": "sgd"}
_CLIP = {
    **_SGD,
    "train.grad_clipping.clipping_type": "norm",
    "train.grad_clipping.max_gradient": 0.5,
}
CHANGES_ROWS = {
    f"{_SPARSE}.kind": ("sgd", {}),
    f"{_SPARSE}.lr": (0.5, {}),
    f"{_SPARSE}.gradient_clipping": (True, {}),
    f"{_SPARSE}.max_gradient": (0.25, {f"{_SPARSE}.gradient_clipping": True}),
    f"{_SPARSE}.weight_decay": (0.5, _DECAY),
    f"{_SPARSE}.weight_decay_mode": ("decouple", _DECAY),
    f"{_SPARSE}.initial_accumulator_value": (0.5, {f"{_SPARSE}.kind": "adagrad"}),
    f"{_SPARSE}.beta1": (0.5, {f"{_SPARSE}.kind": "adam"}),
    f"{_SPARSE}.beta2": (0.5, {f"{_SPARSE}.kind": "adam"}),
    **_rates(_SPARSE),
}
CHANGES_PARAMETERS = {
    f"{_DENSE}.kind": ("adamw", {f"{_DENSE}.weight_decay": 0.25}),
    f"{_DENSE}.lr": (0.5, {}),
    f"{_DENSE}.beta1": (0.5, {}),
    f"{_DENSE}.beta2": (0.5, {}),
    f"{_DENSE}.amsgrad": (True, {}),
    f"{_DENSE}.eps": (0.25, {}),
    f"{_DENSE}.weight_decay": (0.25, {}),
    f"{_DENSE}.momentum": (0.5, _SGD),
    f"{_DENSE}.dampening": (0.5, _SGD),
    f"{_DENSE}.nesterov": (True, _SGD),
    f"{_DENSE}.initial_accumulator_value": (0.5, {f"{_DENSE}.kind": "adagrad"}),
    f"{_DENSE}.rho": (0.5, {f"{_DENSE}.kind": "adadelta"}),
    f"{_DENSE}.alpha": (0.5, {f"{_DENSE}.kind": "rmsprop"}),
    **_rates(_DENSE),
    f"{_DENSE}.part_optimizers": ((dict(kind="sgd", regex_pattern=".*item_tower.*"),), {}),
    f"{_DENSE}.ema.decay": (0.5, {}),
    "train.grad_clipping.clipping_type": ("value", _CLIP),
    "train.grad_clipping.max_gradient": (0.25, _CLIP),
    "train.grad_clipping.norm_type": (1.0, _CLIP),
}
# File of tests/, function in it, and the fields that it shows.
SHOWN_ELSEWHERE = (
    (
        "training/test_loop.py",
        "test_restore_gives_the_trained_state",
        ("workdir",),
    ),
    (
        "features/test_side_features.py",
        "test_batches_hold_every_feature",
        (
            "features",
            "raw_features",
            "feature_groups",
        ),
    ),
    (
        "data/test_list_columns.py",
        "test_newest_first_alone_turns_rows_around",
        ("sequences",),
    ),
    (
        "training/test_loop.py",
        "test_other_data_is_refused",
        ("data.path",),
    ),
    (
        "training/test_list_run.py",
        "test_runs_are_equal_and_learn_every_feature",
        ("data.source",),
    ),
    (
        "data/test_list_columns.py",
        "test_refused_with_file_and_row",
        ("data.label_fields",),
    ),
    (
        "features/test_pipeline.py",
        "test_any_order_any_thread_any_prefetch_gives_the_same_batches",
        ("data.num_prefetch",),
    ),
    (
        "features/test_hard_batches.py",
        "test_simple_negatives_are_those_of_the_plain_sampler",
        ("data.negative_sampler.kind",),
    ),
    (
        "features/test_pipeline.py",
        "test_eval_batches_have_the_training_shape",
        ("data.negative_sampler.num_eval_sample",),
    ),
    (
        "features/test_hard_batches.py",
        "test_sample_weights_are_the_users",
        ("data.sample_weight_fields",),
    ),
    (
        "config/test_resolve.py",
        "test_a_needed_group_must_be_there",
        (
            "model.user_tower.input",
            "model.item_tower.input",
        ),
    ),
    (
        "model/test_stu.py",
        "test_last_position_equals_all_positions_with_dropout",
        ("model.user_tower.hstu.last_layer",),
    ),
    (
        "model/test_initialization.py",
        "test_only_the_items_path_changes",
        (
            "model.user_tower.hstu.stu.qk_bias_init",
            "model.initialization",
        ),
    ),
    (
        "config/test_features.py",
        "test_refused_together",
        ("model.sequence_timestamp_is_ascending",),
    ),
    (
        "model/test_towers.py",
        "test_no_option_is_ignored",
        ("model.user_tower.hstu.input_preprocessor.uih_preprocessor.action_mlp.parameterized_mlp",),
    ),
    (
        "training/test_loop.py",
        "test_epochs_end_where_their_batches_do",
        (
            "train.num_steps",
            "train.num_epochs",
        ),
    ),
    (
        "training/test_mixed_precision.py",
        "test_products_over_tokens_are_bfloat16",
        ("train.mixed_precision",),
    ),
    (
        "training/test_gradients.py",
        "test_the_references_accumulation_adds_losses_and_updates_tables_at_every_batch",
        (
            "train.table_updates",
            "train.gradient_accumulation_steps",
            "train.gradient_accumulation_mode",
        ),
    ),
    (
        "training/test_loop.py",
        "test_resuming_gives_the_run_that_was_never_stopped",
        (
            "train.log_step_count_steps",
            "train.save_checkpoints_steps",
        ),
    ),
    (
        "training/test_checkpoint.py",
        "test_only_the_newest_checkpoints_are_kept",
        ("train.keep_checkpoint_max",),
    ),
    (
        "training/test_metric_log.py",
        "test_tensorboard_events_are_written_if_asked_for",
        ("train.use_tensorboard",),
    ),
    (
        "test_commands.py",
        "test_train_writes_the_closing_table",
        (
            "eval.every_num_steps",
            "eval.baselines",
        ),
    ),
    (
        "training/test_loop.py",
        "test_the_best_validation_is_kept_and_is_one_of_the_average",
        (
            "eval.use_dense_ema",
            "train.keep_best.metric",
            "train.keep_best.larger_is_better",
        ),
    ),
    (
        "training/test_list_run.py",
        "test_the_oracle_is_of_the_sample_only",
        ("eval.oracle",),
    ),
    (
        "metrics/test_ranking.py",
        "test_bootstrap_interval_is_seeded_and_has_the_width_of_the_standard_error",
        ("eval.num_bootstrap",),
    ),
    (
        "features/test_list_batches.py",
        "test_bit_equal_batches",
        (
            "data.list_columns.train_input_path",
            "data.list_columns.validation_input_path",
            "data.list_columns.eval_input_path",
            "data.list_columns.item_input_path",
            "data.list_columns.user_id_field",
        ),
    ),
    (
        "features/test_item_weights.py",
        "test_pipeline_draws_by_the_table",
        ("data.negative_sampler.input_path",),
    ),
    (
        "features/test_item_weights.py",
        "test_columns_may_be_separated_otherwise",
        ("data.negative_sampler.field_delimiter",),
    ),
    (
        "features/test_sampler_inputs.py",
        "test_original_ids_become_lists_of_item_indices_in_file_order",
        (
            "data.negative_sampler.user_input_path",
            "data.negative_sampler.item_input_path",
            "data.negative_sampler.hard_neg_edge_input_path",
        ),
    ),
    (
        "features/test_hard_batches.py",
        "test_every_user_has_the_beginning_of_its_list",
        ("data.negative_sampler.num_hard_sample",),
    ),
    (
        "features/test_hard_batches.py",
        "test_a_random_choice_is_a_function_of_seed_step_group_and_user",
        ("data.negative_sampler.hard_sample_strategy",),
    ),
    (
        "features/test_hard_batches.py",
        "test_positives_are_kept_where_the_configuration_says_so",
        ("data.negative_sampler.exclude_positives",),
    ),
    (
        "features/test_sampler_inputs.py",
        "test_user_ids_may_be_values_of_another_column",
        ("data.negative_sampler.user_id_field",),
    ),
    (
        "features/test_sampler_inputs.py",
        "test_attributes_hold_the_fields_and_the_items_own_id",
        (
            "data.negative_sampler.item_id_field",
            "data.negative_sampler.attr_fields",
            "data.negative_sampler.attr_delimiter",
        ),
    ),
    (
        "features/test_sampler_inputs.py",
        "test_unknown_ids_are_dropped_up_to_the_share_and_refused_above",
        ("data.negative_sampler.max_unknown_share",),
    ),
    (
        "model/test_recompute.py",
        "test_each_field_frees_what_its_name_says",
        (
            "model.user_tower.hstu.stu.recompute_normed_x",
            "model.user_tower.hstu.stu.recompute_uvqk",
            "model.user_tower.hstu.stu.recompute_y",
        ),
    ),
    (
        "model/test_kernel_choice.py",
        "test_for_a_gpu_a_stack_runs_the_kernels_once",
        ("model.kernel",),
    ),
    (
        "training/test_evaluation.py",
        "test_eval_set_equals_a_loop_over_windows",
        (
            "eval.exclude_seen",
            "eval.split",
            "eval.top_k",
        ),
    ),
    (
        "training/test_loop.py",
        "test_train_metrics_are_smoothed_over_windows_of_steps",
        ("train_metrics.recall_at_k",),
    ),
    (
        "training/test_train_metrics.py",
        "test_windows_by_hand",
        (
            "train_metrics.decay_rate",
            "train_metrics.decay_step",
        ),
    ),
    (
        "training/test_step.py",
        "test_two_devices_train_like_one",
        (
            "mesh.host",
            "mesh.chip",
        ),
    ),
)
