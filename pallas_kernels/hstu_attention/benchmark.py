"""Speed and memory of HSTU attention, forward and backward, each implementation in one run.

    python -m pallas_kernels.hstu_attention.benchmark --lengths 1024,2048 --batch 8 --heads 4 \
        --width 32 --contextual 6

    python -m pallas_kernels.hstu_attention.benchmark --quick

The second is for an accelerator: a few sizes in bfloat16, in under 4 minutes. A kernel that is
wrong on the device is refused by its self-check before it is timed. Users' histories have lengths
N/8 .. N, evenly spaced (`--shortest 1`: all N). What is compared for correctness is in the tests;
the sizes of correctness cases are in `cases.py`.
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


def attention_flops(
    num_pairs: int, *, num_heads: int, qk_dim: int, v_dim: int, forward_only: bool = False
) -> int:
    """Floating point operations of forward and backward: matrix products of visible pairs only.

    Per pair and head: forward q.k and s v; backward q.k again, g.v, and the shares of dq, dk, dv.

    Args:
        num_pairs: result of `visible_pairs`.
        num_heads: H.
        qk_dim: K.
        v_dim: V.
        forward_only: leave the backward pass out.
    """
    forward = 2 * qk_dim + 2 * v_dim
    if forward_only:
        return num_pairs * num_heads * forward
    backward = 2 * qk_dim + 2 * v_dim + 2 * (2 * qk_dim + v_dim)
    return num_pairs * num_heads * (forward + backward)


def _run(q, k, v, cotangent, layout, *, rule, divisor, implementation, passes):
    attend = functools.partial(
        api.hstu_attention,
        layout=layout,
        rule=rule,
        alpha=q.shape[-1] ** -0.5,
        divisor=divisor,
        implementation=implementation,
    )
    if passes == "forward":
        return attend(q, k, v)
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
    parser.add_argument("--shortest", type=float, default=0.125, help="history, as a share of N")
    parser.add_argument("--contextual", type=int, default=6, help="contextual tokens")
    parser.add_argument("--window", type=int, default=0, help="max_attn_len, 0 = off")
    parser.add_argument("--block_len", type=int, default=DEFAULT_BLOCK_LEN)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--implementations", help="default: the one of 'auto', xla, and off GPUs the dense one"
    )
    parser.add_argument("--passes", default="both", help="forward, both (with backward), or a list")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few sizes, on an accelerator")
    args = parser.parse_args(argv)
    unknown = set(args.passes.split(",")) - {"forward", "both"}
    if unknown:
        parser.error(f"--passes={args.passes}: knows 'forward' and 'both', not {unknown.pop()!r}.")
    if args.quick and api.auto_implementation() == "xla":
        parser.error("--quick: no kernel runs on this device; name sizes and --implementations.")
    return args


# Full rows as kernels are usually measured; `xla` only where its loop over tiles is short.
_QUICK = "--batch 32 --width 128 --shortest 1 --contextual 0 --dtype bfloat16 --passes forward,both"


def main(argv: list[str] | None = None) -> None:
    """Prints one line per history length, implementation and kind of pass."""
    args = _parse(argv)
    if not args.quick:
        _print_table(args)
        return
    kernel = api.auto_implementation()
    for lengths, implementations in (("1024", f"{kernel},xla"), ("4096,8192", kernel)):
        sizes = ["--lengths", lengths, "--implementations", implementations]
        _print_table(_parse([*_QUICK.split(), *sizes]))


def _print_table(args):
    implementations = (args.implementations or _default_implementations()).split(",")
    print(timing.machine_line())
    print(
        f"batch {args.batch}, heads {args.heads}, width {args.width}, contextual "
        f"{args.contextual}, window {args.window}, block {args.block_len}, {args.dtype}, "
        f"lengths {args.shortest:g} N..N, minimum of {args.runs} runs, both = forward + backward"
    )
    print(
        f"{'N':>6} {'implementation':>23} {'passes':>8} {'min ms':>9} {'median':>9} {'TFLOP/s':>8} "
        f"{'Mpairs/s':>9} {'temp MiB':>9} {'compile s':>9}"
    )
    rule = MaskRule(contextual_len=args.contextual, max_attn_len=args.window)
    for longest in (int(text) for text in args.lengths.split(",")):
        lengths = (
            np.linspace(args.shortest * longest, longest, args.batch).astype(np.int32)
            + args.contextual
        )
        layout = from_lengths(
            lengths, row_len=longest + args.contextual, block_len=args.block_len, rule=rule
        )
        layout = jax.tree.map(jnp.asarray, layout)
        arrays = _inputs(lengths, layout, args)
        num_pairs = visible_pairs(lengths, rule)
        for implementation in implementations:
            for passes in args.passes.split(","):
                run = functools.partial(
                    _run,
                    rule=rule,
                    divisor=float(longest),
                    implementation=implementation,
                    passes=passes,
                )
                result = timing.time_function(run, *arrays, layout, num_runs=args.runs)
                _print_line(longest, implementation, passes, num_pairs, result, args)


def _print_line(longest, implementation, passes, num_pairs, result, args):
    seconds = result.min_ms / 1e3
    flops = attention_flops(
        num_pairs,
        num_heads=args.heads,
        qk_dim=args.width,
        v_dim=args.width,
        forward_only=passes == "forward",
    )
    print(
        f"{longest:>6} {implementation:>23} {passes:>8} {result.min_ms:>9.1f} "
        f"{result.median_ms:>9.1f} {flops / seconds / 1e12:>8.3f} "
        f"{num_pairs * args.heads / seconds / 1e6:>9.1f} "
        f"{result.temp_bytes / 2**20:>9.1f} {result.compile_s:>9.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
