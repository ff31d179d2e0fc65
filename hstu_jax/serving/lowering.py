"""The live model's towers as functions of plain arrays, and their serialized programs.

Only the exporter reads this file. A program takes the tower's parameters, embeddings that were
gathered before, and plain arrays; it builds the token layout from the rows' lengths, one row a
user. Next on the path: `exporter.py`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hstu_jax.config import schema
from hstu_jax.features import ages, next_item, sequence_rules
from hstu_jax.features import batch as batch_lib
from hstu_jax.model import match
from pallas_kernels import dispatch
from pallas_kernels.hstu_attention import layout as attention_layout
from pallas_kernels.hstu_attention import mask as attention_mask


@dataclasses.dataclass(frozen=True)
class TowerFunctions:
    """The towers of a configuration without dropout.

    Attributes:
        config: the training run's.
        attention: implementation of the attention.
    """

    config: schema.Config
    attention: str

    @functools.cached_property
    def model(self) -> match.HstuMatch:
        """The model with that attention."""
        return match.build_model(
            dataclasses.replace(self.config.model, kernel=self.attention),
            self.config.all_features,
            self.config.feature_groups,
        )

    def user(self, variables: Any, inputs: dict[str, Array]) -> Float[Array, "B E"]:
        """Vectors of B users.

        Args:
            variables: of the model; the item tower's are not read.
            inputs: `history` [B, S, F] embeddings of the events, oldest first, `lengths` [B] how
                many of the S there are, and where the model reads them `contextual` [B, C, Cf],
                `action` and `watch_time_s` [B, S], `time_gap_s` [B, S] and `anchor_s` [B] (the
                time that gaps are taken from), `age_s` and `step_gap_s` [B, S], `last_phase`
                [B, P].
        """
        batch = _to_batch(self.config, inputs)
        num_contextual = self.config.num_contextual
        history = jnp.pad(inputs["history"], ((0, 0), (num_contextual, 0), (0, 0)))[None]
        contextual = inputs.get("contextual")
        if contextual is None:
            contextual = jnp.zeros((inputs["lengths"].shape[0], 0, 0), jnp.float32)
        return self.model.apply(variables, history, contextual[None], batch, method="user")[0]

    def item(self, variables: Any, embedding: Float[Array, "B Fc"]) -> Float[Array, "B E"]:
        """Vectors of B items from their embeddings; the user tower's variables are not read."""
        return self.model.apply(variables, embedding, method="item")


def export(
    function: Callable[..., Any], platform: str, variables: Any, inputs: Any
) -> jax.export.Exported:
    """A program of a tower for one platform.

    Args:
        function: of `TowerFunctions`.
        platform: "cpu" or "cuda"; need not be this machine's.
        variables: arrays or shapes.
        inputs: shapes, of which the first axis may be symbolic.
    """
    checks = [jax.export.DisabledSafetyCheck.custom_call(_TRITON_CALL)]
    exporter = jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)
    # No source lines: they are the paths of this machine, and not the same every time.
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        with _device_of(platform):
            return exporter(_shapes(variables), inputs)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def attention_for(config: schema.Config, platform: str, variables: Any, *, length: int) -> str:
    """The attention that programs of a platform are lowered with.

    On cuda the Pallas kernel where it can do this model, else, and on the CPU, the XLA form.
    """
    if platform != "cuda":
        return "xla"
    functions = TowerFunctions(config, "pallas_triton")
    shapes = user_shapes(config, batch=1, length=length)
    try:
        with _device_of(platform):
            jax.eval_shape(functions.user, _shapes(variables), shapes)
    except dispatch.UnsupportedByKernel:
        return "xla"
    return functions.attention


def _device_of(platform: str) -> contextlib.AbstractContextManager[Any]:
    """Names a device that is not here; kernels choose their tiles by it."""
    if platform != "cuda":
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(_GPU, None, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


# The oldest device that the kernel is for: what fits it fits the newer ones.
_GPU = "NVIDIA A100-SXM4-80GB"


# What a Pallas kernel for GPUs becomes; JAX has no promise for it, and programs are a cache.
_TRITON_CALL = "__gpu$xla.gpu.triton"


def user_shapes(config: schema.Config, *, batch: Any, length: int) -> dict[str, Any]:
    """Shapes of the user program's inputs; `batch` may be a symbol."""
    groups = config.feature_groups
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    slots = (batch, length)
    shapes = {
        "history": shape((*slots, config.group_width("uih"))),
        "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    if config.num_contextual:
        width = config.all_features[groups["contextual"][0]].width
        shapes["contextual"] = shape((batch, config.num_contextual, width))
    if groups.get("uih_action"):
        shapes["action"] = jax.ShapeDtypeStruct(slots, jnp.int32)
    if groups.get("uih_watchtime"):
        shapes["watch_time_s"] = shape(slots)
    if groups.get("uih_timestamp"):
        shapes |= {"time_gap_s": shape(slots), "anchor_s": shape((batch,))}
    if ages.are_read(config):
        shapes["age_s"] = jax.ShapeDtypeStruct(slots, jnp.int32)
    if next_item.step_time(config) is not None:
        shapes["step_gap_s"] = shape(slots)
    periods = config.model.user_tower.hstu.timestamp_layernorm.pairs
    if periods:
        shapes["last_phase"] = shape((batch, len(periods)))
    return shapes


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _to_batch(config: schema.Config, inputs: dict[str, Array]) -> batch_lib.Batch:
    """A batch of one group with a row for each user; what only training reads is empty."""
    num_contextual = config.num_contextual
    history = inputs["history"]
    num_users, row_len = history.shape[0], history.shape[1] + num_contextual
    block_len = min(config.data.block_len, row_len)
    rule = sequence_rules.mask_rule(
        config.model.user_tower.hstu.stu,
        num_contextual=num_contextual,
        objective=config.model.objective,
    )
    lengths = inputs["lengths"] + num_contextual
    row = jnp.arange(num_users, dtype=jnp.int32)

    def slots(name: str, dtype: Any) -> Array:
        values = inputs.get(name)
        if values is None:
            return jnp.zeros((1, num_users, row_len), dtype)
        return jnp.pad(values, ((0, 0), (num_contextual, 0)))[None]

    gap = slots("time_gap_s", jnp.float32)
    if "anchor_s" in inputs:
        anchor = jnp.broadcast_to(inputs["anchor_s"][:, None], (num_users, num_contextual))
        gap = gap.at[0, :, :num_contextual].set(anchor)
    step_gap = None
    if "step_gap_s" in inputs:
        step_gap = (
            slots("step_gap_s", jnp.float32).at[0, :, :num_contextual].set(next_item.NO_GAP_S)
        )
    pairs, count = _schedule(lengths, row, row_len=row_len, block_len=block_len, rule=rule)
    num_periods = len(config.model.user_tower.hstu.timestamp_layernorm.pairs)
    per_user = jnp.zeros((1, num_users), jnp.float32)
    return batch_lib.Batch(
        segment_starts=(row * row_len)[None],
        segment_lengths=lengths[None],
        block_pairs=pairs,
        num_block_pairs=count,
        history={},
        action=slots("action", jnp.int32),
        watch_time_s=slots("watch_time_s", jnp.float32),
        time_gap_s=gap,
        step_gap_s=step_gap,
        age_s=slots("age_s", jnp.int32) if "age_s" in inputs else None,
        last_phase=inputs.get("last_phase", jnp.zeros((num_users, num_periods)))[None],
        contextual={},
        user_index=row[None],
        user_mask=jnp.ones((1, num_users), bool),
        sample_weight=per_user,
        positive={},
        positive_user=row[None],
        query_mask=jnp.zeros((1, num_users), bool),
        positive_log_q=per_user,
        negative={},
        negative_log_q=per_user,
        hard_negative={},
        hard_negative_mask=jnp.zeros((1, num_users, 0), bool),
        hard_negative_log_q=jnp.zeros((1, num_users, 0), jnp.float32),
        block_len=block_len,
        tail=_tail(config, lengths, row, row_len=row_len, rule=rule),
    )


def _tail(config, lengths, row, *, row_len, rule) -> batch_lib.Tail | None:
    """The users after the truncation, each at the start of whole blocks of the one row."""
    tail_len = sequence_rules.tail_len(config.model.user_tower)
    if not tail_len:
        return None
    longest = min(config.num_contextual + tail_len, row_len)
    block_len = min(config.data.block_len, longest)
    num_blocks = -(-longest // block_len)
    cut = jnp.minimum(lengths, longest)
    pairs, count = _schedule(
        cut, row, row_len=longest, block_len=block_len, rule=rule, blocks_per_user=num_blocks
    )
    stride = num_blocks * block_len
    return batch_lib.Tail(
        segment_starts=(row * stride)[None],
        segment_lengths=cut[None],
        block_pairs=pairs,
        num_block_pairs=count,
        row_len=lengths.shape[0] * stride,
        block_len=block_len,
    )


def _schedule(
    lengths: Int[Array, "B"],
    row: Int[Array, "B"],
    *,
    row_len: int,
    block_len: int,
    rule: attention_mask.MaskRule,
    blocks_per_user: int = 0,
) -> tuple[Int[Array, "1 P 3"], Int[Array, "1"]]:
    """Block pairs of users that begin at whole blocks, those of short ones left out.

    A user's pairs are those of the longest one whose blocks both begin before the user ends: the
    mask of a shorter user is part of the longer one's.

    Args:
        lengths: tokens of each user.
        row: 0, 1, ...: numbers of the users.
        row_len: tokens of the longest user.
        block_len: tokens of a block.
        rule: the mask.
        blocks_per_user: 0 = every user has a row; else all lie in row 0, this many blocks apart.
    """
    listed, count = attention_layout.build_block_pairs(
        np.zeros(1, np.int32),
        np.array([row_len], np.int32),
        num_rows=1,
        row_len=row_len,
        block_len=block_len,
        rule=rule,
        max_pairs=attention_layout.max_block_pairs(1, row_len, block_len),
    )
    query, key = jnp.asarray(listed[:count, 1]), jnp.asarray(listed[:count, 2])
    later = jnp.maximum(query, key)[None]
    is_needed = (later * block_len < lengths[:, None]).reshape(-1)
    first_block = row * blocks_per_user
    token_row = row if not blocks_per_user else jnp.zeros_like(row)
    every = jnp.stack(
        [
            jnp.broadcast_to(token_row[:, None], (row.shape[0], count)),
            query[None] + first_block[:, None],
            key[None] + first_block[:, None],
        ],
        axis=-1,
    ).reshape(-1, 3)
    # Needed pairs in front, in their order.
    order = jnp.argsort(~is_needed, stable=True)
    return every[order][None], jnp.sum(is_needed, dtype=jnp.int32)[None]
