"""`fit`: a stopped run goes on bit for bit, refuses what does not fit, and stops on a bad loss."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hstu_jax.config import train_schema
from hstu_jax.training import best, checkpoint, evaluation, loop
from hstu_jax.training import run as run_lib
from tests.training.small_config import small_config, with_two_tables


def fit(config, store):
    lines = []
    result = loop.fit(config, store, devices=jax.devices()[:1], echo=lines.append)
    return result, "\n".join(lines)


def with_steps(config, num_steps):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=num_steps))


def metric_lines(config):
    with open(f"{config.workdir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def logged(config):
    lines = metric_lines(config)
    rates = ("per_s", "data_wait_share")
    return [{k: v for k, v in line.items() if not k.endswith(rates)} for line in lines]


@pytest.fixture(scope="module")
def straight(small_store, tmp_path_factory):
    """Six steps with everything that a stop could lose: moments, average, windows, the best."""
    config = small_config(
        small_store,
        tmp_path_factory.mktemp("straight"),
        model__user_tower__hstu__attn_num_layers=1,
        train__sparse_optimizer__kind="partial_rowwise_adam",
        train__sparse_optimizer__lr=0.01,
        train__dense_optimizer__ema__decay=0.5,
        train__keep_best__metric="recall@50",
        train_metrics__recall_at_k=(5,),
        train_metrics__decay_step=3,
        eval__every_num_steps=2,
    )
    config = with_two_tables(config)
    return config, *fit(config, small_store)


@pytest.mark.parametrize(
    ("field", "value", "was"),
    [
        ("exclude_seen", False, True),
        ("catalogue", "all", "trained"),
        ("use_dense_ema", False, True),
    ],
)
def test_a_best_that_other_rules_chose_is_not_compared(straight, field, value, was):
    config, result, _ = straight
    other = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **{field: value}))
    message = (
        rf"eval\.{field}={value!r}: .*best/\d, was chosen with {was!r}, so its recall@50 cannot"
    )
    with pytest.raises(ValueError, match=message):
        best.BestCheckpoint(dataclasses.replace(result.run, config=other))
    more_cutoffs = dataclasses.replace(config.eval, top_k=(1, *config.eval.top_k))
    same_rules = dataclasses.replace(config, eval=more_cutoffs)
    best.BestCheckpoint(dataclasses.replace(result.run, config=same_rules)).close()


def test_resuming_gives_the_run_that_was_never_stopped(straight, small_store, tmp_path):
    config, result, text = straight
    assert result.num_compilations == 1
    assert "step      6/6" in text
    stopped = dataclasses.replace(config, workdir=str(tmp_path))

    class Killed(Exception):
        pass

    def echo(line):
        # The log line of step 4: step 3 is saved, step 4 is not.
        if "step      4/6" in line:
            raise Killed

    with pytest.raises(Killed):
        loop.fit(stopped, small_store, devices=jax.devices()[:1], echo=echo)
    resumed, text = fit(stopped, small_store)
    assert f"resumed   from {tmp_path}/checkpoints/3" in text
    for got, want in zip(*map(jax.tree.leaves, (resumed.state, result.state)), strict=True):
        np.testing.assert_array_equal(got, want)
    # The log too, but for the rates: step 4's line spans the stop.
    assert logged(stopped) == logged(config)
    best = [
        loop.restore(c, small_store, step="best", devices=jax.devices()[:1]).state
        for c in (stopped, config)
    ]
    for got, want in zip(*map(jax.tree.leaves, best), strict=True):
        np.testing.assert_array_equal(got, want)


def test_train_metrics_are_smoothed_over_windows_of_steps(straight):
    config, _, text = straight
    values = [line["smoothed_recall@5"] for line in metric_lines(config) if line["kind"] == "train"]
    # Windows end after steps 3 and 6, lines are of steps 2, 4 and 6.
    assert values[0] == 0 and 0 < values[1] < 1 and values[2] not in (0, values[1])
    assert "smoothed_recall@5" in text


def test_the_best_validation_is_kept_and_is_one_of_the_average(straight, small_store):
    config, result, text = straight
    lines = [line for line in metric_lines(config) if line["kind"] == "validation"]
    assert [line["step"] for line in lines] == [2, 4, 6]  # the last one too
    recalls = [line["recall@50"] for line in lines]
    first_best = lines[int(np.argmax(recalls))]
    assert f"best      recall@50 {max(recalls):.4f}, kept in {config.workdir}/best" in text
    restored = loop.restore(config, small_store, step="best", devices=jax.devices()[:1])
    assert int(restored.state.step) == first_best["step"]
    record = restored.run.checkpointer(read_only=True, folder="best").read_record(
        first_best["step"]
    )
    assert record.metric_value == max(recalls)
    # Ranked by the averaged parameters, and by the others if the configuration says so.
    eval_set = evaluation.make_eval_set(small_store, split="validation", exclude_seen=True)
    found = evaluation.evaluate(result.run, restored.state, eval_set).scalars()
    assert found["loss"] == first_best["loss"]
    other = dataclasses.replace(config, eval=dataclasses.replace(config.eval, use_dense_ema=False))
    plain_run = dataclasses.replace(result.run, config=other)
    plain = evaluation.evaluate(plain_run, restored.state, eval_set).scalars()
    assert abs(plain["loss"] - found["loss"]) > 1e-5


def test_a_better_state_replaces_a_best_one_of_a_later_step(straight, tmp_path):
    """As after a resume from before it: Orbax saves nothing beside a later step."""
    config, result, _ = straight
    run = dataclasses.replace(result.run, config=dataclasses.replace(config, workdir=str(tmp_path)))
    state = dataclasses.replace(result.state, step=jnp.int32(5))
    earlier = dataclasses.replace(result.state, step=jnp.int32(3))
    with contextlib.closing(best.BestCheckpoint(run)) as kept:
        assert "0.1000, kept" in kept.offer(state, {"recall@50": 0.1})
    with contextlib.closing(best.BestCheckpoint(run)) as kept:
        assert kept.offer(earlier, {"recall@50": 0.1}) == ""
        assert "0.1200, kept" in kept.offer(earlier, {"recall@50": 0.12})
    with contextlib.closing(run.checkpointer(folder="best")) as there:
        assert there.all_steps() == [3] and there.read_record(3).metric_value == 0.12
        with pytest.raises(ValueError, match="best: holds step 3, so step 3 cannot be saved there"):
            there.save(earlier, run.record())


def test_the_best_of_a_run_that_keeps_none(small_store, tmp_path):
    config = small_config(small_store, tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match=r"best: no such folder; .* train\.keep_best\.metric set"
    ):
        loop.restore(config, small_store, step="best", devices=jax.devices()[:1])


def test_epochs_end_where_their_batches_do(small_store, tmp_path):
    schedule = {"schedule": "exponential_decay", "decay_size": 1, "by_epoch": True}
    options = {f"train__dense_optimizer__learning_rate__{k}": v for k, v in schedule.items()}
    config = small_config(
        small_store,
        tmp_path,
        train__num_steps=0,
        train__num_epochs=3,
        train__gradient_accumulation_steps=4,
        **options,
    )
    run = run_lib.build_run(config, small_store, devices=jax.devices()[:1])
    length = run.program.run_length
    assert length.num_steps == run.num_steps == run.pipeline.first_step(3) // 4
    batches = [run.pipeline.first_step(epoch) for epoch in (1, 2, 3)]
    assert length.epoch_ends == tuple(-(-count // 4) for count in batches)
    constant = small_config(small_store, tmp_path)
    run = run_lib.build_run(constant, small_store, devices=jax.devices()[:1])
    assert run.program.run_length.epoch_ends == ()


def test_a_longer_run_is_refused_only_if_a_schedule_depends_on_it(straight):
    config, result, _ = straight
    record = result.run.record()
    longer = dataclasses.replace(record, num_steps=12)
    with pytest.raises(ValueError, match=r"a run of 6 steps, this one has 12, .* \(a T_max\)"):
        checkpoint.check_resumable(record, longer, where="here")
    free = dataclasses.replace(longer, is_bound_to_length=False)
    checkpoint.check_resumable(record, free, where="here")
    fixed = train_schema.LearningRateConfig(schedule="cosine_annealing", T_max=5)
    assert not fixed.depends_on_run_length


def test_a_finished_run_trains_no_further(straight, small_store):
    config, result, _ = straight
    again, text = fit(config, small_store)
    assert "nothing to train" in text
    for got, want in zip(*map(jax.tree.leaves, (again.state, result.state)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_another_configuration_is_refused(straight, small_store):
    config, _, _ = straight
    model = dataclasses.replace(config.model, temperature=0.2)
    expected = r"another configuration \(model\.temperature: 0\.15 -> 0\.2\); use another workdir"
    with pytest.raises(ValueError, match=expected):
        fit(dataclasses.replace(config, model=model), small_store)


def test_other_data_is_refused(straight):
    config, result, _ = straight
    record = result.run.record()
    other = dataclasses.replace(record, data_fingerprint="another")
    with pytest.raises(ValueError, match="was trained on other data"):
        checkpoint.check_resumable(record, other, where="here")


def test_restore_gives_the_trained_state(straight, small_store):
    config, result, _ = straight
    restored = loop.restore(config, small_store, devices=jax.devices()[:1])
    for got, want in zip(*map(jax.tree.leaves, (restored.state, result.state)), strict=True):
        np.testing.assert_array_equal(got, want)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5; there are \[3, 6\]"):
        loop.restore(config, small_store, step=5, devices=jax.devices()[:1])


def test_restore_without_a_run_names_the_command(small_store, tmp_path):
    config = small_config(small_store, tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"train first with `python -m hstu_jax\.train"):
        loop.restore(config, small_store, devices=jax.devices()[:1])


def test_a_checkpoint_restores_onto_more_devices(small_store, tmp_path):
    config = small_config(
        small_store,
        tmp_path,
        data__num_groups=2,
        model__user_tower__encoder="mean",  # compiles in a moment; the state is what matters
        train__gradient_accumulation_steps=2,
    )
    config = with_steps(with_two_tables(config), 2)
    result, _ = fit(config, small_store)
    # Steps take the batches in order, two by two.
    run = result.run
    state = run_lib.init_state(run)
    batches = [run.put(run.pipeline.batch_at(number).batch) for number in range(4)]
    for pair in (batches[:2], batches[2:]):
        state, _ = run.train_step(state, tuple(pair))
    for got, want in zip(*map(jax.tree.leaves, (state, result.state)), strict=True):
        np.testing.assert_array_equal(got, want)
    restored = loop.restore(config, small_store, devices=jax.devices()[:2])
    assert restored.run.mesh.size == 2
    for got, want in zip(*map(jax.tree.leaves, (restored.state, result.state)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_loss_that_is_not_finite_stops_the_run(small_store, tmp_path):
    config = small_config(
        small_store,
        tmp_path,
        model__user_tower__encoder="mean",
        train__dense_optimizer__lr=1e30,
        train__sparse_optimizer__lr=1e30,
    )
    with pytest.raises(
        FloatingPointError, match=r"step \d: the loss sum is .* not finite; .*Lower"
    ):
        fit(with_two_tables(config), small_store)


def test_a_mismatched_array_is_named(straight, small_store):
    config, result, _ = straight
    checkpointer = result.run.checkpointer(read_only=True)
    params = {**result.state.params, "extra": np.zeros(3, np.float32)}
    other = dataclasses.replace(result.state, params=jax.device_put(params))
    with pytest.raises(ValueError, match="the checkpoint has no array 'params/extra'"):
        checkpointer.restore(6, other)
    checkpointer.close()
