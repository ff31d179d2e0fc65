"""Small models and matching random inputs for the tests of `hstu_jax.model`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.config import model_schema, schema
from hstu_jax.model import lookups as model_lookups
from hstu_jax.model import match
from tests.model import batches

HISTORY_DIM, CONTEXTUAL_DIM, CANDIDATE_DIM = 6, 5, 6


def model_config(*, embedding_dim=16, encoder="hstu", hstu=None, stu=None, sasrec=None, **fields):
    """A small `ModelConfig`; `hstu`, `stu`, `sasrec` and `fields` override single fields."""
    stu_config = model_schema.StuConfig(
        **{
            "embedding_dim": embedding_dim,
            "num_heads": 2,
            "hidden_dim": 8,
            "attention_dim": 6,
            "use_group_norm": True,
            "output_dropout_ratio": 0.3,
            **(stu or {}),
        }
    )
    hstu_config = model_schema.HstuConfig(
        **{
            "stu": stu_config,
            "attn_num_layers": 2,
            "input_dropout_ratio": 0.2,
            "positional_encoder": model_schema.PositionalEncoderConfig(
                num_position_buckets=12, num_time_buckets=20
            ),
            **(hstu or {}),
        }
    )
    mlp = model_schema.MlpConfig(hidden_units=(embedding_dim,), activation="")
    return model_schema.ModelConfig(
        **{
            "user_tower": model_schema.UserTowerConfig(
                encoder=encoder,
                hstu=hstu_config,
                sasrec=model_schema.SasrecConfig(**{"num_heads": 2, **(sasrec or {})}),
                max_seq_len=16,
            ),
            "item_tower": model_schema.ItemTowerConfig(mlp=mlp),
            **fields,
        }
    )


def features(*, contextual_len=2, contextual_dims=None):
    """Feature declarations and groups for `build_model`."""
    dims = contextual_dims or [CONTEXTUAL_DIM] * contextual_len
    names = [f"context_{i}" for i in range(len(dims))]
    widths = dict(zip(names, dims, strict=True), history=HISTORY_DIM, candidate=CANDIDATE_DIM)
    declared = {
        name: schema.IdFeature(num_buckets=1, embedding_dim=width) for name, width in widths.items()
    }
    groups = {"uih": ("history",), "candidate": ("candidate",), "contextual": tuple(names)}
    return declared, groups


def build(config, *, contextual_len=2):
    """The model of a configuration."""
    return match.build_model(config, *features(contextual_len=contextual_len))


def random_params(model, *, seed=0):
    """Parameters far from their initial values, so that every one matters."""
    shapes = jax.eval_shape(functools.partial(match.init_params, model), jax.random.key(0))
    return random_tree(shapes, seed=seed)


def random_tree(shapes, *, seed=0):
    """Normal values of spread 0.4, around 1 for the scales of norms."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        around = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(around + 0.4 * rng.standard_normal(shape.shape, dtype=np.float32))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@dataclasses.dataclass(frozen=True)
class Content:
    """Random users: what each token and user holds, whatever the layout."""

    lengths: np.ndarray
    contextual_len: int
    history: np.ndarray
    action: np.ndarray
    watch_time_s: np.ndarray
    time_gap_s: np.ndarray
    contextual: np.ndarray
    positive: np.ndarray
    negative: np.ndarray


def random_content(lengths, *, contextual_len=2, num_queries=5, num_negatives=7, seed=0):
    """Random users with these token counts, contextual tokens included."""
    rng = np.random.default_rng(seed)
    num_tokens = int(np.sum(lengths))

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    return Content(
        lengths=np.asarray(lengths),
        contextual_len=contextual_len,
        history=normal(num_tokens, HISTORY_DIM),
        action=rng.integers(0, 256, num_tokens),
        watch_time_s=rng.uniform(0, 60, num_tokens),
        time_gap_s=np.floor(rng.uniform(0, 20000, num_tokens)),
        contextual=normal(len(lengths), contextual_len, CONTEXTUAL_DIM),
        positive=normal(num_queries, CANDIDATE_DIM),
        negative=normal(num_negatives, CANDIDATE_DIM),
    )


def lay_out(
    content,
    *,
    rule,
    row_len,
    packed,
    num_rows=0,
    num_users=0,
    fill=0.0,
    tail_len=0,
    placement=None,
):
    """(Lookups, Batch) of one group; `fill` goes wherever nothing is held. With a `tail_len`, for
    models that truncate. With a `placement` of the content, where that says."""
    placement = placement or batches.place(
        [int(n) for n in content.lengths],
        row_len=row_len,
        packed=packed,
        rule=rule,
        num_rows=num_rows,
        num_users=num_users,
    )
    num_slots, num_users = len(placement.lengths), len(content.lengths)
    contextual = np.full((num_slots, *content.contextual.shape[1:]), fill, np.float32)
    contextual[:num_users] = content.contextual
    position = np.concatenate([np.arange(n) for n in content.lengths])
    history = np.where(position[:, None] >= content.contextual_len, content.history, fill)
    lookups = model_lookups.Lookups(
        history=placement.to_grid(history.astype(np.float32), fill=fill)[None],
        contextual=contextual[None],
        positive=content.positive[None],
        negative=content.negative[None],
        hard_negative=np.zeros((1, num_slots, 0, CANDIDATE_DIM), np.float32),
    )
    tail = None
    if tail_len:
        tail = placement.tail(num_contextual=content.contextual_len, tail_len=tail_len)
    batch = batches.make_batch(
        placement,
        tail=tail,
        action=content.action,
        watch_time_s=content.watch_time_s,
        time_gap_s=content.time_gap_s,
        num_users=num_users,
        num_queries=len(content.positive),
        num_negatives=len(content.negative),
        fill=fill,
    )
    return lookups, batch


def rule_of(model):
    """The attention mask of the model's layers."""
    return model.user_tower.encoder.stack.layers[0].rule
