"""Options of the next-item objective's forward pass, and users in both layouts for its tests.

A case's users lie twice in one grid, several to a row and one to a row, so that one compiled
program shows both layouts. Every token is a query. Times are whole seconds that rise within a user;
gaps and ages are made of them as the pipeline makes them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.config import model_schema, tower_schema
from hstu_jax.features import ages, next_item
from tests.model import batches, models

ROW_LEN = 14
LENGTHS = (7, 2, 5, 12, 3)  # tokens of each user, contextual ones included; three share a row
FIRST_TIME_S = 1_650_000_000
UNUSED = 2  # masked queries
COPIES = ("packed", "padded")


def _positions(**fields):
    return {
        "positional_encoder": model_schema.PositionalEncoderConfig(
            **{"num_position_buckets": 12, "num_time_buckets": 20, **fields}
        )
    }


def _inputs(**fields):
    uih = model_schema.UihPreprocessorConfig(**fields)
    return {"input_preprocessor": model_schema.InputPreprocessorConfig(uih_preprocessor=uih)}


_USER_MAPS = tower_schema.ActionMlpConfig(
    simple_mlp=None, parameterized_mlp=tower_schema.ParameterizedMlpConfig(hidden_dim=8)
)
_WATCHED = model_schema.ActionEncoderConfig(
    simple_action_encoder=model_schema.SimpleActionEncoderConfig(
        watchtime_to_action_thresholds=(20.0,), watchtime_to_action_weights=(256,)
    )
)
_KEPT = dict(recompute_normed_x=False, recompute_uvqk=False, recompute_y=False)
_OWN_TIME = model_schema.NextItemConfig(time="own")
# Every option that the objective allows, some of them together: a leak through one shows all the
# same. "dropout", "contextual_len" and "window" are the cases' own fields. The number at the end
# is where position rows saturate.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults, dropout": {"dropout": True},
    "no_time, window, user_maps": {
        "hstu": _positions(use_time_encoding=False) | _inputs(action_mlp=_USER_MAPS),
        "stu": _KEPT | {"max_attn_len": 3, "contextual_seq_len": 0},
    },
    "log_time, semi_local, layernorm, projected": {
        "hstu": _positions(time_bucket_fn="log", time_bucket_increments=7.0)
        | {"output_postprocessor": "layernorm", "last_layer": "all_positions"},
        "stu": {"sla_k1": 2, "sla_k2": 1, "use_group_norm": False},
        "output_dim": 5,
        "similarity": "COSINE",
    },
    "own steps, prefix, watch_time, saturated": {
        "hstu": _positions(num_position_buckets=4) | _inputs(action_encoder=_WATCHED),
        "stu": _KEPT | {"sla_k2": 4, "scaling_seqlen": 5, "attn_alpha": 1.0},
        "next_item": _OWN_TIME,
    },
    "paper, next_request": {
        "stu": _KEPT
        | dict(use_silu_qkv=True, use_position_bias=True, use_time_bias=True, qk_bias_init=0.5),
    },
    "paper, own times, items alone": {
        "hstu": _positions(use_time_encoding=False) | _inputs(action_encoder=None, action_mlp=None),
        "stu": _KEPT
        | dict(use_silu_qkv=True, use_position_bias=True, use_time_bias=True, time_bias_query="own")
        | dict(num_time_bias_buckets=64, use_gate=False),
        "contextual_len": 0,
        "dropout": True,
    },
    "sasrec, own steps": {
        "encoder": "sasrec",
        "next_item": _OWN_TIME,
        "sasrec": {"num_heads": 1, "ffn_dim": 12},
        "dropout": True,
    },
    "sasrec, one block": {
        "encoder": "sasrec",
        "hstu": _positions(use_time_encoding=False),
        "sasrec": {"num_blocks": 1},
    },
    "mean": {"encoder": "mean"},
}
# The window objective's models, which leak: their contextual tokens look ahead, and positions are
# counted from the end.
WRONG: dict[str, dict[str, Any]] = {
    "look_ahead": {
        "hstu": _positions(use_time_encoding=False) | {"attn_num_layers": 2},
        "stu": _KEPT,
        "objective": "window",
    },
    "from_the_end": {
        "hstu": {"attn_num_layers": 1},
        "stu": _KEPT | {"contextual_seq_len": 0},
        "objective": "window",
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what it reads, and what its positions may see."""

    config: model_schema.ModelConfig
    contextual_len: int
    model: Any
    params: Any
    dropout_key: Any

    @property
    def step_time(self) -> next_item.StepTime:
        """The gap that tokens read, with a time encoding."""
        return self.config.next_item.time

    @property
    def asks_next(self) -> bool:
        """Whether a token reads the time of the next one: its own query's request."""
        hstu = self.config.user_tower.hstu
        is_bias = self.config.user_tower.encoder == "hstu" and hstu.stu.use_time_bias
        has_steps = hstu.positional_encoder.use_time_encoding
        return (is_bias and hstu.stu.time_bias_query == "next_request") or (
            has_steps and self.step_time == "next_request"
        )

    def visible(self, length: int) -> np.ndarray:
        """[query, token] of a user: what reaches which output, over all layers, from the rules."""
        tower, count = self.config.user_tower, self.contextual_len
        i, j = np.arange(length)[:, None], np.arange(length)[None]
        stu = tower.hstu.stu if tower.encoder == "hstu" else model_schema.StuConfig()
        seen = j <= i
        if stu.sla_k1 or stu.sla_k2:
            seen &= (j < max(stu.sla_k2, count)) | (i - j < stu.sla_k1) | (i == j)
        elif stu.max_attn_len:
            seen &= i - j <= stu.max_attn_len
        layers = {
            "hstu": tower.hstu.attn_num_layers,
            "sasrec": tower.sasrec.num_blocks,
            "mean": 1,
        }
        reached = np.linalg.matrix_power(seen.astype(int), layers[tower.encoder]) > 0
        maps = tower.hstu.input_preprocessor.uih_preprocessor.action_mlp
        if maps is not None and maps.parameterized_mlp is not None:
            # Made of all the user's contextual features, for the history tokens.
            reached[count:, :count] = True
        return reached


@functools.cache
def case(name: str) -> Case:
    """The case of this name in `OPTIONS` or `WRONG`."""
    options = {"objective": "next_item", **(OPTIONS | WRONG)[name]}
    contextual_len = options.pop("contextual_len", 2)
    has_dropout = options.pop("dropout", False)
    config = models.model_config(**options)
    model = models.build(config, contextual_len=contextual_len)
    return Case(
        config=config,
        contextual_len=contextual_len,
        model=model,
        params=models.random_params(model),
        dropout_key=jax.random.key(5) if has_dropout else None,
    )


@dataclasses.dataclass(frozen=True)
class Users:
    """What every user's tokens hold, users one after the other, and when."""

    content: models.Content
    time_s: np.ndarray  # of each token; contextual ones have none, and the number here is not read
    request_s: np.ndarray  # of each user

    @property
    def lengths(self) -> np.ndarray:
        return self.content.lengths

    @property
    def position(self) -> np.ndarray:
        return np.concatenate([np.arange(n) for n in self.lengths])

    @property
    def owner(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def next_time_s(self) -> np.ndarray:
        """When the event behind each token happened, or the request."""
        following = np.append(self.time_s[1:], 0)
        is_last = self.position == self.lengths[self.owner] - 1
        return np.where(is_last, self.request_s[self.owner], following)

    def take(self, tokens: np.ndarray, owner: np.ndarray, request_s: np.ndarray) -> "Users":
        """Other users: `tokens` of these, of which `owner[i]` is whose; ascending from 0."""
        jagged = ("history", "action", "watch_time_s")
        cut = {name: getattr(self.content, name)[tokens] for name in jagged}
        source = self.owner[tokens]
        first = np.searchsorted(owner, np.arange(len(request_s)))
        lengths = np.bincount(owner, minlength=len(request_s))
        contextual = self.content.contextual[source[first]]
        content = dataclasses.replace(self.content, lengths=lengths, contextual=contextual, **cut)
        return Users(content, self.time_s[tokens], request_s)


def random_users(case: Case) -> Users:
    """`LENGTHS` of them, with events of one second among the others."""
    rng = np.random.default_rng(4)
    content = models.random_content(
        LENGTHS,
        contextual_len=case.contextual_len,
        num_queries=2 * sum(LENGTHS) + UNUSED,
        seed=3,
    )
    steps = rng.choice([0, 40, 700, 5_000, 40_000], size=sum(LENGTHS), p=[0.1, 0.2, 0.3, 0.2, 0.2])
    time_s = FIRST_TIME_S + np.cumsum(steps)
    last = np.cumsum(LENGTHS) - 1
    return Users(content, time_s, time_s[last] + rng.integers(20, 9_000, len(LENGTHS)))


def both_layouts(case: Case) -> batches.Placement:
    """Where the users lie, packed and then padded, in one grid."""
    options = dict(row_len=ROW_LEN, rule=_rule_of(case))
    packed = batches.place(LENGTHS, packed=True, **options)
    padded = batches.place(LENGTHS, packed=False, **options)
    offset = packed.num_rows * ROW_LEN
    return dataclasses.replace(
        packed,
        starts=np.concatenate([packed.starts, offset + padded.starts]),
        lengths=np.concatenate([packed.lengths, padded.lengths]),
        num_rows=packed.num_rows + padded.num_rows,
    )


def _rule_of(case):
    stack = getattr(case.model.user_tower.encoder, "stack", None)
    return stack.layers[0].rule if stack else batches.ANY_RULE


def _lay_out(case, users, placement, *, user_index, step_time):
    """Lookups and batch; NaN wherever nothing is held."""
    content, position = users.content, users.position
    is_history = position >= case.contextual_len
    history_len = np.maximum(users.lengths - case.contextual_len, 0)
    request_s = users.request_s[users.owner]
    step = np.full(len(position), next_item.NO_GAP_S, np.float32)
    step[is_history] = next_item.step_gaps(
        users.time_s[is_history], history_len, users.request_s, kind=step_time
    )
    age = np.where(is_history, ages.ages(request_s, users.time_s), 0).astype(np.int32)
    gap = np.where(is_history, request_s - users.time_s, request_s)
    content = dataclasses.replace(content, time_gap_s=gap.astype(np.float32))
    lookups, batch = models.lay_out(
        content, rule=placement.rule, row_len=ROW_LEN, packed=True, fill=np.nan, placement=placement
    )
    return lookups, dataclasses.replace(
        batch,
        user_index=np.asarray(user_index, np.int32)[None],
        step_gap_s=placement.to_grid(step, fill=np.nan)[None],
        age_s=placement.to_grid(age, fill=-12345)[None],
    )


def training_inputs(case: Case, users: Users, *, step_time: str = ""):
    """The users in both layouts, with a query at every token that they have of `LENGTHS`.

    Args:
        case: decides the layout's schedule and the gaps.
        users: as many as `LENGTHS`, each as long or shorter: then the end of its slots is empty,
            and the queries of the missing tokens are masked.
        step_time: another kind of gap than the case's.
    """
    placement = both_layouts(case)
    all_slots = placement.slots
    lengths = np.tile(users.lengths, 2)
    is_there = np.concatenate(
        [np.arange(n) < kept for n, kept in zip(placement.lengths, lengths, strict=True)]
    )
    placement = dataclasses.replace(placement, lengths=lengths.astype(np.int32))
    number, count = np.arange(len(users.position)), len(LENGTHS)
    twice = users.take(
        np.tile(number, 2),
        np.concatenate([users.owner, users.owner + count]),
        np.tile(users.request_s, 2),
    )
    lookups, batch = _lay_out(
        case,
        twice,
        placement,
        user_index=np.tile(np.arange(count), 2),
        step_time=step_time or case.step_time,
    )
    past_end = placement.num_rows * ROW_LEN
    slots = np.where(is_there, all_slots, past_end)
    return lookups, dataclasses.replace(
        batch,
        query_slot=np.append(slots, [past_end] * UNUSED).astype(np.int32)[None],
        query_mask=np.append(is_there, [False] * UNUSED)[None],
    )


@functools.partial(jax.jit, static_argnames=("model",))
def _run(model, params, lookups, batch, key, weights):
    def total(history, contextual):
        vectors = model.apply({"params": params}, history, contextual, batch, key, method="user")
        return jnp.sum(vectors[0] * weights), vectors[0]

    return jax.grad(total, argnums=(0, 1), has_aux=True)(lookups.history, lookups.contextual)


def vectors(case: Case, lookups, batch) -> np.ndarray:
    """[copy, token, E]: the output at every token, by the program that has the gradients."""
    count, width = batch.query_mask.shape[1], case.config.output_dim or 16
    weights = np.zeros((count, width), np.float32)
    _, found = _run(case.model, case.params, lookups, batch, case.dropout_key, weights)
    found = np.asarray(found)
    assert not found[count - UNUSED :].any()  # masked queries
    return found[: count - UNUSED].reshape(2, -1, width)


def gradients(case: Case, lookups, batch) -> tuple[np.ndarray, np.ndarray]:
    """Where d (c . output of query q) / d input is not zero: [Q, slots] and [Q, users, C]."""
    count, width = batch.query_mask.shape[1], case.config.output_dim or 16
    mixed = np.random.default_rng(1).normal(size=(count, width)).astype(np.float32)
    found = []
    for query in range(count - UNUSED):
        weights = np.zeros_like(mixed)
        weights[query] = mixed[query]
        pulled, _ = _run(case.model, case.params, lookups, batch, case.dropout_key, weights)
        found.append([(np.asarray(x)[0] != 0).any(axis=-1) for x in pulled])
    history, contextual = (np.stack(each) for each in zip(*found, strict=True))
    return history.reshape(len(history), -1), contextual


@functools.partial(jax.jit, static_argnames=("model",))
def _serve(model, params, lookups, batch, key):
    return model.apply(
        {"params": params}, lookups.history, lookups.contextual, batch, key, method="user"
    )


def served_prefixes(case: Case, users: Users, request_s: np.ndarray) -> tuple[np.ndarray, Any]:
    """The window form's vectors of all users cut behind every token, and these tokens' numbers.

    Args:
        case: the model.
        users: whose prefixes.
        request_s: of every token, as the last one of a prefix.
    """
    first = np.cumsum(users.lengths) - users.lengths
    ends = np.flatnonzero(users.position >= max(case.contextual_len, 1) - 1)
    tokens = np.concatenate([np.arange(first[users.owner[end]], end + 1) for end in ends])
    owner = np.repeat(np.arange(len(ends)), users.position[ends] + 1)
    cut = users.take(tokens, owner, request_s[ends])
    placement = batches.place(
        cut.lengths.tolist(), row_len=ROW_LEN, packed=True, rule=_rule_of(case)
    )
    lookups, batch = _lay_out(
        case, cut, placement, user_index=users.owner[ends], step_time=case.step_time
    )
    found = _serve(case.model, case.params, lookups, batch, case.dropout_key)
    return np.asarray(found)[0, : len(ends)], ends
