"""Replays one recorded case through this package and compares outputs and gradients.

One function per operation of the reference; those of the modules around the sequence layers are in
`golden_tower_runners.py`. Users are packed, several to a row, wherever the
operation has rows, so that parity and packing are checked at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.model import (
    action_encoder,
    reference_weights,
)
from tests import golden_cases
from tests.model import batches

ENCODER = "user_tower._hstu_encoder."
PREPROCESSOR = f"{ENCODER}_input_preprocessor."
# Per family: (forward atol, rtol), (gradient atol, rtol), from the recorder's notes on tolerances.
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
