"""The reference's recordings of op `hstu_mha`, and the comparison with them, for any path.

Which paths are compared is in `test_hstu_attention_golden.py` and `test_pallas_tpu_golden.py`.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hstu_attention import layout
from pallas_kernels.hstu_attention.mask import MaskRule

OP = "hstu_mha"


def recorded(golden_dir):
    """(name, meta, arrays) of every recording."""
    cases = []
    for path in sorted(golden_dir.glob("*.npz")):
        with np.load(path) as arrays:
            meta = json.loads(str(arrays["meta_json"]))
            if meta["op"] == OP:
                cases.append((path.stem, meta, dict(arrays)))
    if not cases:
        pytest.skip(f"no file of op {OP} in {golden_dir}")
    return cases


def rule_of(meta):
    """The mask of a recording."""
    return MaskRule(
        contextual_len=meta["contextual_seq_len"],
        max_attn_len=meta["max_attn_len"],
        min_full_attn_len=meta["min_full_attn_seq_len"],
        sla_k1=meta["sla_k1"],
        sla_k2=meta["sla_k2"],
    )


def setup(meta, arrays, *, block_len=8, extra_slots=0):
    """Lengths, targets and layout of a recording; rows `extra_slots` longer than recorded."""
    lengths = np.array(meta["lengths"], np.int32)
    targets = arrays["in.num_targets"].astype(np.int32) if meta["has_num_targets"] else None
    built = layout.from_lengths(
        lengths,
        row_len=meta["max_seq_len"] + extra_slots,
        block_len=block_len,
        rule=rule_of(meta),
        num_targets=targets,
    )
    return lengths, None if targets is None else jnp.asarray(targets), built


def assert_recorded(name, meta, arrays, rule, attend, *, padding=0.0, **layout_options):
    """Runs one recording by the given rule and compares all four arrays.

    Args:
        name: of the file, for messages.
        meta: its description.
        arrays: its arrays.
        rule: the mask to run it by.
        attend: a callable with the signature of `xla_blockwise.hstu_attention`.
        padding: what stands in slots without a token.
        **layout_options: of `setup`.
    """
    lengths, targets, built = setup(meta, arrays, **layout_options)
    is_token = np.arange(built.row_len) < lengths[:, None]
    divisor = meta["scaling_seqlen"] if meta["scaling_seqlen"] != -1 else meta["max_seq_len"]
    attend = functools.partial(
        attend,
        layout=built,
        rule=rule,
        alpha=meta["alpha"],
        divisor=float(divisor),
        num_targets=targets,
    )

    def to_rows(tokens):
        rows = np.full((*is_token.shape, *tokens.shape[1:]), padding, np.float32)
        rows[is_token] = tokens
        return rows

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


def assert_wrong_rule_is_caught(golden_dir, attend, **options):
    """The comparison fails when the contextual prefix is taken for history."""
    for name, meta, arrays in recorded(golden_dir):
        if meta["contextual_seq_len"] and not meta["max_attn_len"] and not meta["sla_k1"]:
            with pytest.raises(AssertionError, match=f"{name} out.o"):
                assert_recorded(name, meta, arrays, MaskRule(), attend, **options)
            return
    pytest.skip("no recorded case with contextual tokens")
