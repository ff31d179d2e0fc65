"""The TPU kernels inside programs: jit, vmap, remat, shard_map, lowering, export; and refusals.

Lowering needs no TPU. With the `libtpu` package, which is not a dependency, the long tests compile
to machine code as well. Numbers are checked in `test_pallas_tpu.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.hstu_attention import api, cases, layout, pallas_tpu
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.pallas_tpu_tiles import Tiles
from tests.pallas_kernels import oracle

RULE = MaskRule(contextual_len=2)
ROWS = ((9, 4, 8), (21,), (), (5, 0, 15))
TILES = Tiles(block_len=8, heads_per_step=2)
OPTIONS = dict(rule=RULE, alpha=0.5, divisor=7.0)
INTERPRETED = dict(OPTIONS, interpret=True, tiles=TILES)


def _gradients(q, k, v, g, built, **options):
    attend = functools.partial(pallas_tpu.hstu_attention, layout=built, **options)
    output, vjp = jax.vjp(attend, q, k, v)
    return output, *vjp(g)


def _remat_gradients(q, k, v, g, built):
    attend = jax.checkpoint(functools.partial(pallas_tpu.hstu_attention, **INTERPRETED))
    output, vjp = jax.vjp(lambda *qkv: attend(*qkv, layout=built), q, k, v)
    return output, *vjp(g)


@functools.cache
def _expected():
    """Arrays, their layout, and the exact output and gradients."""
    case = cases.Case("", ROWS, RULE)
    built = cases.build_layout(case)
    arrays = oracle.random_inputs(built.num_rows, built.row_len)
    return arrays, built, oracle.attention(*arrays, oracle.case_mask(case), alpha=0.5, divisor=7.0)


def _assert_equal(actual, expected):
    """2e-6 of the largest value is some 16 roundings of a sum of up to 21 terms."""
    for a, e in zip(actual, expected, strict=True):
        atol = 2e-6 * np.abs(e).max()
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=0, atol=atol)


@pytest.mark.parametrize("form", ["inputs", pytest.param("layouts", marks=pytest.mark.long)])
def test_vmap_is_a_loop(form):
    arrays, built, expected = _expected()
    run = functools.partial(_gradients, **INTERPRETED)
    if form == "inputs":
        # The second element has its heads in reverse, so its result is known.
        stacked = [np.stack([x, x[:, :, ::-1]]) for x in arrays]
        results = jax.jit(jax.vmap(run, in_axes=(0, 0, 0, 0, None)))(*stacked, built)
        second = [x[1][:, :, ::-1] for x in results]
    else:
        upside_down = cases.build_layout(cases.Case("", ROWS[::-1], RULE))
        both = jax.tree.map(lambda *leaves: np.stack(leaves), built, upside_down)
        results = jax.jit(jax.vmap(run))(*[np.stack([x, x[::-1]]) for x in arrays], both)
        second = [x[1][::-1] for x in results]
    _assert_equal([x[0] for x in results], expected)
    _assert_equal(second, expected)


def test_shards_of_rematerialised_row_groups_equal_one_grid():
    """Two groups of two rows, one on each device, under jit, shard_map and remat."""
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
        return _remat_gradients(q, k, v, g, built)

    mesh = jax.make_mesh((2,), ("chip",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(jax.P("chip"),) * 8,
        out_specs=(jax.P("chip"),) * 4,
        check_vma=False,
    )
    _assert_equal(jax.jit(sharded)(*arrays, *columns), expected)


def _tpu_mesh(kind):
    device = jax.sharding.AbstractDevice(kind, 1, "tpu")
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


def _case_program(case):
    """Traceable function and shapes of a case, with the layout as an argument."""
    built = cases.build_layout(case)
    targets = cases.targets_of(case)

    def run(q, k, v, g, built):
        targets_or_none = None if targets is None else jnp.asarray(targets)
        options = OPTIONS | dict(rule=case.rule, num_targets=targets_or_none)
        return _gradients(q, k, v, g, built, **options)

    def shapes(dtype, qk_dim=16, v_dim=24):
        grid = (built.num_rows, built.row_len, 2)
        query, value = (jax.ShapeDtypeStruct((*grid, width), dtype) for width in (qk_dim, v_dim))
        return query, query, value, value, built

    return run, shapes


# One case for each number of mask intervals runs in every suite.
_LOWERED = [
    case.name
    if case.name in ("packed_context", "semi_local_targets")
    else pytest.param(case.name, marks=pytest.mark.long)
    for case in cases.CASES
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", _LOWERED)
def test_lowers_for_tpu_without_a_tpu(name, dtype):
    run, shapes = _case_program(next(case for case in cases.CASES if case.name == name))
    with jax.sharding.use_abstract_mesh(_tpu_mesh("TPU v5e")):
        traced = jax.jit(run).trace(*shapes(jnp.dtype(dtype)))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 3


def test_exports_for_tpu():
    run, shapes = _case_program(cases.Case("", ROWS, RULE))
    with jax.sharding.use_abstract_mesh(_tpu_mesh("TPU v6e")):
        exported = jax.export.export(jax.jit(run), platforms=["tpu"])(*shapes(jnp.bfloat16))
    assert exported.platforms == ("tpu",)
    assert exported.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == 3


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_to_machine_code(topology, dtype, monkeypatch):
    """By the TPU compiler itself: packed rows, long rows, one and two mask intervals."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    semi_local = MaskRule(contextual_len=3, sla_k1=5, sla_k2=9)
    for case in (
        cases.Case("", ROWS, RULE),
        cases.Case("", ((300, 212), (511,)), semi_local, row_len=512, block_len=64),
        cases.Case("", ((4102,), (2000, 31)), RULE, row_len=4102, block_len=100),
    ):
        run, shapes = _case_program(case)
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes(jnp.dtype(dtype), qk_dim=128, v_dim=50),
        )
        with jax.sharding.use_abstract_mesh(_tpu_mesh(device.device_kind)):
            lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",))
        assert lowered.compile().as_text().count('custom_call_target="tpu_custom_call"') == 3


def _attend(dtype=jnp.float32, **changes):
    token = jnp.ones((2, 4, 3, 5), dtype)
    built = layout.from_lengths(np.array([4, 2], np.int32), row_len=4)
    return pallas_tpu.hstu_attention(token, token, token, layout=built, **OPTIONS | changes)


def test_refuses_other_platforms():
    with pytest.raises(
        dispatch.UnsupportedByKernel,
        match="platform='cpu': pallas_tpu runs on TPUs only; use 'auto' or 'xla', or "
        "'pallas_tpu_interpret' "
        "to look for faults. To compile for a TPU that is not here, describe it with ",
    ):
        _attend()
    gpu = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):
        with pytest.raises(dispatch.UnsupportedByKernel, match="platform='gpu'"):
            _attend()


def test_auto_for_a_tpu_is_the_kernel():
    token = jnp.ones((2, 4, 3, 5))
    built = layout.from_lengths(np.array([4, 2], np.int32), row_len=4)
    arguments = dict(layout=built, implementation="auto", **OPTIONS)
    attend = functools.partial(api.hstu_attention, **arguments)
    tpu = jax.sharding.AbstractDevice("TPU v5e", 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=tpu)):
        assert api.auto_implementation() == "pallas_tpu"
        lowered = jax.jit(attend).trace(token, token, token).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dtype=jnp.float16), "q.dtype=float16: a TPU has no float16; cast to bfloat16"),
        (dict(tiles=Tiles(96, 1)), "tiles.block_len=96: a TPU needs a multiple of 128; take 128"),
        (dict(tiles=Tiles(128, 2)), "heads_per_step=2: must divide the 3 heads of q; take 1"),
    ],
)
def test_refuses_what_a_tpu_cannot(changes, message):
    with jax.sharding.use_abstract_mesh(_tpu_mesh("TPU v5e")):
        with pytest.raises(dispatch.UnsupportedByKernel, match=message):
            _attend(**changes)


def test_refuses_heads_that_are_too_wide():
    token = jax.ShapeDtypeStruct((1, 4, 1, 8192), jnp.float32)
    built = layout.from_lengths(np.array([4], np.int32), row_len=4)
    attend = functools.partial(pallas_tpu.hstu_attention, layout=built, interpret=True, **OPTIONS)
    with pytest.raises(
        dispatch.UnsupportedByKernel, match=r"q.shape\[3\]=8192, v.shape\[3\]=8192: tiles of 128"
    ):
        jax.eval_shape(attend, token, token, token)


def test_last_query_is_the_linear_program():
    (_, k, v, _), built, _ = _expected()
    rng = np.random.default_rng(1)
    query = rng.standard_normal((len(built.starts), *k.shape[2:])).astype(np.float32)
    arrays = [jnp.asarray(x) for x in (query, k, v)]

    @jax.jit
    def run(q, k, v):
        other = api.hstu_attention_last(q, k, v, layout=built, implementation="xla", **OPTIONS)
        options = dict(OPTIONS, interpret=True)
        return pallas_tpu.hstu_attention_last(q, k, v, layout=built, **options), other

    result, expected = run(*arrays)
    assert np.asarray(result).any()
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
