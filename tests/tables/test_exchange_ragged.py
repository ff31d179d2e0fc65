"""The exchange that sends filled places alone: the same bits as whole buckets, on every platform.

XLA's CPU backend has no ragged all-to-all, so programs run with an emulation (`ragged.py`), which
is held to the example of JAX's documentation; the real one is looked for in programs lowered for
GPUs and TPUs. Four devices and two levels are in `test_exchange_many.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hstu_jax.tables import rounds, spec
from tests.tables import exchange_steps as steps
from tests.tables import ragged

TABLE = spec.TableSpec("video", 9000, 6)
# The example of `jax.lax.ragged_all_to_all`, a row for each of two devices.
EXAMPLE = dict(
    operand=[[1, 2, 2], [3, 4, 0]],
    output=[[0, 0, 0, 0], [0, 0, 0, 0]],
    input_offsets=[[0, 1], [0, 1]],
    send_sizes=[[1, 2], [1, 1]],
    output_offsets=[[0, 0], [1, 2]],
    recv_sizes=[[1, 1], [2, 1]],
)


def emulate_example(**changes):
    """What the emulation gives both devices."""

    def local(given):
        given = {name: value[0] for name, value in given.items()}
        with ragged.emulated():
            return jax.lax.ragged_all_to_all(**given, axis_name=steps.AXES)[None]

    given = {name: jnp.asarray(value, jnp.int32) for name, value in (EXAMPLE | changes).items()}
    split = PartitionSpec(steps.AXES)
    mapped = jax.shard_map(local, mesh=steps.make_mesh((1, 2)), in_specs=split, out_specs=split)
    return jax.jit(mapped)(given).tolist()


def test_the_emulation_gives_the_documented_example_and_poison_for_sizes_that_disagree():
    assert emulate_example() == [[1, 3, 0, 0], [2, 2, 4, 0]]
    wrong = emulate_example(recv_sizes=[[1, 1], [1, 1]])
    assert wrong[0] == [1, 3, 0, 0] and ragged.POISON in wrong[1]


@pytest.mark.parametrize("slack", [steps.WIDE, pytest.param(steps.TIGHT, marks=pytest.mark.long)])
def test_two_devices_get_the_same_bits_as_from_whole_buckets(slack):
    rows, _ = steps.draw(2, table=TABLE)
    waiting = steps.check_ragged((1, 2), TABLE, rows, slack=slack)
    assert waiting.all() if slack == steps.TIGHT else not waiting.any()
    contiguous = np.tile(np.arange(100, 124, dtype=np.int32), (2, 1))  # the other bucket is empty
    steps.check_ragged((1, 2), TABLE, contiguous, slack=slack)
    rows[1] = TABLE.padded_rows  # a device without ids
    assert steps.check_ragged((1, 2), TABLE, rows, slack=slack)[1] == 0


def test_writing_answers_where_they_stand_at_their_sender_is_caught(monkeypatch):
    """A planted wrong variant: offsets of the device that answers, not of the one that asked."""

    def own_offsets(keys, level, low):
        now = next_round(keys, level, low)
        return dataclasses.replace(now, asked=now.asked.at[:, 0].set(now.start))

    rows, cotangent = steps.draw(2, table=TABLE)
    want, _ = steps.dense_sgd(steps.start(TABLE).weights, rows, cotangent)
    next_round = rounds.next_round
    monkeypatch.setattr(rounds, "next_round", own_offsets)
    step = steps.compile_step.__wrapped__((1, 2), is_ragged=True)  # no other test's program
    with ragged.emulated():
        _, got, _ = step(steps.start(TABLE), jnp.asarray(rows), jnp.asarray(cotangent))
    assert np.any(np.asarray(got) != want)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("is_ragged", [False, True])
def test_programs_of_accelerators_have_the_real_one_where_asked_for(platform, is_ragged):
    """Lowered with the check of varying axes, for devices that are not here."""
    step = steps.compile_step((1, 2), is_ragged=is_ragged, check_vma=True)
    arguments = (steps.start(TABLE), *map(jnp.asarray, steps.draw(2, table=TABLE)))
    text = step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    # Rows to fetch, gradients to update; beside them the ids of both, and their counts.
    assert text.count("@ragged_all_to_all") == (2 if is_ragged else 0)
    whole = [line for line in text.splitlines() if "stablehlo.all_to_all" in line]
    assert len(whole) == 4
    assert sum("tensor<2x2xi32>" in line for line in whole) == (2 if is_ragged else 0)


def test_the_emulated_step_passes_shard_maps_check_of_varying_axes():
    step = steps.compile_step((1, 2), is_ragged=True, check_vma=True, slack=steps.TIGHT)
    with ragged.emulated():
        step.lower(steps.start(TABLE), *map(jnp.asarray, steps.draw(2, table=TABLE)))


def test_one_device_sends_nothing():
    step = steps.compile_step((1, 1), is_ragged=True)
    arguments = (steps.start(TABLE), *map(jnp.asarray, steps.draw(1, table=TABLE)))
    assert "all_to_all" not in str(jax.make_jaxpr(step)(*arguments))
