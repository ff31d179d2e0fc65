"""The model's `kernel` reaches the attention of every layer: by name it runs or raises."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.hstu_attention import compile_check
from tests.model import batches, test_stu

PLACEMENT = batches.place([7, 3, 6], row_len=10, packed=True, block_len=10)
X = jnp.zeros((PLACEMENT.num_rows, PLACEMENT.row_len, test_stu.WIDTH))


@pytest.mark.parametrize("method", ["__call__", "last_position"])
def test_by_name_on_a_cpu_is_refused(method):
    layer = test_stu.make_layer(implementation="pallas_triton")
    params = test_stu.random_params(test_stu.make_layer(), PLACEMENT)
    sequence = test_stu.sequence_of(PLACEMENT)
    with pytest.raises(dispatch.UnsupportedByKernel, match="device='cpu': pallas_triton needs"):
        jax.eval_shape(lambda x: layer.apply({"params": params}, x, sequence, method=method), X)


@pytest.mark.parametrize("kernel", ["auto", "pallas_triton"])
def test_for_a_gpu_a_stack_runs_the_kernels_once(kernel):
    """Forward, dq, dk and dv of the first layer; the last one has one query per user."""
    stack = test_stu.make_stack(2, implementation=kernel)
    params = test_stu.random_params(test_stu.make_stack(2), PLACEMENT)
    sequence = test_stu.sequence_of(PLACEMENT)

    def loss(params, x):
        return jnp.sum(stack.apply({"params": params}, x, sequence, method="last_position") ** 2)

    with jax.sharding.use_abstract_mesh(compile_check.abstract_gpu(compile_check.KINDS[90])):
        traced = jax.jit(jax.grad(loss)).trace(params, X)
        lowered = traced.lower(lowering_platforms=("cuda",))
    names = sorted(kernel.name for kernel in compile_check.kernels_of(lowered))
    assert names == ["hstu_attention_dkv", "hstu_attention_dq", "hstu_attention_forward"]
