"""Where a training step's time goes: each part compiled and timed alone, on a real batch.

Parts overlap with nothing else when timed alone, so their sum is near the whole step's time but not
equal to it. The step is also run twice from one state, to compare the results bit for bit.
"""

import dataclasses
import functools
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.model import dropout, encoder, feature_lookup, linear, match, normalization
from hstu_jax.tables import exchange, lookup
from hstu_jax.training import partition, step
from hstu_jax.training import run as run_lib
from hstu_jax.training import state as state_lib
from pallas_kernels.hstu_attention import api as attention

_FUSABLE = "norms, gates, dropout"
_ONE_LAYER = f"{_FUSABLE}, one layer"


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Result of `benchmark_step`.

    Attributes:
        parts_ms: part -> milliseconds, the shortest of the repeats.
        step_ms: the whole compiled step, the shortest and the median.
        batch_ms: making one batch on the host.
        data_wait_share: share of the loop's time spent waiting for batches.
        users_per_s: users trained per second, by the median step.
        tokens_per_s: token slots in use per second.
        temp_bytes: temporary memory of the compiled step.
        peak_bytes: peak memory: of the device where it tells, else of the process.
        is_repeatable: two runs of the step from one state gave the same bits.
        num_compilations: of the training step.
        fusable_ms: norms, gates and dropout of all STU layers, which a fused kernel would not write
            to memory and read again; 0 without STU layers.
    """

    parts_ms: dict[str, float]
    step_ms: tuple[float, float]
    batch_ms: float
    data_wait_share: float
    users_per_s: float
    tokens_per_s: float
    temp_bytes: int
    peak_bytes: int
    is_repeatable: bool
    num_compilations: int
    fusable_ms: float

    def table(self) -> str:
        """The figures as aligned text."""
        rows = [(name, f"{ms:.2f} ms") for name, ms in self.parts_ms.items()]
        best, median = self.step_ms
        rows += [
            ("whole step", f"{best:.2f} ms (median {median:.2f})"),
            ("batch on the host", f"{self.batch_ms:.2f} ms"),
            ("data wait", f"{self.data_wait_share:.1%} of the loop"),
            ("users", f"{self.users_per_s:,.0f} /s"),
            ("tokens", f"{self.tokens_per_s:,.0f} /s"),
            ("temporary memory", f"{self.temp_bytes / 2**20:,.1f} MiB"),
            ("peak memory", f"{self.peak_bytes / 2**20:,.1f} MiB"),
            ("same bits twice", "yes" if self.is_repeatable else "NO"),
            ("compilations", str(self.num_compilations)),
            (f"{_FUSABLE}, all layers", f"{self.fusable_ms / best:.1%} of the step"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def benchmark_step(run: run_lib.Run, *, num_repeats: int = 10) -> StepTimes:
    """Times a run's training step and its parts.

    Args:
        run: the assembled run; nothing is written to its workdir.
        num_repeats: timed calls of each part.

    Raises:
        ValueError: the run's steps take several batches.
    """
    accumulated = run.config.train.gradient_accumulation_steps
    if accumulated > 1:
        raise ValueError(
            f"train.gradient_accumulation_steps={accumulated}: the benchmark times steps of one "
            "batch; set it to 1."
        )
    state = run_lib.init_state(run)
    host_batch = run.pipeline.batch_at(0)
    batch = run.put(host_batch.batch)
    started = time.perf_counter()
    for number in range(num_repeats):
        run.pipeline.batch_at(number)
    batch_ms = (time.perf_counter() - started) * 1e3 / num_repeats

    parts = {
        name: _best_ms(function, arguments, num_repeats)
        for name, function, arguments in _parts(run, state, batch)
    }
    is_repeatable = _is_repeatable(run, state, batch)
    lowered = run.train_step.lower(state, batch).compile()
    times, wait_share = [], 0.0
    with run.pipeline.iterate(stop_step=num_repeats, device_put=run.put) as batches:
        loop_started = time.perf_counter()
        for item in batches:
            started = time.perf_counter()
            state, metrics = run.train_step(state, item.batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - started)
        wait_share = batches.wait_s / (time.perf_counter() - loop_started)
    median = float(np.median(times))
    return StepTimes(
        parts_ms=parts,
        step_ms=(min(times) * 1e3, median * 1e3),
        batch_ms=batch_ms,
        data_wait_share=wait_share,
        users_per_s=host_batch.num_users / median,
        tokens_per_s=host_batch.num_tokens / median,
        temp_bytes=lowered.memory_analysis().temp_size_in_bytes,
        peak_bytes=_peak_bytes(run.mesh.devices.flat[0]),
        is_repeatable=is_repeatable,
        num_compilations=run.train_step._cache_size(),
        fusable_ms=parts.get(_ONE_LAYER, 0.0) * run.config.model.user_tower.hstu.attn_num_layers,
    )


def _parts(run: run_lib.Run, state: state_lib.TrainState, batch: Any):
    """(name, compiled function, arguments) of each part of the step."""
    program, mesh = run.program, run.mesh
    split, replicated = partition.SPLIT, partition.REPLICATED
    tables = run.state_spec.tables

    def place(function, in_specs, out_specs, **kwargs):
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return jax.jit(mapped, **kwargs)

    def look_up(state, batch):
        table_ids = feature_lookup.batch_ids(program.plan, batch)
        unique, picked, _ = step.fetch(program, state, table_ids)
        return unique, picked, {t: lookup.expand(rows, unique[t]) for t, rows in picked.items()}

    # Scalars cannot be split over devices: the number of rows travels as one per device.
    def with_counts(function):
        def wrapped(*args):
            unique, *rest = function(*args)
            unique = {
                t: dataclasses.replace(u, num_rows=u.num_rows[None]) for t, u in unique.items()
            }
            return unique, *rest

        return wrapped

    looked_up = place(with_counts(look_up), (run.state_spec, split), split)
    unique, picked, vectors = looked_up(state, batch)

    def expand_grad(picked, unique, cotangent):
        def total(picked):
            return {t: lookup.expand(rows, unique[t]) for t, rows in picked.items()}

        return jax.vjp(total, picked)[1](cotangent)[0]

    def update_tables(tables, unique, gradients):
        return {
            t: exchange.apply(
                tables[t],
                unique[t],
                g,
                axis_names=partition.AXES,
                slack=run.config.mesh.exchange_slack,
                host_slack=run.config.mesh.host_exchange_slack,
                is_ragged=program.sends_filled(t),
                rule=program.table_rule,
                learning_rate=1e-3,
            )
            for t, g in gradients.items()
        }

    batch_stats = jax.device_get(state.batch_stats)

    def towers(params, vectors, batch):
        inputs = feature_lookup.to_lookups(program.plan, batch, vectors)
        inputs = jax.tree.map(lambda x: x.astype(step.compute_dtype(program.config)), inputs)
        variables = {"params": params, "batch_stats": batch_stats}
        return program.model.apply(variables, inputs, batch, jax.random.key(0))

    def model_grad(params, vectors, batch):
        out, pullback = jax.vjp(lambda p, v: towers(p, v, batch), params, vectors)
        return pullback(out)

    def loss_grad(outputs, batch):
        return jax.grad(lambda o: step.score(program, o, batch).loss_sum)(outputs)

    outputs = place(towers, (replicated, split, split), split)(state.params, vectors, batch)
    yield "lookup", looked_up, (state, batch)
    if run.config.model.user_tower.encoder == "hstu":
        attend = functools.partial(_attention_grad, run.config)
        yield "attention, all layers", place(attend, (split,), split), (batch,)
        yield "projections, all layers", *_projections(run, batch)
        yield _ONE_LAYER, *_fusable(run, batch)
    yield (
        "towers, forward and backward",
        place(model_grad, (replicated, split, split), (replicated, split)),
        (state.params, vectors, batch),
    )
    yield "loss", place(loss_grad, (split, split), split), (outputs, batch)
    yield (
        "lookup gradient",
        place(expand_grad, (split, split, split), split),
        (picked, unique, vectors),
    )
    update = place(update_tables, (tables, split, split), tables)
    yield "table update (not donated)", update, (state.tables, unique, picked)


def _attention_grad(config, batch):
    """Gradient of every layer's attention on random q, k, v of the layer's own layout.

    Without the bias that a layer may have, by the implementation that has one.
    """
    user_tower = config.model.user_tower
    stu = user_tower.hstu.stu
    layer = match.build_stu_layer(
        stu,
        contextual_len=config.num_contextual,
        max_seq_len=user_tower.max_seq_len,
        objective=config.model.objective,
    )
    layout = batch.sequence_layout()
    grid = (layout.num_rows, layout.row_len, stu.num_heads)
    options = dict(
        rule=layer.rule,
        alpha=layer.alpha,
        divisor=layer.divisor,
        implementation=config.model.kernel if layer.logit_bias is None else "xla",
    )
    keys = jax.random.split(jax.random.key(0), 3)
    dtype = step.compute_dtype(config)
    q = jax.random.normal(keys[0], (*grid, stu.attention_dim), dtype)
    k = jax.random.normal(keys[1], (*grid, stu.attention_dim), dtype)
    v = jax.random.normal(keys[2], (*grid, stu.hidden_dim), dtype)
    split = user_tower.hstu.attn_truncation_split_layer
    tail = None if batch.tail is None else batch.tail.sequence_layout()

    def layout_of(index):
        return layout if tail is None or index < split else tail

    def fill(x, layout):  # the tail has no more slots than the rows
        flat = x.reshape(-1, *x.shape[2:])[: layout.num_rows * layout.row_len]
        return flat.reshape(layout.num_rows, layout.row_len, *x.shape[2:])

    ends_at_one_token = (
        user_tower.hstu.last_layer == "last_position" and config.model.objective == "window"
    )
    num_layers = user_tower.hstu.attn_num_layers
    last_layout = layout_of(num_layers - 1)
    last_slot = encoder.build_sequence(last_layout, batch.user_index.reshape(-1))[0].last_slot

    def total(q, k, v):
        out = jnp.float32(0)
        # Unequal inputs, or XLA would compute one layer for all.
        for index in range(num_layers - ends_at_one_token):
            now = layout_of(index)
            inputs = (fill(q + index, now), fill(k, now), fill(v, now))
            full = attention.hstu_attention(*inputs, layout=now, **options)
            out += jnp.sum(full * full)
        if ends_at_one_token:
            last_k, last_v = fill(k, last_layout), fill(v, last_layout)
            flat = q.reshape(-1, *q.shape[2:])
            last_q = flat.at[last_slot].get(mode="fill", fill_value=0)
            last = attention.hstu_attention_last(
                last_q, last_k, last_v, layout=last_layout, **options
            )
            out += jnp.sum(last * last)
        return out

    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)


def _projections(run, batch):
    """Gradient of the layers' two matrix products on random tokens.

    The last layer's outputs are counted at all positions, also where the model computes one.
    """
    stu, hstu = run.config.model.user_tower.hstu.stu, run.config.model.user_tower.hstu
    num_tokens = _num_slots(run, batch)
    value, qk = stu.num_heads * stu.hidden_dim, stu.num_heads * stu.attention_dim
    width_in, width_out = 2 * qk + (1 + stu.use_gate) * value, (1 + 2 * stu.use_gate) * value
    keys = jax.random.split(jax.random.key(0), 4)
    dtype = step.compute_dtype(run.config)
    tokens = jax.random.normal(keys[0], (num_tokens, stu.embedding_dim), dtype)
    gated = jax.random.normal(keys[1], (num_tokens, width_out), dtype)
    kernel_in = jax.random.normal(keys[2], (stu.embedding_dim, width_in), dtype)
    kernel_out = jax.random.normal(keys[3], (width_out, stu.embedding_dim), dtype)

    def total(tokens, gated, kernel_in, kernel_out):
        out = jnp.float32(0)
        for layer in range(hstu.attn_num_layers):
            out += jnp.sum(jnp.square(linear.multiply(tokens + layer, kernel_in)))
            out += jnp.sum(jnp.square(linear.multiply(gated + layer, kernel_out)))
        return out

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))
    return gradient, (tokens, gated, kernel_in, kernel_out)


def _fusable(run, batch):
    """One layer's work beside attention and products, forward and backward, on random tokens.

    Input norm; SiLU of u; dropout of [u, attended, u * norm(attended)], or of norm(attended) where
    there is no gate. Results and gradients are read from memory and written there, as they are
    between matrix products.
    """
    stu = run.config.model.user_tower.hstu.stu
    dtype = step.compute_dtype(run.config)
    num_tokens = _num_slots(run, batch)
    identity = dropout.TokenIdentity(
        user_index=jnp.zeros(num_tokens, jnp.int32), position=jnp.arange(num_tokens)
    )
    flat_shape = (num_tokens, stu.num_heads * stu.hidden_dim)
    # x, attended and u, then the cotangents.
    shapes = [(num_tokens, stu.embedding_dim), (num_tokens, stu.num_heads, stu.hidden_dim)]
    shapes += [flat_shape] * stu.use_gate
    num_inputs = len(shapes)
    shapes += [shapes[0], *[flat_shape] * (1 + 2 * stu.use_gate)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]

    def layer(x, attended, *u):
        flat = attended.reshape(flat_shape)
        heads = normalization.standardize(attended if stu.use_group_norm else flat, eps=1e-6)
        parts = (heads.reshape(flat_shape).astype(dtype),)
        if u:
            gate = jax.nn.silu(*u)
            parts = (gate, flat, gate * parts[0])
        dropped = dropout.dropout_parts(
            parts, rate=stu.output_dropout_ratio, key=jax.random.key(1), identity=identity
        )
        return normalization.standardize(x, eps=1e-6).astype(dtype), *dropped

    @jax.jit
    def with_gradients(*arrays):
        outputs, pullback = jax.vjp(layer, *arrays[:num_inputs])
        return outputs, pullback(arrays[num_inputs:])

    return with_gradients, tuple(arrays)


def _num_slots(run, batch):
    _, rows, row_len = batch.time_gap_s.shape
    return run.config.data.num_groups * rows * row_len


def _best_ms(function: Callable[..., Any], arguments: tuple[Any, ...], num_repeats: int) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(num_repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


def _is_repeatable(run: run_lib.Run, state: state_lib.TrainState, batch: Any) -> bool:
    """Runs the step twice from copies of one state and compares every bit."""
    results = []
    for _ in range(2):
        copy = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
        results.append(jax.device_get(run.train_step(copy, batch)[0]))
    pairs = zip(*map(jax.tree.leaves, results), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def _peak_bytes(device: jax.Device) -> int:
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
