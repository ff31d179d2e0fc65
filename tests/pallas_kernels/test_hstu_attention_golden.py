"""Attention against the recorded numbers of the reference: all files of op `hstu_mha`.

`tests/test_golden.py` replays them in every suite; here, with `-m long`, by name of the path.
"""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.hstu_attention import api, reference
from tests.pallas_kernels import recorded


def _by(implementation):
    return functools.partial(api.hstu_attention, implementation=implementation)


@pytest.mark.long
def test_recorded_attention(golden_dir):
    cases = recorded.recorded(golden_dir)
    for name, meta, arrays in cases:
        recorded.assert_recorded(name, meta, arrays, recorded.rule_of(meta), _by("xla"))
    print(f"{len(cases)} recorded cases of {recorded.OP}")


@pytest.mark.long
@pytest.mark.parametrize("implementation", ["pallas_triton_interpret"])
def test_recorded_attention_by_kernels(golden_dir, implementation):
    """A program for every file: widths and lengths differ."""
    for name, meta, arrays in recorded.recorded(golden_dir):
        rule = recorded.rule_of(meta)
        recorded.assert_recorded(name, meta, arrays, rule, _by(implementation))


def test_wrong_rule_is_caught(golden_dir):
    recorded.assert_wrong_rule_is_caught(golden_dir, _by("xla"))


def test_recorded_masks(golden_dir):
    for name, meta, arrays in recorded.recorded(golden_dir):
        if "aux.mask" not in arrays:
            continue
        lengths, targets, built = recorded.setup(meta, arrays)
        run = jax.jit(functools.partial(reference.attention_mask, rule=recorded.rule_of(meta)))
        mask = np.asarray(run(built, num_targets=targets))
        for user, length in enumerate(lengths):
            np.testing.assert_array_equal(
                mask[user, :length, :length],
                arrays["aux.mask"][user, :length, :length],
                err_msg=f"{name} user {user}",
            )
