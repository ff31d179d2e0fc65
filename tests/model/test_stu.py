"""The STU layer against float64 loops; causality, last position, packing, dropout of the stack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.config import model_schema
from hstu_jax.model import dropout, encoder, match, stu
from pallas_kernels.hstu_attention import mask as attention_mask
from tests.model import batches, models

WIDTH, HEADS, VALUE, QK = 10, 2, 4, 3


def make_layer(**fields):
    return stu.StuLayer(
        **{
            "embedding_dim": WIDTH,
            "num_heads": HEADS,
            "hidden_dim": VALUE,
            "attention_dim": QK,
            "use_group_norm": True,
            "output_dropout_ratio": 0.0,
            "alpha": 0.6,
            "divisor": 7.0,
            "rule": attention_mask.MaskRule(),
            **fields,
        }
    )


def make_stack(num_layers=2, **fields):
    return stu.StuStack(layers=tuple(make_layer(**fields) for _ in range(num_layers)))


def sequence_of(placement):
    user_index = jnp.arange(len(placement.lengths))
    return encoder.build_sequence(placement.layout(), user_index)[0]


def random_params(module, placement):
    x = jnp.zeros((placement.num_rows, placement.row_len, WIDTH))
    init = functools.partial(module.init, sequence=sequence_of(placement))
    return models.random_tree(jax.eval_shape(init, jax.random.key(0), x)["params"])


def apply(module, params, x, sequence, **keywords):
    """The module's output, compiled."""
    call = jax.jit(lambda params, x: module.apply({"params": params}, x, sequence, **keywords))
    return call(params, x)


def random_tokens(placement, seed=1):
    rng = np.random.default_rng(seed)
    return 2 * rng.standard_normal((int(placement.lengths.sum()), WIDTH), dtype=np.float32)


def standardize64(x, eps=1e-6):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def silu(a):
    return a / (1 + np.exp(-a))


def same(a):
    return a


def layer64(
    params,
    x,
    *,
    use_group_norm,
    contextual_len,
    activation_of_v=same,
    activation_of_qk=same,
    rab=lambda i, j: 0.0,
    use_gate=True,
):
    """One user's layer in float64, token by token. x: [n, D]; rab: bias of a query and a key."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    normed = standardize64(x) * p["input_norm"]["scale"] + p["input_norm"]["bias"]
    projected = normed @ p["uvqk_kernel"] + p["uvqk_bias"]
    u, projected = np.split(projected, [HEADS * VALUE * use_gate], axis=1)
    v, q, k = np.split(projected, np.cumsum([HEADS * VALUE, HEADS * QK]), axis=1)
    u, v, q, k = silu(u), activation_of_v(v), activation_of_qk(q), activation_of_qk(k)
    v, q, k = (a.reshape(len(x), HEADS, -1) for a in (v, q, k))
    attended = np.zeros_like(v)
    for i in range(len(x)):
        for j in range(len(x)):
            if j <= i or i < contextual_len:
                for h in range(HEADS):
                    attended[i, h] += silu(0.6 * q[i, h] @ k[j, h] + rab(i, j)) / 7.0 * v[j, h]
    flat = attended.reshape(len(x), -1)
    scale, bias = p["output_norm_scale"], p["output_norm_bias"]
    if use_group_norm:
        normed = (standardize64(attended) * scale[:, None] + bias[:, None]).reshape(len(x), -1)
    else:
        normed = standardize64(flat) * scale + bias
    parts = [u, flat, u * normed] if use_gate else [normed]
    return x + np.concatenate(parts, axis=1) @ p["output_kernel"]


@pytest.mark.parametrize("use_group_norm", [True, False])
def test_layer_equals_float64_loops(use_group_norm):
    rule = attention_mask.MaskRule(contextual_len=2)
    placement = batches.place([7, 2, 3, 11], row_len=13, packed=True, block_len=4, rule=rule)
    layer = make_layer(use_group_norm=use_group_norm, rule=rule)
    params, tokens = random_params(layer, placement), random_tokens(placement)
    x = jnp.asarray(placement.to_grid(tokens))
    out = apply(layer, params, x, sequence_of(placement))
    pieces = np.split(tokens.astype(np.float64), np.cumsum(placement.lengths)[:-1])
    run = functools.partial(layer64, params, use_group_norm=use_group_norm, contextual_len=2)
    right = np.concatenate([run(piece) for piece in pieces])
    wrong = np.concatenate([run(piece, activation_of_v=silu) for piece in pieces])
    # float32 against float64: a few units in the last place of values around 10.
    np.testing.assert_allclose(placement.from_grid(out), right, atol=2e-5, rtol=2e-5)
    assert np.abs(placement.from_grid(out) - wrong).max() > 0.1


@pytest.mark.parametrize("method", ["__call__", "last_position"])
def test_layer_without_a_gate_equals_float64_loops(method):
    placement = batches.place([7, 2, 11], row_len=13, packed=True, block_len=4)
    layer = make_layer(use_group_norm=False, use_gate=False)
    params, tokens = random_params(layer, placement), random_tokens(placement)
    assert params["output_kernel"].shape == (HEADS * VALUE, WIDTH)
    assert params["uvqk_kernel"].shape == (WIDTH, HEADS * (VALUE + 2 * QK))
    x = jnp.asarray(placement.to_grid(tokens))
    out = apply(layer, params, x, sequence_of(placement), method=method)
    run = functools.partial(layer64, params, use_group_norm=False, contextual_len=0, use_gate=False)
    ends = np.cumsum(placement.lengths)
    right = np.concatenate([run(x) for x in np.split(tokens.astype(np.float64), ends[:-1])])
    is_whole = method == "__call__"
    out, right = (placement.from_grid(out), right) if is_whole else (out, right[ends - 1])
    np.testing.assert_allclose(out, right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("use_group_norm", "norm_size"), [(True, HEADS), (False, HEADS * VALUE)])
def test_parameter_count_and_initial_values(use_group_norm, norm_size):
    placement = batches.place([3], row_len=4, packed=False)
    layer = make_layer(use_group_norm=use_group_norm, qk_bias_init=0.5)
    x = jnp.zeros((1, 4, WIDTH))
    init = jax.jit(functools.partial(layer.init, sequence=sequence_of(placement)))
    params = init(jax.random.key(0), x)["params"]
    uvqk = 2 * HEADS * (VALUE + QK)
    expected = 2 * WIDTH + WIDTH * uvqk + uvqk + 2 * norm_size + 3 * HEADS * VALUE * WIDTH
    assert sum(p.size for p in jax.tree.leaves(params)) == expected
    bound = (6 / (WIDTH + uvqk)) ** 0.5
    assert 0.9 * bound < np.abs(params["uvqk_kernel"]).max() <= bound
    np.testing.assert_array_equal(params["uvqk_bias"][: 2 * HEADS * VALUE], 0)
    np.testing.assert_array_equal(params["uvqk_bias"][2 * HEADS * VALUE :], 0.5)


def test_without_contextual_tokens_the_stack_is_causal():
    placement = batches.place([9], row_len=9, packed=False, block_len=4)
    stack, sequence = make_stack(), sequence_of(placement)
    params, tokens = random_params(stack, placement), random_tokens(placement)

    def outputs(x):
        return stack.apply({"params": params}, x[None], sequence)[0]

    jacobian = np.abs(jax.jit(jax.jacrev(outputs))(tokens)).sum(axis=(1, 3))  # [i, j]
    np.testing.assert_array_equal(np.triu(jacobian, k=1), 0)
    assert np.all(np.tril(jacobian)[np.tril_indices(9)] > 0)


def test_with_contextual_tokens_history_rows_of_one_layer_are_causal():
    rule = attention_mask.MaskRule(contextual_len=3)
    placement = batches.place([9], row_len=9, packed=False, block_len=4, rule=rule)
    stack, sequence = make_stack(1, rule=rule), sequence_of(placement)
    params, tokens = random_params(stack, placement), random_tokens(placement)

    def outputs(x):
        return stack.apply({"params": params}, x[None], sequence)[0]

    jacobian = np.abs(jax.jit(jax.jacrev(outputs))(tokens)).sum(axis=(1, 3))
    history = np.triu(jacobian, k=1)[3:]
    np.testing.assert_array_equal(history, 0)
    assert np.all(jacobian[:3] > 0), "contextual rows see everything"


def value_and_grads(stack, params, tokens, placement, *, method, key, cotangent):
    sequence = sequence_of(placement)

    @jax.jit
    def run(params, tokens):
        def forward(params, tokens):
            flat = jnp.zeros((placement.num_rows * placement.row_len, WIDTH))
            x = flat.at[placement.slots].set(tokens)
            x = x.reshape(placement.num_rows, placement.row_len, WIDTH)
            out = stack.apply({"params": params}, x, sequence, dropout_key=key, method=method)
            return out if method == "last_position" else stu.take_last(out, sequence)

        out, vjp = jax.vjp(forward, params, tokens)
        return out, vjp(cotangent)

    return run(params, jnp.asarray(tokens))


def test_last_position_equals_all_positions_with_dropout():
    rule = attention_mask.MaskRule(contextual_len=2, max_attn_len=3)
    lengths = [7, 2, 13, 3]
    placement = batches.place(lengths, row_len=13, packed=True, block_len=4, rule=rule, num_users=6)
    stack = make_stack(rule=rule, output_dropout_ratio=0.4)
    params, tokens = random_params(stack, placement), random_tokens(placement)
    rng = np.random.default_rng(5)
    cotangent = jnp.asarray(rng.standard_normal((6, WIDTH), dtype=np.float32))
    results = [
        value_and_grads(
            stack,
            params,
            tokens,
            placement,
            method=method,
            key=jax.random.key(3),
            cotangent=cotangent,
        )
        for method in ("last_position", "__call__")
    ]
    for last, full in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        scale = np.abs(full).max()
        np.testing.assert_allclose(last, full, atol=2e-6 * scale, rtol=0)
    np.testing.assert_array_equal(results[0][0][4:], 0)


def test_dropout_differs_between_layers_and_from_evaluation():
    placement = batches.place([5], row_len=5, packed=False)
    one = make_stack(1, output_dropout_ratio=0.5)
    params, sequence = random_params(one, placement), sequence_of(placement)
    x = jnp.asarray(placement.to_grid(random_tokens(placement)))
    key = jax.random.key(0)
    layer = params["layers_0"]
    first = apply(one, {"layers_0": layer}, x, sequence, dropout_key=key)
    silent = apply(one, {"layers_0": layer}, x, sequence)
    same = apply(
        make_layer(output_dropout_ratio=0.5),
        layer,
        x,
        sequence,
        dropout_key=jax.random.fold_in(key, 0),
    )
    other = apply(
        make_layer(output_dropout_ratio=0.5),
        layer,
        x,
        sequence,
        dropout_key=jax.random.fold_in(key, 1),
    )
    np.testing.assert_allclose(first, same, rtol=1e-6)
    assert np.abs(first - other).max() > 0.1 and np.abs(first - silent).max() > 0.1


def test_take_last_gives_zeros_and_no_gradient_for_empty_segments():
    placement = batches.place([0, 3, 0, 2], row_len=4, packed=True, num_users=5)
    sequence = sequence_of(placement)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 3), dtype=np.float32))
    out, vjp = jax.vjp(lambda x: stu.take_last(x, sequence), x)
    np.testing.assert_array_equal(out, [[0] * 3, x[0, 2], [0] * 3, x[1, 1], [0] * 3])
    (grad,) = vjp(jnp.ones((5, 3)))
    expected = np.zeros((2, 4, 3))
    expected[0, 2] = expected[1, 1] = 1
    np.testing.assert_array_equal(grad, expected)
    assert isinstance(sequence.last, dropout.TokenIdentity)


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        (dict(sla_k1=2), [0, 1, 4, 5, 6]),  # contextual rows are causal, history is near
        (dict(sla_k2=4), [0, 1, 4, 5, 6]),  # the prefix and nothing near, not even itself
        (dict(contextual_seq_len=0), [0, 1]),  # contextual tokens do not look ahead
        (dict(contextual_seq_len=1), [1]),
        (dict(max_attn_len=2), [4, 5, 6]),
        (dict(attn_alpha=0.3), range(7)),
        (dict(scaling_seqlen=3), range(7)),
    ],
)
def test_each_field_of_the_configuration_changes_the_tokens_that_it_should(fields, changed):
    def output(**fields):
        config = model_schema.StuConfig(embedding_dim=WIDTH, num_heads=1, hidden_dim=2,
                                        attention_dim=3, **fields)  # fmt: skip
        layer = match.build_stu_layer(
            config, contextual_len=2, max_seq_len=9, implementation="reference"
        )
        placement = batches.place([7], row_len=7, packed=False, rule=layer.rule)
        params = random_params(layer, placement)
        x = jnp.asarray(placement.to_grid(random_tokens(placement)))
        return np.asarray(layer.apply({"params": params}, x, sequence_of(placement)))[0]

    difference = np.abs(output(**fields) - output()).max(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(difference > 1e-4), list(changed))
