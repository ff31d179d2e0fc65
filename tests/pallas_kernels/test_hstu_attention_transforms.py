"""The op under jit, remat, vmap, shard_map; its memory; its form for last queries.

Paths are "xla" and the Triton kernels in interpret mode, which must give what "xla" gives. The TPU
kernels have the same tests in `test_pallas_tpu_programs.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hstu_attention import api, cases, layout, pallas_triton
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.tiles import Tile, Tiles
from tests.pallas_kernels import oracle

RULE = MaskRule(contextual_len=2)
ROWS = ((9, 4, 8), (21,), (), (5, 0, 15))
OPTIONS = dict(rule=RULE, alpha=0.5, divisor=7.0)


# Several tiles to a row.
TILES = Tiles(Tile(16, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2))


def _attend(q, k, v, built):
    return api.hstu_attention(q, k, v, layout=built, implementation="xla", **OPTIONS)


def _attend_by_kernel(q, k, v, built):
    return pallas_triton.hstu_attention(
        q, k, v, layout=built, interpret=True, tiles=TILES, **OPTIONS
    )


both_paths = pytest.mark.parametrize(
    "attend", [_attend, _attend_by_kernel], ids=["xla", "pallas_triton"]
)


def _gradients(attend):
    def run(q, k, v, g, built):
        output, vjp = jax.vjp(lambda *qkv: attend(*qkv, built), q, k, v)
        return output, *vjp(g)

    return run


@functools.cache
def _expected():
    built = cases.build_layout(cases.Case("", ROWS, RULE))
    arrays = oracle.random_inputs(built.num_rows, built.row_len)
    return arrays, built, jax.jit(_gradients(_attend))(*arrays, built)


def _assert_equal(actual, expected, atol=1e-6):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=1e-5, atol=atol)


@both_paths
def test_remat_gives_the_same_gradients(attend):
    arrays, built, expected = _expected()
    _assert_equal(jax.jit(_gradients(jax.checkpoint(attend)))(*arrays, built), expected)


@both_paths
def test_vmap_over_inputs_is_a_loop(attend):
    arrays, built, expected = _expected()
    # The second element has its heads in reverse, so its result is known without another program.
    stacked = [np.stack([x, x[:, :, ::-1]]) for x in arrays]
    run = jax.jit(jax.vmap(_gradients(attend), in_axes=(0, 0, 0, 0, None)))
    results = run(*stacked, built)
    _assert_equal([x[0] for x in results], expected)
    _assert_equal([x[1][:, :, ::-1] for x in results], expected)


@pytest.mark.parametrize(
    "attend",
    [
        pytest.param(_attend, id="xla"),
        pytest.param(_attend_by_kernel, id="pallas_triton", marks=pytest.mark.long),
    ],
)
def test_vmap_over_layouts_is_a_loop(attend):
    arrays, built, expected = _expected()
    upside_down = cases.build_layout(cases.Case("", ROWS[::-1], RULE))
    both = jax.tree.map(lambda *leaves: np.stack(leaves), built, upside_down)
    stacked = [np.stack([x, x[::-1]]) for x in arrays]
    results = jax.jit(jax.vmap(_gradients(attend)))(*stacked, both)
    _assert_equal([x[0] for x in results], expected)
    _assert_equal([x[1][::-1] for x in results], expected)


def test_shards_of_row_groups_equal_one_merged_grid():
    """Two groups of two rows: on one device each, and merged on one device."""
    arrays, _, expected = _expected()
    groups = [cases.build_layout(cases.Case("", rows, RULE)) for rows in (ROWS[:2], ROWS[2:])]
    num_segments = max(len(group.starts) for group in groups)

    def fill(array, value):
        return np.pad(array, (0, num_segments - len(array)), constant_values=value)

    columns = (
        np.stack([fill(group.starts, 2 * 21) for group in groups]),
        np.stack([fill(group.lengths, 0) for group in groups]),
        np.concatenate([group.block_pairs for group in groups]),
        np.concatenate([group.num_block_pairs for group in groups]),
    )

    def run(q, k, v, g, *columns):
        built = layout.merge_groups(*columns, num_rows_per_group=2, row_len=21, block_len=8)
        return _gradients(_attend)(q, k, v, g, built)

    _assert_equal(jax.jit(run)(*arrays, *columns), expected)
    mesh = jax.make_mesh((2,), ("chip",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (jax.P("chip"),) * 8
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=(jax.P("chip"),) * 4, check_vma=False
    )
    _assert_equal(jax.jit(sharded)(*arrays, *columns), expected)


def test_packed_rows_equal_plain_padding():
    arrays, built, (output, *_) = _expected()
    lengths = built.lengths
    plain = layout.from_lengths(lengths, row_len=21, block_len=8, rule=RULE)
    users = []
    for x in arrays[:3]:
        flat = np.zeros((len(lengths), 21, *x.shape[2:]), np.float32)
        for user, (start, length) in enumerate(zip(built.starts, lengths, strict=True)):
            flat[user, :length] = x.reshape(-1, *x.shape[2:])[start : start + length]
        users.append(flat)
    result = np.asarray(jax.jit(_attend)(*users, plain))
    tokens = np.concatenate([result[user, :length] for user, length in enumerate(lengths)])
    packed = np.asarray(output).reshape(-1, *output.shape[2:])
    is_token = np.asarray(layout.token_segments(built)).reshape(-1) >= 0
    np.testing.assert_allclose(tokens, packed[is_token], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["all", "last"])
def test_memory_is_linear_in_the_length(form):
    def temp_bytes(length):
        built = layout.from_lengths(np.array([length, length // 2], np.int32), row_len=length)
        token = jax.ShapeDtypeStruct((2, length, 1, 8), jnp.float32)
        query = jax.ShapeDtypeStruct((2, 1, 8), jnp.float32) if form == "last" else token
        op = api.hstu_attention_last if form == "last" else api.hstu_attention

        def loss(q, k, v):
            out = op(q, k, v, layout=built, rule=MaskRule(), alpha=0.3, divisor=9.0)
            return (out**2).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, token, token).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temp_bytes(2048), temp_bytes(4096)
    assert long < 3 * short
    assert long < 4096 * 4096  # a quarter of one [L, L] array of float32


LAST_CASES = ("plain", "nothing", "packed_context", "window", "semi_local")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", LAST_CASES)
def test_last_query_is_the_last_row_of_the_full_op(name, implementation):
    case = next(case for case in cases.CASES if case.name == name)
    built = cases.build_layout(case)
    q, k, v, _ = oracle.random_inputs(built.num_rows, built.row_len)
    has_tokens = built.lengths > 0
    last = np.where(has_tokens, built.starts + built.lengths - 1, 0)
    rng = np.random.default_rng(1)
    g = rng.standard_normal((len(last), *v.shape[2:])).astype(np.float32)
    full_g = np.zeros((built.num_rows * built.row_len, *v.shape[2:]), np.float32)
    full_g[last[has_tokens]] = g[has_tokens]
    full = oracle.attention(
        q, k, v, full_g.reshape(v.shape), oracle.case_mask(case), alpha=0.5, divisor=7.0
    )

    def per_segment(array):
        flat = array.reshape(-1, *array.shape[2:])
        return np.where(has_tokens[:, None, None], flat[last], 0)

    # An empty user's query may hold anything.
    query = np.where(has_tokens[:, None, None], per_segment(q), np.nan).astype(np.float32)

    @jax.jit
    def run(q, k, v, g):
        attend = functools.partial(
            api.hstu_attention_last,
            layout=built,
            rule=case.rule,
            alpha=0.5,
            divisor=7.0,
            implementation=implementation,
        )
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    results = run(query, k, v, g)
    expected = (per_segment(full[0]), per_segment(full[1]), full[2], full[3])
    for result, e in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.asarray(result), e, rtol=1e-5, atol=2e-6)


def test_last_query_keeps_poison_inside_its_segment():
    arrays, built, _ = _expected()
    _, k, v, _ = (x.copy() for x in arrays)
    rng = np.random.default_rng(2)
    query = rng.standard_normal((len(built.starts), *k.shape[2:])).astype(np.float32)
    g = rng.standard_normal((len(built.starts), *v.shape[2:])).astype(np.float32)

    @jax.jit
    def run(q, k, v):
        output, vjp = jax.vjp(
            lambda *qkv: api.hstu_attention_last(*qkv, layout=built, **OPTIONS), q, k, v
        )
        return output, *vjp(g)

    clean = run(query, k, v)
    is_padding = np.asarray(layout.token_segments(built)) < 0
    k[is_padding] = v[is_padding] = np.inf
    for before, after in zip(clean, run(query, k, v), strict=True):
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
    v[0, 10] = np.nan  # segment 1: slots 9 .. 12 of row 0
    for before, after in zip(clean, run(query, k, v), strict=True):
        before, after = np.asarray(before), np.asarray(after)
        is_hit = np.zeros(after.shape[:-2], bool)
        is_hit[(0, slice(9, 13)) if is_hit.ndim == 2 else 1] = True
        np.testing.assert_array_equal(after[~is_hit], before[~is_hit])
        assert np.isnan(after[is_hit]).any()
