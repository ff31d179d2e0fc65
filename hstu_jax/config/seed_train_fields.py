"""The table of the reference's fields: training, evaluation and export.

Source: the protobuf messages of TorchEasyRec 1.3.16. There every kind of an optimizer or schedule
is a message of its own; here one section has the fields of all kinds, beside `kind` or `schedule`.
"""

from hstu_jax.config.seed_entry import SeedField, SeedValue, refused, renamed, same

_FUSED = "chooses an implementation there, not other numbers; leave it out"
_KIND = "{} there is a kind; not built: use rowwise_adagrad, adagrad, adam or sgd"
_TF32 = (
    "float32 products are computed in full unless the environment has "
    "JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32; leave it out"
)
_NO_CUDNN = "no convolutions here; leave it out"
_BY_TIME = "checkpoints are counted in steps; use save_checkpoints_steps"
_EXPORT = "`python -m hstu_jax.export`"
_NO_EXPORT = f"{_EXPORT} writes float32 programs; leave it out"

# kind -> fields that keep their names, besides lr.
_SPARSE_KINDS = {
    "sgd": "",
    "adagrad": "initial_accumulator_value",
    "adam": "beta1 beta2 weight_decay",
    "partial_rowwise_adam": "beta1 beta2 weight_decay",
    "rowwise_adagrad": "weight_decay weight_decay_mode",
}
_SPARSE_NOT_BUILT = {
    "lars_sgd": "momentum weight_decay",
    "lamb": "beta1 beta2 weight_decay",
    "partial_rowwise_lamb": "beta1 beta2 weight_decay",
    "adadelta": "rho eps weight_decay",
    "rmsprop": "alpha eps weight_decay",
}
_FUSED_FIELDS = "lr gradient_clipping max_gradient"
_DENSE_KINDS = {
    "sgd": "lr momentum weight_decay dampening nesterov",
    "adagrad": "lr weight_decay initial_accumulator_value eps",
    "adam": "lr beta1 beta2 weight_decay eps amsgrad",
    "adamw": "lr beta1 beta2 weight_decay eps amsgrad",
    "adadelta": "lr rho eps weight_decay",
    "rmsprop": "lr alpha eps weight_decay",
}
_WITH_FUSED = ("sgd", "adagrad", "adam", "adamw")
_WARMUP = "warmup_learning_rate warmup_size min_learning_rate by_epoch"
_SCHEDULES = {
    "constant": "",
    "exponential_decay": f"decay_size decay_factor staircase {_WARMUP}",
    "manual_step": "schedule_sizes learning_rates warmup by_epoch",
    "cosine_annealing": f"T_max {_WARMUP}",
    "cosine_annealing_warm_restarts": f"T_0 T_mult {_WARMUP}",
}


def _schedules(theirs: str, ours: str) -> tuple[SeedField, ...]:
    """The oneof learning_rate of an optimizer."""
    fields: list[SeedField] = []
    for schedule, names in _SCHEDULES.items():
        message = f"{schedule}_learning_rate"
        fields += renamed(theirs, ours, {message: ("schedule", f"the value {schedule!r}")})
        fields += same(f"{theirs}.{message}", ours, names)
    return tuple(fields)


def _sparse() -> tuple[SeedField, ...]:
    theirs, ours = "train_config.sparse_optimizer", "train.sparse_optimizer"
    fields: list[SeedField] = []
    for kind, names in _SPARSE_KINDS.items():
        message = f"{kind}_optimizer"
        fields += renamed(theirs, ours, {message: ("kind", f"the value {kind!r}")})
        fields += same(f"{theirs}.{message}", ours, f"{_FUSED_FIELDS} {names}")
    for kind, names in _SPARSE_NOT_BUILT.items():
        message, why = f"{kind}_optimizer", _KIND.format(kind)
        fields += refused(theirs, {message: why})
        refusals = dict.fromkeys(f"{_FUSED_FIELDS} {names}".split(), why)
        fields += refused(f"{theirs}.{message}", refusals)
    return (*fields, *_schedules(theirs, f"{ours}.learning_rate"))


def _dense(theirs: str, ours: str) -> tuple[SeedField, ...]:
    fields: list[SeedField] = []
    for kind, names in _DENSE_KINDS.items():
        message = f"{kind}_optimizer"
        fields += renamed(theirs, ours, {message: ("kind", f"the value {kind!r}")})
        fields += same(f"{theirs}.{message}", ours, names)
        if kind in _WITH_FUSED:
            fields += refused(f"{theirs}.{message}", {"fused": _FUSED})
    return (*fields, *_schedules(theirs, f"{ours}.learning_rate"))


_DENSE = ("train_config.dense_optimizer", "train.dense_optimizer")
_TRAIN = (
    *_sparse(),
    *_dense(*_DENSE),
    *same(f"{_DENSE[0]}.ema", f"{_DENSE[1]}.ema", "decay"),
    *same(f"{_DENSE[0]}.part_optimizers", f"{_DENSE[1]}.part_optimizers", "regex_pattern"),
    *_dense(*(f"{optimizer}.part_optimizers" for optimizer in _DENSE)),
    *same(
        "train_config",
        "train",
        "num_steps num_epochs save_checkpoints_steps log_step_count_steps use_tensorboard",
    ),
    SeedField(
        "train_config.gradient_accumulation_steps",
        "same",
        "train.gradient_accumulation_steps",
        "a mean, and tables move once a step; gradient_accumulation_mode and table_updates have "
        "the reference's way",
    ),
    SeedField(
        "train_config.keep_checkpoint_max",
        "same",
        "train.keep_checkpoint_max",
        "at least 1; for all of them (0 there) give a large number",
    ),
    SeedField(
        "train_config.mixed_precision",
        "same",
        "train.mixed_precision",
        '"BF16" or "" (float32); in training only, evaluation is in float32',
    ),
    *same(
        "train_config.grad_clipping",
        "train.grad_clipping",
        "clipping_type max_gradient norm_type",
    ),
    *refused(
        "train_config.grad_clipping",
        {"enable_global_grad_clip": "the norm is always of all dense gradients; leave it out"},
    ),
    *refused(
        "train_config",
        {
            "fine_tune_checkpoint": "not built yet: a run starts fresh or goes on in its workdir",
            "fine_tune_ckpt_param_map": "not built yet: a run starts fresh or goes on in its "
            "workdir",
            "is_profiling": "not built; use jax.profiler",
            "tensorboard_summaries": "loss, recall and throughput are always written; leave it out",
            "cudnn_allow_tf32": _NO_CUDNN,
            "cuda_matmul_allow_tf32": _TF32,
            **dict.fromkeys(
                (
                    "grad_scaler.init_scale",
                    "grad_scaler.growth_factor",
                    "grad_scaler.backoff_factor",
                    "grad_scaler.growth_interval",
                ),
                "scales the losses of float16, which is not built; bfloat16 needs no scaling",
            ),
            **dict.fromkeys(
                (
                    "global_embedding_constraints.sharding_types",
                    "global_embedding_constraints.compute_kernels",
                ),
                "rows of every table are split over all devices; leave it out",
            ),
            "save_checkpoints_epochs": _BY_TIME,
            "save_checkpoints_timestamp_interval": _BY_TIME,
            "save_checkpoints_timestamps": _BY_TIME,
            "save_checkpoints_timestamp_quorum": _BY_TIME,
            "delta_embedding_dump_config": "not built; checkpoints hold whole tables",
        },
    ),
)

_EVAL = (
    *same("eval_config", "eval", "use_dense_ema"),
    *refused(
        "eval_config",
        {
            "num_steps": "evaluation takes the whole split; leave it out",
            "log_step_count_steps": "evaluation reports once, at its end; leave it out",
        },
    ),
)

_EXPORT = (
    *renamed(
        "export_config",
        "train.keep_best",
        {
            "best_exporter_metric": ("metric", "which checkpoint is kept as the best one"),
            "metric_larger_is_better": ("larger_is_better", ""),
        },
    ),
    *refused(
        "export_config",
        {
            "exporter_type": (
                f"leave it out; {_EXPORT} takes the newest checkpoint, with --best that of "
                "train.keep_best"
            ),
            "mixed_precision": _NO_EXPORT,
            "cudnn_allow_tf32": _NO_CUDNN,
            "cuda_matmul_allow_tf32": _NO_EXPORT,
            "use_dense_ema": f"{_EXPORT} takes the parameters that eval.use_dense_ema chooses",
        },
    ),
)

TRAIN = (*_TRAIN, *_EVAL, *_EXPORT)

TRAIN_VALUES = tuple(
    SeedValue("train.sparse_optimizer.weight_decay_mode", name, f"write {name.lower()!r}")
    for name in ("NONE", "L2", "DECOUPLE")
)
