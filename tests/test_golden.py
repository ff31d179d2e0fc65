"""Parity with the reference: every recorded case of the folder, forward and gradients.

`HSTU_GOLDEN_DIR` names the folder (default `../shared/golden`, else the copies in `tests/golden`).
Cases are chosen by their recorded operation and arguments, never by name; every one must pass.
"""

import collections
import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest

from hstu_jax.model import encoder, normalization, stu, time_buckets
from hstu_jax.tables import optimizers
from hstu_jax.training import schedules
from pallas_kernels.hstu_attention import api as attention
from tests import (
    golden_cases,
    golden_model_runners,
    golden_optimizer_runners,
    golden_runners,
    golden_scoring,
    golden_stack_runners,
    golden_tower_runners,
    golden_training_runners,
)

FOLDER = golden_cases.golden_folder()
CASES = golden_cases.load_cases(FOLDER)

RUNNERS = {
    "hstu_mha": golden_stack_runners.run_attention,
    "delta_hstu_mha": golden_stack_runners.run_delta_attention,
    "STUStack": golden_stack_runners.run_stu_stack,
    "HSTUPositionalEncoder": golden_stack_runners.run_positional_encoder,
    "SimpleActionEncoder": golden_runners.run_action_encoder,
    "SimpleContextualizedMLP": golden_tower_runners.run_simple_mlp,
    "ParameterizedContextualizedMLP": golden_tower_runners.run_parameterized_mlp,
    "SwishLayerNorm": golden_tower_runners.run_swish_layer_norm,
    "LayerNorm": golden_tower_runners.run_layer_norm,
    "L2NormPostprocessor": golden_tower_runners.run_postprocessor,
    "LayerNormPostprocessor": golden_tower_runners.run_postprocessor,
    "TimestampLayerNormPostprocessor": golden_tower_runners.run_postprocessor,
    "MLP": golden_tower_runners.run_mlp,
    "input_preprocessor": golden_tower_runners.run_preprocessor,
    "HSTUMatchEncoder": golden_model_runners.run_encoder,
    "HSTUMatch": golden_model_runners.run_match,
    "sim_with_sampler": golden_scoring.run_scores,
    "fbgemm EXACT_ROWWISE_ADAGRAD": golden_optimizer_runners.run_rowwise_adagrad,
    "lr_scheduler": golden_optimizer_runners.run_lr_schedules,
    "HSTUMatch train steps": golden_training_runners.run_training,
}


def run(case):
    """Replays a case; an unknown operation is a failure."""
    assert case.op in RUNNERS, f"{case.path.name}: unknown op {case.op!r}; write a runner for it"
    RUNNERS[case.op](case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.path.stem)
def test_recorded_case(case):
    run(case)


def test_coverage_is_reported(capsys):
    assert CASES, f"HSTU_GOLDEN_DIR={FOLDER}: holds no .npz files; name the folder of the cases"
    families = collections.Counter(case.path.stem[0] for case in CASES)
    line = (
        f"golden: {len(CASES)} cases of {FOLDER} replayed "
        f"({', '.join(f'{family} {count}' for family, count in sorted(families.items()))})"
    )
    with capsys.disabled():
        # To stderr: the workers of pytest-xdist have no terminal of their own on stdout.
        print("", line, sep="\n", file=sys.stderr)


def test_an_unknown_operation_fails():
    case = golden_cases.Case(FOLDER / "new.npz", {"op": "HSTUNextYear"})
    with pytest.raises(AssertionError, match="unknown op 'HSTUNextYear'"):
        run(case)


# The right functions, for the wrong ones below to start from.
_ATTENTION = attention.hstu_attention
_SPLIT = stu.StuLayer._split
_BUILD_SEQUENCE = encoder.build_sequence
_MANUAL = schedules._manual


def _linear_attention(q, k, v, *, alpha, **options):
    """SiLU replaced by its slope at 0, by making the logits small: right for small logits only."""
    shrink = 1e-3
    return _ATTENTION(q, k, v, alpha=alpha * shrink, **options) / shrink


def _silu_on_values(self, projected, names):
    parts = _SPLIT(self, projected, names)
    return {name: jax.nn.silu(part) if name == "v" else part for name, part in parts.items()}


def _reciprocal_buckets(gap_s, *, num_time_buckets, increments, fn):
    curve = jnp.sqrt if fn == "sqrt" else jnp.log
    curved = curve(jnp.maximum(gap_s, 1e-6) * jnp.float32(1 / increments))
    share = jnp.clip(curved * jnp.float32(1 / num_time_buckets), 0, 1)
    return (share * num_time_buckets).astype(jnp.int32)


def _unbiased(x, *, eps):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / (x.shape[-1] - 1)
    return centred / jnp.sqrt(variance + eps)


def _first_token(layout, user_index):
    sequence, segment = _BUILD_SEQUENCE(layout, user_index)
    return dataclasses.replace(sequence, last_slot=jnp.asarray(layout.starts)), segment


def _sum_of_squares(self, rows):
    grown = rows.slots["accumulator"] + jnp.sum(rows.gradients**2, axis=1)
    change = -rows.learning_rate / (jnp.sqrt(grown) + 1e-8)[:, None] * rows.gradients
    return optimizers.RowChange(change, {"accumulator": grown})


def _switch_at_the_size(config, base, step):
    return _MANUAL(config, base, step + 1)


# (what is wrong, where, the wrong function, operations of which a case must notice)
WRONG_VARIANTS = {
    "A: activation is linear": (attention, "hstu_attention", _linear_attention, ["hstu_mha"]),
    "B: v passes through SiLU": (stu.StuLayer, "_split", _silu_on_values, ["STUStack"]),
    "C: buckets by reciprocal": (
        time_buckets,
        "time_buckets",
        _reciprocal_buckets,
        ["HSTUPositionalEncoder"],
    ),
    "D: variance is unbiased": (
        normalization,
        "standardize",
        _unbiased,
        ["SimpleContextualizedMLP", "SwishLayerNorm", "LayerNorm"],
    ),
    "E: first token is read": (
        encoder,
        "build_sequence",
        _first_token,
        ["HSTUMatchEncoder", "HSTUMatch"],
    ),
    "F: positive is not in the denominator": (
        jax.nn,
        "softplus",
        lambda x: x,
        ["sim_with_sampler"],
    ),
    "G: squares are summed": (
        optimizers.RowwiseAdagrad,
        "step",
        _sum_of_squares,
        ["fbgemm EXACT_ROWWISE_ADAGRAD"],
    ),
    "I: a step too early": (schedules, "_manual", _switch_at_the_size, ["lr_scheduler"]),
}


@pytest.mark.parametrize("name", WRONG_VARIANTS)
def test_wrong_variant_is_caught(name, monkeypatch):
    owner, attribute, wrong, ops = WRONG_VARIANTS[name]
    candidates = [case for case in CASES if case.op in ops]
    if not candidates:  # a folder without that family
        copies = golden_cases.load_cases(golden_cases.COPIES)
        candidates = [case for case in copies if case.op in ops]
    monkeypatch.setattr(owner, attribute, wrong)
    for case in candidates:
        try:
            run(case)
        except AssertionError:
            return
    pytest.fail(f"{name}: {len(candidates)} cases pass all the same")
