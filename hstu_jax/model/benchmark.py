"""Time and memory of an STU stack, forward and backward, beside dense attention in the same run.

    python -m hstu_jax.model.benchmark --lengths 1024,2048
    python -m hstu_jax.model.benchmark --lengths 1024 --layout packed --last_layer last_position

Users' histories have lengths N/8 .. N, evenly spaced, behind contextual tokens. Attention alone is
timed by `pallas_kernels.hstu_attention.benchmark`; a whole training step by `hstu_jax.benchmark`.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax import launchers
from hstu_jax.model import encoder, stu
from pallas_kernels import timing
from pallas_kernels.hstu_attention import layout as attention_layout
from pallas_kernels.hstu_attention import mask as attention_mask


def build_layout(
    history_len: int,
    *,
    batch: int,
    layout: str,
    rule: attention_mask.MaskRule,
    block_len: int,
) -> attention_layout.SequenceLayout:
    """The benchmark's users.

    Args:
        history_len: N, the longest history; the shortest is N / 8.
        batch: number of users.
        layout: "padded" (a row each) or "packed" (first fit, longest first, into rows of N + C).
        rule: attention mask, whose contextual tokens come on top of the histories.
        block_len: of the attention schedule.
    """
    lengths = np.linspace(history_len // 8, history_len, batch).astype(np.int32)
    lengths += rule.contextual_len
    row_len = history_len + rule.contextual_len
    if layout == "padded":
        return attention_layout.from_lengths(
            lengths, row_len=row_len, block_len=block_len, rule=rule
        )
    used, starts, packed = [], [], []
    for length in lengths[::-1].tolist():
        row = next((r for r, n in enumerate(used) if n + length <= row_len), len(used))
        if row == len(used):
            used.append(0)
        starts.append(row * row_len + used[row])
        packed.append(length)
        used[row] += length
    order = np.argsort(starts)
    starts, lengths = np.array(starts, np.int32)[order], np.array(packed, np.int32)[order]
    pairs, count = attention_layout.build_block_pairs(
        starts,
        lengths,
        num_rows=len(used),
        row_len=row_len,
        block_len=min(block_len, row_len),
        rule=rule,
        max_pairs=attention_layout.max_block_pairs(len(used), row_len, block_len),
    )
    return attention_layout.SequenceLayout(
        starts=starts,
        lengths=lengths,
        block_pairs=pairs[None],
        num_block_pairs=np.array([count], np.int32),
        num_rows=len(used),
        row_len=row_len,
        block_len=min(block_len, row_len),
    )


def build_stack(
    args: argparse.Namespace, *, divisor: float, rule: attention_mask.MaskRule, implementation: str
) -> stu.StuStack:
    """A stack of the size given on the command line, group norm, no dropout."""
    layers = [
        stu.StuLayer(
            embedding_dim=args.embedding,
            num_heads=args.heads,
            hidden_dim=args.width,
            attention_dim=args.width,
            use_group_norm=True,
            output_dropout_ratio=0.0,
            alpha=args.width**-0.5,
            divisor=divisor,
            rule=rule,
            implementation=implementation,
        )
        for _ in range(args.layers)
    ]
    return stu.StuStack(layers=tuple(layers))


def time_stack(
    stack: stu.StuStack,
    layout: attention_layout.SequenceLayout,
    *,
    last_layer: str,
    num_runs: int,
) -> timing.Timing:
    """Times output and gradients of parameters and tokens, for a random cotangent."""
    width = stack.layers[0].embedding_dim
    rng = np.random.default_rng(0)
    shape = (layout.num_rows, layout.row_len, width)
    x = jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
    layout = jax.tree.map(jnp.asarray, layout)
    out_shape = shape if last_layer == "all_positions" else (layout.starts.shape[0], width)
    cotangent = jnp.asarray(rng.standard_normal(out_shape, dtype=np.float32))
    method = "last_position" if last_layer == "last_position" else "__call__"

    def forward(params, x, layout):
        user_index = jnp.arange(layout.starts.shape[0])
        sequence, _ = encoder.build_sequence(layout, user_index)
        return stack.apply({"params": params}, x, sequence, method=method)

    def forward_backward(params, x, layout, cotangent):
        out, vjp = jax.vjp(lambda params, x: forward(params, x, layout), params, x)
        return out, vjp(cotangent)

    def init(key, x, layout):
        sequence, _ = encoder.build_sequence(layout, jnp.arange(layout.starts.shape[0]))
        return stack.init(key, x, sequence)["params"]

    params = jax.jit(init)(jax.random.key(0), x, layout)
    return timing.time_function(forward_backward, params, x, layout, cotangent, num_runs=num_runs)


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m hstu_jax.model.benchmark", description="Time and memory of an STU stack."
    )
    parser.add_argument("--lengths", default="1024,2048", help="longest histories, comma separated")
    parser.add_argument("--batch", type=int, default=8, help="users")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--embedding", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=32, help="of u, v, q and k per head")
    parser.add_argument("--contextual", type=int, default=6, help="contextual tokens of a user")
    parser.add_argument("--block_len", type=int, default=attention_layout.DEFAULT_BLOCK_LEN)
    parser.add_argument("--layout", choices=("padded", "packed"), default="padded")
    parser.add_argument(
        "--last_layer",
        default="all_positions,last_position",
        help="how the last layer is computed, comma separated",
    )
    parser.add_argument(
        "--implementations", default="auto,reference", help="of attention; reference is dense"
    )
    parser.add_argument("--runs", type=int, default=5)
    return launchers.parse_alone(parser, argv)


def main(argv: list[str] | None = None) -> None:
    """Prints one line per length, implementation and way to compute the last layer."""
    args = _parse(argv)
    print(timing.machine_line())
    rule = attention_mask.MaskRule(contextual_len=args.contextual)
    for history_len in (int(n) for n in args.lengths.split(",")):
        layout = build_layout(
            history_len,
            batch=args.batch,
            layout=args.layout,
            rule=rule,
            block_len=args.block_len,
        )
        for implementation in args.implementations.split(","):
            stack = build_stack(
                args, divisor=float(history_len), rule=rule, implementation=implementation
            )
            for last_layer in args.last_layer.split(","):
                result = time_stack(stack, layout, last_layer=last_layer, num_runs=args.runs)
                print(
                    f"N={history_len} {args.layout} {layout.num_rows}x{layout.row_len} "
                    f"{implementation:9} {last_layer:13} min {result.min_ms:8.1f} ms  "
                    f"median {result.median_ms:8.1f} ms  "
                    f"temp {result.temp_bytes / 2**20:7.1f} MiB  "
                    f"compile {result.compile_s:4.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
