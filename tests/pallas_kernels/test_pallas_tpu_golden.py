"""The TPU kernels in interpret mode against the recorded numbers of the reference, op `hstu_mha`.

Every suite replays one recording, `-m long` all of them.
"""

import functools

import numpy as np
import pytest

from pallas_kernels.hstu_attention import pallas_tpu
from pallas_kernels.hstu_attention.pallas_tpu_tiles import Tiles
from tests.pallas_kernels import recorded

_ATTEND = functools.partial(
    pallas_tpu.hstu_attention, interpret=True, tiles=Tiles(block_len=8, heads_per_step=1)
)
# Longer rows than recorded, so that the divisor cannot come from them.
_OPTIONS = dict(block_len=7, extra_slots=3, padding=np.nan)


def _assert_recorded(name, meta, arrays):
    rule = recorded.rule_of(meta)
    recorded.assert_recorded(name, meta, arrays, rule, _ATTEND, **_OPTIONS)


def test_a_recording_with_prefix_and_semi_local_mask(golden_dir):
    for name, meta, arrays in recorded.recorded(golden_dir):
        if meta["contextual_seq_len"] and recorded.rule_of(meta).is_semi_local:
            _assert_recorded(name, meta, arrays)
            return
    pytest.skip("no recorded case with contextual tokens and a semi-local mask")


@pytest.mark.long
def test_all_recordings(golden_dir):
    for name, meta, arrays in recorded.recorded(golden_dir):
        _assert_recorded(name, meta, arrays)


@pytest.mark.long
def test_wrong_rule_is_caught(golden_dir):
    recorded.assert_wrong_rule_is_caught(golden_dir, _ATTEND, **_OPTIONS)
