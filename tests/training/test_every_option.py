"""No option is ignored: every field of the configuration changes a result.

Each field stands in a table: in `option_tables.py` with what it must change here (the batch, the
towers, dense parameters or rows of tables after given gradients), or in `options_elsewhere.py` with
the test that shows it. A new field without an entry fails. Nothing is compiled: batches are numpy,
optimizers run eagerly, and of the towers it is the traced program that must differ. That values are
right, and that they differ where they should, is for the tests of each module.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hstu_jax.metrics import ranking
from hstu_jax.model import feature_lookup, match
from hstu_jax.tables import lookup, update
from hstu_jax.training import gradients, partition, schedules, step
from hstu_jax.training import run as run_lib
from tests.training import option_tables, options_elsewhere
from tests.training.small_config import small_config, with_two_tables

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_NUM_STEPS = 5
_RUN_LENGTH = schedules.RunLength(num_steps=6, epoch_ends=(2, 4, 6))
_SHAPE = jax.ShapeDtypeStruct((3, 2), jnp.float32)


def leaves(value, path=""):
    """Dotted paths of all fields; mappings and lists of sections are one field."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}"


def test_every_field_stands_in_a_table(small_store, tmp_path):
    config = small_config(small_store, tmp_path)
    batch, towers = option_tables.CHANGES_BATCH, option_tables.CHANGES_TOWERS
    changes = [*batch, *towers, *option_tables.CHANGES_PARAMETERS, *option_tables.CHANGES_ROWS]
    changes += [name for *_, names in options_elsewhere.SHOWN_ELSEWHERE for name in names]
    assert len(changes) == len(set(changes)), "a field stands twice"
    missing = set(leaves(config)) - set(changes)
    assert missing == set()


@pytest.mark.parametrize(
    ("file", "function"), [entry[:2] for entry in options_elsewhere.SHOWN_ELSEWHERE]
)
def test_tests_that_are_named_exist(file, function):
    assert f"def {function}(" in (_ROOT / "tests" / file).read_text(encoding="utf-8")


def test_batch_changes(small_store, tmp_path):
    assert ignored(option_tables.CHANGES_BATCH, batch_of, small_store, tmp_path) == []


def test_program_of_the_towers_changes(small_store, tmp_path):
    assert ignored(option_tables.CHANGES_TOWERS, towers_of, small_store, tmp_path) == []


def test_parameters_after_some_steps_change(small_store, tmp_path):
    assert ignored(option_tables.CHANGES_PARAMETERS, parameters_of, small_store, tmp_path) == []


def test_rows_of_tables_after_some_steps_change(small_store, tmp_path):
    assert ignored(option_tables.CHANGES_ROWS, rows_of, small_store, tmp_path) == []


def ignored(table, observe, store, workdir):
    """Fields of a table whose other value leaves what `observe` sees as it was."""
    seen = {}

    def result(settings):
        key = repr(sorted(settings.items()))  # many fields are compared with the same settings
        if key not in seen:
            overrides = {path.replace(".", "__"): value for path, value in settings.items()}
            config = small_config(store, workdir, **overrides)
            seen[key] = observe(with_two_tables(config), store)
        return seen[key]

    found = []
    for name, (value, given, *along) in table.items():
        before = {**option_tables.PLAIN, **given}
        after = {**before, name: value, **(along[0] if along else {})}
        if equal(result(before), result(after)):
            found.append(name)
    return found


def equal(left, right):
    """Whether two trees have the same structure and the same values."""
    if jax.tree.structure(left) != jax.tree.structure(right):
        return False
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.shape(a) == np.shape(b) and np.array_equal(a, b) for a, b in pairs)


def batch_of(config, store):
    """The first two batches."""
    pipeline = run_lib.build_run(config, store, devices=jax.devices()[:1]).pipeline
    return [pipeline.batch_at(number).batch for number in range(2)]


def towers_of(config, store):
    """The program of vectors, loss and sampled recall of a training batch: text and constants."""
    run = run_lib.build_run(config, store, devices=jax.devices()[:1])
    program, batch = run.program, run.pipeline.batch_at(0).batch
    variables = jax.eval_shape(
        lambda key: match.init_variables(program.model, key), jax.random.key(0)
    )

    def ids_of(batch):
        found = feature_lookup.batch_ids(program.plan, batch)
        return {table: used.ids for table, used in found.items()}

    dims = {table.name: table.dim for table in program.specs}
    vectors = {
        table: jax.ShapeDtypeStruct((*ids.shape, dims[table]), jnp.float32)
        for table, ids in jax.eval_shape(ids_of, batch).items()
    }

    def compute(variables, vectors, batch, key):
        inputs = feature_lookup.to_lookups(program.plan, batch, vectors)
        towers, _ = program.model.apply(variables, inputs, batch, key, mutable=["batch_stats"])
        scores = step.score(program, towers, batch)
        hits, _ = ranking.sampled_hits(
            positive_scores=scores.positive_scores,
            negative_scores=scores.negative_scores,
            positive_user=batch.positive_user,
            query_mask=batch.query_mask,
            cutoffs=config.metrics.recall_at_k,
        )
        return towers, scores.loss_sum, hits

    axes = [(name, 1) for name in partition.AXES]  # batch norm sums over the mesh
    trace = jax.make_jaxpr(compute, axis_env=axes)
    program = trace(variables, vectors, batch, jax.random.key(0))
    return str(program), [np.asarray(constant) for constant in program.consts]


def parameters_of(config, store):
    """Dense parameters and their average after some steps of given gradients."""
    program = step.make_program(config, run_length=_RUN_LENGTH)
    params = {"user_tower": {"kernel": numbers(_SHAPE)}, "item_tower": {"kernel": numbers(_SHAPE)}}
    opt_state, average = program.optimizer.init(params), params
    for number in range(_NUM_STEPS):
        grads = jax.tree.map(lambda x, n=number: 3.0 * jnp.cos(x * (n + 1.0)), params)
        grads = gradients.clip(grads, config.train.grad_clipping)
        changes, opt_state = program.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, changes)
        average = gradients.average(
            average, params, config.train.dense_optimizer.ema, step=jnp.int32(number)
        )
    return jax.device_get((params, average))


def rows_of(config, store):
    """A table's rows after some steps of given gradients of their occurrences."""
    sparse = config.train.sparse_optimizer
    rule = step.table_rule(sparse)
    limit = sparse.max_gradient if sparse.gradient_clipping else None
    state = update.TableState(
        weights=numbers(jax.ShapeDtypeStruct((8, 3), jnp.float32)),
        slots={
            name: jnp.full((8, 3) if slot.per_value else (8,), slot.initial)
            for name, slot in rule.slots.items()
        },
    )
    unique = lookup.unique_rows(jnp.array([1, 3, 3]), capacity=3, sentinel=8)
    occurrences = jnp.array([[0.5, 2.0, -1.0]]) * jnp.arange(1.0, 4.0)[:, None]
    _, pull = jax.vjp(
        lambda rows: lookup.expand(rows, unique, max_gradient=limit), jnp.zeros((3, 3))
    )
    (row_gradients,) = pull(occurrences)
    for number in range(_NUM_STEPS):
        rate = schedules.learning_rate(
            sparse.learning_rate, base=sparse.lr, run=_RUN_LENGTH, step=jnp.int32(number)
        )
        state = update.apply(
            state,
            unique,
            row_gradients,
            rule=rule,
            learning_rate=rate,
            iteration=number + 1,
        )
    return jax.device_get(state.weights)


def numbers(shapes):
    """Values of about one for a tree of shapes, the same for equal trees."""
    return jax.tree.map(
        lambda leaf: jnp.sin(1.0 + jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape),
        shapes,
    )
