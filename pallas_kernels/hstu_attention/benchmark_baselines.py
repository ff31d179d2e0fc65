"""What the attention benchmark compares with: softmax attention, matrix products, memory at hand.

Softmax attention is JAX's own: cuDNN's flash kernel on NVIDIA GPUs, a dense formula elsewhere. The
benchmark itself is `benchmark.py`.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import devices, timing
from pallas_kernels.hstu_attention.layout import SequenceLayout
from pallas_kernels.hstu_attention.mask import MaskRule

# Side of the square product that measures the device's rate: some milliseconds each.
_MATMUL_SIDE = {"gpu": 8192, "tpu": 8192}
_MATMUL_SIDE_ELSEWHERE = 512
# A forward and backward pass of a dense formula holds so many float32 arrays of scores at once.
_DENSE_SCORES = 4


def is_flash() -> bool:
    """True where `softmax_attention` is a flash kernel (cuDNN), not a dense formula."""
    return devices.current_device().capability is not None


def softmax_attention(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L H K"],
    v: Float[Array, "R L H K"],
    lengths: Int[Array, "R"] | None,
) -> Float[Array, "R L H K"]:
    """Causal softmax attention, `o_i = sum_{j <= i} softmax_j(<q_i, k_j> / sqrt(K)) v_j`.

    Args:
        q: queries.
        k: keys.
        v: values.
        lengths: tokens of each row; None = full rows.
    """
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if is_flash() else "xla",
    )


def softmax_refusal(layout: SequenceLayout, rule: MaskRule, dtype: str) -> str:
    """Why `softmax_attention` cannot stand beside this case; empty if it can.

    Args:
        layout: where the segments lie.
        rule: the mask.
        dtype: of q, k and v.
    """
    if rule != MaskRule():
        return "softmax attention is timed for the plain causal mask only"
    if len(layout.starts) != layout.num_rows:
        return "softmax attention is timed with one user a row only"
    if is_flash() and dtype == "float32":
        return "cuDNN's attention takes half types only"
    return ""


def matmul_tflops(dtype: str) -> float:
    """Measured rate of one large square product in this dtype, sums in float32 (no TF32)."""
    platform = devices.current_device().platform
    side = _MATMUL_SIDE.get(platform, _MATMUL_SIDE_ELSEWHERE)
    left, right = (normal(seed, (side, side), dtype) for seed in range(2))
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None

    def product(left, right):
        return jnp.matmul(left, right, precision=precision)

    queue_ms = 0.0 if platform == "cpu" else 50.0
    result = timing.time_function(product, left, right, num_runs=5, queue_ms=queue_ms)
    return 2 * side**3 / result.min_ms / 1e9


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(seed: int | Int[Array, ""], shape: tuple[int, ...], dtype: str) -> Float[Array, "..."]:
    """Standard normal values, made on the device; drawn in float32 and rounded.

    Args:
        seed: of the draw.
        shape: of the result.
        dtype: of the result.
    """
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def memory_limit() -> int:
    """Bytes that programs may use: what the device tells, else the machine's memory."""
    told = timing.device_memory("bytes_limit")
    return told or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def estimated_bytes(
    implementation: str, layout: SequenceLayout, *, num_heads: int, width: int, dtype: str
) -> int:
    """Estimates the memory of forward and backward together, inputs and results included.

    Linear paths: q, k, v and g, o and three gradients, those four of the call before, and eight
    temporary copies (float32 in "xla"). Dense formulas: four float32 arrays of scores on top.

    Args:
        implementation: a name of `api.Implementation`, or "softmax".
        layout: where the segments lie.
        num_heads: H.
        width: of q, k and v per head.
        dtype: of q, k and v.
    """
    values = layout.num_rows * layout.row_len * num_heads * width
    item = np.dtype(jnp.dtype(dtype)).itemsize
    copies = 4 if implementation == "xla" else item
    total = values * (12 * item + 8 * copies)
    if implementation == "reference" or (implementation == "softmax" and not is_flash()):
        total += _DENSE_SCORES * 4 * layout.num_rows * num_heads * layout.row_len**2
    return total
