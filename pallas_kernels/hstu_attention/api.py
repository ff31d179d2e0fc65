"""The one entry to HSTU attention: signatures, checks, choice of implementation.

Nothing is computed here. `reference.py` says what is right; `xla_blockwise.py` and `last_query.py`
run everywhere, `pallas_triton.py` on GPUs and `pallas_tpu.py` on TPUs. Layouts and mask rules are
in `layout.py` and `mask.py`.
"""

import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import checks, devices, dispatch
from pallas_kernels.hstu_attention import (
    last_query,
    pallas_tpu,
    pallas_triton,
    reference,
    xla_blockwise,
)
from pallas_kernels.hstu_attention.bias import AttentionBias
from pallas_kernels.hstu_attention.layout import SequenceLayout, check_segments
from pallas_kernels.hstu_attention.mask import MaskRule

Implementation = Literal[
    "auto",
    "xla",
    "reference",
    "pallas_triton",
    "pallas_triton_interpret",
    "pallas_tpu",
    "pallas_tpu_interpret",
]

_FULL = {
    "xla": xla_blockwise.hstu_attention,
    "reference": reference.hstu_attention,
    "pallas_triton": pallas_triton.hstu_attention,
    "pallas_triton_interpret": functools.partial(pallas_triton.hstu_attention, interpret=True),
    "pallas_tpu": pallas_tpu.hstu_attention,
    "pallas_tpu_interpret": functools.partial(pallas_tpu.hstu_attention, interpret=True),
}
_DELTA = {
    "xla": last_query.hstu_attention_delta,
    "reference": reference.hstu_attention_delta,
}
_LAST = {
    "xla": last_query.hstu_attention_last,
    "reference": reference.hstu_attention_last,
    "pallas_triton": pallas_triton.hstu_attention_last,
    "pallas_triton_interpret": functools.partial(pallas_triton.hstu_attention_last, interpret=True),
    "pallas_tpu": pallas_tpu.hstu_attention_last,
    "pallas_tpu_interpret": functools.partial(pallas_tpu.hstu_attention_last, interpret=True),
}
# What "auto" tries in turn for the full op, by platform; the last entry supports everything.
_AUTO_ORDER = {"gpu": ("pallas_triton", "xla"), "tpu": ("pallas_tpu", "xla")}
_ONLY_XLA = ("xla",)
_WITH_BIAS = ("xla", "reference")


def auto_implementation(*, has_bias: bool = False) -> str:
    """Name of the implementation that "auto" takes for the full op on this device.

    What comes with the first use can still make it "xla", with a line in the log: a failed
    self-check, and heads, types or layouts that the kernel refuses (`UnsupportedByKernel`).

    Args:
        has_bias: the op is given a `bias`.
    """
    if has_bias:
        return "xla"
    device = devices.current_device()
    if device.platform == "gpu" and not pallas_triton.supports(device):
        return "xla"
    return _auto_order()[0]


def _auto_order():
    # The device is looked at here, while tracing: importing asks no device.
    return _AUTO_ORDER.get(devices.current_device().platform, _ONLY_XLA)


def hstu_attention(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    *,
    layout: SequenceLayout,
    rule: MaskRule,
    alpha: float,
    divisor: float,
    implementation: Implementation = "auto",
    num_targets: Int[Array | np.ndarray, "S"] | None = None,
    bias: AttentionBias | None = None,
) -> Float[Array, "R L H V"]:
    """HSTU attention of each token over its own segment: SiLU instead of a softmax.

    Inside `jax.shard_map` it needs `check_vma=False`.

    `o_i = sum_j M_ij silu(alpha <q_i, k_j> + rab_ij) / divisor v_j`, per head; M is the 0/1 mask of
    `rule`, applied after SiLU and division; rab is what `bias` says, 0 without one.

    Args:
        q: queries; anything may stand in padding slots, here and below.
        k: keys.
        v: values.
        layout: where the segments lie. Its block schedule must cover `rule`: built for the same
            rule and targets, or for a rule whose mask contains this one.
        rule: which keys a query sees.
        alpha: factor of the logits, usually K ** -0.5.
        divisor: what scores are divided by; never inferred from L.
        implementation: "xla" (linear memory, every device), "pallas_triton" (NVIDIA GPUs of
            compute capability 8.0 or newer), "pallas_tpu" (TPUs), "pallas_triton_interpret" and
            "pallas_tpu_interpret" (the same kernels run step by step on any device: to find faults,
            far too slow for anything else), "reference" (dense, for tests), or "auto": the kernel
            of the device the program is traced for, if it can do this, else "xla".
        num_targets: targets at the end of each segment, 0 <= num_targets <= length -
            contextual_len; None = no targets.
        bias: learned biases of the logits by distance and by time, the same for all heads; "xla"
            and "reference" only. The block schedule stays.

    Returns:
        Outputs in the dtype of v; zeros in padding slots. Gradients in padding are zeros too.
        A value that is not finite makes the whole segment that holds it NaN and no other
        ("reference": may spread over its row). The tables of `bias` belong to all segments: one
        such value makes their gradients NaN.

    Raises:
        TypeError: dtypes that are not equal or not float32, bfloat16 or float16.
        ValueError: ranks or sizes that do not fit, alpha or divisor not positive, unknown
            implementation, or (only if the layout holds numpy arrays, which can be looked at)
            segments that overlap or leave their row.
        UnsupportedByKernel: an implementation asked for by name cannot do this.

    Source: Zhai et al. 2024, "Actions Speak Louder than Words", equation 2; behaviour of
    TorchEasyRec 1.3.16 (docs/model.md), except that the divisor is always given.
    """
    checks.check_rank("q", q, "R L H K")
    _check(q, k, v, layout, rule, alpha, divisor)
    for axis, letter in enumerate("RLHK"):
        checks.check_axis("q", q, axis, letter, k.shape[axis], like="k")
    _check_targets(num_targets, layout)
    _check_bias(bias, layout)
    return dispatch.run(
        implementation,
        _FULL if bias is None else _with_bias(_FULL, bias),
        auto_order=_auto_order(),
        op="hstu_attention",
        call=lambda kernel: kernel(
            q,
            k,
            v,
            layout=layout,
            rule=rule,
            alpha=float(alpha),
            divisor=float(divisor),
            num_targets=num_targets,
        ),
    )


def hstu_attention_last(
    q: Float[Array, "S H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    *,
    layout: SequenceLayout,
    rule: MaskRule,
    alpha: float,
    divisor: float,
    implementation: Implementation = "auto",
    bias: AttentionBias | None = None,
) -> Float[Array, "S H V"]:
    """The rows of `hstu_attention` at the last position of each segment, and nothing else.

    Cost and memory are linear in R * L. The block schedule is not used.

    Args:
        q: one query per segment of the layout, which stands at its last position; anything may
            stand at empty segments.
        k: keys of all tokens.
        v: values of all tokens.
        layout: where the segments lie.
        rule: which keys a query sees (no targets here).
        alpha: factor of the logits.
        divisor: what scores are divided by.
        implementation: as for `hstu_attention`. One query per segment needs no kernel:
            "pallas_triton" and "pallas_tpu" check their device and run the program of "xla".
        bias: as for `hstu_attention`.

    Returns:
        Outputs in the dtype of v; zeros for empty segments.

    Raises:
        TypeError, ValueError, UnsupportedByKernel: as for `hstu_attention`.
    """
    checks.check_rank("q", q, "S H K")
    _check(q, k, v, layout, rule, alpha, divisor)
    checks.check_axis("q", q, 0, "S", len(layout.starts), like="layout")
    checks.check_axis("q", q, 1, "H", k.shape[2], like="k")
    checks.check_axis("q", q, 2, "K", k.shape[3], like="k")
    _check_bias(bias, layout)
    return dispatch.run(
        implementation,
        _LAST if bias is None else _with_bias(_LAST, bias),
        auto_order=_ONLY_XLA,
        op="hstu_attention_last",
        call=lambda kernel: kernel(
            q, k, v, layout=layout, rule=rule, alpha=float(alpha), divisor=float(divisor)
        ),
    )


def hstu_attention_delta(
    q: Float[Array, "S T H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H V"],
    *,
    layout: SequenceLayout,
    rule: MaskRule,
    alpha: float,
    divisor: float,
    implementation: Implementation = "auto",
    num_targets: Int[Array | np.ndarray, "S"] | None = None,
) -> Float[Array, "S T H V"]:
    """The rows of `hstu_attention` at the last T positions of each segment: decoding with a cache.

    Query t of segment s stands at position length_s - T + t and sees the keys that this row of the
    mask sees; keys and values of all tokens, the new ones included, are given. Time is linear in
    T * R * L and memory in R * L. The block schedule is not used. Decoding knows no bias.

    Args:
        q: the new tokens' queries, the same number T for every segment; anything may stand at
            empty segments.
        k: keys of all tokens.
        v: values of all tokens.
        layout: where the segments lie. Segments that are not empty need at least T tokens.
        rule: which keys a query sees; not semi-local.
        alpha: factor of the logits.
        divisor: what scores are divided by.
        implementation: "xla", "reference" or "auto"; no kernel decodes.
        num_targets: as for `hstu_attention`.

    Returns:
        Outputs in the dtype of v. Zeros, without gradient, for positions that a segment does not
        have: empty segments, and segments shorter than T if the layout's arrays are traced, so that
        they cannot be looked at.

    Raises:
        TypeError, ValueError, UnsupportedByKernel: as for `hstu_attention`; ValueError also for a
            segment with fewer than T tokens (numpy layouts) and for a semi-local rule.

    Source: TorchEasyRec 1.3.16. There, cached decoding uses the standard mask even where the model
    was trained with a semi-local one; here that combination is refused.
    """
    checks.check_rank("q", q, "S T H K")
    _check(q, k, v, layout, rule, alpha, divisor)
    checks.check_axis("q", q, 0, "S", len(layout.starts), like="layout")
    checks.check_axis("q", q, 2, "H", k.shape[2], like="k")
    checks.check_axis("q", q, 3, "K", k.shape[3], like="k")
    if rule.is_semi_local:
        raise ValueError(
            f"rule.sla_k1={rule.sla_k1}, rule.sla_k2={rule.sla_k2}: decoding knows the standard "
            "mask only; run hstu_attention over the whole sequence."
        )
    _check_targets(num_targets, layout)
    _check_new_tokens(q.shape[1], layout)
    return dispatch.run(
        implementation,
        _DELTA,
        auto_order=_ONLY_XLA,
        op="hstu_attention_delta",
        call=lambda kernel: kernel(
            q,
            k,
            v,
            layout=layout,
            rule=rule,
            alpha=float(alpha),
            divisor=float(divisor),
            num_targets=None if num_targets is None else jnp.asarray(num_targets),
        ),
    )


def _check_new_tokens(num_new, layout):
    if not isinstance(layout.lengths, np.ndarray):
        return
    is_short = (layout.lengths > 0) & (layout.lengths < num_new)
    if is_short.any():
        first = int(np.argmax(is_short))
        raise ValueError(
            f"lengths[{first}]={layout.lengths[first]}: the segment is shorter than the {num_new} "
            f"new tokens of q ({int(is_short.sum())} in all); count the new tokens in lengths."
        )


def _with_bias(table, bias):
    """The same table where those that know no bias refuse, and the others get it."""

    def refuse(name, *args, **keywords):
        raise dispatch.UnsupportedByKernel(
            f"bias={type(bias).__name__}: implementation={name!r} adds no bias to its logits; use "
            "'auto' or 'xla'."
        )

    return {
        name: functools.partial(kernel, bias=bias)
        if name in _WITH_BIAS
        else functools.partial(refuse, name)
        for name, kernel in table.items()
    }


def _check_bias(bias, layout):
    if bias is None:
        return
    times = {"query_time_s": bias.query_time_s, "key_time_s": bias.key_time_s}
    for name, table, axes in (
        ("by_distance", bias.by_distance, "P"),
        ("by_interval", bias.by_interval, "T1"),
    ):
        if table is not None:
            checks.check_rank(f"bias.{name}", table, axes)
            checks.check_float(f"bias.{name}", table)
            if table.shape[0] == 0:
                raise ValueError(f"bias.{name}.shape=(0,): an empty table; use None for none.")
    for name, time in times.items():
        if (time is None) != (bias.by_interval is None):
            raise ValueError(
                f"bias.{name}={None if time is None else 'given'}: times and bias.by_interval go "
                "together; give all three or none."
            )
        if time is not None:
            checks.check_rank(f"bias.{name}", time, "R L")
            if jnp.dtype(time.dtype) != jnp.int32:
                raise TypeError(
                    f"bias.{name}.dtype={jnp.dtype(time.dtype).name}: must be int32, whole seconds "
                    "from an origin of your own; subtract the origin in int64 and cast."
                )
            checks.check_axis(f"bias.{name}", time, 0, "R", layout.num_rows, like="layout")
            checks.check_axis(f"bias.{name}", time, 1, "L", layout.row_len, like="layout")


def _check_targets(num_targets, layout):
    if num_targets is not None:
        checks.check_rank("num_targets", num_targets, "S")
        checks.check_axis("num_targets", num_targets, 0, "S", len(layout.starts), like="layout")


def _check(q, k, v, layout, rule, alpha, divisor):
    """Checks that both forms of the op share."""
    checks.check_float("q", q)
    for name, array, axes in (("k", k, "R L H K"), ("v", v, "R L H V")):
        checks.check_rank(name, array, axes)
        checks.check_float(name, array, like=q.dtype)
        checks.check_axis(name, array, 0, "R", layout.num_rows, like="layout")
        checks.check_axis(name, array, 1, "L", layout.row_len, like="layout")
    checks.check_axis("v", v, 2, "H", k.shape[2], like="k")
    checks.check_positive("alpha", alpha)
    checks.check_positive("divisor", divisor)
    if isinstance(layout.starts, np.ndarray) and isinstance(layout.lengths, np.ndarray):
        check_segments(
            layout.starts,
            layout.lengths,
            num_rows=layout.num_rows,
            row_len=layout.row_len,
            rule=rule,
        )
