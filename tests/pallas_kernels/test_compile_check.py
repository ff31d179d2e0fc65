"""Kernels for real GPUs on a machine without one: lowered for CUDA, exported, compiled.

Compiling to machine code needs the stand-alone compiler (extra `kernels-check`).
"""

import contextlib
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.hstu_attention import api, cases, compile_check, pallas_triton, tiles
from pallas_kernels.hstu_attention.compile_check import CASES, KINDS
from tests.pallas_kernels import oracle

KERNELS = ["hstu_attention_forward", "hstu_attention_dq", "hstu_attention_dkv"]
H100 = KINDS[90]
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="no stand-alone Triton compiler; pip install -e '.[kernels-check]'",
)


def _gradients(case, implementation):
    targets = cases.targets_of(case)
    attend = functools.partial(
        api.hstu_attention,
        layout=cases.build_layout(case),
        rule=case.rule,
        alpha=0.5,
        divisor=7.0,
        implementation=implementation,
        num_targets=None if targets is None else jnp.asarray(targets),
    )

    def run(q, k, v, g):
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    return run


def _lower(function, *arrays, kind=H100):
    with jax.sharding.use_abstract_mesh(compile_check.abstract_gpu(kind)):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))


def _arrays(case):
    return oracle.random_inputs(len(case.rows), case.row_len)


def _kernel_names(lowered):
    return [kernel.name for kernel in compile_check.kernels_of(lowered)]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_case_lowers_for_cuda(case):
    lowered = _lower(_gradients(case, "pallas_triton"), *_arrays(case))
    assert _kernel_names(lowered) == KERNELS


def test_auto_for_a_gpu_is_the_kernel():
    case = cases.CASES[0]
    run = _gradients(case, "auto")
    assert _kernel_names(_lower(run, *_arrays(case))) == KERNELS
    assert _kernel_names(_lower(run, *_arrays(case), kind="Tesla V100-SXM2-16GB")) == []


def test_it_lowers_under_vmap_remat_and_shard_map():
    case = next(case for case in cases.CASES if case.name == "packed_context")
    arrays = _arrays(case)
    run = _gradients(case, "pallas_triton")
    stacked = [np.stack([x, x]) for x in arrays]
    assert _kernel_names(_lower(jax.vmap(run), *stacked)) == KERNELS

    def loss(q, k, v):
        attend = functools.partial(
            api.hstu_attention,
            layout=cases.build_layout(case),
            rule=case.rule,
            alpha=0.5,
            divisor=7.0,
            implementation="pallas_triton",
        )
        return jax.checkpoint(attend)(q, k, v).sum()

    # Recomputed: the forward kernel runs in the backward pass too, unless its result is not read.
    names = _kernel_names(_lower(jax.grad(loss, argnums=(0, 1, 2)), *arrays[:3]))
    assert set(names) >= set(KERNELS[1:])
    device = jax.sharding.AbstractDevice(H100, None, "gpu")
    mesh = jax.sharding.AbstractMesh(
        (2,), ("chip",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device
    )
    spec = jax.P("chip")
    # Twice the rows, each half with the layout of the case.
    doubled = [np.concatenate([x, x]) for x in arrays]
    with jax.sharding.use_abstract_mesh(mesh):
        sharded = jax.shard_map(run, in_specs=(spec,) * 4, out_specs=(spec,) * 4, check_vma=False)
        lowered = jax.jit(sharded).trace(*doubled).lower(lowering_platforms=("cuda",))
    assert _kernel_names(lowered) == KERNELS


def test_one_function_exports_for_cpu_and_for_cuda():
    """At static sizes, a program a platform: read back, that of the CPU gives the same bits."""
    case = next(case for case in cases.CASES if case.name == "packed_context")
    arrays = _arrays(case)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    function = jax.jit(_gradients(case, "auto"))
    check = jax.export.DisabledSafetyCheck.custom_call(compile_check.TARGET_NAME)
    stored = {}
    for platform, mesh in (
        ("cpu", contextlib.nullcontext()),
        ("cuda", jax.sharding.use_abstract_mesh(compile_check.abstract_gpu(H100))),
    ):
        with mesh:
            exported = jax.export.export(function, platforms=[platform], disabled_checks=[check])
            stored[platform] = exported(*shapes).serialize()
    programs = {name: jax.export.deserialize(data) for name, data in stored.items()}
    for name, num_kernels in (("cpu", 0), ("cuda", 3)):
        program = programs[name]
        assert program.platforms == (name,)
        assert program.mlir_module().count(compile_check.TARGET_NAME) == num_kernels
        assert [aval.shape for aval in program.out_avals] == [
            shape.shape for shape in (shapes[3], *shapes[:3])
        ]
    results = programs["cpu"].call(*arrays)
    for result, expected in zip(results, function(*arrays), strict=True):
        assert np.asarray(result).any()
        np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
    with pytest.raises(ValueError, match="cuda"):
        programs["cuda"].call(*arrays)


def test_old_gpus_are_refused_by_name():
    case = cases.CASES[0]
    with pytest.raises(
        dispatch.UnsupportedByKernel,
        match=r"device='Tesla V100-SXM2-16GB': .* this is compute capability \(7, 0\)",
    ):
        _lower(_gradients(case, "pallas_triton"), *_arrays(case), kind="Tesla V100-SXM2-16GB")


def _assert_fits(case, capability):
    compiled = compile_check.check(case, capability)
    assert [kernel.name for kernel in compiled] == KERNELS
    limit = tiles.shared_memory_limit(divmod(capability, 10))
    for kernel in compiled:
        assert kernel.shared_bytes <= limit, kernel
        # A few spilled registers outside the loop cost nothing; hundreds would be in it.
        assert kernel.stack_bytes <= 64, kernel
        if case.dtype == "float32":
            assert kernel.num_mma == kernel.num_wgmma == 0, kernel  # no TF32
        elif capability == 90 and case.row_len > 64:
            assert kernel.num_wgmma > 0, kernel
        else:
            assert kernel.num_mma > 0, kernel


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
def test_the_middle_case_compiles_to_machine_code(capability):
    _assert_fits(CASES[1], capability)


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("capability", list(KINDS))
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.dtype}-{case.qk_dim}-{case.v_dim}")
def test_every_case_compiles_to_machine_code(case, capability):
    _assert_fits(case, capability)


def test_compile_cases_cover_what_they_should():
    assert len(CASES) >= 12
    assert {case.dtype for case in CASES} == {"bfloat16", "float16", "float32"}
    assert {case.qk_dim for case in CASES} >= {32, 64, 128, 256}
    assert pallas_triton.MIN_CAPABILITY == (8, 0)
