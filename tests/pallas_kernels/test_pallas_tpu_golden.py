"""The TPU kernels in interpret mode against the recorded numbers of the reference, op `hstu_mha`.

Every suite replays one recording, `-m long` all of them.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hstu_attention import layout, pallas_tpu
from pallas_kernels.hstu_attention.mask import MaskRule
from pallas_kernels.hstu_attention.pallas_tpu_tiles import Tiles

OP = "hstu_mha"
TILES = Tiles(block_len=8, heads_per_step=1)


def _recorded(golden_dir):
    recorded = []
    for path in sorted(golden_dir.glob("*.npz")):
        with np.load(path) as arrays:
            meta = json.loads(str(arrays["meta_json"]))
            if meta["op"] == OP:
                recorded.append((path.stem, meta, dict(arrays)))
    if not recorded:
        pytest.skip(f"no file of op {OP} in {golden_dir}")
    return recorded


def _rule(meta):
    return MaskRule(
        contextual_len=meta["contextual_seq_len"],
        max_attn_len=meta["max_attn_len"],
        min_full_attn_len=meta["min_full_attn_seq_len"],
        sla_k1=meta["sla_k1"],
        sla_k2=meta["sla_k2"],
    )


def _assert_recorded(name, meta, arrays, rule):
    """Runs one recording by the given rule and compares all four arrays."""
    lengths = np.array(meta["lengths"], np.int32)
    row_len = meta["max_seq_len"]
    targets = arrays["in.num_targets"].astype(np.int32) if meta["has_num_targets"] else None
    # Longer rows than recorded, so that the divisor cannot come from them.
    built = layout.from_lengths(
        lengths, row_len=row_len + 3, block_len=7, rule=rule, num_targets=targets
    )
    is_token = np.arange(built.row_len) < lengths[:, None]

    def to_rows(tokens):
        rows = np.full((*is_token.shape, *tokens.shape[1:]), np.nan, np.float32)
        rows[is_token] = tokens
        return rows

    attend = functools.partial(
        pallas_tpu.hstu_attention,
        layout=built,
        rule=rule,
        alpha=meta["alpha"],
        divisor=float(row_len if meta["scaling_seqlen"] == -1 else meta["scaling_seqlen"]),
        num_targets=None if targets is None else jnp.asarray(targets),
        interpret=True,
        tiles=TILES,
    )

    @jax.jit
    def run(q, k, v, g):
        output, vjp = jax.vjp(attend, q, k, v)
        return output, *vjp(g)

    results = run(*(to_rows(arrays[key]) for key in ("in.q", "in.k", "in.v", "cot.o")))
    keys = ("out.o", "grad_in.q", "grad_in.k", "grad_in.v")
    for key, result in zip(keys, results, strict=True):
        # The tolerances that the recording states for this family.
        rtol, atol = (1e-5, 2e-6) if key == "out.o" else (1e-4, 1e-5)
        np.testing.assert_allclose(
            np.asarray(result)[is_token], arrays[key], rtol, atol, err_msg=f"{name} {key}"
        )


def test_a_recording_with_prefix_and_semi_local_mask(golden_dir):
    for name, meta, arrays in _recorded(golden_dir):
        if meta["contextual_seq_len"] and _rule(meta).is_semi_local:
            _assert_recorded(name, meta, arrays, _rule(meta))
            return
    pytest.skip("no recorded case with contextual tokens and a semi-local mask")


@pytest.mark.long
def test_all_recordings(golden_dir):
    for name, meta, arrays in _recorded(golden_dir):
        _assert_recorded(name, meta, arrays, _rule(meta))


@pytest.mark.long
def test_wrong_rule_is_caught(golden_dir):
    for name, meta, arrays in _recorded(golden_dir):
        if meta["contextual_seq_len"] and not meta["max_attn_len"] and not meta["sla_k1"]:
            with pytest.raises(AssertionError, match=f"{name} out.o"):
                _assert_recorded(name, meta, arrays, MaskRule())
            return
    pytest.skip("no recorded case with contextual tokens")
