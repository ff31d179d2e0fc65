"""Choice of implementation, argument checks of the op, timing."""

import inspect
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, timing
from pallas_kernels.hstu_attention import api, layout
from pallas_kernels.hstu_attention.mask import MaskRule

# The annotation checks of the test session would answer first; these are the checks users meet.
ATTEND, ATTEND_LAST = (inspect.unwrap(f) for f in (api.hstu_attention, api.hstu_attention_last))
LAYOUT = layout.from_lengths(np.array([4, 2], np.int32), row_len=4)


def _arguments(**changes):
    token = jnp.ones((2, 4, 3, 5))
    return {
        "q": token,
        "k": token,
        "v": jnp.ones((2, 4, 3, 6)),
        "layout": LAYOUT,
        "rule": MaskRule(),
        "alpha": 0.5,
        "divisor": 4.0,
    } | changes


def _refuse(*_):
    raise dispatch.UnsupportedByKernel("width=5: must be a multiple of 8")


def test_auto_falls_back_and_logs_once(caplog):
    table = {"kernel": _refuse, "xla": lambda x: x + 1}
    options = dict(auto_order=("kernel", "xla"), op="test_op", call=lambda kernel: kernel(1))
    with caplog.at_level(logging.WARNING):
        assert dispatch.run("auto", table, **options) == 2
        assert dispatch.run("auto", table, **options) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "test_op: implementation kernel is not used: width=5: must be a multiple of 8"
    ]


def test_by_name_runs_or_raises():
    table = {"kernel": _refuse, "xla": lambda x: x + 1}
    options = dict(auto_order=("kernel", "xla"), op="op", call=lambda kernel: kernel(1))
    with pytest.raises(dispatch.UnsupportedByKernel, match="width=5"):
        dispatch.run("kernel", table, **options)
    with pytest.raises(dispatch.UnsupportedByKernel, match="width=5"):
        dispatch.run("auto", table, **options | {"auto_order": ("kernel",)})
    with pytest.raises(ValueError, match="implementation='xlaa': op has 'auto', 'kernel', 'xla'; "
                       "did you mean 'xla'"):  # fmt: skip
        dispatch.run("xlaa", table, **options)
    with pytest.raises(ValueError, match="implementation='qqq': .*; use 'auto'"):
        dispatch.run("qqq", table, **options)


def _overlapping():
    starts = np.array([0, 2], np.int32)
    return layout.SequenceLayout(
        starts=starts,
        lengths=np.array([4, 2], np.int32),
        block_pairs=LAYOUT.block_pairs,
        num_block_pairs=LAYOUT.num_block_pairs,
        num_rows=2,
        row_len=4,
        block_len=4,
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": jnp.ones((2, 4, 15))}, ValueError, r"q.shape=\(2, 4, 15\): must have 4 axes \[R L"),
        ({"v": jnp.ones((8, 3, 6))}, ValueError, r"v.shape=\(8, 3, 6\): must have 4 axes \[R L H"),
        ({"q": jnp.ones((2, 4, 3, 7))}, ValueError, r"axis 3 \(K\) must be 5 as in k; got 7"),
        ({"v": jnp.ones((2, 4, 2, 6))}, ValueError, r"v.*axis 2 \(H\) must be 3 as in k; got 2"),
        ({"k": jnp.ones((3, 4, 3, 5))}, ValueError, r"k.*axis 0 \(R\) must be 2 as in layout"),
        ({"v": jnp.ones((2, 5, 3, 6))}, ValueError, r"v.*axis 1 \(L\) must be 4 as in layout"),
        ({"q": jnp.ones((2, 4, 3, 5), jnp.int32)}, TypeError, "q.dtype=int32: must be one of"),
        (
            {"k": jnp.ones((2, 4, 3, 5), jnp.bfloat16)},
            TypeError,
            "k.dtype=bfloat16: must equal q.dtype=float32",
        ),
        ({"alpha": 0.0}, ValueError, "alpha=0.0: must be positive and finite"),
        ({"divisor": float("inf")}, ValueError, "divisor=inf: must be positive and finite"),
        ({"divisor": jnp.ones(())}, TypeError, "divisor=.*: must be a Python number"),
        ({"layout": _overlapping()}, ValueError, r"starts\[1\]=2.* begins before the end"),
        ({"rule": MaskRule(contextual_len=3)}, ValueError, "shorter than contextual_len=3"),
        ({"implementation": "triton"}, ValueError, "implementation='triton': hstu_attention has"),
        (
            {"num_targets": jnp.ones(3, jnp.int32)},
            ValueError,
            r"num_targets.shape=\(3,\): axis 0 \(S\) must be 2 as in layout",
        ),
    ],
)
def test_bad_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        ATTEND(**_arguments(**changes))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (jnp.ones((2, 4, 3, 5)), r"must have 3 axes \[S H K\]"),
        (jnp.ones((3, 3, 5)), r"axis 0 \(S\) must be 2 as in layout; got 3"),
        (jnp.ones((2, 2, 5)), r"axis 1 \(H\) must be 3 as in k; got 2"),
        (jnp.ones((2, 3, 4)), r"axis 2 \(K\) must be 5 as in k; got 4"),
    ],
)
def test_bad_last_queries_are_refused(query, message):
    with pytest.raises(ValueError, match=message):
        ATTEND_LAST(**_arguments(q=query))


def test_timing_refuses_zero_runs():
    with pytest.raises(ValueError, match="num_runs=0: must be at least 1"):
        timing.time_function(jnp.sin, jnp.ones(2), num_runs=0)


def test_short_calls_are_timed_in_a_queue_and_long_ones_once():
    calls = []

    def record(x):
        jax.debug.callback(lambda: calls.append(1))
        return x + 1

    result = timing.time_function(record, jnp.ones(2), num_runs=1, queue_ms=0.0)
    jax.effects_barrier()
    assert (result.num_runs, len(calls)) == (1, 3)
    calls.clear()
    timing.time_function(record, jnp.ones(2), num_runs=1, queue_ms=1e9)
    jax.effects_barrier()
    assert len(calls) == 202
    assert timing.time_function(jnp.sin, jnp.ones(2), num_runs=9, max_s=0.0).num_runs == 1
