"""Speed and memory of HSTU attention beside XLA and softmax attention, in one run.

    python -m pallas_kernels.hstu_attention.benchmark --batches spread --lengths 1024,2048 \
        --batch 8 --heads 4 --widths 32 --contextual 6

    python -m pallas_kernels.hstu_attention.benchmark --quick --json quick.json

`--quick` and `--all` are for an accelerator: a few sizes in bfloat16 (under 4 minutes by estimate),
and the whole grid. A kernel that is wrong on the device is refused by its self-check before
anything is timed. Flags that are given besides win over those that the two set.

Batches (`--batches`): "dense" has full rows; "spread" lengths N/8 .. N; "ragged_padded" KuaiRand-
like lengths with a mean of N/4 (`benchmark_batches.py`), one user a row; "ragged_packed" the same
users, several in a row. Packed rows are nearly full, so they show what many segments in a row cost:
they should keep 80 % of the dense rate at as many tokens (four times the users).

TFLOP/s counts visible pairs, backward 2.5 times forward; "executed" counts whole visited tiles
(`flops.py`); "matmul %" is TFLOP/s over that of a large square product, measured in the same run.
"temp" is what the compiled program asks for, "peak" the process's high-water mark, which is at most
the row's own where it did not rise ("<="). Short calls are timed in a queue on accelerators.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices, dispatch, timing
from pallas_kernels.hstu_attention import (
    api,
    benchmark_baselines,
    benchmark_batches,
    benchmark_report,
    flops,
)
from pallas_kernels.hstu_attention.benchmark_report import Report, Row
from pallas_kernels.hstu_attention.layout import DEFAULT_BLOCK_LEN, from_lengths
from pallas_kernels.hstu_attention.mask import MaskRule

# A step of the loop of "xla" starts several small programs: assumed, not timed yet, at some 40
# microseconds forward and three times that backward on accelerators. More steps than this (seconds
# a call) are left out there, unless "xla" was asked for by name.
_MOST_LOOP_STEPS = 20_000
_QUEUE_MS = 20.0

_ACCELERATOR = dict(dtype="bfloat16", heads=4, passes="forward,both")
# Packed users in as many rows as the dense batch has: the rates then compare.
_QUICK = (
    dict(lengths="1024,4096", widths="128", batches="dense", batch=32),
    dict(lengths="4096", widths="128", batches="ragged_packed", batch=128),
)
_ALL = (
    dict(
        lengths="512,1024,2048,4096,4102,8192,16384",
        widths="64,128,256",
        batches="dense,ragged_padded,ragged_packed",
        batch=32,
    ),
)


def main(argv: list[str] | None = None) -> None:
    """Prints one line per size, implementation and kind of pass.

    Raises:
        SystemExit: bad arguments, or, with status 1 and after everything else has run, a kernel
            that was refused or a row that failed.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv, {})
    parts = _QUICK if args.quick else _ALL if args.all else ({},)
    preset = _ACCELERATOR if args.quick or args.all else {}
    report = Report(json_path=args.json, command=argv)
    # A path that cannot be written is found before the first timing, not after it.
    report.save()
    print(timing.machine_line())
    for part in parts:
        _run_part(_parse(argv, preset | part), report)
    report.print_ratios()
    if report.has_failed:
        sys.exit(1)


def _parse(argv, defaults):
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.hstu_attention.benchmark",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("--quick", action="store_true", help="a few sizes, on an accelerator")
    parser.add_argument("--all", action="store_true", help="all sizes, on an accelerator")
    parser.add_argument("--json", help="file for the rows, with hardware and versions")
    parser.add_argument("--batches", default="dense", help=", ".join(benchmark_batches.KINDS))
    parser.add_argument("--lengths", default="1024,2048", help="longest history of a row, N")
    parser.add_argument("--batch", type=int, default=8, help="users")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--widths", default="32", help="widths per head of q, k and v")
    parser.add_argument("--contextual", type=int, default=0, help="contextual tokens")
    parser.add_argument("--window", type=int, default=0, help="max_attn_len, 0 = off")
    parser.add_argument("--block_len", type=int, default=DEFAULT_BLOCK_LEN)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--implementations",
        help="of hstu_attention, and softmax; default: the device's kernel, xla, softmax, and "
        "on CPUs the dense formula",
    )
    parser.add_argument("--passes", default="both", help="forward, both (with backward), or a list")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--max_s", type=float, default=5.0, help="no new run after so many seconds")
    parser.add_argument("--memory_gib", type=float, help="default: what the device tells")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    _check(args, parser.error)
    return args


def _check(args, refuse):
    known = [name for name in api.Implementation.__args__ if name != "auto"] + ["softmax"]
    for name, choices in (
        ("passes", ("forward", "both")),
        ("batches", benchmark_batches.KINDS),
        ("implementations", known),
    ):
        given = getattr(args, name)
        for word in (given or choices[0]).split(","):
            if word not in choices:
                words = ", ".join(map(repr, choices))
                refuse(f"--{name}={given}: knows {words}, not {word!r}.")
    for name in ("lengths", "widths", "batch", "heads", "block_len", "runs"):
        given = str(getattr(args, name))
        if not all(word.isdigit() and int(word) > 0 for word in given.split(",")):
            refuse(f"--{name}={given}: must be at least 1 (a list has commas between); change it.")
    if args.quick and args.all:
        refuse("--quick, --all: two sets of sizes; give one of them.")
    if (args.quick or args.all) and api.auto_implementation() == "xla":
        name = "--quick" if args.quick else "--all"
        refuse(
            f"{name}: no kernel runs on this device; name sizes and implementations, as in "
            "--lengths 512 --batch 2 --implementations xla."
        )


def _run_part(args, report):
    """All sizes of one parsed command."""
    kernel = api.auto_implementation()
    default = f"{kernel},xla,softmax" if kernel != "xla" else "xla,reference,softmax"
    implementations = (args.implementations or default).split(",")
    refusals = {}
    for width in _numbers(args.widths):
        for name in implementations:
            refusals[name, width] = _self_check(name, args.dtype, width)
    report.has_failed |= any(refusals.values())
    if args.dtype not in report.matmul_tflops:
        report.matmul_tflops[args.dtype] = benchmark_baselines.matmul_tflops(args.dtype)
    print(
        f"{args.batch} users, heads {args.heads}, contextual {args.contextual}, window "
        f"{args.window}, block {args.block_len}, {args.dtype}, matmul "
        f"{report.matmul_tflops[args.dtype]:.3g} TFLOP/s, at most {args.runs} runs, "
        "both = forward + backward"
    )
    benchmark_report.print_header()
    for width in _numbers(args.widths):
        for longest in _numbers(args.lengths):
            for kind in args.batches.split(","):
                names = {name: refusals[name, width] for name in implementations}
                _run_size(kind, longest, width, names, args, report)


def _numbers(text):
    return [int(word) for word in text.split(",")]


def _self_check(implementation, dtype, width):
    """Runs the kernel's self-check, prints what it says; returns why it refuses, or nothing."""
    if not implementation.startswith("pallas") or implementation.endswith("interpret"):
        return ""
    layout = from_lengths(np.array([16], np.int32), row_len=16)
    array = jax.ShapeDtypeStruct((1, 16, 1, width), jnp.dtype(dtype))
    attend = functools.partial(
        api.hstu_attention,
        layout=layout,
        rule=MaskRule(),
        alpha=1.0,
        divisor=1.0,
        implementation=implementation,
    )
    refusal = ""
    try:
        # Kernels check themselves while they are traced; nothing else is computed here.
        jax.eval_shape(attend, array, array, array)
    except dispatch.UnsupportedByKernel as error:
        refusal = str(error)
    print(
        f"self-check: {refusal or 'right'} ({implementation}, {dtype}, width {width})", flush=True
    )
    return refusal


def _run_size(kind, longest, width, implementations, args, report):
    """One batch through all implementations (name -> why it was refused, or nothing)."""
    rule = MaskRule(contextual_len=args.contextual, max_attn_len=args.window)
    batch = benchmark_batches.build_batch(
        kind, num_users=args.batch, longest=longest, rule=rule, block_len=args.block_len
    )
    num_pairs = flops.visible_pairs(batch.lengths, rule)
    arrays = None
    for name, refusal in implementations.items():
        row = Row(
            batch=kind,
            length=longest,
            width=width,
            implementation=name,
            users=args.batch,
            rows=batch.layout.num_rows,
            heads=args.heads,
            contextual=args.contextual,
            window=args.window,
            dtype=args.dtype,
            visible_pairs=num_pairs,
        )
        reason = refusal or _why_not(name, batch.layout, rule, width, args)
        if reason:
            report.add(row.skipped_because(reason))
            continue
        if arrays is None:
            arrays = _inputs(batch.layout, args.heads, width, args.dtype)
        for passes in args.passes.split(","):
            report.add(_timed_row(row, passes, batch.layout, rule, arrays, args, report))
    report.save()


def _why_not(name, layout, rule, width, args):
    """Why an implementation is not tried at this size; empty if it is."""
    if name == "softmax":
        refusal = benchmark_baselines.softmax_refusal(layout, rule, args.dtype)
        if refusal:
            return refusal
    needed = benchmark_baselines.estimated_bytes(
        name, layout, num_heads=args.heads, width=width, dtype=args.dtype
    )
    limit = args.memory_gib * 2**30 if args.memory_gib else benchmark_baselines.memory_limit()
    if needed > limit:
        return f"needs about {needed / 2**30:.3g} GiB, {limit / 2**30:.3g} are there"
    steps = int(layout.num_block_pairs.sum())
    is_slow = name == "xla" and devices.current_device().platform != "cpu"
    if is_slow and not args.implementations and steps > _MOST_LOOP_STEPS:
        return f"a loop of {steps} steps takes long here; name it by --implementations"
    return ""


def _inputs(layout, num_heads, width, dtype):
    """q, k, v and a cotangent, made on the device."""
    shape = (layout.num_rows, layout.row_len, num_heads, width)
    return [benchmark_baselines.normal(seed, shape, dtype) for seed in range(4)]


def _timed_row(row, passes, layout, rule, arrays, args, report):
    """The row filled with figures, or with the reason why there are none."""
    platform = devices.current_device().platform
    run = functools.partial(
        _run,
        is_full=bool((layout.lengths == layout.row_len).all()),
        rule=rule,
        divisor=float(row.length),
        name=row.implementation,
        passes=passes,
    )
    peak_before = timing.device_memory("peak_bytes_in_use")
    try:
        result = timing.time_function(
            run,
            *arrays,
            jax.tree.map(jnp.asarray, layout),
            num_runs=args.runs,
            queue_ms=0.0 if platform == "cpu" else _QUEUE_MS,
            max_s=args.max_s,
        )
    except Exception as error:  # one failing row must not cost the others their time on a device
        report.has_failed |= row.implementation != "softmax"
        return row.skipped_because(f"{type(error).__name__}: {str(error)[:300]}", passes=passes)
    sizes = dict(num_heads=row.heads, qk_dim=row.width, v_dim=row.width, passes=passes)
    executed = flops.executed_flops(
        row.implementation,
        layout,
        rule,
        device=devices.current_device(),
        dtype=jnp.dtype(row.dtype),
        **sizes,
    )
    return row.timed(
        result,
        passes=passes,
        useful=flops.attention_flops(row.visible_pairs, **sizes),
        executed=executed,
        matmul_tflops=report.matmul_tflops[row.dtype],
        peak_before=peak_before,
        peak_after=timing.device_memory("peak_bytes_in_use"),
    )


def _run(q, k, v, cotangent, layout, *, is_full, rule, divisor, name, passes):
    if name == "softmax":
        attend = functools.partial(
            benchmark_baselines.softmax_attention, lengths=None if is_full else layout.lengths
        )
    else:
        attend = functools.partial(
            api.hstu_attention,
            layout=layout,
            rule=rule,
            alpha=q.shape[-1] ** -0.5,
            divisor=divisor,
            implementation=name,
        )
    if passes == "forward":
        return attend(q, k, v)
    output, vjp = jax.vjp(attend, q, k, v)
    return output, vjp(cotangent)


if __name__ == "__main__":
    main()
