"""The next-item objective's forward pass: no position sees what comes later, whatever the option.

Three views of the same, packed and padded: no gradient comes back from a later token or another
user; what is changed or taken away behind a token changes no bit of its output; and the output is
the user vector of the tokens up to there. Models that leak fail them. What a batch's tokens and
queries are is checked in `tests/features/test_next_item.py`, both together in
`tests/training/test_next_item.py`.
"""

import dataclasses
import typing

import jax
import numpy as np
import pytest

from tests.model import next_item_cases as cases

NAMES = tuple(cases.OPTIONS)
YEARS_S = 4 * 365 * 86_400


def gradient_mistakes(case, lookups, batch):
    """(copy, user, query, token) where a gradient is that must not be, or none that must."""
    to_history, to_contextual = cases.gradients(case, lookups, batch)
    placement, context = cases.both_layouts(case), case.contextual_len
    slots, found, count = placement.slots, [], sum(placement.lengths)
    segment = np.repeat(np.arange(len(placement.lengths)), placement.lengths)
    position = np.concatenate([np.arange(n) for n in placement.lengths])
    want = np.zeros((count, to_history.shape[1]), bool)
    want_contextual = np.zeros_like(to_contextual)
    for user, length in enumerate(placement.lengths):
        visible = case.visible(length)
        mine = np.flatnonzero(segment == user)
        history = mine[context:]
        want[np.ix_(mine, slots[history])] = visible[:, context:]
        want_contextual[mine, user] = visible[:, :context]
    for kind, mistakes in (("token", to_history != want), ("of", to_contextual != want_contextual)):
        for query, *other in np.argwhere(mistakes):
            copy, user = divmod(int(segment[query]), len(cases.LENGTHS))
            found.append((cases.COPIES[copy], user, int(position[query]), kind, *map(int, other)))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_gradients_come_from_what_is_earlier_and_seen_and_from_nothing_else(name):
    case = cases.case(name)
    inputs = cases.training_inputs(case, cases.random_users(case))
    assert gradient_mistakes(case, *inputs) == []


def test_wrong_masks_are_caught_in_both_layouts():
    """Contextual tokens that look ahead, as the window objective's do; and users that are not kept
    apart."""
    case = cases.case("look_ahead")
    inputs = cases.training_inputs(case, cases.random_users(case))
    found = gradient_mistakes(case, *inputs)
    assert {copy for copy, *_ in found} == set(cases.COPIES)
    case = cases.case(NAMES[0])
    lookups, batch = cases.training_inputs(case, cases.random_users(case))
    starts, lengths = batch.segment_starts.copy(), batch.segment_lengths.copy()
    lengths[0, :2] = lengths[0, 0] + lengths[0, 1], 0  # the first row's first two users
    starts[0, 1] = starts[0, 2]
    batch = dataclasses.replace(batch, segment_starts=starts, segment_lengths=lengths)
    found = gradient_mistakes(case, lookups, batch)
    others = range(case.contextual_len, cases.LENGTHS[0])  # slots of the first one's history
    assert {(1, slot) for slot in others} <= {
        (user, slot)
        for copy, user, _, kind, slot, *_ in found
        if (copy, kind) == ("packed", "token")
    }


def changed(case, users, last, *, what):
    """The users with other things behind position `last` of each."""
    rng, late = np.random.default_rng(11), users.position > last
    content = users.content
    if what == "removed":
        kept = np.flatnonzero(~late)
        end = np.minimum(users.lengths, last + 1) - 1 + np.cumsum(users.lengths) - users.lengths
        return users.take(kept, users.owner[kept], users.next_time_s()[end])
    if what == "time":
        # A token's own request stays, the time of the one behind it.
        last = last + 1 if case.asks_next else last
        late, is_later = users.position > last, users.lengths > last
        time_s = users.time_s + np.where(late, YEARS_S + 9 * users.position, 0)
        request_s = users.request_s + np.where(is_later, YEARS_S + 1_000, 0)
        return dataclasses.replace(users, time_s=time_s, request_s=request_s)
    values = {
        "history": rng.normal(size=content.history.shape).astype(np.float32),
        "action": rng.integers(0, 256, len(late)),
        "watch_time_s": rng.uniform(0, 60, len(late)),
    }[what]
    late = late.reshape(-1, *(1,) * (values.ndim - 1))
    values = np.where(late, values, getattr(content, what))
    return dataclasses.replace(users, content=dataclasses.replace(content, **{what: values}))


def bit_mistakes(case, *, step_time="", spoil=lambda batch: batch):
    """(change, last position, copy) after which an earlier output is another.

    And whether any later output was another, for each change.
    """
    users, found, seen = cases.random_users(case), [], {}

    def run(users):
        lookups, batch = cases.training_inputs(case, users, step_time=step_time)
        return cases.vectors(case, lookups, spoil(batch))

    before = run(users)
    for last in (1, 4, 9):
        is_early = users.position <= last
        for what in ("history", "action", "watch_time_s", "time", "removed"):
            after = run(changed(case, users, last, what=what))
            for copy, name in enumerate(cases.COPIES):
                if (after[copy, is_early] != before[copy, is_early]).any():
                    found.append((what, last, name))
            differs = (after[:, ~is_early] != before[:, ~is_early]).any(axis=-1)
            seen.setdefault(what, []).append(differs)
    return found, {what: np.concatenate(each, axis=1) for what, each in seen.items()}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_later_changes_no_bit(name):
    """Nor does taking it away, with the request where the next event was."""
    case = cases.case(name)
    found, seen = bit_mistakes(case)
    assert found == []
    hstu = case.config.user_tower.hstu
    has_actions = hstu.input_preprocessor.uih_preprocessor.action_encoder is not None
    assert seen["history"].all() and seen["action"].any() == has_actions
    assert seen["watch_time_s"].any() == (name == "own steps, prefix, watch_time, saturated")
    assert seen["time"].any() == (
        hstu.positional_encoder.use_time_encoding
        or (case.config.user_tower.encoder == "hstu" and hstu.stu.use_time_bias)
    )


def _ages_of_the_next(batch):
    return dataclasses.replace(batch, age_s=np.roll(batch.age_s, -1, axis=-1))


def _ages_at_the_rows_last_request(batch):
    return dataclasses.replace(batch, step_gap_s=batch.time_gap_s)


@pytest.mark.parametrize(
    ("name", "wrong", "what"),
    [
        ("own steps, prefix, watch_time, saturated", {"step_time": "next_request"}, "time"),
        ("sasrec, own steps", {"spoil": _ages_at_the_rows_last_request}, "time"),
        ("paper, own times, items alone", {"spoil": _ages_of_the_next}, "time"),
        ("from_the_end", {}, "removed"),
    ],
)
def test_times_of_the_next_event_and_positions_from_the_end_are_caught(name, wrong, what):
    found, _ = bit_mistakes(cases.case(name), **wrong)
    assert {(change, copy) for change, _, copy in found} >= {(what, copy) for copy in cases.COPIES}


@pytest.mark.parametrize("name", NAMES)
def test_output_at_a_token_is_the_user_vector_of_the_tokens_up_to_it(name):
    """Training reads what serving computes, by the last layer's short cut, at the request: the time
    of the event behind the token."""
    case = cases.case(name)
    users = cases.random_users(case)
    found = cases.vectors(case, *cases.training_inputs(case, users))
    want, ends = cases.served_prefixes(case, users, users.next_time_s())
    for copy in found:
        np.testing.assert_allclose(copy[ends], want, rtol=2e-4, atol=2e-5)
    later, _ = cases.served_prefixes(case, users, users.next_time_s() + YEARS_S)
    assert (np.abs(later - want).max() > 0.01) == case.asks_next


def test_batches_without_the_gaps_are_refused():
    case = cases.case(NAMES[0])
    lookups, batch = cases.training_inputs(case, cases.random_users(case))
    batch = dataclasses.replace(batch, step_gap_s=None)
    with pytest.raises(ValueError, match="step_gap_s=None: the next-item objective reads gaps"):
        jax.eval_shape(
            lambda history: case.model.apply(
                {"params": case.params}, history, lookups.contextual, batch, method="user"
            ),
            lookups.history,
        )


_UIH = "user_tower.hstu.input_preprocessor.uih_preprocessor"
# Fields of the model's sections that no case above needs, and why.
_NOT_HERE = {
    "objective": "the subject",
    "user_tower.input": "has one value",
    "user_tower.max_seq_len": "divides attention as scaling_seqlen does, and cuts rows in packing",
    "user_tower.hstu.input_dropout_ratio": "with and without a key: the first case has one",
    "user_tower.sasrec.dropout_ratio": "the same: 'sasrec, own steps'",
    "user_tower.hstu.stu.output_dropout_ratio": "the same",
    "user_tower.hstu.stu.embedding_dim": "a width",
    "user_tower.hstu.stu.num_heads": "a width",
    "user_tower.hstu.stu.hidden_dim": "a width",
    "user_tower.hstu.stu.attention_dim": "a width",
    "user_tower.hstu.attn_num_layers": "repeats a layer",
    f"{_UIH}.action_encoder.simple_action_encoder.action_embedding_dim": "a width",
    f"{_UIH}.action_encoder.simple_action_encoder.action_weights": "of one token's actions",
    f"{_UIH}.action_mlp.simple_mlp.hidden_dim": "a width",
    f"{_UIH}.action_mlp.parameterized_mlp.hidden_dim": "a width",
    f"{_UIH}.action_mlp.parameterized_mlp.contextual_dropout_ratio": "of contextual features",
    "user_tower.hstu.positional_encoder.num_time_buckets": "a size",
    "user_tower.hstu.attn_truncation_split_layer": "refused",
    "user_tower.hstu.attn_truncation_tail_len": "refused",
    "user_tower.hstu.timestamp_layernorm": "refused",
    "item_tower": "reads no user",
    "temperature": "of scores",
    "sequence_timestamp_is_ascending": "has one value",
    "kernel": "tests/pallas_kernels: equal to xla under every mask",
    "initialization": "parameters are random here",
}
_REFUSED = {"timestamp_layernorm", "EUCLID"}


# Start of a path -> whether a model reads it; a value that it does not read shows nothing.
_READ_IF = {
    "user_tower.sasrec.": lambda tower: tower.encoder == "sasrec",
    "user_tower.hstu.stu.": lambda tower: tower.encoder == "hstu",
    "user_tower.hstu.stu.time_bias_": lambda tower: tower.hstu.stu.use_time_bias,
    "user_tower.hstu.stu.num_time_bias_": lambda tower: tower.hstu.stu.use_time_bias,
    "user_tower.hstu.last_layer": lambda tower: tower.encoder == "hstu",
    "user_tower.hstu.positional_encoder.time_bucket_": (
        lambda tower: tower.hstu.positional_encoder.use_time_encoding
    ),
}


def _is_read(path, config):
    return all(
        reads(config.user_tower) for start, reads in _READ_IF.items() if path.startswith(start)
    )


def _leaves(config, path=""):
    """(path, value, its choices) of every field; of a section that may be None, whether it is."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), hints[field.name]
        here, is_section = f"{path}{field.name}", dataclasses.is_dataclass(value)
        if here in _NOT_HERE:
            continue
        if type(None) in typing.get_args(kind):
            yield here, is_section, {True, False}
        elif not is_section:
            is_choice = typing.get_origin(kind) is typing.Literal
            yield here, value, set(typing.get_args(kind) if is_choice else ())
        if is_section:
            yield from _leaves(value, f"{here}.")


def test_every_option_is_in_a_case():
    """All choices of a field, or two values of it: a new field without a case fails."""
    seen, choices = {}, {}
    for name in NAMES:
        config = cases.case(name).config
        for path, value, all_values in _leaves(config):
            if not _is_read(path, config):
                continue
            seen.setdefault(path, set()).add(value)
            choices[path] = all_values - _REFUSED
    assert {
        path: choices[path] - found for path, found in seen.items() if choices[path] - found
    } == {}
    assert [path for path, found in seen.items() if len(found) < 2] == []
