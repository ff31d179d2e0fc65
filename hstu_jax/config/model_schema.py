"""The model's configuration: both towers, field by field as the reference names them.

Frozen dataclasses with their own checks (docs/seed-fields.md lists the reference's fields).
Relations to other sections are checked in `schema.py`, which has the rest.
"""

import dataclasses
from typing import Literal

from hstu_jax.config.checks import require, require_ratio
from hstu_jax.config.stu_schema import StuConfig
from hstu_jax.config.tower_schema import ActionMlpConfig, MlpConfig, TimestampLayerNormConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionalEncoderConfig:
    """Position and time embeddings added to the tokens (docs/model.md)."""

    num_position_buckets: int = 256
    num_time_buckets: int = 2048
    use_time_encoding: bool = True
    time_bucket_fn: Literal["sqrt", "log"] = "sqrt"
    time_bucket_increments: float = 60.0  # seconds

    def __post_init__(self):
        require(
            self.num_position_buckets > 0,
            "num_position_buckets",
            self.num_position_buckets,
            "must be positive",
        )
        if self.use_time_encoding:
            require(
                self.num_time_buckets > 0,
                "num_time_buckets",
                self.num_time_buckets,
                "must be positive when use_time_encoding is true",
            )
        require(
            self.time_bucket_increments > 0,
            "time_bucket_increments",
            self.time_bucket_increments,
            "must be positive",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimpleActionEncoderConfig:
    """A learned vector per action bit that is set (docs/model.md)."""

    action_embedding_dim: int = 8
    action_weights: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    watchtime_to_action_thresholds: tuple[float, ...] = ()  # seconds
    watchtime_to_action_weights: tuple[int, ...] = ()

    def __post_init__(self):
        require(
            self.action_embedding_dim > 0,
            "action_embedding_dim",
            self.action_embedding_dim,
            "must be positive",
        )
        require(
            len(self.action_weights) + len(self.watchtime_to_action_weights) > 0,
            "action_weights",
            self.action_weights,
            "must not be empty",
        )
        require(
            all(0 < w < 2**31 for w in self.action_weights + self.watchtime_to_action_weights),
            "action_weights",
            self.action_weights,
            "must be positive bitmasks of 31 bits",
        )
        require(
            len(self.watchtime_to_action_thresholds) == len(self.watchtime_to_action_weights),
            "watchtime_to_action_thresholds",
            self.watchtime_to_action_thresholds,
            f"must pair with watchtime_to_action_weights={self.watchtime_to_action_weights}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionEncoderConfig:
    """Which action encoder to use; there is one kind."""

    simple_action_encoder: SimpleActionEncoderConfig = SimpleActionEncoderConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class UihPreprocessorConfig:
    """Projects the history, adds actions, prepends contextual tokens (docs/model.md).

    `action_encoder` and `action_mlp` come together, or both are None.
    """

    action_encoder: ActionEncoderConfig | None = ActionEncoderConfig()
    action_mlp: ActionMlpConfig | None = ActionMlpConfig()

    def __post_init__(self):
        require(
            (self.action_encoder is None) == (self.action_mlp is None),
            "action_mlp",
            self.action_mlp,
            "must be set exactly when action_encoder is",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputPreprocessorConfig:
    """Which input preprocessor to use; HSTU Match has one kind."""

    uih_preprocessor: UihPreprocessorConfig = UihPreprocessorConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class HstuConfig:
    """The sequence encoder: preprocessing, positions, STU layers, postprocessing."""

    stu: StuConfig = StuConfig()
    input_dropout_ratio: float = 0.2
    attn_num_layers: int = 3
    positional_encoder: PositionalEncoderConfig = PositionalEncoderConfig()
    input_preprocessor: InputPreprocessorConfig = InputPreprocessorConfig()
    # The reference writes `l2norm_postprocessor {}`; a message without fields is a name here.
    output_postprocessor: Literal["l2norm", "layernorm", "timestamp_layernorm"] = "l2norm"
    timestamp_layernorm: TimestampLayerNormConfig = TimestampLayerNormConfig()
    # The window objective reads only each user's last position, so the last layer computes only
    # that one: exact, and about 1.4 times fewer operations at the reference's size. The next-item
    # objective trains all positions; there this is how evaluation computes its one.
    last_layer: Literal["last_position", "all_positions"] = "last_position"
    # Layers from the split layer on (counted from 0) see the contextual tokens and the newest
    # tail_len items of a history. Both 0 = off.
    attn_truncation_split_layer: int = 0
    attn_truncation_tail_len: int = 0

    def __post_init__(self):
        require_ratio("input_dropout_ratio", self.input_dropout_ratio)
        require(
            self.attn_num_layers > 0, "attn_num_layers", self.attn_num_layers, "must be positive"
        )
        self._check_truncation()
        self._check_periods()

    def _check_truncation(self):
        split, tail_len = self.attn_truncation_split_layer, self.attn_truncation_tail_len
        for name in ("attn_truncation_split_layer", "attn_truncation_tail_len"):
            value = getattr(self, name)
            require(value >= 0, name, value, "must not be negative", "use 0 for off")
        require(
            (split > 0) == (tail_len > 0),
            "attn_truncation_split_layer",
            split,
            f"goes together with attn_truncation_tail_len={tail_len}",
            "set both above 0, or both to 0",
        )
        require(
            split < self.attn_num_layers,
            "attn_truncation_split_layer",
            split,
            f"must be below attn_num_layers={self.attn_num_layers}, since layers count from 0",
            "choose a lower layer",
        )

    def _check_periods(self):
        is_timed, periods = (
            self.output_postprocessor == "timestamp_layernorm",
            self.timestamp_layernorm,
        )
        require(
            is_timed or not periods.pairs,
            "timestamp_layernorm",
            periods,
            f"is not read with output_postprocessor={self.output_postprocessor!r}",
            "leave it empty, or use 'timestamp_layernorm'",
        )
        require(
            not is_timed or len(periods.pairs) > 0,
            "timestamp_layernorm",
            periods,
            "must name one period or more with output_postprocessor='timestamp_layernorm'",
            "use for instance time_duration_period_units=(3600,) and "
            "time_duration_units_per_period=(24,) for the hour of the day",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SasrecConfig:
    """The layers of the SASRec encoder; the reference has none (docs/model.md)."""

    num_blocks: int = 2
    num_heads: int = 1  # must divide hstu.stu.embedding_dim
    ffn_dim: int = 0  # hidden width of a block's feed-forward layers; 0 = embedding_dim
    dropout_ratio: float = 0.2  # of attention outputs and feed-forward layers

    def __post_init__(self):
        for name in ("num_blocks", "num_heads"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(
            self.ffn_dim >= 0,
            "ffn_dim",
            self.ffn_dim,
            "must not be negative",
            "use 0 for hstu.stu.embedding_dim",
        )
        require_ratio("dropout_ratio", self.dropout_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserTowerConfig:
    """User tower: a history (UIH) in, one vector out.

    Every encoder reads from `hstu` what makes its tokens and its vector: `stu.embedding_dim` (the
    model's width), `input_preprocessor`, `positional_encoder`, `input_dropout_ratio`,
    `output_postprocessor` and `timestamp_layernorm`. The rest of `hstu` is the stack of
    "hstu", and `sasrec` the blocks of "sasrec": another encoder leaves them unread, so that one
    configuration can be compared under all three.
    """

    input: str = "uih"
    # "sasrec": softmax attention. "mean" pools the preprocessed tokens. Both are baselines.
    encoder: Literal["hstu", "sasrec", "mean"] = "hstu"
    hstu: HstuConfig = HstuConfig()
    sasrec: SasrecConfig = SasrecConfig()
    max_seq_len: int = 128  # history items; longer histories keep the newest

    def __post_init__(self):
        require(self.input == "uih", "input", self.input, "must be 'uih', the only history group")
        require(self.max_seq_len > 0, "max_seq_len", self.max_seq_len, "must be positive")
        width, heads = self.hstu.stu.embedding_dim, self.sasrec.num_heads
        require(
            self.encoder != "sasrec" or width % heads == 0,
            "sasrec.num_heads",
            heads,
            f"must divide hstu.stu.embedding_dim={width}",
            "change one of them",
        )
        tail_len = self.hstu.attn_truncation_tail_len
        require(
            tail_len < self.max_seq_len,
            "hstu.attn_truncation_tail_len",
            tail_len,
            f"would cut nothing from histories of max_seq_len={self.max_seq_len}",
            "use a smaller one, or 0 for both attn_truncation fields",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemTowerConfig:
    """Item tower: candidate embedding, then an optional MLP (None = the embedding itself)."""

    input: str = "candidate"
    mlp: MlpConfig | None = None

    def __post_init__(self):
        require(
            self.input == "candidate",
            "input",
            self.input,
            "must be 'candidate', the only item group",
        )


Objective = Literal["window", "next_item"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextItemConfig:
    """Options of `objective="next_item"` (docs/model.md)."""

    # The gap that a token's time row is read at, with use_time_encoding: from its event to the
    # user's next one (to the request, for the last), or from the event before to its own.
    time: Literal["next_request", "own"] = "next_request"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """HSTU Match: both towers and how they are compared."""

    # "window": all positives of a window are asked for from its request, as in the reference.
    # "next_item": in training every positive is asked for from the user's last event before it.
    objective: Objective = "window"
    next_item: NextItemConfig = NextItemConfig()

    user_tower: UserTowerConfig = UserTowerConfig()
    item_tower: ItemTowerConfig = ItemTowerConfig()
    output_dim: int = 0  # > 0 adds a Linear to this width on both towers
    similarity: Literal["COSINE", "INNER_PRODUCT", "EUCLID"] = "INNER_PRODUCT"
    temperature: float = 1.0
    # The model reads histories from oldest to newest. Rows that are stored the other way round are
    # turned where they are read, so False is refused here.
    sequence_timestamp_is_ascending: bool = True
    # Of the attention. "auto" takes the fastest one of the device; those that end in "_interpret"
    # run the kernels step by step anywhere, to find faults.
    kernel: Literal[
        "auto",
        "xla",
        "pallas_triton",
        "pallas_tpu",
        "pallas_triton_interpret",
        "pallas_tpu_interpret",
    ] = "auto"
    # Not in the reference: "aligned" starts both towers in the item embedding's coordinates, which
    # learns from far less data (`hstu_jax/model/initialization.py`).
    initialization: Literal["reference", "aligned"] = "reference"

    def __post_init__(self):
        require(self.output_dim >= 0, "output_dim", self.output_dim, "must not be negative")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require(
            self.similarity != "EUCLID",
            "similarity",
            self.similarity,
            "there is no Euclidean similarity (the reference takes the name and computes inner "
            "products)",
            "use 'INNER_PRODUCT' for what the reference does, or 'COSINE'",
        )
        require(
            self.sequence_timestamp_is_ascending,
            "sequence_timestamp_is_ascending",
            self.sequence_timestamp_is_ascending,
            "rows from newest to oldest are turned where they are read, and an event store is "
            "sorted by time anyway",
            "leave it True, and for list columns set sequences.uih_seq.newest_first=True",
        )
