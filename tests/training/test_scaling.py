"""The model of many GPUs: programs read from their trace, by hand, and the table made of them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from absl.testing import flagsaver
from jax.extend import core

from hstu_jax import benchmark
from hstu_jax.config import schema
from hstu_jax.features import pipeline as pipeline_lib
from hstu_jax.features.batch import BatchShape
from hstu_jax.losses import query_softmax
from hstu_jax.training import collectives, partition, scaling, schedules, step, traced
from tests.training.small_config import small_config, with_two_tables


def abstract_mesh(host, chip):
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return jax.sharding.AbstractMesh((host, chip), partition.AXES, axis_types=axis_types)


def read(function, *shapes, mesh):
    """Figures of a function of one device's arrays."""
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=partition.REPLICATED,
        out_specs=partition.REPLICATED,
        check_vma=False,
    )
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return traced.read(jax.make_jaxpr(mapped)(*arguments), mesh.shape)


def test_products_by_hand():
    def products(a, b):
        nested = jax.lax.fori_loop(  # a while in a scan is unknown
            0, 5, lambda _, x: jax.lax.while_loop(lambda y: y[0, 0] < 0, lambda y: y @ b, x), a
        )
        with_loop = jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ b), a)  # a scan of 5
        half = (a.astype(jnp.bfloat16) @ b.astype(jnp.bfloat16)).astype(jnp.float32)
        exact = jnp.matmul(a, b, precision="highest")
        unknown = jax.lax.while_loop(lambda x: x[0, 0] < 0, lambda x: x @ b, a)
        either = jax.lax.cond(a[0, 0] > 0, lambda x: x @ b @ b, lambda x: x @ b, a)
        return nested + with_loop + half + exact + unknown + either

    found = read(products, (3, 4), (4, 4), mesh=abstract_mesh(1, 1))
    one = 2 * 3 * 4 * 4
    assert found.products == {"float32": 7 * one, "bfloat16": one, "float32 exact": one}


@pytest.mark.parametrize(
    ("users", "rows", "row_len", "layout", "want"),
    [
        (34, 2, 48, "packed", 2),  # 43 tokens each
        (34, 2, 96, "packed", 4),
        (34, 2, 96, "padded", 2),
        (3, 2, 96, "packed", 3),
        (3, 8, 48, "padded", 3),
    ],
)
def test_users_of_full_length_in_a_group(config, users, rows, row_len, layout, want):
    sizes = dict(groups=1, queries=9, negatives=4, block_len=16)
    shape = BatchShape(users=users, rows=rows, row_len=row_len, **sizes)
    data = dataclasses.replace(config.data, layout=layout)
    assert scaling.full_users(dataclasses.replace(config, data=data), shape=shape) == want


@pytest.mark.parametrize(("block_scores", "is_looped"), [(3 * 5, True), (10**6, False)])
def test_the_products_of_the_next_item_loss(block_scores, is_looped):
    """In a loop of unknown length the trace shows none of them: then the formula counts them."""
    groups, queries, negatives, width = 3, 7, 5, 4

    def gradients(query, positive, negative):
        def loss(query, positive, negative):
            return query_softmax.query_softmax(
                query=query,
                positive=positive,
                negative=negative,
                query_mask=jnp.ones((groups, queries), bool),
                positive_log_q=jnp.zeros((groups, queries)),
                negative_log_q=jnp.zeros((groups, negatives)),
                temperature=0.1,
                log_q_correction=True,
                block_scores=block_scores,
            ).loss_sum

        return jax.grad(loss, argnums=(0, 1, 2))(query, positive, negative)

    shapes = [(groups, count, width) for count in (queries, queries, negatives)]
    found = read(gradients, *shapes, mesh=abstract_mesh(1, 1)).products
    hidden = query_softmax.looped_flops(
        groups=groups,
        num_queries=queries,
        num_negatives=negatives,
        width=width,
        block_scores=block_scores,
    )
    all_products = 3 * 2 * groups * queries * negatives * width
    assert hidden == (all_products if is_looped else 0)
    own_scores = 0 if is_looped else 2 * groups * queries * width  # with the positives
    assert found.get("float32 exact", 0) + hidden == all_products + own_scores


def test_collectives_by_hand():
    def sends(a):
        b = jax.lax.all_to_all(a, "host", split_axis=0, concat_axis=0, tiled=True)
        c = jax.lax.all_gather(a, "chip")
        d = jax.lax.psum_scatter(a, ("host", "chip"), tiled=True)
        c = jax.lax.fori_loop(0, 2, lambda _, x: jax.lax.pmin(x, "host"), jnp.sum(c))
        return jax.lax.psum(jnp.sum(b) + c, ("host", "chip")) + jax.lax.pmax(d, "chip")

    found = read(sends, (8, 2), mesh=abstract_mesh(2, 4)).collectives
    assert [(each.times, each.kind, each.result_bytes, each.group) for each in found] == [
        (1, "all-to-all", 64, (0, 4)),
        (1, "all-gather", 4 * 64, (0, 1, 2, 3)),
        (1, "reduce-scatter", 8, tuple(range(8))),
        (2, "all-reduce", 4, (0, 4)),
        (1, "all-reduce", 4, tuple(range(8))),
        (1, "all-reduce", 8, (0, 1, 2, 3)),
    ]
    with pytest.raises(ValueError, match=r"axis_size_of_tomorrow: names the mesh axes \('chip',\)"):
        traced.read(_with_unknown_collective(), {"chip": 2})


def _with_unknown_collective():
    primitive = core.Primitive("axis_size_of_tomorrow")
    primitive.def_abstract_eval(lambda x, *, axis_name: x)
    return jax.make_jaxpr(lambda x: primitive.bind(x, axis_name="chip"))(1.0)


# Kind, devices of the group on hosts of 4, and bytes of 800 sent within the host and to others.
TRAFFIC = [
    ("all-to-all", range(4), (600, 0)),
    ("all-to-all", range(8), (300, 400)),
    ("all-to-all", (0, 4), (0, 400)),
    ("ragged-all-to-all", range(8), (300, 400)),
    ("all-reduce", range(4), (1200, 0)),
    ("all-reduce", range(8), (1200, 200)),
    ("all-reduce", (0, 4), (0, 800)),
    ("all-gather", range(8), (600, 100)),
    ("reduce-scatter", range(8), (4800, 800)),
    ("all-reduce", (0,), (0, 0)),
]


@pytest.mark.parametrize(("kind", "group", "want"), TRAFFIC)
def test_traffic_by_hand(kind, group, want):
    each = collectives.Collective(kind, "f32[200]", 800, tuple(group))
    sent = scaling.traffic(each, devices_per_host=4)
    assert (sent.in_host, sent.between_hosts) == want
    if kind != "all-reduce" and len(set(d // 4 for d in group)) == 1:
        assert sent.in_host == each.sent_bytes
    twice = scaling.traffic(dataclasses.replace(each, times=2), devices_per_host=4)
    assert (twice.in_host, twice.between_hosts) == (2 * want[0], 2 * want[1])


def test_unknown_traffic_is_refused():
    each = collectives.Collective("collective-permute", "f32[2]", 8, (0, 1))
    with pytest.raises(ValueError, match=r"collective-permute: the model knows all-to-all, all-r"):
        scaling.traffic(each, devices_per_host=4)


def test_attention_of_users_of_full_length(small_store, tmp_path):
    config = with_two_tables(small_config(small_store, tmp_path))
    # 1 contextual token and 42 items, causal; everybody sees the contextual token, which sees all.
    pairs = 43 * 44 // 2 + 42
    per_pair = (2 * 8 + 2 * 8) + (6 * 8 + 4 * 8)  # forward 2 K + 2 V, backward 6 K + 4 V
    # Two layers, the last for one query per user; two heads.
    assert scaling.attention_flops(config, num_users=3) == 3 * pairs * 2 * per_pair


@pytest.fixture(scope="module")
def config(small_store, tmp_path_factory) -> schema.Config:
    """More ids on a device than the 1,024 for which buckets are made at least."""
    return with_two_tables(
        small_config(
            small_store,
            tmp_path_factory.mktemp("scaling"),
            data__source="event_store",
            data__negative_sampler__num_sample=900,
            model__user_tower__hstu__attn_num_layers=1,
        )
    )


def with_rows(config, num_rows):
    features = {
        name: dataclasses.replace(each, num_buckets=num_rows) if each.num_buckets > 1000 else each
        for name, each in config.features.items()
    }
    return dataclasses.replace(config, features=features)


def with_next_item(config, *, is_shared=False, **data):
    if is_shared:
        sampler = dataclasses.replace(config.data.negative_sampler, exclusion="query")
        data |= dict(negative_sharing="all", negative_sampler=sampler)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, objective="next_item"),
        data=dataclasses.replace(config.data, **data),
    )


def test_the_loss_that_a_trace_does_not_show(config):
    shape = BatchShape(
        groups=2, rows=1, row_len=48, users=9, queries=3000, negatives=500, block_len=16
    )
    found = functools.partial(scaling.loss_flops, shape=shape, num_devices=4)
    assert found(config) == 0  # of the window objective everything is in the trace
    two = with_next_item(config, num_groups=2)
    assert found(two) == 6 * 2 * 3000 * 500 * 16
    train = dataclasses.replace(two.train, gradient_accumulation_steps=3)
    assert found(dataclasses.replace(two, train=train)) == 3 * found(two)
    shared = with_next_item(config, num_groups=2, is_shared=True)
    assert found(shared) == 4 * 2 * found(two)  # 2 groups on each of 4 devices


def with_encoder(config, encoder):
    tower = dataclasses.replace(config.model.user_tower, encoder=encoder)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, user_tower=tower))


def test_what_a_device_sends_follows_its_batch_alone(config, small_store):
    """Neither the rows of tables nor, beyond (n - 1) / n, the number of devices."""
    config = with_encoder(config, "mean")  # fast to trace
    pipeline, sent, others = pipeline_lib.Pipeline(config, small_store), {}, set()
    for host, chip, num_rows in ((1, 2, 2_000_000), (1, 8, 8_000_000), (2, 4, 8_000_000)):
        program = step.make_program(
            with_rows(config, num_rows), run_length=schedules.RunLength(num_steps=1)
        )
        mesh = abstract_mesh(host, chip)
        found = traced.trace_step(program, pipeline, mesh=mesh, groups_per_device=1)
        largest = max(each.result_bytes for each in found.collectives)
        assert largest < 0.01 * num_rows * 16 * 4 / mesh.size
        sent[host, chip] = sum(
            each.sent_bytes for each in found.collectives if each.kind == "all-to-all"
        )
        others.add(
            sum(each.result_bytes for each in found.collectives if each.kind != "all-to-all")
        )
    # Of four times the rows and devices; buckets are rounded up to whole ids.
    assert sent[1, 8] / (7 / 8) < 1.01 * sent[1, 2] / (1 / 2)
    # Two levels send the same buckets twice, within the host and between hosts.
    assert sent[2, 4] / (3 / 4 + 1 / 2) == pytest.approx(sent[1, 8] / (7 / 8), rel=0.01)
    assert max(others) < 1.001 * min(others)  # two levels ask once more whether a round is left


def test_the_table(config, small_store, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.cli, "open_data", lambda config: small_store)
    with _devices("16"):
        benchmark.model_many_devices(config)
    text = capsys.readouterr().out
    assert "A model of H100 GPUs, not a measurement." in text
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line[:1] == "|"]
    names, _, level, two = rows
    assert [row[:3] for row in (level, two)] == [
        ["16", "1 x 16", "15"],
        ["16", "2 x 8", "7 + 1"],
    ]
    efficiency = names.index("efficiency")
    assert 0 < int(level[efficiency].rstrip("%")) < 100
    step_ms, exchange_ms = names.index("step ms"), names.index("exchange ms")
    for row in (level, two):
        assert float(row[step_ms]) >= float(row[exchange_ms])


def test_a_loss_that_grows_with_the_devices(config, small_store):
    """Every row takes its own: with shared negatives a device scores those of all."""
    config = with_next_item(config, is_shared=True, num_groups=2, queries_per_group=300_000)
    text = scaling.report(config, small_store, devices=[1, 8])
    grown = re.search(r"own: 1 x 1 ([\d.]+) ms, 1 x 8 ([\d.]+) ms\.$", text, re.MULTILINE)
    assert grown, text
    exact = re.search(r"float32 exact: ([\d.]+) TFLOP", text)
    first, last = (float(each) for each in grown.groups())
    flops = 6 * (2 * 300_000) * (2 * 900) * 16
    assert float(exact.group(1)) == pytest.approx(flops / 1e12, abs=5e-3)
    assert last - first == pytest.approx(7 * flops / 33e12 * 1e3, abs=0.1)
    for line, compute in zip(text.splitlines()[-2:], (first, last), strict=True):
        exchange, total = (float(cell) for cell in line.split("|")[7:9])
        assert total == pytest.approx(exchange + compute, abs=0.15)


def _devices(text):
    benchmark.flags.FLAGS.mark_as_parsed()
    return flagsaver.flagsaver(devices=text.split(","))


def test_refused(config, small_store):
    with pytest.raises(ValueError, match=r"devices=12: must be a multiple of the 8 of a host"):
        scaling.report(config, small_store, devices=[12])
    with pytest.raises(ValueError, match=r"mesh=2048 devices: must divide the 1024 stripes"):
        scaling.report(config, small_store, devices=[2048])
    with pytest.raises(ValueError, match=r"--devices=0: must be positive numbers"), _devices("0"):
        benchmark.model_many_devices(config)
    with pytest.raises(ValueError, match=r"encoder='mean': the model of many devices counts the"):
        scaling.report(with_encoder(config, "mean"), small_store, devices=[8])
