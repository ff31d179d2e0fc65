"""The configuration as frozen dataclasses: every field, its default and its own checks.

Field names are the reference's (`docs/seed-fields.md` follows). `resolve.py` turns a `ConfigDict`
into these classes once; nothing behind it ever sees a `ConfigDict`. Relations between sections are
checked in `Config.__post_init__`. Next on the path: `hstu_jax.data`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from hstu_jax.config.checks import require, require_cutoffs, require_ratio
from hstu_jax.config.data_schema import DataConfig
from hstu_jax.config.model_schema import ModelConfig

# Group names keep the reference's meaning; towers and encoders look features up by them.
GROUP_NAMES = (
    "contextual",
    "uih",
    "candidate",
    "uih_action",
    "uih_watchtime",
    "uih_timestamp",
    "query_time",
)
_ID_GROUPS = ("contextual", "uih", "candidate")  # looked up in embedding tables
_SINGLE_GROUPS = ("uih_action", "uih_watchtime", "uih_timestamp", "query_time")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdFeature:
    """An integer feature looked up in an embedding table.

    Features with the same `embedding_name` share one table and must agree on its size.
    """

    num_buckets: int = 0
    embedding_dim: int = 32
    embedding_name: str = ""  # "" = the feature has a table of its own, `<feature>_emb`
    # First values are uniform within +- this; 0 = the reference's sqrt(1 / num_buckets).
    init_bound: float = 0.0

    def __post_init__(self):
        require(self.init_bound >= 0, "init_bound", self.init_bound, "must not be negative")
        require(self.num_buckets > 0, "num_buckets", self.num_buckets, "must be positive")
        require(self.embedding_dim > 0, "embedding_dim", self.embedding_dim, "must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Sampled softmax."""

    # Subtract the log sampling probability from every logit; with uniform weights it changes
    # nothing, with popularity weights it is what makes the model learn p(item | user).
    log_q_correction: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Schedule over optimizer steps: linear warm-up, then the base rate or a cosine to `min`."""

    schedule: Literal["constant", "cosine"] = "constant"
    warmup_size: int = 0  # steps
    warmup_learning_rate: float = 0.0
    min_learning_rate: float = 0.0

    def __post_init__(self):
        for name in ("warmup_size", "warmup_learning_rate", "min_learning_rate"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseOptimizerConfig:
    """Row-wise Adagrad of the embedding tables (FACTS 7.1)."""

    lr: float = 0.002
    gradient_clipping: bool = False
    max_gradient: float = 1.0
    learning_rate: LearningRateConfig = LearningRateConfig()

    def __post_init__(self):
        require(self.lr >= 0, "lr", self.lr, "must not be negative")
        require(self.max_gradient > 0, "max_gradient", self.max_gradient, "must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseOptimizerConfig:
    """Adam of the dense parameters; `weight_decay` is L2, added to the gradient."""

    lr: float = 0.002
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    learning_rate: LearningRateConfig = LearningRateConfig()

    def __post_init__(self):
        require(self.lr >= 0, "lr", self.lr, "must not be negative")
        for name in ("beta1", "beta2"):
            require_ratio(name, getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and what to write on the way. 0 = unset."""

    num_steps: int = 0
    num_epochs: int = 0
    sparse_optimizer: SparseOptimizerConfig = SparseOptimizerConfig()
    dense_optimizer: DenseOptimizerConfig = DenseOptimizerConfig()
    log_step_count_steps: int = 100
    save_checkpoints_steps: int = 1000
    keep_checkpoint_max: int = 2
    use_tensorboard: bool = True

    def __post_init__(self):
        require(
            self.num_steps >= 0 and self.num_epochs >= 0 and self.num_steps + self.num_epochs > 0,
            "num_steps",
            self.num_steps,
            f"needs num_steps or num_epochs (={self.num_epochs}) to be positive",
            "set one; with both set, whichever is reached first ends the run",
        )
        for name in ("log_step_count_steps", "save_checkpoints_steps", "keep_checkpoint_max"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Whole-catalogue evaluation."""

    split: Literal["validation", "test"] = "test"  # of the closing table
    every_num_steps: int = 0  # on the validation split while training; 0 = only at the end
    top_k: tuple[int, ...] = (1, 5, 10, 50, 100)
    exclude_seen: bool = True
    baselines: bool = True  # popularity, co-occurrence and a mean-pooling model beside the result
    # Also rank by the true probabilities; the generated sample's test split only.
    oracle: bool = False
    num_bootstrap: int = 1000

    def __post_init__(self):
        require_cutoffs("top_k", self.top_k)
        for name in ("every_num_steps", "num_bootstrap"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(self.num_bootstrap > 0, "num_bootstrap", self.num_bootstrap, "must be positive")
        require(
            not self.oracle or self.split == "test",
            "oracle",
            self.oracle,
            f"exists for the test split, not for split={self.split!r}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Recall among the sampled negatives, as the reference reports it."""

    recall_at_k: tuple[int, ...] = (1, 5)

    def __post_init__(self):
        require_cutoffs("recall_at_k", self.recall_at_k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices of the mesh; -1 = all that are left."""

    host: int = 1
    chip: int = -1

    def __post_init__(self):
        for name in ("host", "chip"):
            value = getattr(self, name)
            require(value == -1 or value > 0, name, value, "must be positive, or -1 for the rest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    seed: int = 0
    workdir: str = "runs/kuairand"
    features: Mapping[str, IdFeature] = dataclasses.field(default_factory=dict)
    feature_groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig(num_epochs=1)
    eval: EvalConfig = EvalConfig()
    metrics: MetricsConfig = MetricsConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        _check_groups(self)
        _check_action_mlp(self)
        _check_tables(self)
        _check_widths(self)
        _check_rows(self)
        _check_aligned(self)

    @property
    def num_contextual(self) -> int:
        """C: contextual tokens in front of every history."""
        return len(self.feature_groups.get("contextual", ()))

    @property
    def embedding_names(self) -> dict[str, str]:
        """Feature name -> name of its embedding table."""
        return {
            name: feature.embedding_name or f"{name}_emb" for name, feature in self.features.items()
        }

    def group_width(self, group: str) -> int:
        """Width of a group's features looked up and concatenated."""
        return sum(self.features[name].embedding_dim for name in self.feature_groups[group])


def _check_groups(config: Config) -> None:
    for group, names in config.feature_groups.items():
        require(
            group in GROUP_NAMES,
            f"feature_groups.{group}",
            names,
            "is not a group that the model reads",
            f"the groups are {', '.join(GROUP_NAMES)}",
        )
        if group in _ID_GROUPS:
            for name in names:
                require(
                    name in config.features,
                    f"feature_groups.{group}",
                    names,
                    f"names {name!r}, which features does not describe",
                    f"add features.{name} (there are: {', '.join(config.features) or 'none'})",
                )
    hstu = config.model.user_tower.hstu
    action_encoder = hstu.input_preprocessor.uih_preprocessor.action_encoder
    needed = {"uih": True, "candidate": True, "uih_action": action_encoder is not None}
    needed["uih_watchtime"] = (
        action_encoder is not None
        and len(action_encoder.simple_action_encoder.watchtime_to_action_weights) > 0
    )
    needed["uih_timestamp"] = (
        hstu.positional_encoder.use_time_encoding
        or hstu.output_postprocessor == "timestamp_layernorm"
    )
    for group, is_needed in needed.items():
        require(
            not is_needed or bool(config.feature_groups.get(group)),
            f"feature_groups.{group}",
            config.feature_groups.get(group, ()),
            "must name a feature, since the model reads it",
        )
    for group in _SINGLE_GROUPS:
        names = config.feature_groups.get(group, ())
        require(len(names) <= 1, f"feature_groups.{group}", names, "must name one feature")
    used = {name for group in _ID_GROUPS for name in config.feature_groups.get(group, ())}
    for name in config.features:
        require(
            name in used,
            f"features.{name}",
            config.features[name],
            "is in no feature group, so its table would only take memory",
            f"add it to one of {', '.join(_ID_GROUPS)}, or leave it out",
        )


def _check_action_mlp(config: Config) -> None:
    mlp = config.model.user_tower.hstu.input_preprocessor.uih_preprocessor.action_mlp
    require(
        mlp is None or mlp.parameterized_mlp is None or config.num_contextual > 0,
        "feature_groups.contextual",
        config.feature_groups.get("contextual", ()),
        "must name a feature: parameterized_mlp makes each user's map from contextual features",
        "add one, or use simple_mlp",
    )


def _check_tables(config: Config) -> None:
    sizes = {}
    for name, table in config.embedding_names.items():
        feature = config.features[name]
        size = (feature.num_buckets, feature.embedding_dim, feature.init_bound)
        other, other_size = sizes.setdefault(table, (name, size))
        require(
            size == other_size,
            f"features.{name}.embedding_name",
            table,
            f"shares a table with features.{other}, whose (num_buckets, embedding_dim, init_bound) "
            f"is {other_size}, not {size}",
            "make them equal or give one another embedding_name",
        )


def _check_widths(config: Config) -> None:
    widths = {
        n: config.features[n].embedding_dim for n in config.feature_groups.get("contextual", ())
    }
    require(
        len(set(widths.values())) <= 1,
        "feature_groups.contextual",
        widths,
        "must have one embedding_dim, since each feature becomes a token of the same projection",
    )
    model = config.model
    item_width = config.group_width("candidate")
    where = "feature_groups.candidate"
    if model.item_tower.mlp is not None:
        item_width = model.item_tower.mlp.hidden_units[-1]
        where = "model.item_tower.mlp.hidden_units"
    user_width = model.user_tower.hstu.stu.embedding_dim
    require(
        model.output_dim > 0 or item_width == user_width,
        where,
        item_width,
        f"the item tower's width must equal model.user_tower.hstu.stu.embedding_dim={user_width}",
        "make them equal, or set model.output_dim to project both towers to one width",
    )


def _check_rows(config: Config) -> None:
    longest = config.num_contextual + config.model.user_tower.max_seq_len
    data = config.data
    require(
        not data.row_lens or data.row_lens[-1] >= longest,
        "data.row_lens",
        data.row_lens,
        f"its longest must hold the longest history: {config.num_contextual} contextual tokens + "
        f"model.user_tower.max_seq_len={config.model.user_tower.max_seq_len}",
        f"add {longest}",
    )
    require(
        data.tokens_per_group == 0 or data.tokens_per_group >= longest,
        "data.tokens_per_group",
        data.tokens_per_group,
        "must hold at least one user with the longest history",
        f"use {longest} or more, or 0 to have it chosen",
    )


def _check_aligned(config: Config) -> None:
    model = config.model
    if model.initialization == "reference":
        return
    mlp = model.item_tower.mlp
    require(
        model.output_dim == 0 and (mlp is None or mlp.is_linear),
        "model.initialization",
        model.initialization,
        "needs linear towers: model.output_dim=0 and model.item_tower.mlp.activation='', without "
        "use_bn and use_ln",
        "change them, or use 'reference'",
    )
