"""The property tests' own comparison: it passes what is right and catches what is not."""

import dataclasses

import numpy as np
import pytest

from pallas_kernels.hstu_attention.mask import MaskRule
from tests.pallas_kernels import dense, drawn, oracle

EXAMPLE = drawn.Example(
    rule=MaskRule(contextual_len=1, max_attn_len=2),
    starts=np.array([1, 7, 14], np.int32),
    lengths=np.array([5, 2, 0], np.int32),
    targets=np.array([2, 0, 0], np.int32),
    seed=1,
    poisoned=(1, 0, 0.9),
    num_rows=2,
    row_len=7,
)


def _dense_mask(example):
    return oracle.dense_mask(
        example.starts, example.lengths, example.targets, example.num_rows, 7, example.rule
    )


def _run_with(mask, *, spreads_poison=True):
    """The dense formula with that mask, and poison only where it belongs or nowhere."""

    def run(q, k, v, g):
        owner = EXAMPLE.owners()
        q, k, v, g = (np.nan_to_num(x) for x in (q, k, v, g))
        results = dense.attention(q, k, v, g, mask, drawn.ALPHA, drawn.DIVISOR)
        is_hit = (owner == 1) & spreads_poison
        return [np.where(is_hit[..., None, None], np.nan, x) for x in results]

    return run


def _compare(run):
    drawn.assert_as_dense(EXAMPLE, run, heads=1, qk_dim=2, v_dim=3)


def test_what_is_right_passes():
    _compare(_run_with(_dense_mask(EXAMPLE)))


@pytest.mark.parametrize(
    "changes",
    [
        dict(rule=MaskRule(max_attn_len=2)),
        dict(rule=MaskRule(contextual_len=1)),
        dict(targets=np.array([1, 0, 0], np.int32)),
    ],
)
def test_another_mask_is_caught(changes):
    with pytest.raises(AssertionError):
        _compare(_run_with(_dense_mask(dataclasses.replace(EXAMPLE, **changes))))


def test_poison_that_is_swallowed_is_caught():
    with pytest.raises(AssertionError):
        _compare(_run_with(_dense_mask(EXAMPLE), spreads_poison=False))


def test_the_mask_as_data_is_that_of_the_pairs():
    bounds, key = EXAMPLE.bounds(), np.arange(7)
    inside = [(key >= lo[..., None]) & (key < hi[..., None]) for lo, hi in _intervals(bounds)]
    np.testing.assert_array_equal(inside[0] | inside[1], _dense_mask(EXAMPLE))


def _intervals(bounds):
    return zip(bounds[:, ::2].swapaxes(0, 1), bounds[:, 1::2].swapaxes(0, 1), strict=True)
