"""The next-item objective's forward pass: no position sees what comes later, whatever the option.

Three views of the same: the output at a position is the user vector of the tokens up to it; no
gradient comes back from a later token or another user; and later tokens' actions, watch times and
gaps change no bit. Models that leak fail them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.config import model_schema, tower_schema
from tests.model import batches, models

LENGTHS = [7, 2, 12, 3]  # of users, two contextual tokens included
CONTEXTUAL = 2
MASKED = 2  # queries not in use


def positions(**fields):
    return {
        "positional_encoder": model_schema.PositionalEncoderConfig(
            num_position_buckets=12, num_time_buckets=20, **fields
        )
    }


def with_action_mlp():
    mlp = tower_schema.ActionMlpConfig(
        simple_mlp=None, parameterized_mlp=tower_schema.ParameterizedMlpConfig(hidden_dim=8)
    )
    uih = model_schema.UihPreprocessorConfig(action_mlp=mlp)
    return {"input_preprocessor": model_schema.InputPreprocessorConfig(uih_preprocessor=uih)}


PAPER = dict(use_silu_qkv=True, use_position_bias=True, use_time_bias=True)
# Every option of the forward pass, some of them together: a leak through one shows all the same.
OPTIONS = {
    "defaults": {},
    "no_time, window, user_maps": {
        "hstu": positions(use_time_encoding=False) | with_action_mlp(),
        "stu": {"max_attn_len": 3, "recompute_normed_x": False, "recompute_uvqk": False},
    },
    "log_time, semi_local, layernorm, projected": {
        "hstu": positions(time_bucket_fn="log", time_bucket_increments=7.0)
        | {"output_postprocessor": "layernorm"},
        "stu": {"sla_k1": 2, "sla_k2": 3, "use_group_norm": False},
        "output_dim": 5,
        "similarity": "COSINE",
    },
    "mean": {"encoder": "mean"},
    "paper, own times": {"stu": PAPER | {"time_bias_query": "own"}},
    "sasrec": {"encoder": "sasrec"},
    "next_request": {"hstu": positions(use_time_encoding=False), "stu": PAPER},
    # The window objective's models of the last test, which leak.
    "look_ahead": {"hstu": positions(use_time_encoding=False)},
    "causal": {"stu": {"contextual_seq_len": 0}},
}
NAMES = tuple(OPTIONS)[:6]


@functools.cache
def setting(name, *, packed=True, objective="next_item"):
    """(model, parameters, content, lookups, batch) with a query at every token."""
    config = models.model_config(objective=objective, **OPTIONS[name])
    model = models.build(config, contextual_len=CONTEXTUAL)
    content = models.random_content(
        LENGTHS, contextual_len=CONTEXTUAL, num_queries=sum(LENGTHS) + MASKED, seed=3
    )
    lookups, batch = at_every_token(model, content, packed=packed)
    return model, models.random_params(model), content, lookups, batch


def rule_of(model):
    stack = getattr(model.user_tower.encoder, "stack", None)
    return stack.layers[0].rule if stack else batches.ANY_RULE


def lay_out(model, content, *, packed):
    return models.lay_out(content, rule=rule_of(model), row_len=14, packed=packed, fill=np.nan)


def at_every_token(model, content, *, packed):
    """The content as a training batch: a query at every token, and some that are masked."""
    lookups, batch = lay_out(model, content, packed=packed)
    num_slots = batch.time_gap_s[0].size
    slots = slots_of(batch)
    unused = np.full(MASKED, num_slots, np.int32)
    batch = dataclasses.replace(
        batch,
        query_slot=np.concatenate([slots, unused])[None],
        query_mask=np.concatenate([np.ones(len(slots), bool), np.zeros(MASKED, bool)])[None],
        # Any numbers do: each token's own, and the padding's NaN.
        step_gap_s=batch.time_gap_s,
    )
    return lookups, batch


def slots_of(batch):
    """Flat slots of the users' tokens, users one after the other."""
    pairs = zip(batch.segment_starts[0], batch.segment_lengths[0], strict=True)
    return np.concatenate([start + np.arange(n) for start, n in pairs]).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("model",))
def vectors(model, params, history, contextual, batch, key=None):
    return model.apply({"params": params}, history, contextual, batch, key, method="user")


def place_of(token):
    """(user, position) of the token with this number."""
    user = int(np.searchsorted(np.cumsum(LENGTHS), token, side="right"))
    return user, token - sum(LENGTHS[:user])


def prefixes(content):
    """The content's users, cut behind every one of their tokens: one user for each."""
    starts = np.cumsum(LENGTHS) - LENGTHS
    pieces = [(s, s + i) for s, n in zip(starts, LENGTHS, strict=True) for i in range(1, n + 1)]
    pieces = [(s, e) for s, e in pieces if e - s >= CONTEXTUAL]
    tokens = np.concatenate([np.arange(*piece) for piece in pieces])
    owner = [int(np.flatnonzero(starts == s)[0]) for s, _ in pieces]
    cut = {name: getattr(content, name)[tokens] for name in JAGGED}
    lengths = np.array([e - s for s, e in pieces])
    cut |= {"lengths": lengths, "contextual": content.contextual[owner]}
    return dataclasses.replace(content, **cut), np.array([e - 1 for _, e in pieces])


JAGGED = ("history", "action", "watch_time_s", "time_gap_s")


@pytest.mark.parametrize("name", NAMES)
def test_output_at_a_token_is_the_user_vector_of_the_tokens_up_to_it(name):
    """Training reads what serving computes: the window form of every prefix, by the last layer's
    short cut."""
    model, params, content, lookups, batch = setting(name)
    found = vectors(model, params, lookups.history, lookups.contextual, batch)[0]
    cut, last_tokens = prefixes(content)
    cut_lookups, cut_batch = lay_out(model, cut, packed=True)
    cut_batch = dataclasses.replace(cut_batch, step_gap_s=cut_batch.time_gap_s)
    want = vectors(model, params, cut_lookups.history, cut_lookups.contextual, cut_batch)[0]
    np.testing.assert_allclose(
        np.asarray(found)[last_tokens], want[: len(last_tokens)], rtol=2e-4, atol=2e-5
    )
    assert not np.asarray(found)[len(slots_of(batch)) :].any()  # masked queries


def test_a_bias_by_time_asks_at_the_next_event_as_serving_asks_at_the_request():
    """The prefix's request, from which gaps count, is then the time of the token behind it."""
    model, params, content, lookups, batch = setting("next_request")
    found = np.asarray(vectors(model, params, lookups.history, lookups.contextual, batch))[0]
    cut, last_tokens = prefixes(content)
    is_last = np.isin(np.arange(sum(LENGTHS)), np.cumsum(LENGTHS) - 1)
    request_gap = np.where(is_last, 0, np.roll(content.time_gap_s, -1))[last_tokens]

    def served(request_gap):
        gaps = cut.time_gap_s - np.repeat(request_gap, cut.lengths)
        whole = dataclasses.replace(cut, time_gap_s=gaps.astype(np.float32))
        cut_lookups, cut_batch = lay_out(model, whole, packed=True)
        out = vectors(model, params, cut_lookups.history, cut_lookups.contextual, cut_batch)
        return np.asarray(out)[0, : len(last_tokens)]

    np.testing.assert_allclose(found[last_tokens], served(request_gap), rtol=2e-4, atol=2e-5)
    assert np.abs(found[last_tokens] - served(0 * request_gap)).max() > 0.01


def test_a_bias_by_time_does_not_see_how_much_later_the_last_request_is():
    """Bits, with years between a token's request and those behind it: ages are whole seconds."""
    model, params, content, lookups, batch = setting("next_request")
    before = np.asarray(vectors(model, params, lookups.history, lookups.contextual, batch))[0]
    position = np.concatenate([np.arange(n) for n in LENGTHS])
    years = 4 * 365 * 86_400
    for last in (4, 7):
        # The events behind `last + 1`, and the requests, are later; ages count from the request.
        older = np.where(position <= last + 1, content.time_gap_s + years, content.time_gap_s)
        later_lookups, later = at_every_token(
            model, dataclasses.replace(content, time_gap_s=older), packed=True
        )
        after = vectors(model, params, later_lookups.history, later_lookups.contextual, later)[0]
        has_next = position < np.repeat(LENGTHS, LENGTHS) - 1
        kept = np.flatnonzero(has_next & (position <= last))
        np.testing.assert_array_equal(np.asarray(after)[kept], before[kept])
        assert np.abs(np.asarray(after)[: len(position)] - before[: len(position)]).max() > 0.01


def gradients(model, params, lookups, batch):
    """|d (c . output of query q) / d input|: [Q, tokens] and [Q, users, C]."""
    weights = jax.random.normal(jax.random.key(1), (batch.query_mask.shape[1],))

    @jax.jit
    def pull(history, contextual):
        out, pullback = jax.vjp(
            lambda h, c: model.apply({"params": params}, h, c, batch, method="user"),
            history,
            contextual,
        )
        count, width = out.shape[1:]
        mixed = weights[:, None] * jnp.cos(jnp.arange(width, dtype=jnp.float32) + 1)[None]
        one_hot = jnp.eye(count)[:, None, :, None] * mixed[None, None]
        return jax.vmap(pullback)(one_hot)

    to_history, to_contextual = pull(lookups.history, lookups.contextual)
    to_history = np.abs(np.asarray(to_history)).max(axis=-1).reshape(len(to_history), -1)
    return to_history[:, slots_of(batch)], np.abs(np.asarray(to_contextual)[:, 0]).max(axis=-1)


def leaks(to_history, to_contextual):
    """Pairs (query, token or contextual feature) with a gradient that must not be."""
    found, seen = [], 0
    for query in range(sum(LENGTHS)):
        user, place = place_of(query)
        for token in range(sum(LENGTHS)):
            other, position = place_of(token)
            is_earlier = other == user and CONTEXTUAL <= position <= place
            seen += is_earlier and to_history[query, token] > 0
            if not is_earlier and to_history[query, token] != 0:
                found.append((query, token))
        for other in range(len(LENGTHS)):
            is_own = other == user
            late = to_contextual[query, other, place + 1 :] if is_own else to_contextual[query]
            found += [(query, "contextual")] * bool(np.any((late if is_own else late[other]) != 0))
    return found, seen


@pytest.mark.parametrize(("name", "packed"), [*((name, True) for name in NAMES), (NAMES[0], False)])
def test_no_gradient_comes_from_what_is_later(name, packed):
    model, params, _, lookups, batch = setting(name, packed=packed)
    to_history, to_contextual = gradients(model, params, lookups, batch)
    if "user_maps" in name:  # made of all the user's contextual features, which are no events
        to_contextual = np.where(np.arange(len(to_contextual))[:, None, None] < 0, to_contextual, 0)
    found, seen = leaks(to_history, to_contextual)
    assert found == []
    full = sum(n * (n + 1) // 2 for n in (np.array(LENGTHS) - CONTEXTUAL))
    is_local = "window" in name or "semi_local" in name
    assert 0.5 * full < seen < full if is_local else seen == full


@pytest.mark.parametrize("name", NAMES)
def test_later_actions_times_and_items_change_no_bit(name):
    model, params, content, lookups, batch = setting(name)
    before = np.asarray(vectors(model, params, lookups.history, lookups.contextual, batch))[0]
    position = np.concatenate([np.arange(n) for n in LENGTHS])
    rng = np.random.default_rng(11)
    for last in (1, 4, 9):
        late = position > last
        changed = {
            "history": rng.normal(size=content.history.shape).astype(np.float32),
            "action": rng.integers(0, 256, len(position)),
            "watch_time_s": rng.uniform(0, 60, len(position)),
            "time_gap_s": rng.uniform(0, 20000, len(position)),
        }
        for key, values in changed.items():
            kept = late.reshape(-1, *(1,) * (values.ndim - 1))
            changed[key] = np.where(kept, values, getattr(content, key))
        other = dataclasses.replace(content, **changed)
        other_lookups, other_batch = at_every_token(model, other, packed=True)
        after = vectors(model, params, other_lookups.history, other_lookups.contextual, other_batch)
        after = np.asarray(after)[0]
        tokens = np.flatnonzero(~late)
        np.testing.assert_array_equal(after[tokens], before[tokens])
        assert np.abs(after[np.flatnonzero(late)] - before[np.flatnonzero(late)]).min() > 0


def test_wrong_variants_are_caught():
    """The window objective's model leaks, by its contextual tokens and by its positions."""
    model, params, _, lookups, batch = setting("look_ahead", objective="window")
    found, _ = leaks(*gradients(model, params, lookups, batch))
    assert found  # every token sees the later ones through the contextual tokens
    # No gradient would show that positions are counted from the end; prefixes do.
    model, params, content, lookups, batch = setting("causal", objective="window")
    cut, last_tokens = prefixes(content)
    cut_lookups, cut_batch = lay_out(model, cut, packed=True)
    want = vectors(model, params, cut_lookups.history, cut_lookups.contextual, cut_batch)[0]
    got = vectors(model, params, lookups.history, lookups.contextual, batch)[0]
    assert np.abs(got[last_tokens] - want[: len(last_tokens)]).max() > 0.05


def test_dropout_is_that_of_the_window_form():
    """Bits belong to the token, so training's queries drop what the window form would."""
    model, params, content, lookups, batch = setting("defaults")
    key = jax.random.key(5)
    found = vectors(model, params, lookups.history, lookups.contextual, batch, key)[0]
    whole, whole_batch = lay_out(model, content, packed=True)
    whole_batch = dataclasses.replace(whole_batch, step_gap_s=whole_batch.time_gap_s)
    want = vectors(model, params, whole.history, whole.contextual, whole_batch, key)[0]
    last = np.cumsum(LENGTHS) - 1
    np.testing.assert_allclose(found[last], want[: len(LENGTHS)], rtol=2e-4, atol=2e-5)


def test_batches_without_the_gaps_are_refused():
    model, params, _, lookups, batch = setting("defaults")
    batch = dataclasses.replace(batch, step_gap_s=None)
    with pytest.raises(ValueError, match="step_gap_s=None: the next-item objective reads gaps"):
        model.apply({"params": params}, lookups.history, lookups.contextual, batch, method="user")
