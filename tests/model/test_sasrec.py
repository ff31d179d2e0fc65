"""SASRec against a dense float64 forward pass; who sees whom; what the configuration refuses.

That neither packing, padding nor poison in it matters is in `test_match.py`, for all encoders.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.config import checks, model_schema
from hstu_jax.model import encoder, sasrec
from hstu_jax.training import traced
from tests.model import batches, models

HEADS, WIDTH = 2, 6
LENGTHS = [7, 2, 3, 13]


def standardize64(x, weights):
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-8)
    return normed * weights["scale"] + weights["bias"]


def linear64(x, weights):
    return x @ weights["kernel"] + weights.get("bias", 0)


def block64(p, x, wrong=""):
    """One user's block in float64. x: [n, D]."""
    normed = standardize64(x, p["attention_norm"])
    q, k, v = (
        linear64(normed, p[name]).reshape(len(x), HEADS, -1) for name in ("query", "key", "value")
    )
    scale = 1.0 if wrong == "unscaled" else q.shape[-1] ** -0.5
    attended = np.zeros_like(v)
    for i in range(len(x)):
        keys = len(x) if wrong == "looks ahead" else i + 1
        for h in range(HEADS):
            weights = np.exp(scale * k[:keys, h] @ q[i, h])
            attended[i, h] = weights @ v[:keys, h] / weights.sum()
    residual = normed if wrong == "residual of the norm" else x
    x = residual + linear64(attended.reshape(x.shape), p["attention_output"])
    hidden = linear64(standardize64(x, p["ffn_norm"]), p["ffn_in"])
    hidden = hidden if wrong == "no relu" else np.maximum(hidden, 0)
    return x + linear64(hidden, p["ffn_output"])


def sequence_of(placement):
    return encoder.build_sequence(placement.layout(), jnp.arange(len(placement.lengths)))[0]


def make_block(dropout_ratio=0.0):
    return sasrec.SasrecBlock(num_heads=HEADS, ffn_dim=9, dropout_ratio=dropout_ratio)


def random_params(placement):
    x = jnp.zeros((placement.num_rows, placement.row_len, WIDTH))
    init = functools.partial(make_block().init, sequence=sequence_of(placement))
    return models.random_tree(jax.eval_shape(init, jax.random.key(0), x)["params"])


def test_block_equals_a_dense_float64_pass_and_wrong_variants_do_not():
    placement = batches.place(LENGTHS, row_len=14, packed=True)
    params, sequence = random_params(placement), sequence_of(placement)
    rng = np.random.default_rng(1)
    tokens = 2 * rng.standard_normal((sum(LENGTHS), WIDTH), dtype=np.float32)
    x = jnp.asarray(placement.to_grid(tokens))
    run = jax.jit(lambda x: make_block().apply({"params": params}, x, sequence))
    out = placement.from_grid(run(x))
    params64 = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def right(wrong=""):
        pieces = np.split(tokens.astype(np.float64), np.cumsum(LENGTHS)[:-1])
        return np.concatenate([block64(params64, piece, wrong) for piece in pieces])

    # float32 against float64: a few units in the last place of values around 10.
    np.testing.assert_allclose(out, right(), atol=2e-5, rtol=2e-5)
    for wrong in ("unscaled", "looks ahead", "residual of the norm", "no relu"):
        assert np.abs(out - right(wrong)).max() > 0.01, wrong


def test_products_of_float32_are_computed_in_full():
    placement = batches.place(LENGTHS, row_len=14, packed=True)
    params, sequence = random_params(placement), sequence_of(placement)

    def total(params, x):
        return make_block().apply({"params": params}, x, sequence).sum()

    x = jnp.ones((placement.num_rows, placement.row_len, WIDTH))
    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(params, x)
    assert set(traced.read(jaxpr, {}).products) == {"float32 exact"}


def test_a_token_sees_itself_and_what_came_before_it_in_its_segment():
    placement = batches.place([4, 3], row_len=8, packed=True)
    params, sequence = random_params(placement), sequence_of(placement)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, WIDTH), dtype=np.float32))

    def outputs(x):
        return make_block().apply({"params": params}, x[None], sequence)[0]

    jacobian = np.abs(jax.jit(jax.jacrev(outputs))(x)).sum(axis=(1, 3))[:7, :]  # [i, j]
    segment = np.array([0, 0, 0, 0, 1, 1, 1, -1])
    is_seen = (segment[:7, None] == segment[None]) & np.tri(7, 8, dtype=bool)
    np.testing.assert_array_equal(jacobian > 0, is_seen)


def test_encoder_reads_the_last_token_behind_a_last_norm():
    """Contextual tokens, positions, two blocks, norm, l2: from the encoded tokens on in float64."""
    model = models.build(models.model_config(encoder="sasrec", sasrec=dict(ffn_dim=5)))
    params, content = models.random_params(model), models.random_content([9, 2, 3])
    lookups, batch = models.lay_out(content, rule=batches.ANY_RULE, row_len=16, packed=False)
    lookups, batch = jax.tree.map(jnp.asarray, (lookups, batch))
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), params["user_tower"]["encoder"])
    assert weights["blocks_1"]["ffn_in"]["kernel"].shape == (16, 5)
    user_encoder = model.user_tower.encoder.clone(parent=None)

    @jax.jit
    def run(lookups, batch):
        variables = {"params": params["user_tower"]["encoder"]}
        inputs = (lookups.history, lookups.contextual, batch)
        embed = functools.partial(user_encoder.apply, variables, dropout_key=None, method="embed")
        return embed(*inputs)[0], model.apply({"params": params}, lookups, batch).user

    tokens, vectors = run(lookups, batch)
    for row, length in enumerate([9, 2, 3]):
        x = np.asarray(tokens[row, :length], np.float64)
        for block in ("blocks_0", "blocks_1"):
            x = block64(weights[block], x)
        x = standardize64(x[-1], weights["last_norm"])
        np.testing.assert_allclose(vectors[0, row], x / np.linalg.norm(x), atol=1e-5)


def test_dropout_is_in_three_places_and_differs_between_blocks():
    placement = batches.place([5], row_len=5, packed=False)
    params, sequence = random_params(placement), sequence_of(placement)
    x = jnp.ones((1, 5, WIDTH))

    @jax.jit
    def run(params, key):
        return make_block(0.5).apply({"params": params}, x, sequence, dropout_key=key)

    def changes(**without):
        """Whether two keys differ where parts of the block add nothing."""
        cut = {
            name: jax.tree.map(jnp.zeros_like, part) if name in without.get("zero", ()) else part
            for name, part in params.items()
        }
        one, two = (run(cut, jax.random.key(number)) for number in range(2))
        return bool(jnp.any(one != two))

    assert changes()
    assert changes(zero=("ffn_output",)), "of the attention's output"
    assert changes(zero=("attention_output",)), "of the feed-forward layers"
    assert not changes(zero=("ffn_output", "attention_output")), "the residual is not dropped"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_blocks=0), "num_blocks=0: must be positive"),
        (dict(num_heads=0), "num_heads=0: must be positive"),
        (dict(ffn_dim=-1), "ffn_dim=-1: must not be negative; use 0 for hstu.stu.embedding_dim"),
        (dict(dropout_ratio=1.0), r"dropout_ratio=1.0: must be in \[0, 1\)"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(checks.ConfigError, match=message):
        model_schema.SasrecConfig(**fields)


def test_heads_must_divide_the_width_where_they_are_read():
    fields = dict(sasrec=model_schema.SasrecConfig(num_heads=3))
    with pytest.raises(checks.ConfigError, match=r"sasrec.num_heads=3: must divide .*=64; change"):
        model_schema.UserTowerConfig(encoder="sasrec", **fields)
    model_schema.UserTowerConfig(**fields)
