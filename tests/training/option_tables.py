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
    "model.objective": ("next_item", {}),
    "model.next_item.time": ("own", {"model.objective": "next_item"}),
    "data.negative_sampler.exclusion": ("query", {"model.objective": "next_item"}),
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
_SASREC = {"model.user_tower.encoder": "sasrec"}
CHANGES_TOWERS = {
    "model.user_tower.encoder": ("mean", {}),
    "model.user_tower.sasrec.num_blocks": (1, _SASREC),
    "model.user_tower.sasrec.num_heads": (2, _SASREC),
    "model.user_tower.sasrec.ffn_dim": (24, _SASREC),
    "model.user_tower.sasrec.dropout_ratio": (0.4, _SASREC),
    f"{_STU}.embedding_dim": (8, _REFERENCE, {f"{_MLP}.hidden_units": (8,)}),
    f"{_STU}.num_heads": (1, {}),
    f"{_STU}.hidden_dim": (4, _REFERENCE),
    f"{_STU}.attention_dim": (4, {}),
    f"{_STU}.output_dropout_ratio": (0.2, {}),
    f"{_STU}.use_group_norm": (False, {}),
    f"{_STU}.attn_alpha": (0.5, {}),
    f"{_STU}.scaling_seqlen": (7, {}),
    f"{_STU}.contextual_seq_len": (0, {}),
    f"{_STU}.use_silu_qkv": (True, {}),
    f"{_STU}.use_gate": (False, {}),
    f"{_STU}.use_position_bias": (True, {}),
    f"{_STU}.use_time_bias": (True, {}),
    f"{_STU}.num_time_bias_buckets": (16, {f"{_STU}.use_time_bias": True}),
    f"{_STU}.time_bias_query": ("own", {f"{_STU}.use_time_bias": True}),
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
