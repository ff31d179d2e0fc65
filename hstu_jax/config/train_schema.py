"""Training in the configuration: optimizers, schedules, clipping, accumulation, checkpoints.

Field names are the reference's. One class holds the fields of every kind of an optimizer or
schedule, so that each can be set on the command line; a field that the chosen kind does not read
must stay at its default. What the fields do is in `hstu_jax/training` and `hstu_jax/tables`.
"""

import dataclasses
from typing import Literal

from hstu_jax.config.checks import (
    require,
    require_compiles,
    require_cutoffs,
    require_ratio,
    require_read,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Schedule of a base rate; formulas in `hstu_jax/training/schedules.py`.

    Sizes count optimizer steps, or epochs with `by_epoch`.
    """

    schedule: Literal[
        "constant",
        "exponential_decay",
        "manual_step",
        "cosine_annealing",
        "cosine_annealing_warm_restarts",
    ] = "constant"
    by_epoch: bool = False
    warmup_size: int = 0
    warmup_learning_rate: float = 0.0
    min_learning_rate: float = 0.0
    decay_size: int = 0  # exponential_decay
    decay_factor: float = 0.95
    staircase: bool = True
    schedule_sizes: tuple[int, ...] = ()  # manual_step
    learning_rates: tuple[float, ...] = ()
    warmup: bool = False
    T_max: int = 0  # cosine_annealing; 0 = to the end of the run
    T_0: int = 0  # cosine_annealing_warm_restarts
    T_mult: int = 1

    def __post_init__(self):
        names = (
            "warmup_size",
            "warmup_learning_rate",
            "min_learning_rate",
            "decay_factor",
            "T_max",
        )
        for name in names:
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        cosines = ("cosine_annealing", "cosine_annealing_warm_restarts")
        with_warmup = ("constant", "exponential_decay", *cosines)
        require_read(
            self,
            choice="schedule",
            readers={
                "warmup_size": with_warmup,
                "warmup_learning_rate": with_warmup,
                "min_learning_rate": ("exponential_decay", *cosines),
                "decay_size": ("exponential_decay",),
                "decay_factor": ("exponential_decay",),
                "staircase": ("exponential_decay",),
                "schedule_sizes": ("manual_step",),
                "learning_rates": ("manual_step",),
                "warmup": ("manual_step",),
                "T_max": ("cosine_annealing",),
                "T_0": ("cosine_annealing_warm_restarts",),
                "T_mult": ("cosine_annealing_warm_restarts",),
            },
        )
        require(
            self.warmup_size > 0 or self.warmup_learning_rate == 0,
            "warmup_learning_rate",
            self.warmup_learning_rate,
            "has no effect without a warm-up",
            "set warmup_size",
        )
        require(
            not self.by_epoch or self.schedule != "constant" or self.warmup_size > 0,
            "by_epoch",
            self.by_epoch,
            "has no effect on a constant rate without a warm-up",
        )
        if self.schedule == "exponential_decay":
            require(self.decay_size > 0, "decay_size", self.decay_size, "must be positive")
        if self.schedule == "manual_step":
            _check_manual(self)
        if self.schedule == "cosine_annealing":
            require(
                self.T_max > 0 or not self.by_epoch,
                "T_max",
                self.T_max,
                "must be positive with by_epoch, since the run's length is counted in steps",
                "set the epochs of the cosine",
            )
        if self.schedule == "cosine_annealing_warm_restarts":
            require(self.T_0 > 0, "T_0", self.T_0, "must be positive")
            require(self.T_mult > 0, "T_mult", self.T_mult, "must be positive")

    @property
    def depends_on_run_length(self) -> bool:
        """Whether another `num_steps` changes the rates of earlier steps."""
        return self.schedule == "cosine_annealing" and self.T_max == 0


def _check_manual(config: LearningRateConfig) -> None:
    sizes, rates = config.schedule_sizes, config.learning_rates
    is_ascending = all(a < b for a, b in zip((0, *sizes), sizes, strict=False))
    require(
        len(sizes) > 0 and is_ascending,
        "schedule_sizes",
        sizes,
        "must be one or more positive, ascending numbers",
    )
    require(
        len(rates) == len(sizes),
        "learning_rates",
        rates,
        f"must be as many as schedule_sizes={sizes}",
    )
    require(min(rates) >= 0, "learning_rates", rates, "must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseOptimizerConfig:
    """Optimizer of the embedding tables; it changes the rows of the batch and no others."""

    kind: Literal["rowwise_adagrad", "sgd", "adagrad", "adam", "partial_rowwise_adam"] = (
        "rowwise_adagrad"
    )
    lr: float = 0.002
    gradient_clipping: bool = False  # of each element of each occurrence's gradient
    max_gradient: float = 1.0
    weight_decay: float = 0.0
    weight_decay_mode: Literal["none", "l2", "decouple"] = "none"  # rowwise_adagrad
    initial_accumulator_value: float = 0.0  # adagrad
    beta1: float = 0.9  # both Adams
    beta2: float = 0.999
    learning_rate: LearningRateConfig = LearningRateConfig()

    def __post_init__(self):
        for name in ("lr", "weight_decay", "initial_accumulator_value"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("beta1", "beta2"):
            require_ratio(name, getattr(self, name))
        require(self.max_gradient > 0, "max_gradient", self.max_gradient, "must be positive")
        adams = ("adam", "partial_rowwise_adam")
        require_read(
            self,
            choice="kind",
            readers={
                "weight_decay": ("rowwise_adagrad", *adams),
                "weight_decay_mode": ("rowwise_adagrad",),
                "initial_accumulator_value": ("adagrad",),
                "beta1": adams,
                "beta2": adams,
            },
        )
        require_read(self, choice="gradient_clipping", readers={"max_gradient": (True,)})
        if self.kind == "rowwise_adagrad":
            require_read(
                self, choice="weight_decay_mode", readers={"weight_decay": ("l2", "decouple")}
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer of dense parameters, with the semantics of torch.optim.

    `weight_decay` is L2, added to the gradient; for adamw it is decoupled.
    """

    kind: Literal["adam", "adamw", "sgd", "adagrad", "adadelta", "rmsprop"] = "adam"
    lr: float = 0.002
    beta1: float = 0.9  # adam, adamw
    beta2: float = 0.999
    amsgrad: bool = False
    # 0 = the kind's own default: 1e-10 of adagrad, 1e-6 of adadelta, 1e-8 of the others.
    eps: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.9  # sgd
    dampening: float = 0.0
    nesterov: bool = False
    initial_accumulator_value: float = 0.0  # adagrad
    rho: float = 0.95  # adadelta
    alpha: float = 0.99  # rmsprop

    def __post_init__(self):
        for name in ("lr", "eps", "weight_decay", "momentum", "initial_accumulator_value"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("beta1", "beta2", "dampening", "rho", "alpha"):
            require_ratio(name, getattr(self, name))
        adams = ("adam", "adamw")
        require_read(
            self,
            choice="kind",
            readers={
                "beta1": adams,
                "beta2": adams,
                "amsgrad": adams,
                "eps": (*adams, "adagrad", "adadelta", "rmsprop"),
                "momentum": ("sgd",),
                "dampening": ("sgd",),
                "nesterov": ("sgd",),
                "initial_accumulator_value": ("adagrad",),
                "rho": ("adadelta",),
                "alpha": ("rmsprop",),
            },
        )
        require(
            not self.nesterov or (self.momentum > 0 and self.dampening == 0),
            "nesterov",
            self.nesterov,
            f"needs momentum={self.momentum} above 0 and dampening={self.dampening} of 0",
        )
        require(
            self.momentum > 0 or self.dampening == 0,
            "dampening",
            self.dampening,
            "has no effect with momentum=0",
        )

    @property
    def eps_in_use(self) -> float:
        """`eps`, or the kind's default where that is 0."""
        return self.eps or {"adagrad": 1e-10, "adadelta": 1e-6}.get(self.kind, 1e-8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartOptimizerConfig(OptimizerConfig):
    """An optimizer of the dense parameters whose name its pattern matches."""

    # Must match the whole of a parameter's name: ours (`user_tower/encoder/...`) or the reference's
    # (`user_tower._hstu_encoder....`). The first part that matches takes the parameter.
    regex_pattern: str = ""
    learning_rate: LearningRateConfig | None = None  # None = the schedule of dense_optimizer

    def __post_init__(self):
        super().__post_init__()
        require(self.regex_pattern != "", "regex_pattern", self.regex_pattern, "must not be empty")
        require_compiles("regex_pattern", self.regex_pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the dense parameters."""

    decay: float = 0.0  # 0 = no average; the reference's is 0.999

    def __post_init__(self):
        require_ratio("decay", self.decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseOptimizerConfig(OptimizerConfig):
    """Optimizer of the dense parameters, or of those that no part takes."""

    learning_rate: LearningRateConfig = LearningRateConfig()
    part_optimizers: tuple[PartOptimizerConfig, ...] = ()
    ema: EmaConfig = EmaConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradClippingConfig:
    """Clipping of the dense gradients; the norm is of all of them, on all devices."""

    clipping_type: Literal["none", "norm", "value"] = "none"
    max_gradient: float = 1.0
    norm_type: float = 2.0  # "norm": any power from 1, or inf

    def __post_init__(self):
        require(self.max_gradient > 0, "max_gradient", self.max_gradient, "must be positive")
        require(self.norm_type >= 1, "norm_type", self.norm_type, "must be at least 1, or inf")
        readers = {"max_gradient": ("norm", "value"), "norm_type": ("norm",)}
        require_read(self, choice="clipping_type", readers=readers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepBestConfig:
    """A second folder of checkpoints, `<workdir>/best`, with the best validation so far."""

    metric: str = ""  # of the validation split, e.g. "recall@10"; "" = keep none
    larger_is_better: bool = True

    def __post_init__(self):
        require(
            self.metric != "" or self.larger_is_better,
            "larger_is_better",
            self.larger_is_better,
            "has no effect without a metric",
            "set metric",
        )
        require(
            self.metric != "loss" or not self.larger_is_better,
            "larger_is_better",
            self.larger_is_better,
            "must be False for metric='loss'",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainMetricsConfig:
    """Recall among the sampled negatives while training, smoothed over windows of steps."""

    recall_at_k: tuple[int, ...] = ()  # some of metrics.recall_at_k; () = none
    decay_rate: float = 0.9
    decay_step: int = 100

    def __post_init__(self):
        require_ratio("decay_rate", self.decay_rate)
        require(self.decay_step > 0, "decay_step", self.decay_step, "must be positive")
        if self.recall_at_k:
            require_cutoffs("recall_at_k", self.recall_at_k)
        for name, default in (("decay_rate", 0.9), ("decay_step", 100)):
            value = getattr(self, name)
            require(
                bool(self.recall_at_k) or value == default,
                name,
                value,
                "has no effect without recall_at_k",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and what to write on the way. 0 = unset.

    A step is an optimizer step: with accumulation it takes several batches.
    """

    num_steps: int = 0
    num_epochs: int = 0
    sparse_optimizer: SparseOptimizerConfig = SparseOptimizerConfig()
    dense_optimizer: DenseOptimizerConfig = DenseOptimizerConfig()
    grad_clipping: GradClippingConfig = GradClippingConfig()
    # "BF16": both towers compute training batches in bfloat16. Parameters, tables, optimizers, sums
    # and the loss stay float32; so does evaluation.
    mixed_precision: Literal["", "BF16"] = ""
    gradient_accumulation_steps: int = 1  # batches of an optimizer step
    # Over the queries of all its batches: their mean loss, or (as the reference) the sum of the
    # batches' mean losses, which makes gradients that many times larger.
    gradient_accumulation_mode: Literal["mean", "sum"] = "mean"
    # When tables are updated: once a step, or (as the reference) with every batch.
    table_updates: Literal["step", "batch"] = "step"
    log_step_count_steps: int = 100
    save_checkpoints_steps: int = 1000
    keep_checkpoint_max: int = 2
    keep_best: KeepBestConfig = KeepBestConfig()
    use_tensorboard: bool = True
    dry_run: bool = False  # describe the compiled step, then stop; nothing is allocated or written
    dry_run_devices: int = 0  # as if on so many CPU devices; 0 = on the devices that are here

    @property
    def schedules(self) -> tuple[LearningRateConfig, ...]:
        """Every learning-rate schedule of the run."""
        dense = self.dense_optimizer
        parts = tuple(p.learning_rate for p in dense.part_optimizers if p.learning_rate is not None)
        return (self.sparse_optimizer.learning_rate, dense.learning_rate, *parts)

    def __post_init__(self):
        require(
            self.num_steps >= 0 and self.num_epochs >= 0 and self.num_steps + self.num_epochs > 0,
            "num_steps",
            self.num_steps,
            f"needs num_steps or num_epochs (={self.num_epochs}) to be positive",
            "set one; with both set, whichever is reached first ends the run",
        )
        for name in (
            "log_step_count_steps",
            "save_checkpoints_steps",
            "keep_checkpoint_max",
            "gradient_accumulation_steps",
        ):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        devices = self.dry_run_devices
        require(
            devices == 0 or (devices > 0 and self.dry_run),
            "dry_run_devices",
            devices,
            "must be a positive number, and is read by a dry run only",
            "set dry_run, or leave it 0",
        )
        for name, default in (("gradient_accumulation_mode", "mean"), ("table_updates", "step")):
            value = getattr(self, name)
            require(
                self.gradient_accumulation_steps > 1 or value == default,
                name,
                value,
                "has no effect with gradient_accumulation_steps=1",
                f"leave it at {default!r}, or accumulate over more batches",
            )
