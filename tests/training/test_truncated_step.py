"""A truncating model in the training step: the batch's second layout reaches the sharded model."""

import functools

import jax

from hstu_jax.training import run as run_lib
from tests.training.small_config import small_config


def test_a_truncating_run_traces_on_two_devices(small_store, tmp_path):
    config = small_config(
        small_store,
        tmp_path,
        data__num_groups=2,
        model__initialization="reference",
        model__user_tower__hstu__attn_truncation_split_layer=1,
        model__user_tower__hstu__attn_truncation_tail_len=8,
        model__user_tower__hstu__stu__contextual_seq_len=0,
        model__user_tower__hstu__stu__sla_k1=4,
    )
    run = run_lib.build_run(config, small_store, devices=jax.devices()[:2])
    state = jax.eval_shape(functools.partial(run_lib.init_state, run))
    batch = run.pipeline.batch_at(0).batch
    (shape,) = run.pipeline.shapes
    assert shape.tail_segment_len == 14 and batch.tail.segment_lengths.max() == 14
    after, metrics = jax.eval_shape(run.train_step, state, run.put(batch))
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert metrics.loss_sum.shape == ()
