"""The recompute fields: fewer bytes for the backward pass, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.model import batches, test_stu

FIELDS = ("recompute_normed_x", "recompute_uvqk", "recompute_y")
NOTHING, EVERYTHING = dict.fromkeys(FIELDS, False), dict.fromkeys(FIELDS, True)
PLACEMENT = batches.place([7, 3, 6], row_len=10, packed=True, block_len=10)
GRID = (PLACEMENT.num_rows, PLACEMENT.row_len)
U = V = test_stu.HEADS * test_stu.VALUE
Q = test_stu.HEADS * test_stu.QK


def make_stack(flags):
    # The dense attention compiles in a third of the time; what is kept around it is the same.
    options = dict(output_dropout_ratio=0.4, implementation="reference")
    return test_stu.make_stack(2, **options, **flags)


def backward(flags, method, params, x):
    """Output, and the function that gives gradients; its leaves are what is kept."""
    sequence, key = test_stu.sequence_of(PLACEMENT), jax.random.key(3)

    def forward(params, x):
        stack = make_stack(flags)
        return stack.apply({"params": params}, x, sequence, dropout_key=key, method=method)

    return jax.vjp(forward, params, x)


def kept_floats(flags, method="__call__"):
    """float32 values per token that the backward pass of a whole layer keeps, parameters aside."""
    params = test_stu.random_params(make_stack(flags), PLACEMENT)
    x = jnp.zeros((*GRID, test_stu.WIDTH))
    kept = jax.tree.leaves(jax.eval_shape(lambda p, x: backward(flags, method, p, x)[1], params, x))
    of_tokens = [a for a in kept if a.dtype == jnp.float32 and a.shape[:2] == GRID]
    return sum(a.size // (GRID[0] * GRID[1]) for a in of_tokens)


def test_each_field_frees_what_its_name_says():
    everything = kept_floats(EVERYTHING)
    more = {name: kept_floats(EVERYTHING | {name: False}) - everything for name in FIELDS}
    # Per token and layer.
    assert more == {
        "recompute_normed_x": 2 * test_stu.WIDTH,
        "recompute_uvqk": 2 * (U + V + 2 * Q),
        "recompute_y": 2 * 3 * V,
    }
    assert kept_floats(NOTHING) > everything + sum(more.values()) / 2
    assert kept_floats(NOTHING) > kept_floats(NOTHING | {"recompute_y": True})
    assert kept_floats(NOTHING, "last_position") > kept_floats(EVERYTHING, "last_position")


def test_values_and_gradients_are_equal():
    """With nothing but the output part computed again, and with everything; dropout is on."""
    params = test_stu.random_params(make_stack(NOTHING), PLACEMENT)
    x = jnp.asarray(PLACEMENT.to_grid(test_stu.random_tokens(PLACEMENT)))
    cotangent = np.random.default_rng(0).standard_normal((3, test_stu.WIDTH), dtype=np.float32)

    def run(flags):
        def forward_backward(params, x):
            out, vjp = backward(flags, "last_position", params, x)
            return out, vjp(cotangent)

        return jax.tree.leaves(jax.jit(forward_backward)(params, x))

    for got, want in zip(run(EVERYTHING), run(NOTHING | {"recompute_y": True}), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), rtol=0)


def test_the_attention_itself_does_not_run_again():
    """Two loops over tiles, forward and backward, as without recomputation."""
    layer = test_stu.make_layer(implementation="xla", **EVERYTHING)
    params = test_stu.random_params(layer, PLACEMENT)
    sequence = test_stu.sequence_of(PLACEMENT)

    def loss(params, x):
        return jnp.sum(layer.apply({"params": params}, x, sequence) ** 2)

    x = jnp.zeros((*GRID, test_stu.WIDTH))
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile().as_text()
    # The loops of searchsorted carry integers only.
    loops = [line for line in text.splitlines() if " while(" in line and "f32" in line]
    assert len(loops) == 2
