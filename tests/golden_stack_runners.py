"""Replays recorded cases of attention, STU stacks and the positional encoder.

Like `golden_runners.py`, which has the comparisons; targets and truncation are in here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.config import model_schema
from hstu_jax.model import encoder, match, positional_encoder, stu, time_buckets
from pallas_kernels.hstu_attention import api as attention
from pallas_kernels.hstu_attention import mask as attention_mask
from tests import golden_cases
from tests.golden_runners import ENCODER, check, from_grid, place, sub_params, time_gaps, to_grid

# Per family: (forward atol, rtol), (gradient atol, rtol), from the recorder's notes on tolerances.
_A = (2e-6, 1e-5), (1e-5, 1e-4)
_B = (1e-5, 1e-5), (1e-4, 1e-4)
_C = (1e-6, 1e-6), (1e-5, 1e-5)


def run_attention(case: golden_cases.Case) -> None:
    """Family A: `hstu_mha`."""
    args = case.args
    rule = attention_mask.MaskRule(
        contextual_len=args["contextual_seq_len"],
        max_attn_len=args["max_attn_len"],
        min_full_attn_len=args["min_full_attn_seq_len"],
        sla_k1=args["sla_k1"],
        sla_k2=args["sla_k2"],
    )
    targets = case.arrays.get("in.num_targets")
    placement = place(args["lengths"], rule=rule)
    divisor = args["scaling_seqlen"] if args["scaling_seqlen"] > 0 else args["max_seq_len"]
    layout = placement.layout(targets)

    def fn(params, inputs):
        del params
        out = attention.hstu_attention(
            to_grid(placement, inputs["q"]),
            to_grid(placement, inputs["k"]),
            to_grid(placement, inputs["v"]),
            layout=layout,
            rule=rule,
            alpha=args["alpha"],
            divisor=float(divisor),
            num_targets=None if targets is None else jnp.asarray(targets, jnp.int32),
        )
        return from_grid(placement, out)

    inputs = {name: jnp.asarray(case[f"in.{name}"]) for name in "qkv"}
    check(case, "o", fn, inputs, {}, _A, name_of=lambda grads: {})


def run_delta_attention(case: golden_cases.Case) -> None:
    """Family A: `delta_hstu_mha`, the same number of new tokens for every user."""
    args = case.args
    rule = attention_mask.MaskRule(
        contextual_len=args["contextual_seq_len"],
        max_attn_len=args["max_attn_len"],
        min_full_attn_len=args.get("min_full_attn_seq_len", 0),
    )
    targets = case.arrays.get("in.num_targets")
    targets = None if targets is None else targets.astype(np.int32)
    placement = place(args["lengths"], rule=rule)
    divisor = args["scaling_seqlen"] if args["scaling_seqlen"] > 0 else args["max_seq_len"]

    def fn(params, inputs):
        del params
        query = inputs["delta_q"]
        out = attention.hstu_attention_delta(
            query.reshape(len(placement.lengths), args["delta_size"], *query.shape[1:]),
            to_grid(placement, inputs["k"]),
            to_grid(placement, inputs["v"]),
            layout=placement.layout(targets),
            rule=rule,
            alpha=args["alpha"],
            divisor=float(divisor),
            num_targets=targets,
        )
        return out.reshape(-1, *out.shape[2:])

    inputs = {name: jnp.asarray(case[f"in.{name}"]) for name in ("delta_q", "k", "v")}
    check(case, "o", fn, inputs, {}, _A, name_of=lambda grads: {})


def stu_config(fields: dict) -> model_schema.StuConfig:
    """`stu` section from the reference's fields, without those that it reads for speed only or,
    beside semi-local attention, not at all."""
    fields = {name: value for name, value in fields.items() if value is not None}
    fields.pop("sort_by_length", None)
    if fields.get("sla_k1") or fields.get("sla_k2"):
        fields.pop("max_attn_len", None)
    return model_schema.StuConfig(**fields)


def run_stu_stack(case: golden_cases.Case) -> None:
    """Family B: `STUStack`, with targets and truncation."""
    layer, options = dict(case.args["layer"]), case.args["stack"]
    contextual_len = max(layer.pop("contextual_seq_len", 0) or 0, 0)
    sees_targets = layer.pop("target_aware", True)
    split, tail_len = (options.get(f"truncate_{name}") or 0 for name in ("split_layer", "tail_len"))
    targets = case.arrays.get("in.num_targets")
    targets = targets.astype(np.int32) if targets is not None and targets.any() else None
    placement = place(
        case.args["lengths"],
        rule=match.build_stu_layer(
            stu_config(layer), contextual_len=contextual_len, max_seq_len=1
        ).rule,
    )
    user_index = jnp.arange(len(placement.lengths))
    mask_targets = targets if sees_targets else None
    sequence, _ = encoder.build_sequence(placement.layout(mask_targets), user_index)
    if mask_targets is not None:
        sequence = dataclasses.replace(sequence, num_targets=jnp.asarray(mask_targets))
    tail, out_lengths = None, placement.lengths
    if split:
        cut = placement.tail(num_contextual=contextual_len, tail_len=tail_len, num_targets=targets)
        out_lengths = cut.segment_lengths[0]
        layout = cut.sequence_layout()
        if not sees_targets:  # targets were kept, but masks take them for history
            layout = dataclasses.replace(
                placement,
                starts=cut.segment_starts[0],
                lengths=out_lengths,
                num_rows=1,
                row_len=cut.row_len,
                block_len=cut.block_len,
            ).layout()
        tail = encoder.build_tail(sequence, layout, contextual_len=contextual_len)
        np.testing.assert_array_equal(out_lengths, case["out.plan_new_lengths"])
    np.testing.assert_array_equal(np.cumsum([0, *out_lengths]), case["out.y_offsets"])
    padded_len = [case.args["max_seq_len"], int(out_lengths.max())]
    layers = tuple(
        match.build_stu_layer(
            stu_config(layer),
            contextual_len=contextual_len,
            max_seq_len=padded_len[bool(split) and index >= split],
        )
        for index in range(case.args["n_layers"])
    )
    stack = stu.StuStack(layers=layers, split_layer=split)

    def fn(params, inputs):
        x = to_grid(placement, inputs["x"], fill=0.0)
        out = stack.apply({"params": params}, x, sequence, tail=tail)
        # The tail lies end to end already.
        return from_grid(placement, out) if tail is None else out[0, : out_lengths.sum()]

    inputs = {"x": jnp.asarray(case["in.x"])}
    params, name_of = sub_params(
        case,
        stack,
        f"{ENCODER}_stu_module.",
        "user_tower/encoder/stack",
        to_grid(placement, inputs["x"], fill=0.0),
        sequence=sequence,
        tail=tail,
    )
    check(case, "y", fn, inputs, params, _B, name_of=name_of)


def run_positional_encoder(case: golden_cases.Case) -> None:
    """Family C: `HSTUPositionalEncoder`, looked-up rows included."""
    args = case.args
    module = positional_encoder.PositionalEncoder(
        num_position_buckets=args["num_position_buckets"],
        num_time_buckets=args["num_time_buckets"],
        use_time_encoding=args["use_time_encoding"],
        time_bucket_fn=args["time_bucket_fn"],
        time_bucket_increments=args["time_bucket_increments"],
        contextual_len=args["contextual_seq_len"],
    )
    placement = place(args["lengths"])
    lengths = np.asarray(args["lengths"])
    gap = time_gaps(case["in.timestamps"], case.arrays.get("in.query_time"), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    segment_len = np.repeat(lengths, lengths)
    targets = case.arrays.get("in.num_targets")
    targets = np.zeros_like(lengths) if targets is None else targets
    targets = np.repeat(targets.astype(np.int32), lengths)
    grids = dict(
        position=jnp.asarray(placement.to_grid(position.astype(np.int32))),
        segment_len=jnp.asarray(placement.to_grid(segment_len.astype(np.int32))),
        time_gap_s=jnp.asarray(placement.to_grid(gap, fill=np.nan)),
        token_mask=jnp.asarray(placement.to_grid(np.ones(len(gap), bool))),
        num_targets=jnp.asarray(placement.to_grid(targets)) if targets.any() else None,
    )

    def fn(params, inputs):
        x = to_grid(placement, inputs["x"], fill=0.0)
        return from_grid(placement, module.apply({"params": params}, x, **grids))

    inputs = {"x": jnp.asarray(case["in.x"])}
    params, name_of = sub_params(
        case,
        module,
        f"{ENCODER}_positional_encoder.",
        "user_tower/encoder/positions",
        jnp.zeros((*grids["position"].shape, inputs["x"].shape[-1])),
        **grids,
    )
    check(case, "y", fn, inputs, params, _C, name_of=name_of)
    rows = _position_rows(args, position, segment_len - targets)
    np.testing.assert_array_equal(rows, case["aux.pos_index"], err_msg="aux.pos_index")
    if args["use_time_encoding"]:
        bucket = jax.jit(time_buckets.time_buckets, static_argnames=_BUCKET_ARGS)(
            jnp.asarray(gap),
            num_time_buckets=args["num_time_buckets"],
            increments=args["time_bucket_increments"],
            fn=args["time_bucket_fn"],
        )
        np.testing.assert_array_equal(bucket, case["aux.time_bucket"], err_msg="aux.time_bucket")


_BUCKET_ARGS = ("num_time_buckets", "increments", "fn")


def _position_rows(args, position, history_end):
    options = dict(num_position_buckets=args["num_position_buckets"])
    position, history_end = jnp.asarray(position), jnp.asarray(history_end)
    if not args["use_time_encoding"]:
        return positional_encoder.forward_positions(position, history_end, **options)
    return positional_encoder.backward_positions(
        position, history_end, contextual_len=args["contextual_seq_len"], **options
    )
