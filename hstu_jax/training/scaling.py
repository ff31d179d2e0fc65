"""A model of a training step on many GPUs: operations and bytes, divided by stated rates.

    python -m hstu_jax.benchmark scaling --config=configs/kuairand.py:seed

No figure here is measured. Operations and bytes are those of the step traced for each mesh
(`traced.py`); rates are `H100`. Groups per device stay as configured while devices are added (weak
scaling). Nothing overlaps, and norms, gates, sorting, latency and waiting for the slowest device
are left out: the first makes the efficiency too low, the rest work either way.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from hstu_jax.config import schema
from hstu_jax.data import event_store
from hstu_jax.features import pipeline as pipeline_lib
from hstu_jax.features import sequence_rules
from hstu_jax.features.batch import BatchShape
from hstu_jax.losses import query_softmax
from hstu_jax.training import collectives, partition, schedules, step, traced
from hstu_jax.training import run as run_lib
from hstu_jax.training import state as state_lib
from pallas_kernels.hstu_attention import flops

DEVICES_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device reaches, by assumption; operations and bytes per second.

    Attributes:
        name: of the device.
        products: kind of matrix product (`traced.Traced`) -> operations.
        attention: dtype of attention -> useful operations, forward and backward together.
        in_host: bytes that a device sends to others of its host.
        between_hosts: bytes that a device sends to other hosts.
    """

    name: str
    products: Mapping[str, float]
    attention: Mapping[str, float]
    in_host: float
    between_hosts: float


# Peaks of an H100 SXM: 989 TFLOP/s in bfloat16, 495 in TF32 (float32 where full precision is not
# asked for), 67 in float32; 60 % of the first two and half of the third are assumed. Attention:
# what docs/performance.md calls a good landing, 300 TFLOP/s forward and 180 backward, weighed by
# their operations; in float32 the kernel runs on no tensor core. 900 GB/s inside a host count both
# directions; 50 GB/s between hosts (400 Gb/s) each.
H100 = Rates(
    name="H100",
    products={"bfloat16": 593e12, "float32": 297e12, "float32 exact": 33e12},
    attention={"bfloat16": 203e12, "float32": 33e12},
    in_host=450e9,
    between_hosts=50e9,
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends."""

    in_host: float
    between_hosts: float

    def seconds(self, rates: Rates) -> float:
        """Time of both, one after the other."""
        return self.in_host / rates.in_host + self.between_hosts / rates.between_hosts


def traffic(each: collectives.Collective, *, devices_per_host: int) -> Traffic:
    """Bytes that a device sends in all runs of a collective, to its own host and to others.

    A group of g devices, k of them on each of m hosts; R bytes of result on each device.
    All-to-all: R (k - 1) / g and R (g - k) / g; ragged, the same if all its room is filled.
    All-reduce: reduced within the host, then each device its part between hosts, then gathered:
    2 R (k - 1) / k and 2 R (m - 1) / (m k).
    All-gather: R (k - 1) / k and R (m - 1) / (m k). Reduce-scatter: the same of its input, g R.

    Args:
        each: the collective.
        devices_per_host: device d is on host d // devices_per_host.

    Raises:
        ValueError: another kind of collective.
    """
    hosts = [device // devices_per_host for device in each.group]
    g, m, k = len(hosts), len(set(hosts)), hosts.count(hosts[0])
    size = each.times * each.result_bytes
    if each.kind in ("all-to-all", "ragged-all-to-all"):
        return Traffic(size * (k - 1) / g, size * (g - k) / g)
    factors = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": float(g)}
    if each.kind not in factors:
        raise ValueError(f"{each.kind}: the model knows all-to-all, {', '.join(factors)}.")
    size *= factors[each.kind]
    return Traffic(size * (k - 1) / k, size * (m - 1) / (m * k))


def attention_flops(config: schema.Config, *, num_users: int) -> int:
    """Operations of all layers' attention, forward and backward, for users of full length.

    The last layer's one query per user is counted among the matrix products.
    """
    hstu = config.model.user_tower.hstu
    rule = sequence_rules.mask_rule(
        hstu.stu, num_contextual=config.num_contextual, objective=config.model.objective
    )
    longest = config.num_contextual + config.model.user_tower.max_seq_len
    tail_len = sequence_rules.tail_len(config.model.user_tower)
    ends_at_one = hstu.last_layer == "last_position" and config.model.objective == "window"
    pairs = 0
    for layer in range(hstu.attn_num_layers - ends_at_one):
        is_tail = tail_len > 0 and layer >= hstu.attn_truncation_split_layer
        length = min(longest, config.num_contextual + tail_len) if is_tail else longest
        pairs += flops.visible_pairs(np.array([length]), rule)
    return flops.attention_flops(
        num_users * pairs,
        num_heads=hstu.stu.num_heads,
        qk_dim=hstu.stu.attention_dim,
        v_dim=hstu.stu.hidden_dim,
    )


def loss_flops(config: schema.Config, *, shape: BatchShape, num_devices: int) -> int:
    """Operations of a device's loss that its traced step does not show, forward and backward.

    Those of the next-item objective's loop, for batches whose queries are all in use; other losses
    are in the trace. With shared negatives a device scores its queries against those of all.

    Args:
        config: of one device, as of `report`.
        shape: of its batches.
        num_devices: devices of the mesh.
    """
    if config.model.objective != "next_item":
        return 0
    groups, queries, negatives = config.data.num_groups, shape.queries, shape.negatives
    if config.data.negative_sharing == "all":  # as `shared_negatives.share` joins them
        queries, negatives, groups = groups * queries, num_devices * groups * negatives, 1
    return config.train.gradient_accumulation_steps * query_softmax.looped_flops(
        groups=groups,
        num_queries=queries,
        num_negatives=negatives,
        width=config.model.output_dim or config.model.user_tower.hstu.stu.embedding_dim,
    )


def full_users(config: schema.Config, *, shape: BatchShape) -> int:
    """Users of full length that a group has room for: its rows and its user slots bind."""
    longest = config.num_contextual + config.model.user_tower.max_seq_len
    per_row = 1 if config.data.layout == "padded" else max(shape.row_len // longest, 1)
    return min(shape.users, shape.rows * per_row)


def meshes(num_devices: int) -> list[tuple[int, int]]:
    """(host, chip) of a number of devices: one level, and two where there are several hosts.

    Raises:
        ValueError: the devices do not fill their hosts.
    """
    if num_devices <= DEVICES_PER_HOST:
        return [(1, num_devices)]
    if num_devices % DEVICES_PER_HOST:
        raise ValueError(
            f"devices={num_devices}: must be a multiple of the {DEVICES_PER_HOST} of a host, or at "
            "most as many."
        )
    return [(1, num_devices), (num_devices // DEVICES_PER_HOST, DEVICES_PER_HOST)]


def report(
    config: schema.Config,
    store: event_store.EventStore,
    *,
    devices: Sequence[int],
    rates: Rates = H100,
) -> str:
    """The model's table, as Markdown, below lines that say what a step takes.

    Args:
        config: of one device: `data.num_groups` are the groups on each. Its mesh's sizes are not
            read.
        store: the data, for the shapes of batches.
        devices: numbers of devices.
        rates: what a device reaches.

    Raises:
        ValueError: the user tower is no HSTU, or numbers of devices that cannot be.
    """
    tower = config.model.user_tower
    if tower.encoder != "hstu":
        raise ValueError(
            f"model.user_tower.encoder={tower.encoder!r}: the model of many devices counts the "
            "layers of 'hstu' only; leave it at 'hstu'."
        )
    sizes = [size for count in devices for size in meshes(count)]
    pipeline = pipeline_lib.Pipeline(config, store)
    shape = max(pipeline.shapes, key=lambda shape: shape.rows * shape.row_len)
    state = run_lib.state_shapes(config)
    lines, rows, computed = [], [], []
    for host, chip in sizes:
        program, mesh = _program(config, host, chip)
        partition.check_groups(config.data.num_groups * mesh.size, mesh)
        found = traced.trace_step(
            program, pipeline, mesh=mesh, groups_per_device=config.data.num_groups
        )
        hidden = loss_flops(config, shape=shape, num_devices=mesh.size)
        compute_s, described = _compute(config, found, hidden, shape, rates)
        lines = lines or described
        computed.append(compute_s)
        rows.append(_row(host, chip, found, compute_s, rates, _state_bytes(state, program, mesh)))
    if min(computed) < max(computed):
        lines += ["", _says_that_compute_differs(sizes, computed)]
    lines += ["", _HEAD, "|" + "---|" * (_HEAD.count("|") - 1), *rows]
    return "\n".join(lines)


_SAYS_AT_MOST = (
    "mesh.exchange='ragged': filled places only are sent, on average over the devices at most what "
    "is below, which is all the room; how much of it is filled, the ids of a step alone can tell."
)

_HEAD = (
    "| devices | mesh | all-to-all with | state GiB | sent in the host MB | between hosts MB "
    "| exchange ms | step ms | efficiency |"
)


def _program(config, host, chip):
    # The attention of the device at hand is not the one of the model, which counts it by the mask.
    model = dataclasses.replace(config.model, kernel="xla")
    is_two_level = host > 1 and chip > 1
    slack = {} if is_two_level else {"host_exchange_slack": 1.25}
    sizes = dataclasses.replace(config.mesh, host=host, chip=chip, **slack)
    config = dataclasses.replace(config, model=model, mesh=sizes)
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((host, chip), partition.AXES, axis_types=axis_types)
    # "auto" sends whole buckets on GPUs.
    is_ragged = config.mesh.exchange == "ragged"
    run_length = schedules.RunLength(num_steps=1)
    return step.make_program(config, run_length=run_length, is_ragged=is_ragged), mesh


def _compute(config, found, hidden_flops, shape, rates):
    """Seconds of products and attention of a step, and lines that say how they come about."""
    dtype = step.compute_dtype(config).name
    num_users = (
        config.data.num_groups
        * config.train.gradient_accumulation_steps
        * full_users(config, shape=shape)
    )
    products = dict(found.products)
    if hidden_flops:
        products["float32 exact"] = products.get("float32 exact", 0) + hidden_flops
    work = [
        (f"matrix products in {kind}", count, rates.products[kind])
        for kind, count in sorted(products.items())
    ]
    attention = attention_flops(config, num_users=num_users)
    work.append((f"attention in {dtype}", attention, rates.attention[dtype]))
    seconds = sum(count / rate for _, count, rate in work)
    lines = [
        f"A model of {rates.name} GPUs, not a measurement. A device computes "
        f"{seconds * 1e3:.1f} ms for {num_users} users of {config.num_contextual} + "
        f"{config.model.user_tower.max_seq_len} tokens in {config.data.num_groups} group(s):",
        *(
            f"- {name}: {count / 1e12:,.2f} TFLOP at {rate / 1e12:,.0f} TFLOP/s, "
            f"{count / rate * 1e3:.1f} ms"
            for name, count, rate in work
        ),
        "",
        f"Sent at {rates.in_host / 1e9:,.0f} GB/s in a host of {DEVICES_PER_HOST}, "
        f"{rates.between_hosts / 1e9:,.0f} GB/s between hosts, each way; "
        f"mesh.exchange_slack={config.mesh.exchange_slack}, "
        f"host_exchange_slack={config.mesh.host_exchange_slack} (two levels).",
    ]
    if config.mesh.exchange == "ragged":
        lines.append(_SAYS_AT_MOST)
    return seconds, lines


def _says_that_compute_differs(sizes, computed) -> str:
    parts = [
        f"{host} x {chip} {seconds * 1e3:.1f} ms"
        for (host, chip), seconds in zip(sizes, computed, strict=True)
    ]
    return (
        "What a device computes depends on the mesh; above is the first, and each row takes its "
        f"own: {', '.join(parts)}."
    )


def _row(host, chip, found, compute_s, rates, state_bytes) -> str:
    each = [traffic(one, devices_per_host=DEVICES_PER_HOST) for one in found.collectives]
    total = Traffic(sum(one.in_host for one in each), sum(one.between_hosts for one in each))
    exchange_s = total.seconds(rates)
    peers = f"{chip - 1} + {host - 1}" if host > 1 else f"{chip - 1}"
    cells = [
        f"{host * chip}",
        f"{host} x {chip}",
        peers,
        f"{state_bytes / 2**30:.1f}",
        f"{total.in_host / 1e6:,.0f}",
        f"{total.between_hosts / 1e6:,.0f}",
        f"{exchange_s * 1e3:.1f}",
        f"{(compute_s + exchange_s) * 1e3:.1f}",
        f"{compute_s / (compute_s + exchange_s):.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def _state_bytes(state, program, mesh) -> float:
    """Bytes of a state on each device."""
    specs = partition.table_specs(
        program.specs, mesh, replicated_bytes=program.config.mesh.replicated_table_bytes
    )
    tables = sum(
        state_lib.size_bytes(table) / (mesh.size if specs[name] == partition.SPLIT else 1)
        for name, table in state.tables.items()
    )
    return tables + state_lib.size_bytes(dataclasses.replace(state, tables={}))
