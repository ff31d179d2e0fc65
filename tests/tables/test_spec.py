"""The id -> row map and the first values of a table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hstu_jax.tables import spec


@pytest.mark.parametrize("num_rows", [1, 1024, 8191, 8192, 20_001])
def test_rows_are_a_bijection_and_ids_of_inverts_it(num_rows):
    table = spec.TableSpec("video", num_rows, 4)
    ids = jnp.arange(table.padded_rows, dtype=jnp.int32)
    rows = spec.rows_of(table, ids, jnp.ones(ids.shape, bool))
    assert table.padded_rows % spec.VIRTUAL_SHARDS == 0
    assert sorted(np.asarray(rows).tolist()) == list(range(table.padded_rows))
    np.testing.assert_array_equal(spec.ids_of(table, rows), ids)


def test_neighbouring_ids_go_to_different_stripes_only_in_large_tables():
    large, small = spec.TableSpec("a", 8192, 4), spec.TableSpec("b", 8191, 4)
    ids, valid = jnp.array([0, 1, 1024, 8191]), jnp.ones(4, bool)
    np.testing.assert_array_equal(spec.rows_of(large, ids, valid), [0, 8, 1, 8191])
    np.testing.assert_array_equal(spec.rows_of(small, ids[:3], valid[:3]), [0, 1, 1024])


def test_row_of_the_largest_table_stays_in_int32():
    table = spec.TableSpec("huge", 2**31 - 2048, 1)
    ids = jnp.array([table.num_rows - 1, 1023], jnp.int32)
    rows = np.asarray(spec.rows_of(table, ids, jnp.array([True, True])))
    stripe = table.padded_rows // 1024
    expected = [(int(i) % 1024) * stripe + int(i) // 1024 for i in ids]
    np.testing.assert_array_equal(rows, expected)
    assert table.padded_rows < 2**31


def test_invalid_ids_become_the_sentinel_whatever_they_hold():
    table = spec.TableSpec("video", 10_000, 4)
    ids = jnp.array([[-1, 5], [2**31 - 1, -(2**31)]], jnp.int32)
    rows = spec.rows_of(table, ids, jnp.array([[False, True], [False, False]]))
    sentinel = table.padded_rows
    np.testing.assert_array_equal(rows, [[sentinel, 5 * (sentinel // 1024)], [sentinel, sentinel]])


def test_init_is_uniform_with_zero_padding_and_the_same_on_two_devices():
    table = spec.TableSpec("video", 10_000, 8)
    weights = np.asarray(spec.init_weights(table, jax.random.key(3)))
    is_used = np.asarray(spec.ids_of(table, jnp.arange(table.padded_rows))) < table.num_rows
    limit = 1 / np.sqrt(table.num_rows)
    assert is_used.sum() == table.num_rows
    assert np.all(weights[~is_used] == 0)
    assert np.abs(weights).max() <= limit
    np.testing.assert_allclose(weights[is_used].std(), limit / np.sqrt(3), rtol=0.02)

    mesh = jax.make_mesh((1, 2), ("host", "chip"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(("host", "chip")))
    split = spec.init_weights(table, jax.random.key(3), sharding=sharding)
    assert split.sharding == sharding
    np.testing.assert_array_equal(split, weights)


def test_init_draws_large_tables_in_slabs_in_little_memory():
    table = spec.TableSpec("video", 200_000, 64)
    compiled = (
        jax.jit(spec.init_weights, static_argnums=0).lower(table, jax.random.key(0)).compile()
    )
    table_bytes = 4 * table.padded_rows * table.dim
    assert compiled.memory_analysis().temp_size_in_bytes < table_bytes
    weights = np.asarray(spec.init_weights(table, jax.random.key(0)))
    is_used = np.asarray(spec.ids_of(table, jnp.arange(table.padded_rows))) < table.num_rows
    assert np.all(weights[~is_used] == 0)
    # No two slabs are alike, nor two stripes.
    assert len(np.unique(weights[is_used][:, :3], axis=0)) == table.num_rows


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"num_rows=0 \(table 'video'\): must be between 1 and"):
        spec.TableSpec("video", 0, 4)
    with pytest.raises(ValueError, match=r"num_rows=2147483648 .*hash the ids into fewer"):
        spec.TableSpec("video", 2**31, 4)
    with pytest.raises(ValueError, match=r"dim=0 \(table 'video'\): must be at least 1"):
        spec.TableSpec("video", 10, 0)


def test_init_bound_replaces_the_references_bound():
    wide = spec.TableSpec("t", num_rows=500, dim=8, init_bound=0.5)
    weights = np.asarray(spec.init_weights(wide, jax.random.key(0)))
    assert 0.49 < np.abs(weights).max() <= 0.5
    with pytest.raises(ValueError, match=r"init_bound=-1\.0 \(table 't'\): must not be negative"):
        spec.TableSpec("t", num_rows=500, dim=8, init_bound=-1.0)
