"""Speed and memory of HSTU attention, forward and backward, each implementation in one run.

    python -m pallas_kernels.hstu_attention.benchmark --lengths 1024,2048 --batch 8 --heads 4 \
        --width 32 --contextual 6

    python -m pallas_kernels.hstu_attention.benchmark --lengths 1024,4096 --batch 32 --heads 4 \
        --width 128 --dtype bfloat16 --implementations pallas_triton,xla

The second is for an NVIDIA GPU; a kernel checks itself there before it is timed. Users' histories
have lengths N/8 .. N, evenly spaced. What is compared for correctness is in the tests; the sizes of
correctness cases are in `cases.py`.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from pallas_kernels import timing
from pallas_kernels.hstu_attention import api
from pallas_kernels.hstu_attention.layout import (
    DEFAULT_BLOCK_LEN,
    MaskRule,
    SequenceLayout,
    from_lengths,
)
from pallas_kernels.hstu_attention.mask import key_intervals


def visible_pairs(lengths: Int[np.ndarray, "B"], rule: MaskRule) -> int:
    """Counts (query, key) pairs that the mask lets through, without targets, one head.

    Args:
        lengths: tokens of each segment, contextual tokens included.
        rule: the mask.
    """
    total = 0
    for length in lengths.tolist():
        position = np.arange(length)
        for interval in key_intervals(position, np.full(length, length), None, rule=rule, xp=np):
            total += int(np.maximum(interval.end - interval.start, 0).sum())
    return total


def attention_flops(num_pairs: int, *, num_heads: int, qk_dim: int, v_dim: int) -> int:
    """Floating point operations of forward and backward: matrix products of visible pairs only.

    Per pair and head: forward q.k and s v; backward q.k again, g.v, and the shares of dq, dk, dv.

    Args:
        num_pairs: result of `visible_pairs`.
        num_heads: H.
        qk_dim: K.
        v_dim: V.
    """
    forward = 2 * qk_dim + 2 * v_dim
    backward = 2 * qk_dim + 2 * v_dim + 2 * (2 * qk_dim + v_dim)
    return num_pairs * num_heads * (forward + backward)


def _forward_backward(q, k, v, cotangent, layout, *, rule, divisor, implementation):
    attend = functools.partial(
        api.hstu_attention,
        layout=layout,
        rule=rule,
        alpha=q.shape[-1] ** -0.5,
        divisor=divisor,
        implementation=implementation,
    )
    output, vjp = jax.vjp(attend, q, k, v)
    return output, vjp(cotangent)


def _inputs(lengths, layout: SequenceLayout, args):
    rng = np.random.default_rng(0)
    shape = (len(lengths), layout.row_len, args.heads, args.width)
    arrays = [rng.standard_normal(shape, dtype=np.float32) for _ in range(4)]
    return [jnp.asarray(x, args.dtype) for x in arrays]


def _default_implementations():
    chosen = api.auto_implementation()
    return "xla,reference" if chosen == "xla" else f"{chosen},xla"


def _parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,2048", help="history lengths N")
    parser.add_argument("--batch", type=int, default=8, help="users, one per row")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=32, help="width per head of q, k and v")
    parser.add_argument("--contextual", type=int, default=6, help="contextual tokens")
    parser.add_argument("--window", type=int, default=0, help="max_attn_len, 0 = off")
    parser.add_argument("--block_len", type=int, default=DEFAULT_BLOCK_LEN)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--implementations", help="default: the one of 'auto', xla, and off GPUs the dense one"
    )
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Prints one line per history length and implementation."""
    args = _parse(argv)
    implementations = (args.implementations or _default_implementations()).split(",")
    print(timing.machine_line())
    print(
        f"batch {args.batch}, heads {args.heads}, width {args.width}, contextual "
        f"{args.contextual}, window {args.window}, block {args.block_len}, {args.dtype}, "
        f"forward + backward, lengths N/8..N, minimum of {args.runs} runs"
    )
    print(
        f"{'N':>6} {'implementation':>23} {'min ms':>9} {'median':>9} {'TFLOP/s':>8} "
        f"{'Mpairs/s':>9} {'temp MiB':>9} {'compile s':>9}"
    )
    rule = MaskRule(contextual_len=args.contextual, max_attn_len=args.window)
    for longest in (int(text) for text in args.lengths.split(",")):
        lengths = np.linspace(longest / 8, longest, args.batch).astype(np.int32) + args.contextual
        layout = from_lengths(
            lengths, row_len=longest + args.contextual, block_len=args.block_len, rule=rule
        )
        layout = jax.tree.map(jnp.asarray, layout)
        arrays = _inputs(lengths, layout, args)
        num_pairs = visible_pairs(lengths, rule)
        flops = attention_flops(
            num_pairs, num_heads=args.heads, qk_dim=args.width, v_dim=args.width
        )
        for implementation in implementations:
            run = functools.partial(
                _forward_backward, rule=rule, divisor=float(longest), implementation=implementation
            )
            result = timing.time_function(run, *arrays, layout, num_runs=args.runs)
            seconds = result.min_ms / 1e3
            print(
                f"{longest:>6} {implementation:>23} {result.min_ms:>9.1f} "
                f"{result.median_ms:>9.1f} {flops / seconds / 1e12:>8.3f} "
                f"{num_pairs * args.heads / seconds / 1e6:>9.1f} "
                f"{result.temp_bytes / 2**20:>9.1f} {result.compile_s:>9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
