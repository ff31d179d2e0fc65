"""The paper's layer: times of tokens by hand, against float64 loops, at the last position, cut."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.config import checks, model_schema
from hstu_jax.model import match, relative_bias
from pallas_kernels.hstu_attention import bias as attention_bias
from pallas_kernels.hstu_attention import mask as attention_mask
from tests.model import batches, models, test_match, test_stu

CONTEXTUAL, NUM_DISTANCES, NUM_BUCKETS = 2, 6, 25


def test_times_of_tokens_by_hand():
    """Two users in a row, one of them with contextual tokens alone; a gap of padding."""
    layout = batches.place([5, 2], row_len=8, packed=True).layout()
    age = np.array([[10**9, 10**9, 90, 40, 7, 10**9, 10**9, 55]], np.int32)
    time, following = relative_bias.token_times(layout, jnp.asarray(age), contextual_len=2)
    none = attention_bias.NO_TIME
    np.testing.assert_array_equal(time, [[none, none, -90, -40, -7, none, none, none]])
    np.testing.assert_array_equal(following, [[none, none, -40, -7, 0, none, none, none]])
    assert relative_bias.token_times(layout, None, contextual_len=2) == (None, None)


def paper_layer(time_query="next_request", **fields):
    bias = relative_bias.RelativeBias(
        num_distances=NUM_DISTANCES, num_time_buckets=NUM_BUCKETS, time_query=time_query
    )
    rule = attention_mask.MaskRule(contextual_len=CONTEXTUAL)
    return test_stu.make_layer(rule=rule, use_silu_qkv=True, logit_bias=bias, **fields)


def timed(sequence, age_s):
    time, following = relative_bias.token_times(sequence.layout, age_s, contextual_len=CONTEXTUAL)
    return dataclasses.replace(sequence, time_s=time, next_time_s=following)


def rab64(params, gaps, time_query):
    """Bias of a query and a key of one user, in float64."""
    by_distance, by_interval = (params["logit_bias"][n] for n in ("by_distance", "by_interval"))
    following = np.append(gaps[1:], 0.0)

    def rab(i, j):
        total = float(by_distance[min(abs(i - j), NUM_DISTANCES - 1)])
        if min(i, j) < CONTEXTUAL:
            return total
        asked = gaps[i] if time_query == "own" else following[i]
        elapsed = max(abs(gaps[j] - asked), 1.0)
        bucket = min(math.floor(math.log(elapsed) / 0.301), NUM_BUCKETS)
        return total + float(by_interval[bucket])

    return rab


@pytest.mark.parametrize("time_query", ["next_request", "own"])
def test_layer_equals_float64_loops(time_query):
    layer = paper_layer(time_query)
    placement = batches.place([9, 2, 3, 11], row_len=13, packed=True, block_len=4, rule=layer.rule)
    rng = np.random.default_rng(3)
    steps = np.floor(np.exp(rng.uniform(0, 8, int(placement.lengths.sum()))))
    splits = np.cumsum(placement.lengths)[:-1]
    gaps = np.concatenate([np.cumsum(part[::-1])[::-1] for part in np.split(steps, splits)])
    grid = jnp.asarray(placement.to_grid(gaps.astype(np.int32), fill=-12345))
    sequence = test_stu.sequence_of(placement)
    x = jnp.zeros((placement.num_rows, placement.row_len, test_stu.WIDTH))
    init = functools.partial(layer.init, sequence=timed(sequence, grid))
    params = models.random_tree(jax.eval_shape(init, jax.random.key(0), x)["params"])
    tokens = test_stu.random_tokens(placement)

    @jax.jit
    def run(x, grid):
        return layer.apply({"params": params}, x, timed(sequence, grid))

    x = jnp.asarray(placement.to_grid(tokens))
    out = placement.from_grid(run(x, grid))

    def loops(time_query):
        pieces = zip(
            np.split(tokens.astype(np.float64), splits), np.split(gaps, splits), strict=True
        )
        options = dict(activation_of_v=test_stu.silu, activation_of_qk=test_stu.silu)
        options |= dict(use_group_norm=True, contextual_len=CONTEXTUAL)
        return np.concatenate(
            [
                test_stu.layer64(params, x, rab=rab64(params, gap, time_query), **options)
                for x, gap in pieces
            ]
        )

    # float32 against float64, as in `test_stu.py`.
    np.testing.assert_allclose(out, loops(time_query), atol=2e-5, rtol=2e-5)
    other = "own" if time_query == "next_request" else "next_request"
    assert np.abs(out - loops(other)).max() > 0.01

    # The newest event's time is known to nobody that asks before it, but to contextual rows.
    last = 8 if time_query == "own" else 7
    changed = placement.from_grid(run(x, grid.at[0, 8].set(1)))
    np.testing.assert_array_equal(changed[CONTEXTUAL:last], out[CONTEXTUAL:last])


def test_last_position_and_truncation_keep_biases():
    """Packed with a cut between layers: the last layer at one position equals it at all."""

    def build(last_layer):
        hstu = dict(last_layer=last_layer, attn_truncation_split_layer=1)
        hstu |= dict(attn_truncation_tail_len=4)
        return models.build(models.model_config(hstu=hstu, stu=test_match.PAPER))

    model = build("last_position")
    params, content = models.random_params(model), models.random_content(test_match.LENGTHS)
    inputs = models.lay_out(
        content, rule=models.rule_of(model), tail_len=4, packed=True, **test_match.GRID
    )
    run = jax.jit(model.apply)
    last = run({"params": params}, *inputs).user
    everywhere = jax.jit(build("all_positions").apply)({"params": params}, *inputs).user
    test_match.assert_close(last, everywhere)
    bias = params["user_tower"]["encoder"]["stack"]["layers_1"]["logit_bias"]
    bias["by_interval"] = bias["by_interval"] + 1.0  # the cut layer reads the tokens' times
    assert np.abs(run({"params": params}, *inputs).user - last).max() > 0.01


def test_first_values_and_sizes():
    model = models.build(models.model_config(stu=test_match.PAPER))
    params = jax.eval_shape(functools.partial(match.init_params, model), jax.random.key(0))
    stack = params["user_tower"]["encoder"]["stack"]
    for layer in ("layers_0", "layers_1"):  # each has its own, long enough for every distance
        sizes = {name: leaf.shape for name, leaf in stack[layer]["logit_bias"].items()}
        assert sizes == {"by_distance": (2 + 16,), "by_interval": (129,)}
    bias = relative_bias.RelativeBias(
        num_distances=200, num_time_buckets=128, time_query="next_request"
    )
    for first in jax.tree.leaves(bias.init(jax.random.key(0), *[jnp.zeros((1, 1), jnp.int32)] * 2)):
        assert 0.015 < np.std(first) < 0.025


def test_a_bias_by_time_needs_times():
    layer = paper_layer()
    placement = batches.place([3], row_len=3, packed=False)
    with pytest.raises(ValueError, match="num_time_buckets=25: a bias by time needs the tokens'"):
        jax.eval_shape(
            functools.partial(layer.init, sequence=test_stu.sequence_of(placement)),
            jax.random.key(0),
            jnp.zeros((1, 3, test_stu.WIDTH)),
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(use_time_bias=True, num_time_bias_buckets=0), "num_time_bias_buckets=0: must be pos"),
        (dict(num_time_bias_buckets=8), "num_time_bias_buckets=8: is read with use_time_bias=True"),
        (dict(time_bias_query="own"), "time_bias_query='own': is read with use_time_bias=True"),
    ],
)
def test_fields_that_nothing_reads_are_refused(fields, message):
    with pytest.raises(checks.ConfigError, match=message):
        model_schema.StuConfig(**fields)
