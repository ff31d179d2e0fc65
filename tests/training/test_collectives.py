"""Collectives read from text, in the forms that XLA prints for CPU, GPU and TPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from hstu_jax.training import collectives

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n"
# Line, kind, bytes of the result, devices in a group, bytes sent.
LINES = [
    (
        "  %a = (s32[1,64]{1,0}, /*index=1*/f32[2,8]{1,0}) all-to-all(%x, %y), channel_id=1, "
        "replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}",
        ("all-to-all", 320, 2, 160),
    ),
    (
        "  ROOT %b = bf16[16,4]{1,0:T(8,128)(2,1)} all-gather(bf16[2,4]{1,0} %x), channel_id=2, "
        "replica_groups=[1,8]<=[8], dimensions={0}",
        ("all-gather", 128, 8, 112),
    ),
    (
        "  %c = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), "
        "replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}",
        ("all-gather", 128, 4, 96),
    ),
    ("  %d = f32[] all-reduce(%x), replica_groups={}, to_apply=%sum", ("all-reduce", 4, 8, 7)),
    (
        "  %e = f32[4]{0} reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}",
        ("reduce-scatter", 16, 4, 48),
    ),
    (
        "  %f = (pred[8]{0}, pred[8]{0}, u32[], u32[]) collective-permute-start(%x), "
        "source_target_pairs={{0,1},{1,0}}",
        ("collective-permute", 8, 8, 8),
    ),
    (
        "  %h = f32[4]{0} all-reduce(%x), replica_groups=mesh['host'=2,'chip'=4] {'chip'}",
        ("all-reduce", 16, 4, 24),
    ),
    (
        "  %i = f32[4]{0} all-gather(%x), replica_groups=mesh['host'=2,'chip'=4] {'host','chip'}",
        ("all-gather", 16, 8, 14),
    ),
    ("  %g = f8e4m3fn[3]{0} collective-broadcast(%x)", ("collective-broadcast", 3, 8, 3)),
    (
        "  %j = f32[40,2]{1,0} ragged-all-to-all(%rows, %room, %from, %sizes, %to, %received), "
        "channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}",
        ("ragged-all-to-all", 320, 2, 160),
    ),
]


def test_the_devices_of_a_group():
    """The first of the groups: every fourth, neighbours, half of a transposed mesh, all."""
    groups = [each.group for line, _ in LINES for each in collectives.read(HEADER + line)]
    everyone = tuple(range(8))
    assert groups == [
        *((0, 4), everyone, (0, 2, 4, 6), everyone, (0, 1, 2, 3)),
        *(everyone, (0, 1, 2, 3), everyone, everyone, (0, 4)),
    ]
    assert collectives.group_along(["host"], {"host": 2, "chip": 4}) == (0, 4)


@pytest.mark.parametrize(("line", "want"), LINES)
def test_every_form_by_hand(line, want):
    (found,) = collectives.read(HEADER + line)
    assert (found.kind, found.result_bytes, found.group_size, found.sent_bytes) == want


LOOPS = """
%inner (x: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} all-reduce(%x), replica_groups={}, to_apply=%sum
}

%outer.1 (x: f32[4]) -> f32[4] {
  %b = f32[8]{0} all-to-all(%x), replica_groups={}
  %c = f32[4] while(%b), condition=%on, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %d = f32[4] while(%c), condition=%is_on, body=%unknown
}

%unknown (x: f32[4]) -> f32[4] {
  ROOT %e = f32[2]{0} all-reduce(%x), replica_groups={}, to_apply=%sum
}

%branch (x: f32[4]) -> f32[4] {
  ROOT %f = f32[16]{0} all-reduce(%x), replica_groups={}, to_apply=%sum
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %g = f32[4] while(%x), condition=%o, body=%outer.1, backend_config={"known_trip_count":{"n":"3"}}
  %h = f32[4] conditional(%p, %g, %g), branch_computations={%branch, %inner}
  ROOT %i = f32[32]{0} all-reduce(%h), replica_groups={}, to_apply=%sum
}
"""


def test_runs_in_loops_by_hand():
    """In a loop of 3 one of 5 and one of unknown length; behind it a branch, taken or not."""
    found = {each.shape: each for each in collectives.read(HEADER + LOOPS)}
    want = {"f32[4]": 3 * 5 + 1, "f32[8]": 3, "f32[2]": 3, "f32[16]": 1, "f32[32]": 1}
    assert {shape: each.times for shape, each in found.items()} == want
    assert found["f32[8]"].sent_bytes == 3 * 32 * 7 / 8


def test_what_only_mentions_a_collective_is_none():
    text = (
        "  %h = f32[8]{0} all-reduce-done(f32[8]{0} %all-reduce-start.1)\n"
        '  %i = f32[8]{0} add(%all-reduce.1, %y), metadata={op_name="jit(f)/all_to_all"}\n'
        "  %j = f32[8]{0} fusion(%all-to-all.2), kind=kLoop, calls=%all-to-all_fusion"
    )
    assert collectives.read(HEADER + text) == ()


def test_groups_of_an_unknown_form_are_refused():
    line = "  %a = f32[4]{0} all-reduce(%x), replica_groups=mesh['x'=8] {'x':(2)4}"
    with pytest.raises(ValueError, match="unknown form of replica_groups"):
        collectives.read(HEADER + line)


def test_a_compiled_program():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("chip",), axis_types=auto, devices=jax.devices()[:2])

    def local(x):
        rows = jax.lax.all_to_all(x, "chip", split_axis=0, concat_axis=0, tiled=True)
        rows, _ = jax.lax.scan(lambda x, _: (shift(x), None), rows, length=3)
        return rows + jax.lax.psum(jnp.sum(x), "chip")

    def shift(x):
        return jax.lax.ppermute(x, "chip", [(0, 1), (1, 0)])

    split = PartitionSpec("chip")
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split))
    text = step.lower(jnp.zeros((8, 16))).compile().as_text()
    found = {each.kind: each for each in collectives.read(text)}
    assert found.keys() == {"all-to-all", "all-reduce", "collective-permute"}
    assert [found[kind].times for kind in sorted(found)] == [1, 1, 3]
    assert found["all-to-all"].result_bytes == 4 * 16 * 4
    assert found["all-to-all"].sent_bytes == 128 and found["all-reduce"].sent_bytes == 4
