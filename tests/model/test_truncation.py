"""Truncation between layers: against float64 loops, in every layout, at every length."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.model import encoder, stu
from pallas_kernels.hstu_attention import mask as attention_mask
from tests.model import batches, models, test_match, test_stu

TAIL_LEN = 4


def tail_of(placement, *, contextual_len):
    """The tail of a placement's sequence, and the cut lengths."""
    cut = placement.tail(num_contextual=contextual_len, tail_len=TAIL_LEN)
    sequence = test_stu.sequence_of(placement)
    tail = encoder.build_tail(sequence, cut.sequence_layout(), contextual_len=contextual_len)
    return tail, cut.segment_lengths[0]


def make_stack(num_layers=2, **fields):
    layers = tuple(test_stu.make_layer(**fields) for _ in range(num_layers))
    return stu.StuStack(layers=layers, split_layer=1)


def random_params(stack, placement, tail):
    x = jnp.zeros((placement.num_rows, placement.row_len, test_stu.WIDTH))
    init = functools.partial(stack.init, sequence=test_stu.sequence_of(placement), tail=tail)
    return models.random_tree(jax.eval_shape(init, jax.random.key(0), x)["params"])


@pytest.mark.parametrize("contextual_len", [0, 2])
def test_stack_equals_float64_loops_with_the_history_cut_in_between(contextual_len):
    # Longer than the cut, as long, one shorter, contextual tokens only, full row.
    lengths = [9 + contextual_len, 4 + contextual_len, 3 + contextual_len, contextual_len, 13]
    rule = attention_mask.MaskRule(contextual_len=contextual_len)
    placement = batches.place(lengths, row_len=13, packed=True, block_len=4, rule=rule)
    # Once with the tail's block schedule, once without, which compiles faster.
    stack = make_stack(rule=rule, implementation="xla" if contextual_len else "reference")
    tail, cut_lengths = tail_of(placement, contextual_len=contextual_len)
    params, tokens = random_params(stack, placement, tail), test_stu.random_tokens(placement)
    run = jax.jit(
        lambda x: stack.apply({"params": params}, x, test_stu.sequence_of(placement), tail=tail)
    )
    out = np.asarray(run(jnp.asarray(placement.to_grid(tokens))))[0]

    def layer(index, x):
        options = dict(use_group_norm=True, contextual_len=contextual_len)
        return test_stu.layer64(params[f"layers_{index}"], x, **options) if len(x) else x

    expected = []
    for piece in np.split(tokens.astype(np.float64), np.cumsum(lengths)[:-1]):
        x = layer(0, piece)
        history = x[contextual_len:][-TAIL_LEN:]
        expected.append(layer(1, np.concatenate([x[:contextual_len], history])))
    assert [len(x) for x in expected] == cut_lengths.tolist()
    # float32 against float64: a few units in the last place of values around 10.
    expected = np.concatenate(expected)
    np.testing.assert_allclose(out[: len(expected)], expected, atol=5e-5, rtol=5e-5)

    if contextual_len == 0:  # causal: the newest token of the first user reaches itself alone
        tokens[8] += 1
        changed = np.asarray(run(jnp.asarray(placement.to_grid(tokens))))[0]
        np.testing.assert_array_equal(np.delete(changed, 3, axis=0), np.delete(out, 3, axis=0))
        assert np.abs(changed[3] - out[3]).max() > 0.1


def truncating_model(**hstu):
    hstu |= dict(attn_truncation_split_layer=1, attn_truncation_tail_len=TAIL_LEN)
    return models.build(models.model_config(hstu=hstu))


def test_no_layout_nor_poison_in_padding_matters_with_dropout_on():
    """Packed, padded, and with the last layer, here the split, at all positions."""
    model = truncating_model()
    params, content = models.random_params(model), models.random_content(test_match.LENGTHS)
    run, key = test_match.make_runner(model, params), jax.random.key(7)
    lay_out = functools.partial(
        models.lay_out, content, rule=models.rule_of(model), tail_len=TAIL_LEN, **test_match.GRID
    )
    clean = run(lay_out(packed=True), key)
    jax.tree.map(np.testing.assert_array_equal, run(lay_out(packed=True, fill=np.nan), key), clean)
    padded, (grads, _) = run(lay_out(packed=False), key)
    test_match.assert_close(padded, clean[0])
    test_match.assert_close(grads, clean[1][0])
    everywhere = jax.jit(truncating_model(last_layer="all_positions").apply)
    out = everywhere({"params": params}, *lay_out(packed=True), key)
    test_match.assert_close(out, clean[0])


def test_a_split_needs_a_tail_and_a_tail_a_split():
    content = models.random_content([5, 9])
    for model, tail_len, message in (
        (truncating_model(), 0, "split_layer=1, tail=NoneType: a stack that cuts"),
        (models.build(models.model_config()), 4, "split_layer=0, tail=Tail: .* no other may get"),
    ):
        params = models.random_params(model)
        rule = models.rule_of(model)
        lookups, batch = models.lay_out(
            content, rule=rule, row_len=9, packed=False, tail_len=tail_len
        )
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.apply, {"params": params}, lookups, batch)


def test_last_position_refuses_targets():
    placement = batches.place([3], row_len=3, packed=False)
    sequence = test_stu.sequence_of(placement)
    stack = test_stu.make_stack(1)
    params = test_stu.random_params(stack, placement)
    sequence = dataclasses.replace(sequence, num_targets=jnp.ones(1, jnp.int32))
    with pytest.raises(ValueError, match="num_targets: last_position knows no targets; call"):
        apply = functools.partial(stack.apply, {"params": params}, method="last_position")
        jax.eval_shape(lambda x: apply(x, sequence), jnp.zeros((1, 3, test_stu.WIDTH)))
