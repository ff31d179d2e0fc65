"""Before first use on a device: is a kernel right there? Compilers have miscompiled this op.

Forward and backward of a small ragged case are compared with the path without a kernel, on the
device itself, once per kernel, kind of device, dtype, widths and tiles. A wrong result refuses the
kernel. Several processes run one program, so what one of them refuses all refuse.
"""

import concurrent.futures
import functools
import pathlib
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from pallas_kernels import devices, dispatch
from pallas_kernels.hstu_attention import xla_blockwise
from pallas_kernels.hstu_attention.layout import from_lengths
from pallas_kernels.hstu_attention.mask import MaskRule

_LENGTHS = np.array([300, 0, 3, 77], np.int32)
_RULE = MaskRule(contextual_len=3, max_attn_len=150)
# Largest error, relative to the largest value. Half types round scores once more than `xla` does:
# a few units of 2^-8 (bfloat16) or 2^-11 (float16). A fault of the compiler is of order one.
_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_verdicts: dict[tuple, str] = {}
# Bytes of a verdict that processes exchange.
_MESSAGE_BYTES = 600


def require(
    implementation: str,
    attend: Callable[..., Float[Array, "R L H V"]],
    device: devices.Device,
    *,
    dtype: np.dtype,
    qk_dim: int,
    v_dim: int,
    tiles: Hashable,
    num_heads: int = 2,
) -> None:
    """Refuses a kernel that is wrong on this device; the answer is remembered.

    With several processes (`jax.distributed`) the answer is theirs together, so all of them must
    ask, for the same kernels in the same order, as they do while they trace one program. They wait
    here for each other.

    Args:
        implementation: name of the kernel.
        attend: the kernel, with the signature of `xla_blockwise.hstu_attention`.
        device: where it is to run; present.
        dtype: of q, k and v.
        qk_dim: K.
        v_dim: V.
        tiles: sizes that `attend` is compiled for.
        num_heads: H of the small case; what the tiles need.

    Raises:
        UnsupportedByKernel: a wrong result, or the kernel did not compile or run, here or in
            another process; names device, driver and versions.
    """
    key = (implementation, device.kind, jnp.dtype(dtype).name, qk_dim, v_dim, tiles, num_heads)
    if key not in _verdicts:
        check = functools.partial(_common_verdict, attend, dtype, qk_dim, v_dim, num_heads)
        # In a thread of its own: the caller is usually inside a trace (jit, grad, shard_map),
        # which would swallow the computation, and that state belongs to its thread.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            verdict = pool.submit(check).result()
        if "RESOURCE_EXHAUSTED" in verdict:
            # Says nothing about the kernel: it is asked again next time.
            raise dispatch.UnsupportedByKernel(
                f"implementation={implementation!r}: no memory for its self-check ({verdict}); "
                "free some, or use 'xla'."
            )
        _verdicts[key] = verdict
    if _verdicts[key]:
        raise dispatch.UnsupportedByKernel(
            f"implementation={implementation!r}: refused by its self-check on this device, "
            f"{key[2]}, widths {qk_dim} and {v_dim}: {_verdicts[key]} ({_versions(device)}); use "
            "'xla', and report this."
        )


def _common_verdict(*args):
    """What is wrong here, or else in the first process where something is; or an empty string."""
    verdict = _verdict(*args)
    return verdict if jax.process_count() == 1 else _first_refusal(verdict)


def _first_refusal(verdict):
    """All processes' verdicts in one: that of the first process that refuses, with its number."""
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = verdict.encode("utf-8")[:_MESSAGE_BYTES]
    message[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    verdicts = [
        bytes(row).rstrip(b"\0").decode("utf-8", "ignore")
        for row in np.asarray(multihost_utils.process_allgather(message))
    ]
    # No memory anywhere is no verdict: whoever remembered one would not ask again with the others.
    order = sorted(range(len(verdicts)), key=lambda p: ("RESOURCE_EXHAUSTED" not in verdicts[p], p))
    found = (f"process {p} of {len(verdicts)}: {verdicts[p]}" for p in order if verdicts[p])
    return next(found, "")


def _verdict(attend, dtype, qk_dim, v_dim, num_heads):
    """What is wrong, or an empty string."""
    sizes = (dtype, qk_dim, v_dim, num_heads)
    try:
        expected = _results(xla_blockwise.hstu_attention, *sizes)
        actual = _results(attend, *sizes)
    except Exception as error:  # whatever a compiler or driver may raise is a reason to refuse
        return f"{type(error).__name__}: {str(error)[:500]}"
    tolerance = _TOLERANCE[jnp.dtype(dtype).name]
    for name, a, e in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        error = float(np.abs(a - e).max() / np.abs(e).max())
        if not error <= tolerance:  # NaN is wrong too
            return f"largest error of {name} is {error:.3g} of the largest value"
    return ""


def _results(attend, dtype, qk_dim, v_dim, num_heads):
    """o, dq, dk, dv of the small case in float32, computed on the device."""
    layout = from_lengths(_LENGTHS, row_len=int(_LENGTHS.max()), rule=_RULE)
    rng = np.random.default_rng(0)
    shape = (len(_LENGTHS), layout.row_len, num_heads)
    widths = (qk_dim, qk_dim, v_dim, v_dim)
    values = [rng.standard_normal((*shape, width), dtype=np.float32) for width in widths]

    @jax.jit
    def run(q, k, v, g):
        call = functools.partial(
            attend, layout=layout, rule=_RULE, alpha=2 * qk_dim**-0.5, divisor=32.0
        )
        output, vjp = jax.vjp(call, q, k, v)
        return output, *vjp(g)

    return [np.asarray(x, np.float32) for x in run(*(jnp.asarray(x, dtype) for x in values))]


def _versions(device):
    return (
        f"device {device.kind}, driver {driver_version()}, jax {jax.__version__}, jaxlib "
        f"{jaxlib.__version__}, compiler {_platform_version(device.platform)}"
    )


def _platform_version(platform):
    client = jax.local_devices(backend=platform)[0].client
    return " ".join(client.platform_version.split())


def driver_version() -> str:
    """Version of the NVIDIA driver, or "unknown"."""
    try:
        lines = pathlib.Path("/proc/driver/nvidia/version").read_text("utf-8").splitlines()
    except OSError:
        return "unknown"
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu ..."
    words = lines[0].partition("Kernel Module")[2].split() if lines else []
    return words[0] if words else "unknown"
