"""HSTU Match: both towers, and `build_model`, the only place where a configuration becomes modules.

Pure: parameters, looked-up embeddings and a Batch in, vectors out. Tables are looked up before
(`hstu_jax.tables`), scores and the loss come after (`hstu_jax.losses`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from hstu_jax.config import model_schema, schema, tower_schema
from hstu_jax.features import batch as features_batch
from hstu_jax.features import sequence_rules
from hstu_jax.model import (
    action_encoder,
    contextual_mlp,
    encoder,
    positional_encoder,
    preprocessor,
    relative_bias,
    sasrec,
    stu,
    tower_mlp,
    towers,
)
from hstu_jax.model import (
    lookups as model_lookups,
)

_ITEM_KEY = 3  # of the item tower's dropout; `encoder.py` has the numbers below


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Towers:
    """Vectors of one shard. Fields are `Any`: trees of this shape also hold specs.

    Attributes:
        user: [G, U, E] per user slot; zeros in unused slots. In training batches of the next-item
            objective [G, Q, E] per query; zeros in masked ones.
        positive: [G, Q, E] per query; finite and meaningless where the query is masked.
        negative: [G, M, E] per negative.
        hard_negative: [G, U, Hn, E] per hard negative of a user; finite and meaningless where
            masked.
    """

    user: Any
    positive: Any
    negative: Any
    hard_negative: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputWidths:
    """Sizes of the looked-up embeddings, taken from the feature groups.

    Attributes:
        history: F, all `uih` id features side by side.
        contextual_len: C, number of contextual features.
        contextual: Cf, their common width; 0 when there are none.
        candidate: Fc, all `candidate` id features side by side.
        phases: P, periods that the output postprocessor reads.
    """

    history: int
    contextual_len: int
    contextual: int
    candidate: int
    phases: int = 0


class HstuMatch(nn.Module):
    """The two towers; made by `build_model`.

    Attributes:
        user_tower: history -> vector.
        item_tower: embedding -> vector.
        widths: sizes of the inputs.
    """

    user_tower: towers.UserTower
    item_tower: towers.ItemTower
    widths: InputWidths

    def __call__(
        self,
        lookups: model_lookups.Lookups,
        batch: features_batch.Batch,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Towers:
        """Vectors of users, positives and negatives of one shard.

        Args:
            lookups: embeddings; slots that hold nothing may hold anything, also NaN.
            batch: the shard's groups.
            dropout_key: key of this training step; None = evaluation. In training, batch norm
                updates its running statistics if the caller makes `batch_stats` mutable.
        """
        query_mask = jnp.asarray(batch.query_mask)[..., None]
        hard_mask = jnp.asarray(batch.hard_negative_mask)
        groups, users, num_hard = hard_mask.shape
        hard = jnp.where(hard_mask[..., None], lookups.hard_negative, 0.0)
        items = [
            jnp.where(query_mask, lookups.positive, 0.0),
            jnp.asarray(lookups.negative),
            hard.reshape(groups, users * num_hard, hard.shape[-1]),
        ]
        train = None
        if dropout_key is not None:
            train = towers.item_train_rows(batch, jax.random.fold_in(dropout_key, _ITEM_KEY))
        positive, negative, hard = self.item_tower.parts(items, train)
        return Towers(
            user=self.user(lookups.history, lookups.contextual, batch, dropout_key),
            positive=positive,
            negative=negative,
            hard_negative=hard.reshape(groups, users, num_hard, hard.shape[-1]),
        )

    def user(
        self,
        history: Float[Array | np.ndarray, "G R L F"],
        contextual: Float[Array | np.ndarray, "G U C Cf"],
        batch: features_batch.Batch,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "G _ E"]:
        """User vectors alone, or those of the queries; see `Towers`."""
        history, contextual, batch = jax.tree.map(jnp.asarray, (history, contextual, batch))
        return self.user_tower(history, contextual, batch, dropout_key=dropout_key)

    def item(self, embedding: Float[Array | np.ndarray, "*batch Fc"]) -> Float[Array, "*batch E"]:
        """Item vectors alone, for any leading axes."""
        return self.item_tower(jnp.asarray(embedding))


def build_model(
    config: model_schema.ModelConfig,
    features: Mapping[str, schema.IdFeature | schema.RawFeature],
    feature_groups: Mapping[str, tuple[str, ...]],
    *,
    axis_names: tuple[str, ...] = (),
) -> HstuMatch:
    """The modules that a configuration describes.

    Args:
        config: `Config.model`.
        features: `Config.all_features`, for the widths of the embeddings.
        feature_groups: `Config.feature_groups`.
        axis_names: mesh axes over which training batches are split; () = batches are whole.

    Raises:
        ValueError: contextual features of unequal width, or towers of unequal width.
    """
    num_phases = len(config.user_tower.hstu.timestamp_layernorm.pairs)
    widths = _input_widths(features, feature_groups, num_phases=num_phases)
    user_width = config.output_dim or config.user_tower.hstu.stu.embedding_dim
    mlp = config.item_tower.mlp
    item_width = config.output_dim or (mlp.hidden_units[-1] if mlp else widths.candidate)
    if user_width != item_width:
        raise ValueError(
            f"model.user_tower.hstu.stu.embedding_dim={user_width}: the item tower's vectors are "
            f"{item_width} wide and must be as wide as the user's; end model.item_tower.mlp."
            f"hidden_units with {user_width}, or set model.output_dim."
        )
    normalize = config.similarity == "COSINE"
    return HstuMatch(
        user_tower=towers.UserTower(
            encoder=_build_encoder(config, widths),
            output_dim=config.output_dim,
            normalize=normalize,
        ),
        item_tower=towers.ItemTower(
            mlp=build_mlp(mlp, axis_names=axis_names) if mlp else None,
            output_dim=config.output_dim,
            normalize=normalize,
        ),
        widths=widths,
    )


def build_mlp(config: tower_schema.MlpConfig, *, axis_names: tuple[str, ...] = ()) -> tower_mlp.Mlp:
    """A tower's MLP; `axis_names` as for `build_model`."""
    return tower_mlp.Mlp(
        hidden_units=config.hidden_units,
        activation=config.activation,
        norm="batch" if config.use_bn else "layer" if config.use_ln else "none",
        use_bias=config.bias,
        dropout_ratio=config.layer_dropout,
        axis_names=axis_names,
    )


def init_variables(model: HstuMatch, key: PRNGKeyArray) -> dict:
    """Random float32 parameters of the model, without the embedding tables, and first statistics.

    Args:
        model: from `build_model`.
        key: decides every value.

    Returns:
        What to pass to `model.apply`: "params", and "batch_stats", which is empty without batch
        norm.
    """
    user_encoder = model.user_tower.encoder
    has_tail = isinstance(user_encoder, encoder.HstuEncoder) and user_encoder.stack.split_layer > 0
    lookups, batch = _smallest_inputs(model.widths, has_tail=has_tail)
    return {"batch_stats": {}, **jax.jit(model.init)(key, lookups, batch)}


def init_params(model: HstuMatch, key: PRNGKeyArray) -> dict:
    """The "params" of `init_variables`."""
    return init_variables(model, key)["params"]


def _input_widths(features, feature_groups, *, num_phases) -> InputWidths:
    contextual = [features[name].width for name in feature_groups.get("contextual", ())]
    if len(set(contextual)) > 1:
        raise ValueError(
            f"feature_groups.contextual={tuple(feature_groups['contextual'])}: embedding_dim must "
            f"be the same for all, got {tuple(contextual)}; choose one."
        )
    return InputWidths(
        history=sum(features[name].width for name in feature_groups["uih"]),
        contextual_len=len(contextual),
        contextual=contextual[0] if contextual else 0,
        candidate=sum(features[name].width for name in feature_groups["candidate"]),
        phases=num_phases,
    )


def _build_encoder(config, widths):
    hstu = config.user_tower.hstu
    shared = dict(
        preprocess=_build_preprocessor(hstu, widths),
        positions=positional_encoder.PositionalEncoder(
            **dataclasses.asdict(hstu.positional_encoder),
            contextual_len=widths.contextual_len,
            counting="forward" if config.objective == "next_item" else "reference",
        ),
        input_dropout_ratio=hstu.input_dropout_ratio,
        postprocessor=hstu.output_postprocessor,
    )
    if config.user_tower.encoder == "mean":
        return encoder.MeanEncoder(**shared)
    if config.user_tower.encoder == "sasrec":
        fields = dataclasses.asdict(config.user_tower.sasrec)
        fields["ffn_dim"] = fields["ffn_dim"] or hstu.stu.embedding_dim
        numbers = range(fields.pop("num_blocks"))
        blocks = tuple(sasrec.SasrecBlock(**fields) for _ in numbers)
        return sasrec.SasrecEncoder(**shared, blocks=blocks)
    layers = tuple(
        build_stu_layer(
            hstu.stu,
            contextual_len=widths.contextual_len,
            max_seq_len=config.user_tower.max_seq_len,
            implementation=config.kernel,
            objective=config.objective,
        )
        for _ in range(hstu.attn_num_layers)
    )
    return encoder.HstuEncoder(
        **shared,
        stack=stu.StuStack(layers=layers, split_layer=hstu.attn_truncation_split_layer),
        last_layer=hstu.last_layer,
    )


def _build_preprocessor(hstu, widths):
    config = hstu.input_preprocessor.uih_preprocessor
    actions, action_mlp = None, None
    if config.action_encoder is not None:
        fields = dataclasses.asdict(config.action_encoder.simple_action_encoder)
        actions = action_encoder.SimpleActionEncoder(**fields)
        action_mlp = build_action_mlp(config.action_mlp, output_dim=hstu.stu.embedding_dim)
    return preprocessor.UihPreprocessor(
        output_dim=hstu.stu.embedding_dim,
        contextual_len=widths.contextual_len,
        actions=actions,
        action_mlp=action_mlp,
    )


def build_action_mlp(
    config: tower_schema.ActionMlpConfig, *, output_dim: int
) -> contextual_mlp.SimpleMlp | contextual_mlp.ParameterizedMlp:
    """The MLP behind the action encoder."""
    if config.parameterized_mlp is not None:
        return contextual_mlp.ParameterizedMlp(
            output_dim=output_dim, **dataclasses.asdict(config.parameterized_mlp)
        )
    return contextual_mlp.SimpleMlp(config.simple_mlp.hidden_dim, output_dim)


def build_stu_layer(
    config: model_schema.StuConfig,
    *,
    contextual_len: int,
    max_seq_len: int,
    implementation: str = "auto",
    objective: model_schema.Objective = "window",
) -> stu.StuLayer:
    """One layer of the stack.

    Args:
        config: `stu` section.
        contextual_len: C, contextual tokens of a user.
        max_seq_len: history tokens of a user, at most; divisor of attention where
            `scaling_seqlen` is negative.
        implementation: of the attention.
        objective: decides about the mask of contextual tokens.
    """
    return stu.StuLayer(
        embedding_dim=config.embedding_dim,
        num_heads=config.num_heads,
        hidden_dim=config.hidden_dim,
        attention_dim=config.attention_dim,
        use_group_norm=config.use_group_norm,
        output_dropout_ratio=config.output_dropout_ratio,
        alpha=config.attn_alpha or config.attention_dim**-0.5,
        divisor=float(config.scaling_seqlen if config.scaling_seqlen > 0 else max_seq_len),
        rule=sequence_rules.mask_rule(config, num_contextual=contextual_len, objective=objective),
        qk_bias_init=config.qk_bias_init,
        implementation=implementation,
        recompute_normed_x=config.recompute_normed_x,
        recompute_uvqk=config.recompute_uvqk,
        recompute_y=config.recompute_y,
        use_silu_qkv=config.use_silu_qkv,
        use_gate=config.use_gate,
        logit_bias=_build_relative_bias(config, num_tokens=contextual_len + max_seq_len),
    )


def _build_relative_bias(config, *, num_tokens):
    if not (config.use_position_bias or config.use_time_bias):
        return None
    return relative_bias.RelativeBias(
        num_distances=num_tokens if config.use_position_bias else 0,
        num_time_buckets=config.num_time_bias_buckets if config.use_time_bias else 0,
        time_query=config.time_bias_query,
    )


def _smallest_inputs(widths, *, has_tail):
    """One group with one user, one query, one negative: enough to create the parameters."""
    num_slots = widths.contextual_len + 1
    lookups = model_lookups.Lookups(
        history=jnp.zeros((1, 1, num_slots, widths.history)),
        contextual=jnp.zeros((1, 1, widths.contextual_len, widths.contextual)),
        positive=jnp.zeros((1, 1, widths.candidate)),
        negative=jnp.zeros((1, 1, widths.candidate)),
        hard_negative=jnp.zeros((1, 1, 0, widths.candidate)),
    )
    slots = jnp.zeros((1, 1, num_slots), dtype=jnp.int32)
    one = jnp.zeros((1, 1), dtype=jnp.int32)
    segments = dict(
        segment_starts=one,
        segment_lengths=one + num_slots,
        block_pairs=jnp.zeros((1, 1, 3), dtype=jnp.int32),
        num_block_pairs=jnp.ones((1,), dtype=jnp.int32),
        block_len=num_slots,
    )
    batch = features_batch.Batch(
        **segments,
        history={},
        action=slots,
        watch_time_s=slots.astype(jnp.float32),
        time_gap_s=slots.astype(jnp.float32),
        contextual={},
        user_index=one,
        user_mask=one == 0,
        sample_weight=one.astype(jnp.float32),
        positive={},
        positive_user=one,
        query_mask=one == 0,
        positive_log_q=one.astype(jnp.float32),
        negative={},
        negative_log_q=one.astype(jnp.float32),
        hard_negative={},
        hard_negative_mask=jnp.zeros((1, 1, 0), bool),
        hard_negative_log_q=jnp.zeros((1, 1, 0)),
        tail=features_batch.Tail(**segments, row_len=num_slots) if has_tail else None,
        last_phase=jnp.zeros((1, 1, widths.phases)),
        step_gap_s=slots.astype(jnp.float32),
        age_s=slots,
    )
    return lookups, batch
