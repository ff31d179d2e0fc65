"""Attention against the recorded numbers of the reference: all files of op `hstu_mha`."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hstu_attention import api, layout, reference
from pallas_kernels.hstu_attention.mask import MaskRule

OP = "hstu_mha"


def _recorded(golden_dir):
    cases = []
    for path in sorted(golden_dir.glob("*.npz")):
        with np.load(path) as arrays:
            meta = json.loads(str(arrays["meta_json"]))
            if meta["op"] == OP:
                cases.append((path.stem, meta, dict(arrays)))
    if not cases:
        pytest.skip(f"no file of op {OP} in {golden_dir}")
    return cases


def _rule(meta):
    return MaskRule(
        contextual_len=meta["contextual_seq_len"],
        max_attn_len=meta["max_attn_len"],
        min_full_attn_len=meta["min_full_attn_seq_len"],
        sla_k1=meta["sla_k1"],
        sla_k2=meta["sla_k2"],
    )


def _to_rows(tokens, lengths, row_len):
    rows = np.zeros((len(lengths), row_len, *tokens.shape[1:]), np.float32)
    rows[np.arange(row_len) < lengths[:, None]] = tokens
    return rows


def _setup(meta, arrays):
    lengths = np.array(meta["lengths"], np.int32)
    targets = arrays["in.num_targets"].astype(np.int32) if meta["has_num_targets"] else None
    built = layout.from_lengths(
        lengths, row_len=meta["max_seq_len"], block_len=8, rule=_rule(meta), num_targets=targets
    )
    return lengths, None if targets is None else jnp.asarray(targets), built


def _assert_recorded(name, meta, arrays, rule, implementation="xla"):
    """Runs one recorded case by the given rule and compares all four arrays."""
    lengths, targets, built = _setup(meta, arrays)
    to_rows = functools.partial(_to_rows, lengths=lengths, row_len=built.row_len)
    is_token = np.arange(built.row_len) < lengths[:, None]
    divisor = meta["scaling_seqlen"] if meta["scaling_seqlen"] != -1 else meta["max_seq_len"]
    attend = functools.partial(
        api.hstu_attention,
        layout=built,
        rule=rule,
        alpha=meta["alpha"],
        divisor=float(divisor),
        implementation=implementation,
        num_targets=targets,
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


def test_recorded_attention(golden_dir):
    recorded = _recorded(golden_dir)
    for name, meta, arrays in recorded:
        _assert_recorded(name, meta, arrays, _rule(meta))
    print(f"{len(recorded)} recorded cases of {OP}")


@pytest.mark.long
@pytest.mark.parametrize("implementation", ["pallas_triton_interpret"])
def test_recorded_attention_by_kernels(golden_dir, implementation):
    """A program for every file: widths and lengths differ."""
    for name, meta, arrays in _recorded(golden_dir):
        _assert_recorded(name, meta, arrays, _rule(meta), implementation)


def test_wrong_rule_is_caught(golden_dir):
    """The same comparison fails when the contextual prefix is taken for history."""
    for name, meta, arrays in _recorded(golden_dir):
        if meta["contextual_seq_len"] and not meta["max_attn_len"] and not meta["sla_k1"]:
            with pytest.raises(AssertionError, match=f"{name} out.o"):
                _assert_recorded(name, meta, arrays, MaskRule())
            return
    pytest.skip("no recorded case with contextual tokens")


def test_recorded_masks(golden_dir):
    for name, meta, arrays in _recorded(golden_dir):
        if "aux.mask" not in arrays:
            continue
        lengths, targets, built = _setup(meta, arrays)
        run = jax.jit(functools.partial(reference.attention_mask, rule=_rule(meta)))
        mask = np.asarray(run(built, num_targets=targets))
        for user, length in enumerate(lengths):
            np.testing.assert_array_equal(
                mask[user, :length, :length],
                arrays["aux.mask"][user, :length, :length],
                err_msg=f"{name} user {user}",
            )
