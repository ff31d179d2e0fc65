"""Position rows by hand, and padding that nothing reads."""

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.model import positional_encoder


def test_positions_count_backwards_with_time_encoding():
    position = jnp.arange(8)
    rows = positional_encoder.backward_positions(
        position, jnp.full(8, 8), contextual_len=2, num_position_buckets=100
    )
    # Two contextual tokens, then 6 history tokens: the newest stands at C + 1.
    np.testing.assert_array_equal(rows, [0, 1, 8, 7, 6, 5, 4, 3])
    rows = positional_encoder.backward_positions(
        position, jnp.full(8, 8), contextual_len=2, num_position_buckets=6
    )
    np.testing.assert_array_equal(rows, [0, 1, 5, 5, 5, 5, 4, 3])


def test_positions_count_forwards_without_time_encoding():
    rows = positional_encoder.forward_positions(
        jnp.arange(6), jnp.full(6, 6), num_position_buckets=4
    )
    np.testing.assert_array_equal(rows, [0, 1, 2, 3, 3, 3])


def test_output_by_hand_and_padding_is_zero_and_without_gradient():
    module = positional_encoder.PositionalEncoder(
        num_position_buckets=5,
        num_time_buckets=4,
        use_time_encoding=True,
        time_bucket_fn="sqrt",
        time_bucket_increments=1.0,
        contextual_len=0,
    )
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 3, 2), dtype=np.float32))
    params = {
        "position_embedding": jnp.asarray(rng.standard_normal((5, 2), dtype=np.float32)),
        "time_embedding": jnp.asarray(rng.standard_normal((5, 2), dtype=np.float32)),
    }
    grids = dict(
        position=jnp.array([[0, 1, 0]]),
        segment_len=jnp.array([[2, 2, 2]]),
        time_gap_s=jnp.array([[9.5, 1.0, jnp.nan]]),
        token_mask=jnp.array([[True, True, False]]),
    )
    out, vjp = jax.vjp(lambda p: module.apply({"params": p}, x, **grids), params)
    expected = np.zeros((1, 3, 2))
    for slot, (position, time) in enumerate([(2, 3), (1, 1)]):
        expected[0, slot] = (
            2**0.5 * np.asarray(x)[0, slot]
            + params["position_embedding"][position]
            + params["time_embedding"][time]
        )
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    (grads,) = vjp(jnp.ones_like(out))
    np.testing.assert_array_equal(grads["position_embedding"][:, 0], [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(grads["time_embedding"][:, 0], [0, 1, 0, 1, 0])
