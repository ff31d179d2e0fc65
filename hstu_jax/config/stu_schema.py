"""One STU layer's configuration: sizes, mask, scale, and what its backward pass computes again.

Field names and defaults are the reference's. `model_schema.py` has the sections around it; how the
mask fields become a rule is `hstu_jax.features.sequence_rules`.
"""

import dataclasses
from typing import Literal

from hstu_jax.config.checks import require, require_ratio, require_read


@dataclasses.dataclass(frozen=True, kw_only=True)
class StuConfig:
    """One Sequential Transduction Unit layer; every layer of the stack is alike.

    The reference's `sort_by_length` has no field: it orders a batch's users for its GPU kernels,
    and here the block schedule visits exactly the blocks that hold something, in any order.
    """

    embedding_dim: int = 64
    num_heads: int = 4
    hidden_dim: int = 32  # width of v and u per head
    attention_dim: int = 32  # width of q and k per head
    output_dropout_ratio: float = 0.3
    use_group_norm: bool = False
    attn_alpha: float = 0.0  # 0 = 1 / sqrt(attention_dim)
    scaling_seqlen: int = -1  # negative = user_tower.max_seq_len
    max_attn_len: int = 0  # local window; 0 = off
    # Semi-local attention: a token sees the newest sla_k1 tokens (itself included) and the first
    # sla_k2 (contextual tokens always). Either one above 0 replaces every other rule of the mask.
    sla_k1: int = 0
    sla_k2: int = 0
    # Tokens at the start that see each other and the whole history; negative = all contextual
    # tokens, 0 = none: contextual tokens are then masked like history. The next-item objective
    # has none: they would show every token what comes after it.
    contextual_seq_len: int = -1
    # Computed again in the backward pass instead of kept: less memory, the same numbers.
    recompute_normed_x: bool = True  # the layer norm of the input
    recompute_uvqk: bool = True  # the projection to u, v, q, k
    recompute_y: bool = True  # gate, norm and dropout between attention and output projection
    # Not in the reference: the initial bias of q and k. With 0, as there, SiLU attention starts as
    # small weights of either sign; a positive bias starts it as a mean over the history.
    qk_bias_init: float = 0.0
    # Not in the reference: the layer of the HSTU paper (docs/model.md).
    use_silu_qkv: bool = False  # SiLU on q, k and v as well as on u
    use_position_bias: bool = False  # a learned value per distance of two tokens, added to logits
    use_time_bias: bool = False  # a learned value per bucket of the time between query and key
    num_time_bias_buckets: int = 128  # newest bucket 0; more than 72 are above 2^31 seconds
    # When a query asks: at the next event (the request of the newest token), or at its own.
    time_bias_query: Literal["next_request", "own"] = "next_request"
    # Not in the reference: False leaves out u, to measure what the gate is worth. The output
    # projection then reads the normalised attention alone.
    use_gate: bool = True

    def __post_init__(self):
        for name in ("embedding_dim", "num_heads", "hidden_dim", "attention_dim"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require_ratio("output_dropout_ratio", self.output_dropout_ratio)
        require(self.attn_alpha >= 0, "attn_alpha", self.attn_alpha, "must not be negative")
        require(
            self.scaling_seqlen != 0,
            "scaling_seqlen",
            0,
            "would divide by zero",
            "use a positive length, or -1 for user_tower.max_seq_len",
        )
        require(
            self.num_time_bias_buckets > 0,
            "num_time_bias_buckets",
            self.num_time_bias_buckets,
            "must be positive",
            "use use_time_bias=False for no time bias",
        )
        timed = ("num_time_bias_buckets", "time_bias_query")
        require_read(self, choice="use_time_bias", readers=dict.fromkeys(timed, (True,)))
        for name in ("max_attn_len", "sla_k1", "sla_k2"):
            value = getattr(self, name)
            require(value >= 0, name, value, "must not be negative", "use 0 for off")
        require(
            self.max_attn_len == 0 or (self.sla_k1 == 0 and self.sla_k2 == 0),
            "max_attn_len",
            self.max_attn_len,
            f"would not be read: semi-local attention (sla_k1={self.sla_k1}, sla_k2="
            f"{self.sla_k2}) replaces the window",
            "set it to 0, or sla_k1 and sla_k2",
        )
