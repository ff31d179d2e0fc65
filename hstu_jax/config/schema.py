"""The configuration as frozen dataclasses: every field, its default and its own checks.

Field names are the reference's (`docs/seed-fields.md`). `resolve.py` turns a `ConfigDict` into
these classes once; nothing behind it ever sees a `ConfigDict`. Relations between sections are
checked in `Config.__post_init__`. Next on the path: `hstu_jax.data`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from hstu_jax.config import feature_checks, objective_checks
from hstu_jax.config.checks import require, require_cutoffs
from hstu_jax.config.data_schema import DataConfig
from hstu_jax.config.feature_schema import IdFeature, RawFeature, SequenceConfig, column_of
from hstu_jax.config.mesh_schema import MeshConfig
from hstu_jax.config.model_schema import ModelConfig
from hstu_jax.config.train_schema import TrainConfig, TrainMetricsConfig

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
_SINGLE_GROUPS = ("uih_action", "uih_watchtime", "uih_timestamp", "query_time")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Sampled softmax."""

    # Subtract the log sampling probability from every logit; with uniform weights it changes
    # nothing, with popularity weights it is what makes the model learn p(item | user).
    log_q_correction: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Whole-catalogue evaluation."""

    split: Literal["validation", "test"] = "test"  # of the closing table
    every_num_steps: int = 0  # on the validation split while training; 0 = only at the end
    top_k: tuple[int, ...] = (1, 5, 10, 50, 100)
    exclude_seen: bool = True
    also_with_seen: bool = False  # figures with seen items in the ranking too, beside those without
    # "trained": items with a training event are ranked, positives without one are left out (cold);
    # "all": every item of the data, as published leave-one-out figures have it.
    catalogue: Literal["trained", "all"] = "trained"
    use_dense_ema: bool = True  # rank by the averaged parameters where the run keeps them
    # Popularity, co-occurrence, item-kNN and a mean-pooling model beside the result.
    baselines: bool = True
    mean_baseline: bool = True  # False leaves out the mean-pooling model, which has to be trained
    # Also rank by the true probabilities; the generated sample's test split only.
    oracle: bool = False
    num_bootstrap: int = 1000

    def __post_init__(self):
        require_cutoffs("top_k", self.top_k)
        for name in ("every_num_steps", "num_bootstrap"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(self.num_bootstrap > 0, "num_bootstrap", self.num_bootstrap, "must be positive")
        require(
            self.exclude_seen or not self.also_with_seen,
            "also_with_seen",
            self.also_with_seen,
            "has nothing to add: with exclude_seen=False the figures are with seen items",
            "leave one of the two at its default",
        )
        require(
            self.baselines or self.mean_baseline,
            "mean_baseline",
            self.mean_baseline,
            "has no effect with baselines=False",
            "leave it True",
        )
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
class Config:
    """One training run."""

    seed: int = 0
    workdir: str = "runs/kuairand"
    features: Mapping[str, IdFeature] = dataclasses.field(default_factory=dict)
    raw_features: Mapping[str, RawFeature] = dataclasses.field(default_factory=dict)
    sequences: Mapping[str, SequenceConfig] = dataclasses.field(default_factory=dict)
    feature_groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig(num_epochs=1)
    eval: EvalConfig = EvalConfig()
    metrics: MetricsConfig = MetricsConfig()
    train_metrics: TrainMetricsConfig = TrainMetricsConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        # What JAX's keys are made of; beyond it two seeds have one key.
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in 0 .. 2**32 - 1")
        _check_groups(self)
        feature_checks.check(self)
        objective_checks.check(self)
        _check_action_mlp(self)
        _check_tables(self)
        _check_widths(self)
        _check_rows(self)
        _check_sampler(self)
        _check_mask(self)
        _check_aligned(self)
        _check_train_metrics(self)
        _check_keep_best(self)
        _check_average(self)

    @property
    def num_contextual(self) -> int:
        """C: contextual tokens in front of every history."""
        return len(self.feature_groups.get("contextual", ()))

    @property
    def embedding_names(self) -> dict[str, str]:
        """Feature name -> name of its embedding table."""
        return {
            name: feature.embedding_name or f"{name}_emb"
            for name, feature in self.all_features.items()
            if feature.has_table
        }

    @property
    def all_features(self) -> dict[str, IdFeature | RawFeature]:
        """Id and raw features by name."""
        return {**self.features, **self.raw_features}

    def column(self, feature: str) -> str:
        """The column that a feature reads."""
        described = self.all_features.get(feature)
        return column_of(feature, described.expression if described else "")

    def group_width(self, group: str) -> int:
        """Width of a group's features side by side."""
        return sum(self.all_features[name].width for name in self.feature_groups[group])


def _check_groups(config: Config) -> None:
    for group, names in config.feature_groups.items():
        require(
            group in GROUP_NAMES,
            f"feature_groups.{group}",
            names,
            "is not a group that the model reads",
            f"the groups are {', '.join(GROUP_NAMES)}",
        )
        if group in feature_checks.VECTOR_GROUPS:
            for name in names:
                require(
                    name in config.all_features,
                    f"feature_groups.{group}",
                    names,
                    f"names {name!r}, which features does not describe",
                    f"add features.{name} (there are: {', '.join(config.all_features) or 'none'})",
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
        or (hstu.stu.use_time_bias and config.model.user_tower.encoder == "hstu")
    )
    for group, is_needed in needed.items():
        require(
            not is_needed or bool(config.feature_groups.get(group)),
            f"feature_groups.{group}",
            config.feature_groups.get(group, ()),
            "must name a feature, since the model reads it",
        )
    taken = {"no_actions": "uih_action", "no_time": "uih_timestamp"}.get(config.data.ablation)
    require(
        taken is None or needed[taken],
        "data.ablation",
        config.data.ablation,
        "takes away what this model does not read",
        "use another ablation",
    )
    for group in _SINGLE_GROUPS:
        names = config.feature_groups.get(group, ())
        require(len(names) <= 1, f"feature_groups.{group}", names, "must name one feature")
    groups = feature_checks.VECTOR_GROUPS
    used = {name for group in groups for name in config.feature_groups.get(group, ())}
    for name in config.features:
        require(
            name in used,
            f"features.{name}",
            config.features[name],
            "is in no feature group, so its table would only take memory",
            f"add it to one of {', '.join(groups)}, or leave it out",
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
        feature = config.all_features[name]
        size = (feature.num_ids, feature.embedding_dim, feature.init_bound, feature.id_rule)
        other, other_size = sizes.setdefault(table, (name, size))
        section = "features" if name in config.features else "raw_features"
        require(
            size == other_size,
            f"{section}.{name}.embedding_name",
            table,
            f"shares a table with features.{other}, whose (ids, embedding_dim, init_bound) is "
            f"{other_size[:3]} by {other_size[3][0]}, not {size[:3]} by {size[3][0]}",
            "make them equal or give one another embedding_name",
        )


def _check_widths(config: Config) -> None:
    features = config.all_features
    widths = {n: features[n].width for n in config.feature_groups.get("contextual", ())}
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


def _check_sampler(config: Config) -> None:
    sampler = config.data.negative_sampler
    if not sampler.attr_fields:
        return
    candidate = config.feature_groups["candidate"]
    where = "data.negative_sampler"
    require(
        sampler.item_id_field in candidate,
        f"{where}.item_id_field",
        sampler.item_id_field,
        "is no feature of the group candidate",
        f"choose one of {', '.join(candidate)}",
    )
    # Names in attr_fields are without the sequence's prefix, as in the reference.
    missing = [name for name in candidate if name.split("__")[-1] not in sampler.attr_fields]
    require(
        not missing,
        f"{where}.attr_fields",
        sampler.attr_fields,
        f"lacks the candidate features {', '.join(missing)}",
        "name every candidate feature, without its sequence's prefix",
    )


def _check_mask(config: Config) -> None:
    hstu = config.model.user_tower.hstu
    require(
        hstu.stu.contextual_seq_len <= config.num_contextual,
        "model.user_tower.hstu.stu.contextual_seq_len",
        hstu.stu.contextual_seq_len,
        f"must not exceed the {config.num_contextual} tokens of feature_groups.contextual, which "
        "may be all that a segment holds",
        "use -1 for all of them",
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


def _check_train_metrics(config: Config) -> None:
    cutoffs = config.train_metrics.recall_at_k
    require(
        set(cutoffs) <= set(config.metrics.recall_at_k),
        "train_metrics.recall_at_k",
        cutoffs,
        f"must be some of metrics.recall_at_k={config.metrics.recall_at_k}",
        "add the missing ones there",
    )


def _check_keep_best(config: Config) -> None:
    metric = config.train.keep_best.metric
    if not metric:
        return
    ranked = ("hit_rate", "recall", "ndcg")
    known = [f"{name}@{k}" for name in ranked for k in config.eval.top_k]
    known += ["mrr", "loss", *(f"sampled_recall@{k}" for k in config.metrics.recall_at_k)]
    require(
        metric in known,
        "train.keep_best.metric",
        metric,
        "is not a metric of the validation",
        f"available: {', '.join(known)}",
    )
    require(
        config.eval.every_num_steps > 0,
        "train.keep_best.metric",
        metric,
        "needs validations to choose from",
        "set eval.every_num_steps",
    )


def _check_average(config: Config) -> None:
    require(
        config.eval.use_dense_ema or config.train.dense_optimizer.ema.decay > 0,
        "eval.use_dense_ema",
        False,
        "has no effect, since train.dense_optimizer.ema.decay=0.0 keeps no average",
        "leave it True",
    )
