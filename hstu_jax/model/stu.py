"""Sequential Transduction Unit: one layer, and the stack of them (docs/model.md).

A layer is norm, one projection to u, v, q, k, pointwise attention, a gate and an output projection
around a residual. The last layer of a stack can be computed for each user's last token alone, and
layers from a split on may read a shorter sequence. Attention itself is
`pallas_kernels.hstu_attention`; `encoder.py` is the next file.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import ad_checkpoint
from jaxtyping import Array, Float, PRNGKeyArray

from hstu_jax.model import dropout, linear, normalization, relative_bias
from pallas_kernels.hstu_attention import api as attention
from pallas_kernels.hstu_attention import layout as attention_layout
from pallas_kernels.hstu_attention import mask as attention_mask

_NORM_EPS = 1e-6
# Names of what a layer's backward pass may keep, for checkpoint policies.
_NORMED_X, _UVQK, _ATTENDED, _Y = "normed_x", "uvqk", "attended", "y"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequence:
    """Everything about a token grid but the tokens themselves.

    Attributes:
        layout: where each user's tokens lie.
        tokens: identity of every slot, `[R, L]`, for dropout.
        last: identity of each segment's last token, `[S]`.
        last_slot: flat index of each segment's last token; R * L for empty segments.
        num_targets: candidates at the end of each segment, `[S]`, as ranking models have them;
            None (HSTU Match) = none, which costs nothing.
        time_s: when each slot's event happened, `[R, L]` (`relative_bias.token_times`); None =
            not known.
        next_time_s: when the next one did, or the request behind the last.
    """

    layout: attention_layout.SequenceLayout
    tokens: dropout.TokenIdentity
    last: dropout.TokenIdentity
    last_slot: Array
    num_targets: Array | None = None
    time_s: Array | None = None
    next_time_s: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tail:
    """The shorter sequence that layers from a stack's split on read.

    Attributes:
        sequence: its own layout; tokens keep the identity that they have in the full sequence.
        source: flat index in the full sequence of each slot, `[R2, L2]`; R * L in padding.
    """

    sequence: Sequence
    source: Array

    def cut(self, x: Float[Array, "R L D"]) -> Float[Array, "R2 L2 D"]:
        """The tokens that are left; zeros in padding."""
        return x.reshape(-1, x.shape[-1]).at[self.source].get(mode="fill", fill_value=0)


def take_last(x: Float[Array, "R L D"], sequence: Sequence) -> Float[Array, "S D"]:
    """Each segment's last token; zeros, and no gradient, for empty segments."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.at[sequence.last_slot].get(mode="fill", fill_value=0)


class StuLayer(nn.Module):
    """x + [u, o, u * norm(o)] @ W_out, with u, v, q, k = LN(x) @ W + b and o = attention(q, k, v).

    Only u passes through SiLU, unless `use_silu_qkv`. The gate reads the normalised attention
    output; its raw value goes into the concatenation as well. The residual is the un-normalised x.
    Without a gate there is no u: x + norm(o) @ W_out.

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
        recompute_normed_x: compute LN(x) again in the backward pass instead of keeping it.
        recompute_uvqk: the same for u, v, q, k. The attention itself never runs again.
        recompute_y: the same for the concatenation after dropout, and for the dropout bits.
        use_silu_qkv: q, k and v pass through SiLU as well.
        logit_bias: learned, added to the logits before SiLU; None = none.
        use_gate: False leaves out u, and with it all but norm(o) of the concatenation.

    Source: TorchEasyRec 1.3.16, tzrec/modules/gr/stu.py; docs/model.md. `qk_bias_init` is ours,
    0 is the reference; so is the layer without a gate, for comparison. SiLU on q, k, v and the
    biases are those of Zhai et al. 2024, "Actions Speak Louder than Words", equations 1 and 2.
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
    recompute_normed_x: bool = False
    recompute_uvqk: bool = False
    recompute_y: bool = True
    use_silu_qkv: bool = False
    logit_bias: relative_bias.RelativeBias | None = None
    use_gate: bool = True

    def setup(self):
        value_width, uvqk_width = self._value_width, sum(map(self._width, self._names))
        norm_width = self.num_heads if self.use_group_norm else value_width
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        self.input_norm = normalization.NormWeights()
        self.uvqk_kernel = self.param(
            "uvqk_kernel", linear.xavier_uniform, (self.embedding_dim, uvqk_width)
        )
        self.uvqk_bias = self.param("uvqk_bias", self._init_uvqk_bias, (uvqk_width,))
        self.output_norm_scale = self.param("output_norm_scale", ones, (norm_width,))
        self.output_norm_bias = self.param("output_norm_bias", zeros, (norm_width,))
        self.output_kernel = self.param(
            "output_kernel",
            linear.xavier_uniform,
            ((3 if self.use_gate else 1) * value_width, self.embedding_dim),
        )

    @property
    def _value_width(self) -> int:
        return self.num_heads * self.hidden_dim

    @property
    def _names(self) -> tuple[str, ...]:
        """What the projection gives, in the order of its columns."""
        return ("u", "v", "q", "k") if self.use_gate else ("v", "q", "k")

    def _width(self, name: str) -> int:
        return self.num_heads * (self.hidden_dim if name in "uv" else self.attention_dim)

    def _init_uvqk_bias(self, key, shape, dtype=jnp.float32):
        del key
        num_qk = self._width("q") + self._width("k")
        return jnp.zeros(shape, dtype).at[shape[0] - num_qk :].set(self.qk_bias_init)

    def __call__(
        self,
        x: Float[Array, "R L D"],
        sequence: Sequence,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R L D"]:
        """The layer at every position; padding stays finite and is read by nobody."""
        norm_weights, bias = self.input_norm(self.embedding_dim), self._bias(sequence)

        def run(x):
            normed = self._input_norm(x, norm_weights)
            projected = linear.multiply(normed, self.uvqk_kernel.astype(x.dtype))
            projected = (projected + self.uvqk_bias[None, None]).astype(x.dtype)
            projected = ad_checkpoint.checkpoint_name(projected, _UVQK)
            parts = self._split(projected, self._names)
            attended = attention.hstu_attention(
                parts["q"],
                parts["k"],
                parts["v"],
                layout=sequence.layout,
                rule=self.rule,
                alpha=self.alpha,
                divisor=self.divisor,
                implementation=self.implementation,
                num_targets=sequence.num_targets,
                bias=bias,
            )
            u = parts.get("u")
            return self._output(x, u, attended, dropout_key=dropout_key, identity=sequence.tokens)

        return self._remat(run)(x)

    def last_position(
        self,
        x: Float[Array, "R L D"],
        sequence: Sequence,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "S D"]:
        """The layer's output at each segment's last token: `take_last` of `__call__`, cheaper.

        Keys and values are needed for all tokens; query, gate, attention and output for one token
        per segment (docs/design.md). Empty segments give zeros.

        Raises:
            ValueError: the sequence has targets.
        """
        if sequence.num_targets is not None:
            raise ValueError(
                "sequence.num_targets: last_position knows no targets; call the layer itself."
            )
        norm_weights, bias = self.input_norm(self.embedding_dim), self._bias(sequence)
        cuts = tuple(itertools.accumulate(map(self._width, self._names)))[:-1]
        kernels = jnp.split(self.uvqk_kernel.astype(x.dtype), cuts, axis=1)
        kernels = dict(zip(self._names, kernels, strict=True))
        biases = dict(zip(self._names, jnp.split(self.uvqk_bias, cuts), strict=True))
        names_of_one = tuple(name for name in self._names if name in "uq")

        def project(tokens, names):
            bias = jnp.concatenate([biases[name] for name in names])
            kernel = jnp.concatenate([kernels[name] for name in names], axis=1)
            tokens = linear.multiply(tokens, kernel)
            tokens = tokens + bias.reshape(*(1,) * (tokens.ndim - 1), -1)
            tokens = ad_checkpoint.checkpoint_name(tokens.astype(x.dtype), _UVQK)
            return self._split(tokens, names)

        def run(x):
            normed = self._input_norm(x, norm_weights)
            all_tokens = project(normed, ("v", "k"))
            one_token = project(take_last(normed, sequence), names_of_one)
            attended = attention.hstu_attention_last(
                one_token["q"],
                all_tokens["k"],
                all_tokens["v"],
                layout=sequence.layout,
                rule=self.rule,
                alpha=self.alpha,
                divisor=self.divisor,
                implementation=self.implementation,
                bias=bias,
            )
            x = take_last(x, sequence)
            u = one_token.get("u")
            return self._output(x, u, attended, dropout_key=dropout_key, identity=sequence.last)

        out = self._remat(run)(x)
        is_used = jnp.asarray(sequence.layout.lengths) > 0
        return jnp.where(is_used[:, None], out, 0.0)

    def _bias(self, sequence):
        if self.logit_bias is None:
            return None
        return self.logit_bias(sequence.time_s, sequence.next_time_s)

    def _input_norm(self, x, weights):
        scale, bias = (w.reshape(*(1,) * (x.ndim - 1), -1) for w in weights)
        normed = normalization.standardize(x, eps=_NORM_EPS) * scale + bias
        return ad_checkpoint.checkpoint_name(normed.astype(x.dtype), _NORMED_X)

    def _remat(self, run):
        """`run` with a backward pass that keeps what the recompute fields leave to keep."""
        if not (self.recompute_normed_x or self.recompute_uvqk):
            return run  # `_output` sees to recompute_y alone
        names = [_ATTENDED]
        names += [] if self.recompute_normed_x else [_NORMED_X]
        names += [] if self.recompute_uvqk else [_UVQK]
        names += [] if self.recompute_y else [_Y, dropout.KEEP_MASK]
        return jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(*names))

    def _split(self, projected, names):
        """Cuts projected columns, by name; q, k, v get their head axis, u stays flat."""
        # `split`, whose gradient joins; that of slices pads and adds, which costs a CPU much more.
        widths, axis = [self._width(name) for name in names], projected.ndim - 1
        cuts = []
        if self.use_silu_qkv:  # one pass over all but u
            if names[0] == "u":
                u, projected = jax.lax.split(projected, [widths[0], sum(widths[1:])], axis=axis)
                cuts.append(u)
            projected = jax.nn.silu(projected)
        cuts += jax.lax.split(projected, widths[len(cuts) :], axis=axis)
        heads = {
            n: (self.num_heads, w // self.num_heads) for n, w in zip(names, widths, strict=True)
        }
        return {
            name: cut if name == "u" else cut.reshape(*cut.shape[:-1], *heads[name])
            for name, cut in zip(names, cuts, strict=True)
        }

    def _output(self, x, u, attended, *, dropout_key, identity):
        """Gate (none where u is None), dropout, projection, residual for tokens of any axes."""
        attended = ad_checkpoint.checkpoint_name(attended, _ATTENDED)

        def project(u, attended):
            normed = self._output_norm(attended).astype(attended.dtype)
            parts = (normed,)
            if u is not None:
                u = jax.nn.silu(u)
                parts = (u, attended.reshape(*u.shape), u * normed)
            parts = dropout.dropout_parts(
                parts, rate=self.output_dropout_ratio, key=dropout_key, identity=identity
            )
            parts = [ad_checkpoint.checkpoint_name(part, _Y) for part in parts]
            # Three products instead of one of the concatenation: 336 instead of 389 MiB of
            # temporaries in the stack benchmark at N = 2048.
            kernels = jnp.split(self.output_kernel.astype(normed.dtype), len(parts))
            return sum(map(linear.multiply, parts, kernels))

        # SiLU, norm and dropout bits are as wide as everything else a layer keeps together, and
        # cheap next to attention.
        return x + (jax.checkpoint(project) if self.recompute_y else project)(u, attended)

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

    Immediately before layer `split_layer` (counted from 0) every segment is cut to its contextual
    tokens, its newest history items and its targets; later layers see nothing else.

    Attributes:
        layers: at least one.
        split_layer: first layer that reads the tail; 0 = none does.

    Source: TorchEasyRec 1.3.16, tzrec/modules/gr/stu.py; docs/model.md.
    """

    layers: tuple[StuLayer, ...]
    split_layer: int = 0

    def __call__(
        self,
        x: Float[Array, "R L D"],
        sequence: Sequence,
        *,
        tail: Tail | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R2 L2 D"]:
        """Every position through every layer.

        Args:
            x: tokens; padding holds finite values.
            sequence: where they lie.
            tail: the sequence from the split on; given exactly when the stack has a split.
            dropout_key: key of this step; None = evaluation.

        Returns:
            Outputs in the layout of the last layer: the tail's, or that of x.

        Raises:
            ValueError: a split without a tail, or a tail without a split.
        """
        x, _ = self._apply(len(self.layers), x, sequence, tail, dropout_key)
        return x

    def last_position(
        self,
        x: Float[Array, "R L D"],
        sequence: Sequence,
        *,
        tail: Tail | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "S D"]:
        """Each segment's last position; the last layer computes only that one."""
        last = len(self.layers) - 1
        x, sequence = self._apply(last, x, sequence, tail, dropout_key)
        if last == self.split_layer and tail is not None:
            x, sequence = tail.cut(x), tail.sequence
        key = _layer_key(dropout_key, last)
        return self.layers[last].last_position(x, sequence, dropout_key=key)

    def _apply(self, num_layers, x, sequence, tail, dropout_key):
        """The first layers, and the sequence that they leave."""
        if (self.split_layer > 0) != (tail is not None):
            raise ValueError(
                f"split_layer={self.split_layer}, tail={type(tail).__name__}: a stack that cuts "
                "its sequence needs the tail, and no other may get one; make the batches with the "
                "model's own configuration."
            )
        for index, layer in enumerate(self.layers[:num_layers]):
            if index == self.split_layer and tail is not None:
                x, sequence = tail.cut(x), tail.sequence
            x = layer(x, sequence, dropout_key=_layer_key(dropout_key, index))
        return x, sequence


def _layer_key(dropout_key, index):
    return None if dropout_key is None else jax.random.fold_in(dropout_key, index)
