"""Negatives of all groups: both losses beside one group of all users, on one and two devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.features import batch as batch_lib
from hstu_jax.losses import query_softmax, same_item, sampled_softmax
from hstu_jax.model import match
from hstu_jax.training import collectives, partition, schedules, step, step_metrics
from tests.training.small_config import small_config

GROUPS, USERS, QUERIES, NEGATIVES, HARD, WIDTH, ITEMS = 4, 3, 5, 6, 2, 8, 7
OBJECTIVES = ("window", "next_item")
TEMPERATURE, CUTOFFS = 0.5, (3, 7, 12)


@pytest.fixture(scope="module")
def make_program(small_store, tmp_path_factory):
    """Function: objective -> the program of a run that shares its negatives."""

    @functools.cache
    def make(objective):
        config = small_config(
            small_store,
            tmp_path_factory.mktemp("run"),
            data__num_groups=GROUPS,
            data__negative_sharing="all",
            data__negative_sampler__exclusion="query",
            model__objective=objective,
            model__temperature=TEMPERATURE,
            metrics__recall_at_k=CUTOFFS,
        )
        return step.make_program(config, run_length=schedules.RunLength(num_steps=1))

    return make


def draw(objective):
    """Vectors of both towers and a batch of few items, so that most users meet their own."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.normal(size=(GROUPS, *shape), scale=0.6).astype(np.float32)

    def integers(high, *shape):
        return rng.integers(0, high, (GROUPS, *shape)).astype(np.int32)

    is_next = objective == "next_item"
    num_hard = 0 if is_next else HARD
    towers = match.Towers(
        user=normal(QUERIES if is_next else USERS, WIDTH),
        positive=normal(QUERIES, WIDTH),
        negative=normal(NEGATIVES, WIDTH),
        hard_negative=normal(USERS, num_hard, WIDTH),
    )
    log_q = normal(ITEMS)[0]
    positive, negative = integers(ITEMS, QUERIES), integers(ITEMS, NEGATIVES)
    mask = np.ones((GROUPS, QUERIES), bool)
    mask[0, 3:] = mask[2, 1] = False
    empty = np.zeros((GROUPS, 1, 1), np.float32)
    users = np.zeros((GROUPS, USERS), np.int32)
    batch = batch_lib.Batch(
        segment_starts=users,
        segment_lengths=users,
        block_pairs=np.zeros((GROUPS, 1, 3), np.int32),
        num_block_pairs=np.zeros(GROUPS, np.int32),
        history={},
        action=empty.astype(np.int32),
        watch_time_s=empty,
        time_gap_s=empty,
        last_phase=np.zeros((GROUPS, USERS, 0), np.float32),
        contextual={},
        user_index=users,
        user_mask=users == 0,
        sample_weight=users.astype(np.float32),
        positive={"item": positive},
        positive_user=integers(USERS, QUERIES),
        query_mask=mask,
        positive_log_q=log_q[positive],
        negative={"item": negative},
        negative_log_q=log_q[negative],
        hard_negative={},
        hard_negative_mask=rng.random((GROUPS, USERS, num_hard)) < 0.7,
        hard_negative_log_q=normal(USERS, num_hard),
        block_len=1,
        query_slot=np.zeros((GROUPS, QUERIES), np.int32) if is_next else None,
    )
    return towers, batch


def place(program, num_devices):
    """Compiled (towers, batch) -> (sums over the mesh, gradients of their loss by the towers)."""

    def local(towers, batch):
        def loss_of(towers):
            scores = step.score(program, towers, batch)
            return scores.loss_sum, scores

        gradients, scores = jax.grad(loss_of, has_aux=True)(towers)
        zero = jnp.float32(0)
        counts = dict(num_not_finite=zero, num_waiting=jnp.int32(0))
        return step_metrics.sums(program.config, scores, batch, **counts), gradients

    mesh = partition.make_mesh(program.config.mesh, jax.devices()[:num_devices])
    out = (partition.REPLICATED, partition.SPLIT)
    return partition.place_eval(local, mesh, out_specs=out, state_spec=partition.SPLIT)


def slow(objective, towers, batch, *, is_masked=True, is_shared=True):
    """Loss, its gradients and hits, query by query in float64."""
    vectors = {name: np.asarray(getattr(towers, name), np.float64) for name in vars(towers)}
    pulls = {name: np.zeros_like(value) for name, value in vectors.items()}
    total, ahead = 0.0, []
    positive_item, negative_item = batch.positive["item"], batch.negative["item"]
    for g, q in zip(*np.nonzero(batch.query_mask), strict=True):
        user = batch.positive_user[g, q]
        own = [q]
        if objective == "window":
            own = np.flatnonzero(batch.query_mask[g] & (batch.positive_user[g] == user))
        asks = (g, q if objective == "next_item" else user)
        items = [("positive", (g, q), batch.positive_log_q[g, q])]
        for h in range(GROUPS) if is_shared else [g]:
            for m in range(NEGATIVES):
                if not (is_masked and negative_item[h, m] in positive_item[g, own]):
                    items.append(("negative", (h, m), batch.negative_log_q[h, m]))
        for n in np.flatnonzero(batch.hard_negative_mask[g, user]):
            items.append(("hard_negative", (g, user, n), batch.hard_negative_log_q[g, user, n]))
        query = vectors["user"][asks]
        scores = np.array([vectors[name][at] @ query for name, at, _ in items]) / TEMPERATURE
        logits = scores - [log_q for *_, log_q in items]
        shares = np.exp(logits - logits.max())
        total += np.log(shares.sum()) + logits.max() - logits[0]
        ahead.append(int((scores[1:] >= scores[0]).sum()))
        shares /= shares.sum()
        shares[0] -= 1
        for share, (name, at, _) in zip(shares / TEMPERATURE, items, strict=True):
            pulls["user"][asks] += share * vectors[name][at]
            pulls[name][at] += share * query
    return total, pulls, [float(np.sum(np.array(ahead) < k)) for k in CUTOFFS]


def one_group(objective, program, towers, batch):
    """Loss and gradients of one group of all users, which is handed all negatives."""

    def join(x):
        return jnp.asarray(np.concatenate(list(x))[None])

    arguments = {
        name: join(getattr(batch, name))
        for name in ("query_mask", "positive_log_q", "negative_log_q")
    }
    for side in ("positive", "negative"):
        arguments[f"{side}_item"] = {"item": join(getattr(batch, side)["item"])}
    options = dict(temperature=TEMPERATURE, log_q_correction=True)
    if objective == "window":
        first = USERS * np.arange(GROUPS, dtype=np.int32)[:, None]
        arguments["positive_user"] = join(batch.positive_user + first)
        mask, log_q = join(batch.hard_negative_mask), join(batch.hard_negative_log_q)

    def loss_of(vectors):
        three = {name: vectors[name] for name in ("positive", "negative")}
        if objective == "next_item":
            three["query"] = vectors["user"]
            return query_softmax.query_softmax(**three, **arguments, **options).loss_sum
        hard = sampled_softmax.HardNegatives(
            vectors=vectors["hard_negative"], mask=mask, log_q=log_q
        )
        three |= dict(user=vectors["user"], hard=hard)
        return sampled_softmax.sampled_softmax(**three, **arguments, **options).loss_sum

    joined = {name: join(value) for name, value in vars(towers).items()}
    loss, pulls = jax.jit(jax.value_and_grad(loss_of))(joined)
    return loss, {name: pulls[name].reshape(getattr(towers, name).shape) for name in pulls}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sharing_is_one_group_that_is_handed_all_negatives(objective, make_program):
    program, (towers, batch) = make_program(objective), draw(objective)
    loss, pulls, hits = slow(objective, towers, batch)
    joined_loss, joined = one_group(objective, program, towers, batch)
    np.testing.assert_allclose(joined_loss, loss, rtol=1e-6)
    for num_devices in (1, 2):
        compiled = place(program, num_devices).lower(towers, batch).compile()
        sums, gradients = compiled(*jax.device_put((towers, batch), compiled.input_shardings[0]))
        np.testing.assert_allclose(sums.loss_sum, joined_loss, rtol=1e-6)
        assert list(sums.recall_hits) == hits
        for name, want in pulls.items():
            got = np.asarray(getattr(gradients, name))
            np.testing.assert_allclose(got, joined[name], rtol=1e-5, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=name)
    # What two devices send: all vectors, ids and log q once, and the gradients of the vectors.
    found = [each for each in collectives.read(compiled.as_text()) if each.result_bytes > 64]
    received = 4 * GROUPS * NEGATIVES * (WIDTH + 1 + 1)
    gathered = sum(each.result_bytes for each in found if each.kind == "all-gather")
    assert gathered == received
    assert {each.kind for each in found} <= {"all-gather", "reduce-scatter", "all-reduce"}
    returned = sum(each.sent_bytes for each in found if each.kind != "all-gather")
    assert returned == 4 * GROUPS * NEGATIVES * WIDTH / 2
    # What would be wrong is far away.
    for wrong in (dict(is_shared=False), dict(is_masked=False)):
        other_loss, other, other_hits = slow(objective, towers, batch, **wrong)
        assert abs(other_loss / loss - 1) > 0.01 and other_hits != hits
        assert np.abs(other["negative"] - pulls["negative"]).max() > 0.05


def test_blocks_of_queries_find_the_same_positives_of_users():
    rng = np.random.default_rng(0)
    shape = dict(positive=(2, 7, 2), negative=(2, 5, 2))
    items = {name: rng.integers(0, 2, size).astype(np.int32) for name, size in shape.items()}
    user, mask = rng.integers(0, 3, (2, 7)).astype(np.int32), rng.random((2, 7)) < 0.8
    expected = np.zeros((2, 3, 5), bool)
    for g, q in zip(*np.nonzero(mask), strict=True):
        same = (items["negative"][g] == items["positive"][g, q]).all(axis=-1)
        expected[g, user[g, q]] |= same
    assert 0 < expected.sum() < expected.size
    find = jax.jit(same_item.positives_of_users, static_argnames=("num_users", "block"))
    for block in (20, 10**6):
        found = find(
            positive_item={"pair": items["positive"]},
            negative_item={"pair": items["negative"]},
            positive_user=user,
            query_mask=mask,
            num_users=3,
            block=block,
        )
        np.testing.assert_array_equal(found, expected)


def test_a_user_whose_negatives_are_all_its_own_costs_nothing(make_program):
    towers, batch = draw("window")
    for items in (batch.positive, batch.negative):
        items["item"][:] = 1
    batch.hard_negative_mask[:] = False
    sums, gradients = place(make_program("window"), 1)(towers, batch)
    assert float(sums.loss_sum) == 0 and not any(map(np.any, jax.tree.leaves(gradients)))
