"""The check of a kernel before first use on a device, with planted right and wrong kernels."""

import functools
import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from pallas_kernels import devices, dispatch
from pallas_kernels.hstu_attention import (
    api,
    layout,
    pallas_tpu,
    pallas_triton,
    self_check,
    xla_blockwise,
)
from pallas_kernels.hstu_attention.mask import MaskRule

# This machine's CPU under the name of a GPU: programs run, and nothing is compiled for a GPU.
GPU = devices.Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), is_present=True)
RULE = MaskRule(contextual_len=1)
LAYOUT = layout.from_lengths(np.array([5, 3], np.int32), row_len=5, rule=RULE)
TOKEN = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 1, 4)), jnp.float32)

# The expected values are the same in all tests and take longest to compile.
RESULTS = functools.cache(self_check._results)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Runs a fake kernel where the Triton kernel would run; returns how it is set."""
    monkeypatch.setattr(devices, "current_device", lambda: GPU)
    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setattr(self_check, "_results", RESULTS)
    monkeypatch.setattr(self_check, "_platform_version", lambda _: "fake compiler 1.2")
    monkeypatch.setattr(dispatch, "_logged_fallbacks", set())
    calls = []

    def use(kernel):
        def run(q, k, v, *, interpret, tiles, **options):
            calls.append(q.shape)
            return kernel(q, k, v, **options)

        monkeypatch.setattr(pallas_triton, "_run", run)
        return calls

    return use


def _attend(q, implementation):
    return api.hstu_attention(
        q, q, q, layout=LAYOUT, rule=RULE, alpha=0.5, divisor=5.0, implementation=implementation
    )


def _wrong(q, k, v, **options):
    """As a miscompilation of one tile would look: right but for a few keys."""
    return xla_blockwise.hstu_attention(q, k.at[:, 70:77].multiply(-1.0), v, **options)


def _crashing(q, k, v, **options):
    raise RuntimeError("ptxas died")


def test_a_right_kernel_runs_and_is_checked_once(pretended_gpu):
    calls = pretended_gpu(xla_blockwise.hstu_attention)
    expected = _attend(TOKEN, "xla")
    for _ in range(2):
        np.testing.assert_array_equal(_attend(TOKEN, "pallas_triton"), expected)
    assert [shape for shape in calls if shape != TOKEN.shape] == [(4, 300, 2, 4)]
    assert calls.count(TOKEN.shape) == 2


def test_a_wrong_kernel_is_refused_by_name(pretended_gpu):
    pretended_gpu(_wrong)
    with pytest.raises(
        dispatch.UnsupportedByKernel,
        match=r"implementation='pallas_triton': refused by its self-check on this device, float32, "
        r"widths 4 and 4: largest error of o is .* of the largest value \(device NVIDIA H100 80GB "
        rf"HBM3, driver .*, jax {jax.__version__}, jaxlib .*, compiler fake compiler 1.2\); use",
    ):
        _attend(TOKEN, "pallas_triton")


def test_a_kernel_that_does_not_compile_is_refused(pretended_gpu):
    pretended_gpu(_crashing)
    with pytest.raises(dispatch.UnsupportedByKernel, match="RuntimeError: ptxas died"):
        _attend(TOKEN, "pallas_triton")


def test_auto_falls_back_with_one_line(pretended_gpu, caplog):
    calls = pretended_gpu(_wrong)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(_attend(TOKEN, "auto"), _attend(TOKEN, "xla"))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("hstu_attention: implementation pallas_triton is not used: impl")
    assert len(calls) == 1  # the self-check alone


def test_the_check_runs_inside_traces(pretended_gpu):
    """First use is usually under jit, grad and shard_map, which must not swallow the check."""
    calls = pretended_gpu(xla_blockwise.hstu_attention)
    mesh = jax.make_mesh((2,), ("chip",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(q):
        built = layout.from_lengths(np.array([5], np.int32), row_len=5, rule=RULE)
        out = api.hstu_attention(
            q, q, q, layout=built, rule=RULE, alpha=0.5, divisor=5.0, implementation="pallas_triton"
        )
        return (out**2).sum()

    spec = jax.P("chip")
    gradient = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    assert np.isfinite(np.asarray(jax.jit(gradient)(TOKEN))).all()
    assert (4, 300, 2, 4) in calls
    assert list(self_check._verdicts.values()) == [""]


def test_auto_on_this_cpu_is_xla():
    assert api.auto_implementation() == "xla"
    np.testing.assert_array_equal(_attend(TOKEN, "auto"), _attend(TOKEN, "xla"))


def test_auto_takes_the_kernel_on_a_gpu_and_says_so_once(pretended_gpu, caplog, monkeypatch):
    calls = pretended_gpu(xla_blockwise.hstu_attention)
    monkeypatch.setattr(dispatch, "_logged_choices", set())
    assert api.auto_implementation() == "pallas_triton"
    with caplog.at_level(logging.INFO, logger="pallas_kernels.dispatch"):
        _attend(TOKEN, "auto")
        _attend(TOKEN, "auto")
    assert calls.count(TOKEN.shape) == 2
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["hstu_attention: 'auto' is pallas_triton"]


@pytest.mark.parametrize(
    "device",
    [
        devices.Device("gpu", "Tesla V100-SXM2-16GB", (7, 0), is_present=True),
        devices.Device("gpu", "AMD Instinct MI300X", None, is_present=True),
    ],
)
def test_auto_on_other_gpus_is_xla(device, monkeypatch):
    monkeypatch.setattr(devices, "current_device", lambda: device)
    np.testing.assert_array_equal(_attend(TOKEN, "auto"), _attend(TOKEN, "xla"))
    with pytest.raises(dispatch.UnsupportedByKernel, match="needs an NVIDIA GPU of compute"):
        _attend(TOKEN, "pallas_triton")


def test_no_memory_is_no_verdict(pretended_gpu):
    pretended_gpu(_full)
    for _ in range(2):
        with pytest.raises(dispatch.UnsupportedByKernel, match="no memory for its self-check"):
            _attend(TOKEN, "pallas_triton")
    pretended_gpu(xla_blockwise.hstu_attention)
    np.testing.assert_array_equal(_attend(TOKEN, "pallas_triton"), _attend(TOKEN, "xla"))


@pytest.fixture
def second_process(monkeypatch):
    """Pretends that this is process 0 of 2; returns how the verdict of the other one is set."""
    gathered = []

    def use(verdict):
        def gather(message):
            assert message.dtype == np.uint8 and threading.current_thread() is not main
            other = np.zeros_like(message)
            other[: len(verdict)] = np.frombuffer(verdict.encode(), np.uint8)
            gathered.append(bytes(message).rstrip(b"\0").decode())
            return np.stack([message, other])

        monkeypatch.setattr(multihost_utils, "process_allgather", gather)
        return gathered

    main = threading.current_thread()
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    return use


def test_a_kernel_that_is_right_in_all_processes_runs(pretended_gpu, second_process):
    pretended_gpu(xla_blockwise.hstu_attention)
    gathered = second_process("")
    for _ in range(2):
        np.testing.assert_array_equal(_attend(TOKEN, "pallas_triton"), _attend(TOKEN, "xla"))
    assert gathered == [""]  # asked once


def test_a_kernel_that_another_process_refuses_is_refused(pretended_gpu, second_process):
    pretended_gpu(xla_blockwise.hstu_attention)
    gathered = second_process("largest error of dq is 0.7 of the largest value")
    for _ in range(2):
        with pytest.raises(
            dispatch.UnsupportedByKernel,
            match="widths 4 and 4: process 1 of 2: largest error of dq is 0.7 of the largest value",
        ):
            _attend(TOKEN, "pallas_triton")
    np.testing.assert_array_equal(_attend(TOKEN, "auto"), _attend(TOKEN, "xla"))
    assert gathered == [""]


def test_a_kernel_that_is_wrong_here_is_told_to_the_others(pretended_gpu, second_process):
    pretended_gpu(_wrong)
    gathered = second_process("")
    with pytest.raises(dispatch.UnsupportedByKernel, match="process 0 of 2: largest error of o is"):
        _attend(TOKEN, "pallas_triton")
    assert len(gathered) == 1 and gathered[0].startswith("largest error of o is")


def test_no_memory_in_another_process_is_no_verdict(pretended_gpu, second_process):
    """Also not where this process has one: all ask again together."""
    for kernel in (xla_blockwise.hstu_attention, _wrong):
        pretended_gpu(kernel)
        second_process("XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory")
        with pytest.raises(
            dispatch.UnsupportedByKernel, match=r"no memory for its self-check \(process 1 of 2: "
        ):
            _attend(TOKEN, "pallas_triton")
    second_process("")
    pretended_gpu(xla_blockwise.hstu_attention)
    np.testing.assert_array_equal(_attend(TOKEN, "pallas_triton"), _attend(TOKEN, "xla"))


def _full(q, k, v, **options):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_each_choice_of_tiles_is_checked(pretended_gpu):
    calls = pretended_gpu(xla_blockwise.hstu_attention)
    for row_len in (5, 200):
        long = layout.from_lengths(np.array([5, 3], np.int32), row_len=row_len, rule=RULE)
        q = jnp.zeros((2, row_len, 1, 4))
        options = dict(layout=long, rule=RULE, alpha=0.5, divisor=5.0)
        api.hstu_attention(q, q, q, implementation="pallas_triton", **options)
    assert calls.count((4, 300, 2, 4)) == 2


def test_the_small_case_has_the_heads_that_tiles_of_a_tpu_need(monkeypatch):
    asked = {}
    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setattr(
        self_check, "require", lambda *args, num_heads, tiles, **_: asked.update({tiles: num_heads})
    )
    tpu = devices.Device("tpu", "TPU v5e", None, is_present=True)
    monkeypatch.setattr(devices, "current_device", lambda: tpu)
    monkeypatch.setattr(pallas_tpu, "_run", lambda q, k, v, **_: v)
    for num_heads in (1, 6, 8):
        q = jnp.zeros((2, 5, num_heads, 16))
        pallas_tpu.hstu_attention(q, q, q, layout=LAYOUT, rule=RULE, alpha=0.5, divisor=5.0)
    assert len(asked) > 1
    assert all(heads % tiles.heads_per_step == 0 for tiles, heads in asked.items())
