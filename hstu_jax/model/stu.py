"""Sequential Transduction Unit: one layer, and the stack of them (FACTS 2).

A layer is norm, one projection to u, v, q, k, pointwise attention, a gate and an output projection
around a residual. The last layer of a stack can be computed for each user's last token alone.
Attention itself is `pallas_kernels.hstu_attention`; `encoder.py` is the next file.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from hstu_jax.model import dropout, linear, normalization
from pallas_kernels.hstu_attention import api as attention
from pallas_kernels.hstu_attention import layout as attention_layout
from pallas_kernels.hstu_attention import mask as attention_mask

_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequence:
    """Everything about a token grid but the tokens themselves.

    Attributes:
        layout: where each user's tokens lie.
        tokens: identity of every slot, `[R, L]`, for dropout.
        last: identity of each segment's last token, `[S]`.
        last_slot: flat index of each segment's last token; R * L for empty segments.
    """

    layout: attention_layout.SequenceLayout
    tokens: dropout.TokenIdentity
    last: dropout.TokenIdentity
    last_slot: Array


def take_last(x: Float[Array, "R L D"], sequence: Sequence) -> Float[Array, "S D"]:
    """Each segment's last token; zeros, and no gradient, for empty segments."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.at[sequence.last_slot].get(mode="fill", fill_value=0)


class StuLayer(nn.Module):
    """x + [u, o, u * norm(o)] @ W_out, with u, v, q, k = LN(x) @ W + b and o = attention(q, k, v).

    Only u passes through SiLU. The gate reads the normalised attention output; its raw value goes
    into the concatenation as well. The residual is the un-normalised x.

    Attributes:
        embedding_dim: D.
        num_heads: H.
        hidden_dim: V, width of u and v per head.
        attention_dim: K, width of q and k per head.
        use_group_norm: normalise o per head with one scale and bias per head, instead of over all
            heads with a scale and bias per element.
        output_dropout_ratio: dropout of the concatenation.
        alpha: factor of q . k before SiLU.
        divisor: what SiLU's output is divided by; explicit, never the padded length.
        rule: attention mask.
        qk_bias_init: initial bias of q and k.
        implementation: of the attention.

    Source: TorchEasyRec 1.3.16, tzrec/modules/gr/stu.py; FACTS 2. `qk_bias_init` is ours; 0 is the
    reference.
    """

    embedding_dim: int
    num_heads: int
    hidden_dim: int
    attention_dim: int
    use_group_norm: bool
    output_dropout_ratio: float
    alpha: float
    divisor: float
    rule: attention_mask.MaskRule
    qk_bias_init: float = 0.0
    implementation: str = "auto"

    def setup(self):
        value_width, qk_width = self._value_width, self.num_heads * self.attention_dim
        uvqk_width = 2 * (value_width + qk_width)
        norm_width = self.num_heads if self.use_group_norm else value_width
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        self.input_norm = normalization.LayerNorm(eps=_NORM_EPS)
        self.uvqk_kernel = self.param(
            "uvqk_kernel", linear.xavier_uniform, (self.embedding_dim, uvqk_width)
        )
        self.uvqk_bias = self.param("uvqk_bias", self._init_uvqk_bias, (uvqk_width,))
        self.output_norm_scale = self.param("output_norm_scale", ones, (norm_width,))
        self.output_norm_bias = self.param("output_norm_bias", zeros, (norm_width,))
        self.output_kernel = self.param(
            "output_kernel", linear.xavier_uniform, (3 * value_width, self.embedding_dim)
        )

    @property
    def _value_width(self) -> int:
        return self.num_heads * self.hidden_dim

    def _init_uvqk_bias(self, key, shape, dtype=jnp.float32):
        del key
        return jnp.zeros(shape, dtype).at[2 * self._value_width :].set(self.qk_bias_init)

    def __call__(
        self,
        x: Float[Array, "R L D"],
        sequence: Sequence,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R L D"]:
        """The layer at every position; padding stays finite and is read by nobody."""
        normed = self.input_norm(x)
        projected = jnp.dot(normed, self.uvqk_kernel) + self.uvqk_bias[None, None]
        u, v, q, k = self._split(projected, ("u", "v", "q", "k"))
        attended = attention.hstu_attention(
            q,
            k,
            v,
            layout=sequence.layout,
            rule=self.rule,
            alpha=self.alpha,
            divisor=self.divisor,
            implementation=self.implementation,
        )
        return self._output(x, u, attended, dropout_key=dropout_key, identity=sequence.tokens)

    def last_position(
        self,
        x: Float[Array, "R L D"],
        sequence: Sequence,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "S D"]:
        """The layer's output at each segment's last token: `take_last` of `__call__`, cheaper.

        Keys and values are needed for all tokens; query, gate, attention and output for one token
        per segment (DESIGN 3.7). Empty segments give zeros.
        """
        normed = self.input_norm(x)
        value_width, qk_width = self._value_width, self.num_heads * self.attention_dim
        cuts = (value_width, 2 * value_width, 2 * value_width + qk_width)
        kernel_u, kernel_v, kernel_q, kernel_k = jnp.split(self.uvqk_kernel, cuts, axis=1)
        bias_u, bias_v, bias_q, bias_k = jnp.split(self.uvqk_bias, cuts)
        all_tokens = jnp.dot(normed, jnp.concatenate([kernel_v, kernel_k], axis=1))
        all_tokens += jnp.concatenate([bias_v, bias_k])[None, None]
        one_token = jnp.dot(
            take_last(normed, sequence), jnp.concatenate([kernel_u, kernel_q], axis=1)
        )
        one_token += jnp.concatenate([bias_u, bias_q])[None]
        v, k = self._split(all_tokens, ("v", "k"))
        u, q = self._split(one_token, ("u", "q"))
        attended = attention.hstu_attention_last(
            q,
            k,
            v,
            layout=sequence.layout,
            rule=self.rule,
            alpha=self.alpha,
            divisor=self.divisor,
            implementation=self.implementation,
        )
        out = self._output(
            take_last(x, sequence), u, attended, dropout_key=dropout_key, identity=sequence.last
        )
        is_used = jnp.asarray(sequence.layout.lengths) > 0
        return jnp.where(is_used[:, None], out, 0.0)

    def _split(self, projected, names):
        """Cuts projected columns; q, k, v get their head axis, u stays flat."""
        parts, start = [], 0
        for name in names:
            per_head = self.hidden_dim if name in "uv" else self.attention_dim
            part = projected[..., start : start + self.num_heads * per_head]
            start += self.num_heads * per_head
            if name != "u":
                part = part.reshape(*part.shape[:-1], self.num_heads, per_head)
            parts.append(part)
        return parts

    def _output(self, x, u, attended, *, dropout_key, identity):
        """Gate, dropout, projection, residual for tokens of any leading axes."""

        # Recomputed in the backward pass: SiLU, norm and dropout bits are as wide as everything
        # else a layer keeps together, and cheap next to attention.
        @jax.checkpoint
        def project(u, attended):
            u = jax.nn.silu(u)
            flat = attended.reshape(*u.shape)
            parts = (u, flat, u * self._output_norm(attended))
            parts = dropout.dropout_parts(
                parts, rate=self.output_dropout_ratio, key=dropout_key, identity=identity
            )
            # Three products instead of one of the concatenation: 336 instead of 389 MiB of
            # temporaries in the stack benchmark at N = 2048.
            kernels = jnp.split(self.output_kernel, len(parts))
            return sum(jnp.dot(part, kernel) for part, kernel in zip(parts, kernels, strict=True))

        return x + project(u, attended)

    def _output_norm(self, attended):
        """[..., H, V] -> [..., H * V], normalised per head or over all heads."""
        tokens = attended.shape[:-2]
        ones = (1,) * len(tokens)
        flat_shape = (*tokens, self._value_width)
        if self.use_group_norm:
            scale = self.output_norm_scale.reshape(*ones, -1, 1)
            bias = self.output_norm_bias.reshape(*ones, -1, 1)
            normed = normalization.standardize(attended, eps=_NORM_EPS) * scale + bias
            return normed.reshape(flat_shape)
        normed = normalization.standardize(attended.reshape(flat_shape), eps=_NORM_EPS)
        scale = self.output_norm_scale.reshape(*ones, -1)
        return normed * scale + self.output_norm_bias.reshape(*ones, -1)


class StuStack(nn.Module):
    """STU layers in sequence; layer i draws its dropout bits from `fold_in(dropout_key, i)`.

    Attributes:
        layers: at least one.
    """

    layers: tuple[StuLayer, ...]

    def __call__(
        self,
        x: Float[Array, "R L D"],
        sequence: Sequence,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R L D"]:
        """Every position through every layer."""
        return self._apply(self.layers, x, sequence, dropout_key)

    def last_position(
        self,
        x: Float[Array, "R L D"],
        sequence: Sequence,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "S D"]:
        """Each segment's last position; the last layer computes only that one."""
        x = self._apply(self.layers[:-1], x, sequence, dropout_key)
        last_key = _layer_key(dropout_key, len(self.layers) - 1)
        return self.layers[-1].last_position(x, sequence, dropout_key=last_key)

    def _apply(self, layers, x, sequence, dropout_key):
        for index, layer in enumerate(layers):
            x = layer(x, sequence, dropout_key=_layer_key(dropout_key, index))
        return x


def _layer_key(dropout_key, index):
    return None if dropout_key is None else jax.random.fold_in(dropout_key, index)
