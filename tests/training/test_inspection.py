"""Shapes without a state: what is printed equals what a run allocates, and nothing is allocated."""

import dataclasses
import os
import re
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import kuairand
from hstu_jax import inspect
from hstu_jax.config import resolve
from hstu_jax.features import balance
from hstu_jax.training import inspection, loop
from hstu_jax.training import run as run_lib
from hstu_jax.training import state as state_lib
from tests.training.small_config import small_config, with_two_tables


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_shapes_and_shardings_are_those_of_a_real_state(small_store, tmp_path):
    config = with_two_tables(small_config(small_store, tmp_path, data__num_groups=2))
    run = run_lib.build_run(config, small_store, devices=jax.devices()[:2])
    real, abstract = run_lib.init_state(run), run_lib.abstract_state(run)
    shapes = run_lib.state_shapes(run.config)
    assert run.config.model.initialization == "aligned"
    pairs = list(zip(leaves(real), leaves(abstract), leaves(shapes), strict=True))
    for (path, have), (other, expected), (third, bare) in pairs:
        assert path == other == third
        assert have.shape == expected.shape == bare.shape
        assert have.dtype == expected.dtype == bare.dtype
        assert have.sharding == expected.sharding
    assert state_lib.size_bytes(shapes) == sum(leaf.nbytes for leaf in jax.tree.leaves(real))
    assert state_lib.count(shapes.params) == sum(leaf.size for _, leaf in leaves(real.params))
    text = inspection.describe_state(run.config)
    assert f"({state_lib.size_bytes(real):,} bytes), without" in text


def test_every_optimizer_array_counts(small_store, tmp_path):
    bare = with_two_tables(small_config(small_store, tmp_path))
    more = with_two_tables(
        small_config(
            small_store,
            tmp_path,
            train__sparse_optimizer__kind="adam",
            train__dense_optimizer__kind="sgd",
            train__dense_optimizer__beta2=0.999,
            train__dense_optimizer__ema__decay=0.9,
        )
    )
    one, other = run_lib.state_shapes(bare), run_lib.state_shapes(more)
    params = state_lib.size_bytes(one.params)
    table = next(iter(one.tables.values())).weights
    assert state_lib.size_bytes(other.ema) == params
    # Momentum alone in place of two moments, and two values a weight in place of one a row.
    assert params < state_lib.size_bytes(other.opt_state) + 16 < state_lib.size_bytes(one.opt_state)
    slots = next(iter(other.tables.values())).slots
    assert state_lib.size_bytes(slots) == 2 * state_lib.size_bytes(table)


def test_the_seed_variant_is_inspected_without_allocating():
    config = resolve.resolve(kuairand.get_config("seed"))
    before = {id(array) for array in jax.live_arrays()}
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = inspection.describe_state(config)
    assert all(array.size < 1_000 for array in jax.live_arrays() if id(array) not in before)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib
    assert grown_kib < 2**18, "tables of 20 GiB must not be made"
    # By hand: rows padded to a multiple of 1024, float32; one more float32 a row.
    rows = 10_000_384
    assert f"{rows:,} x 512: {rows * 512:,} parameters, 19.1 GiB" in text
    assert f"38.1 MiB of optimizer state: {rows * 513 * 4:,} bytes" in text
    assert re.search(r"stack/layers_2/uvqk_kernel +512 x 2,048$", text, re.MULTILINE)
    assert re.search(r"positions/position_embedding +8,192 x 512$", text, re.MULTILINE)


def test_command_prints_the_seed_variant_without_data():
    command = [sys.executable, "-m", "hstu_jax.inspect", "--config=configs/kuairand.py:seed"]
    command.append("--config.data.path=no/such/folder")
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    assert "video_id_emb" in result.stdout and "state: 20.5 GiB" in result.stdout
    assert "no/such/folder is missing" in result.stdout


def test_shapes_of_batches_are_printed_where_the_data_is(run):
    (shape,) = run.pipeline.shapes
    assert inspect.batches_line(run.config) == f"batches: {shape}"


def test_the_banner_says_how_even_an_epoch_is(run):
    banner = run_lib.describe(run, run_lib.abstract_state(run))
    (line,) = (line for line in banner.splitlines() if "most / mean" in line)
    loads = {"tokens": [], "pairs": []}
    for number in range(run.pipeline.num_steps(0)):
        lengths = run.pipeline.batch_at(number).batch.segment_lengths
        pairs = balance.visible_pairs(lengths.ravel(), rule=run.pipeline.source.rule)
        loads["tokens"].append(lengths.sum(axis=1))
        loads["pairs"].append(pairs.reshape(lengths.shape).sum(axis=1))
    arrays = {name: np.array(rows, dtype=np.int64) for name, rows in loads.items()}
    steps = balance.Loads(**arrays, num_steps=run.pipeline.num_steps(0))
    assert line.strip() == steps.line(1) and "2 groups tokens 1." in line


@pytest.mark.parametrize(
    ("num_layers", "text"),
    [
        (1, "attention: one query a user, by xla\n"),
        (2, "attention: xla (auto); last layer: one query a user, by xla\n"),
    ],
)
def test_the_banner_says_what_computes_attention(run, num_layers, text):
    state, tower = run_lib.abstract_state(run), run.config.model.user_tower
    tower = dataclasses.replace(
        tower, hstu=dataclasses.replace(tower.hstu, attn_num_layers=num_layers)
    )
    model = dataclasses.replace(run.config.model, user_tower=tower)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
    assert text in run_lib.describe(run, state)


def test_going_on_makes_no_first_state(small_store, tmp_path, monkeypatch):
    config = with_two_tables(
        small_config(small_store, tmp_path, train__num_steps=1, data__num_groups=2)
    )
    run = run_lib.build_run(config, small_store, devices=jax.devices()[:1])
    made = run_lib.init_state(run)
    # At the run's last step, so that nothing is left to train (nor to compile).
    state = dataclasses.replace(made, step=made.step + 1)
    checkpointer = run.checkpointer()
    checkpointer.save(state, run.record())
    checkpointer.close()

    def refuse(run):
        raise AssertionError("a first state was made")

    monkeypatch.setattr(run_lib, "init_state", refuse)
    options = dict(devices=jax.devices()[:1], echo=lambda line: None)
    again = loop.fit(config, small_store, **options)
    restored = loop.restore(config, small_store, devices=jax.devices()[:2])
    for result in (again, restored):
        for have, want in zip(*map(jax.tree.leaves, (result.state, state)), strict=True):
            np.testing.assert_array_equal(have, want)
        expected = result.run.state_spec.tables
        for name, table in result.state.tables.items():
            assert table.weights.sharding.spec == expected[name]
            assert table.weights.sharding.mesh == result.run.mesh
    with pytest.raises(AssertionError, match="a first state was made"):
        loop.fit(dataclasses.replace(config, workdir=str(tmp_path / "new")), small_store, **options)
