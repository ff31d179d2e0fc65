"""Dropout bits: right frequency, a function of the token's identity alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.model import dropout


def identity(user_index, position):
    return dropout.TokenIdentity(
        user_index=jnp.asarray(user_index, jnp.int32), position=jnp.asarray(position, jnp.int32)
    )


def grid_identity(num_users, length):
    user, position = np.divmod(np.arange(num_users * length), length)
    return identity(user, position)


def threefry_2x32(key, first, second):
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011), on Python integers."""
    mask = 0xFFFFFFFF
    keys = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA]
    rotations = [[13, 15, 26, 6], [17, 29, 16, 24]]
    x, y = (first + keys[0]) & mask, (second + keys[1]) & mask
    for group in range(5):
        for rotation in rotations[group % 2]:
            x = (x + y) & mask
            y = ((y << rotation) | (y >> (32 - rotation))) & mask
            y ^= x
        x = (x + keys[(group + 1) % 3]) & mask
        y = (y + keys[(group + 2) % 3] + group + 1) & mask
    return x, y


def test_lanes_are_the_documented_hash():
    key = jax.random.key(11)
    words = [int(word) for word in jax.random.key_data(key)]
    lanes = dropout.random_lanes(key, identity([3, 700_000], [0, 41]), num_channels=10)
    for token, (user, position) in enumerate([(3, 0), (700_000, 41)]):
        expected = []
        for group in range(3):
            for word in threefry_2x32(words, user, position * 3 + group):
                expected += [word & 0xFFFF, word >> 16]
        np.testing.assert_array_equal(lanes[token], expected[:10])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_drop_rate_mean_and_independence(rate):
    x = jnp.ones((4000, 50))
    y = dropout.dropout(x, rate=rate, key=jax.random.key(1), identity=grid_identity(40, 100))
    dropped = np.asarray(y == 0)
    # 200,000 draws: five standard deviations.
    tolerance = 5 * (rate * (1 - rate) / dropped.size) ** 0.5
    assert abs(dropped.mean() - rate) < tolerance
    assert abs(np.asarray(y).mean() - 1) < tolerance / (1 - rate)
    for axis in (0, 1):
        neighbours = np.mean(
            np.take(dropped, range(1, dropped.shape[axis]), axis)
            & np.take(dropped, range(dropped.shape[axis] - 1), axis)
        )
        assert abs(neighbours - rate**2) < 2 * tolerance
    kept = np.unique(np.asarray(y)[~dropped])
    threshold = dropout.keep_threshold(rate)
    np.testing.assert_allclose(kept, [2**16 / (2**16 - threshold)], rtol=1e-6)


def test_bits_follow_the_token_wherever_it_lies():
    key, x = jax.random.key(2), jnp.ones((60, 11))
    tokens = grid_identity(6, 10)
    out = np.asarray(dropout.dropout(x, rate=0.4, key=key, identity=tokens))
    order = np.random.default_rng(0).permutation(60)
    moved = identity(tokens.user_index[order], tokens.position[order])
    np.testing.assert_array_equal(dropout.dropout(x, rate=0.4, key=key, identity=moved), out[order])
    grid = identity(tokens.user_index.reshape(6, 10), tokens.position.reshape(6, 10))
    np.testing.assert_array_equal(
        dropout.dropout(x.reshape(6, 10, 11), rate=0.4, key=key, identity=grid),
        out.reshape(6, 10, 11),
    )


def test_bits_differ_between_keys_users_and_positions():
    lanes = [
        dropout.random_lanes(jax.random.key(seed), identity([user], [position]), num_channels=64)
        for seed, user, position in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    for i in range(4):
        for j in range(i):
            assert np.mean(np.asarray(lanes[i] == lanes[j])) < 0.1


def test_parts_equal_the_concatenation():
    key, tokens = jax.random.key(4), grid_identity(3, 5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((15, 14), dtype=np.float32))
    whole = dropout.dropout(x, rate=0.5, key=key, identity=tokens)
    parts = dropout.dropout_parts(
        (x[:, :5], x[:, 5:6], x[:, 6:]), rate=0.5, key=key, identity=tokens
    )
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), whole)


def test_no_key_and_rate_zero_change_nothing():
    x, tokens = jnp.ones((4, 3)), grid_identity(2, 2)
    assert dropout.dropout(x, rate=0.5, key=None, identity=tokens) is x
    assert dropout.dropout(x, rate=0.0, key=jax.random.key(0), identity=tokens) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0, 0.999999])
def test_rates_that_drop_everything_or_less_than_nothing_are_refused(rate):
    rule = r"must be in \[0, 1\) also when rounded to a multiple of 2\*\*-16; 0 switches"
    with pytest.raises(ValueError, match=f"rate={rate}: {rule}"):
        dropout.keep_threshold(rate)


def test_a_key_of_another_kind_is_refused():
    key = jax.random.key(0, impl="rbg")
    with pytest.raises(ValueError, match="must be one threefry key; make it with jax.random.key"):
        dropout.random_lanes(key, identity([0], [0]), num_channels=4)


def test_no_token_at_all_is_no_error():
    """A batch without hard negatives has none; item towers with dropout met them."""
    x = jnp.zeros((1, 0, 6))
    empty = identity(np.zeros((1, 0)), np.zeros((1, 0)))
    assert dropout.dropout(x, rate=0.5, key=jax.random.key(0), identity=empty).shape == x.shape
