"""Replays one recorded case through this package and compares outputs and gradients.

One function per operation of the reference; those of the modules around the sequence layers are in
`golden_tower_runners.py`. Users are packed, several to a row, wherever the
operation has rows, so that parity and packing are checked at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.config import model_schema
from hstu_jax.model import (
    action_encoder,
    encoder,
    match,
    positional_encoder,
    reference_weights,
    stu,
    time_buckets,
)
from pallas_kernels.hstu_attention import api as attention
from pallas_kernels.hstu_attention import mask as attention_mask
from tests import golden_cases
from tests.model import batches

ENCODER = "user_tower._hstu_encoder."
PREPROCESSOR = f"{ENCODER}_input_preprocessor."
# Per family: (forward atol, rtol), (gradient atol, rtol), from the recorder's notes on tolerances.
_A = (2e-6, 1e-5), (1e-5, 1e-4)
_B = (1e-5, 1e-5), (1e-4, 1e-4)
_C = (1e-6, 1e-6), (1e-5, 1e-5)
D_TOLERANCE = (1e-5, 1e-5), (1e-4, 1e-4)
E_TOLERANCE = (2e-5, 1e-5), (2e-4, 1e-3)


def close(actual, desired, tolerance, name):
    """Asserts equality up to (atol, rtol); the message names the array."""
    atol, rtol = tolerance
    np.testing.assert_allclose(
        np.asarray(actual), desired, atol=atol, rtol=rtol, err_msg=name, equal_nan=False
    )


def check(case, out_name, fn, inputs, params, tolerance, *, name_of):
    """fn(params, inputs) against `out.<out_name>`, gradients against `grad_in` and `grad_w`.

    Args:
        case: the recorded case.
        out_name: name of its output and cotangent.
        fn: (params, dict of inputs in the case's own jagged form) -> output in that form.
        inputs: differentiable inputs.
        params: our parameters.
        tolerance: (forward, gradient).
        name_of: gradient tree of the parameters -> {reference name: array}.
    """

    @jax.jit
    def run(params, inputs, cotangent):
        out, vjp = jax.vjp(fn, params, inputs)
        return out, vjp(cotangent)

    cotangent = jnp.asarray(case[f"cot.{out_name}"])
    out, (grad_params, grad_inputs) = run(params, inputs, cotangent)
    close(out, case[f"out.{out_name}"], tolerance[0], out_name)
    recorded = case.group("grad_in")
    assert set(recorded) <= set(grad_inputs), f"{set(recorded)} not in {set(grad_inputs)}"
    for name, value in recorded.items():
        close(grad_inputs[name], value, tolerance[1], f"grad_in.{name}")
    check_weight_grads(case.group("grad_w"), name_of(grad_params), tolerance[1])


def check_weight_grads(recorded, grads, tolerance):
    """Every recorded weight gradient; parameters without effect must be recorded as zero."""
    for name, value in recorded.items():
        if name in grads:
            close(grads[name], value, tolerance, f"grad_w.{name}")
        else:
            np.testing.assert_array_equal(value, 0, err_msg=f"grad_w.{name} is not ours")


def sub_params(case, module, reference_prefix, path, *example, **keywords):
    """Our parameters of a sub-module from `w.*`, and the way back for gradients."""
    keys = path.split("/")

    def nest(tree):
        for key in reversed(keys):
            tree = {key: tree}
        return tree

    like = jax.eval_shape(functools.partial(module.init, **keywords), jax.random.key(0), *example)
    like = like.get("params", {})
    weights = {reference_prefix + name: value for name, value in case.group("w").items()}
    params = reference_weights.to_params(weights, like=nest(like))
    for key in keys:
        params = params.get(key, {})  # a module without parameters has no branch

    def name_of(grads):
        named = reference_weights.from_params(nest(grads))
        return {name.removeprefix(reference_prefix): value for name, value in named.items()}

    return jax.tree.map(jnp.asarray, params), name_of


def place(lengths, *, rule=batches.ANY_RULE):
    """Packs users into rows a little longer than the longest, so that rows have padding."""
    lengths = [int(n) for n in lengths]
    return batches.place(lengths, row_len=max(lengths) + 3, packed=True, block_len=8, rule=rule)


def to_grid(placement, jagged, *, fill=jnp.nan):
    """[sum of lengths, ...] -> [R, L, ...] inside a differentiated function."""
    flat = jnp.full((placement.num_rows * placement.row_len, *jagged.shape[1:]), fill)
    flat = flat.at[placement.slots].set(jagged)
    return flat.reshape(placement.num_rows, placement.row_len, *jagged.shape[1:])


def from_grid(placement, grid):
    """[R, L, ...] -> [sum of lengths, ...]."""
    return grid.reshape(-1, *grid.shape[2:])[placement.slots]


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


def run_stu_stack(case: golden_cases.Case) -> None:
    """Family B: `STUStack`."""
    layer = {"contextual_seq_len": 0, "scaling_seqlen": -1, **case.args["layer"]}
    contextual_len = layer.pop("contextual_seq_len")
    config = model_schema.StuConfig(**layer)
    layers = tuple(
        match.build_stu_layer(
            config, contextual_len=contextual_len, max_seq_len=case.args["max_seq_len"]
        )
        for _ in range(case.args["n_layers"])
    )
    stack = stu.StuStack(layers=layers)
    placement = place(case.args["lengths"], rule=layers[0].rule)
    user_index = jnp.arange(len(placement.lengths))
    sequence, _ = encoder.build_sequence(placement.layout(), user_index)

    def fn(params, inputs):
        x = to_grid(placement, inputs["x"], fill=0.0)
        return from_grid(placement, stack.apply({"params": params}, x, sequence))

    inputs = {"x": jnp.asarray(case["in.x"])}
    params, name_of = sub_params(
        case,
        stack,
        f"{ENCODER}_stu_module.",
        "user_tower/encoder/stack",
        to_grid(placement, inputs["x"], fill=0.0),
        sequence=sequence,
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
    grids = dict(
        position=jnp.asarray(placement.to_grid(position.astype(np.int32))),
        segment_len=jnp.asarray(placement.to_grid(segment_len.astype(np.int32))),
        time_gap_s=jnp.asarray(placement.to_grid(gap, fill=np.nan)),
        token_mask=jnp.asarray(placement.to_grid(np.ones(len(gap), bool))),
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
    rows = _position_rows(args, position, segment_len)
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


def _position_rows(args, position, segment_len):
    position, segment_len = jnp.asarray(position), jnp.asarray(segment_len)
    num_positions = args["num_position_buckets"]
    if not args["use_time_encoding"]:
        return positional_encoder.forward_positions(position, num_position_buckets=num_positions)
    return positional_encoder.backward_positions(
        position,
        segment_len,
        contextual_len=args["contextual_seq_len"],
        num_position_buckets=num_positions,
    )


def time_gaps(timestamps, query_time, lengths):
    """Anchor minus timestamp per token, in the recorded dtype as the reference subtracts."""
    ends = np.cumsum(lengths)
    if query_time is None:
        anchor = np.array([timestamps[max(end - 1, 0)] for end in ends], timestamps.dtype)
    else:
        anchor = query_time[:, 0].astype(timestamps.dtype)
    return (np.repeat(anchor, lengths) - timestamps).astype(np.float32)


def action_encoder_of(fields: dict) -> action_encoder.SimpleActionEncoder:
    """The action encoder of the reference's fields; other keys are ignored."""
    return action_encoder.SimpleActionEncoder(
        action_embedding_dim=fields["action_embedding_dim"],
        action_weights=tuple(fields["action_weights"]),
        watchtime_to_action_thresholds=tuple(
            float(t) for t in fields.get("watchtime_to_action_thresholds", ())
        ),
        watchtime_to_action_weights=tuple(fields.get("watchtime_to_action_weights", ())),
    )


def run_action_encoder(case: golden_cases.Case) -> None:
    """Family D: `SimpleActionEncoder` on tokens without targets."""
    args = case.args
    module = action_encoder_of(args)
    assert module.output_dim == args["output_dim"]
    action = jnp.asarray(case["in.actions"].astype(np.int32)).T
    watch_time_s = jnp.asarray(case.arrays.get("in.watchtimes", case["in.actions"])).T
    params, name_of = sub_params(
        case,
        module,
        f"{PREPROCESSOR}_action_encoder.",
        "user_tower/encoder/preprocess/actions",
        action,
        watch_time_s,
    )

    def fn(params, inputs):
        return module.apply({"params": params}, action, watch_time_s)[0]

    check(case, "y", fn, {}, params, D_TOLERANCE, name_of=name_of)
