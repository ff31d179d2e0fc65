"""Training options: what is refused and how, and that parts can be set on the command line."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from configs import kuairand
from hstu_jax.config import checks, resolve, train_schema

DENSE, SPARSE = "train.dense_optimizer", "train.sparse_optimizer"
RATE = f"{DENSE}.learning_rate"


def resolved(**overrides):
    """The sample's configuration with plain optimizers and dotted paths (`__` for dots) set."""
    raw = kuairand.get_config("sample")
    for optimizer in (raw.train.dense_optimizer, raw.train.sparse_optimizer):
        optimizer.learning_rate.schedule = "constant"
    raw.train.dense_optimizer.beta2 = 0.999
    for path, value in overrides.items():
        *sections, name = path.split("__")
        section = raw
        for part in sections:
            section = section[part]
        section[name] = value
    return resolve.resolve(raw)


def under(path, **options):
    return {f"{path.replace('.', '__')}__{name}": value for name, value in options.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train__mixed_precision": "FP16"}, r"mixed_precision='FP16': unknown choice; .*'BF16'"),
        (under(DENSE, kind="lamb"), r"dense_optimizer\.kind='lamb': unknown choice; .*'rmsprop'"),
        (
            under(DENSE, kind="adagrad", beta1=0.8),
            r"dense_optimizer\.beta1=0\.8: is read with kind='adam' or 'adamw' only, not with "
            r"'adagrad'; leave it at 0\.9, or change kind",
        ),
        (
            under(DENSE, momentum=0.5),
            r"momentum=0\.5: is read with kind='sgd' only, not with 'adam",
        ),
        (under(DENSE, amsgrad=True, kind="sgd"), r"amsgrad=True: is read with kind='adam' or"),
        (under(DENSE, rho=0.5), r"rho=0\.5: is read with kind='adadelta' only"),
        (under(DENSE, alpha=0.5), r"alpha=0\.5: is read with kind='rmsprop' only"),
        (under(DENSE, kind="sgd", eps=1e-3), r"eps=0\.001: is read with .*'rmsprop' only"),
        (under(DENSE, eps=-1.0), r"eps=-1\.0: must not be negative"),
        (
            under(DENSE, kind="sgd", nesterov=True, dampening=0.1),
            r"nesterov=True: needs momentum=0\.9 above 0 and dampening=0\.1 of 0",
        ),
        (
            under(DENSE, kind="sgd", momentum=0.0, dampening=0.1),
            r"dampening=0\.1: has no effect with momentum=0",
        ),
        (under(f"{DENSE}.ema", decay=1.0), r"ema\.decay=1\.0: must be in \[0, 1\)"),
        (under(SPARSE, weight_decay=0.1), r"weight_decay=0\.1: .*weight_decay_mode='l2' or 'deco"),
        (
            under(SPARSE, kind="sgd", weight_decay=0.1),
            r"sparse_optimizer\.weight_decay=0\.1: is read with kind='rowwise_adagrad' or 'adam'",
        ),
        (
            under(SPARSE, kind="adam", weight_decay_mode="l2"),
            r"weight_decay_mode='l2': is read with kind='rowwise_adagrad' only",
        ),
        (
            under(SPARSE, initial_accumulator_value=0.1),
            r"initial_accumulator_value=0\.1: is read with kind='adagrad' only",
        ),
        (under(SPARSE, max_gradient=0.5), r"max_gradient=0\.5: is read with gradient_clipping=Tru"),
        (under(SPARSE, beta1=0.5), r"beta1=0\.5: is read with kind='adam' or 'partial_rowwise"),
        (under(RATE, schedule="cosine"), r"schedule='cosine': unknown choice; available: 'const"),
        (
            under(RATE, T_max=5),
            r"learning_rate\.T_max=5: is read with schedule='cosine_annealing' o",
        ),
        (
            under(RATE, decay_size=5),
            r"decay_size=5: is read with schedule='exponential_decay' only",
        ),
        (under(RATE, min_learning_rate=0.1), r"min_learning_rate=0\.1: is read with schedule='exp"),
        (under(RATE, schedule="exponential_decay"), r"decay_size=0: must be positive"),
        (
            under(RATE, schedule="manual_step", schedule_sizes=(3, 3), learning_rates=(0.1, 0.2)),
            r"schedule_sizes=\(3, 3\): must be one or more positive, ascending numbers",
        ),
        (
            under(RATE, schedule="manual_step", schedule_sizes=(3, 9), learning_rates=(0.1,)),
            r"learning_rates=\(0\.1,\): must be as many as schedule_sizes=\(3, 9\)",
        ),
        (
            under(RATE, schedule="manual_step", schedule_sizes=(3,), learning_rates=(-0.1,)),
            r"learning_rates=\(-0\.1,\): must not be negative",
        ),
        (
            under(RATE, schedule="cosine_annealing", by_epoch=True),
            r"T_max=0: must be positive with by_epoch",
        ),
        (under(RATE, schedule="cosine_annealing_warm_restarts"), r"T_0=0: must be positive"),
        (under(RATE, by_epoch=True), r"by_epoch=True: has no effect on a constant rate"),
        (under(RATE, warmup_learning_rate=0.1), r"warmup_learning_rate=0\.1: has no effect withou"),
        (
            under("train.grad_clipping", max_gradient=2.0),
            r"grad_clipping\.max_gradient=2\.0: is read with clipping_type='norm' or 'value' only",
        ),
        (
            under("train.grad_clipping", clipping_type="value", norm_type=3.0),
            r"norm_type=3\.0: is read with clipping_type='norm' only, not with 'value'",
        ),
        (
            under("train.grad_clipping", clipping_type="norm", norm_type=0.5),
            r"norm_type=0\.5: must be at least 1, or inf",
        ),
        (under("train", gradient_accumulation_steps=0), r"accumulation_steps=0: must be positive"),
        (
            under("train", gradient_accumulation_mode="sum"),
            r"gradient_accumulation_mode='sum': has no effect with gradient_accumulation_steps=1",
        ),
        (under("train", table_updates="batch"), r"table_updates='batch': has no effect with grad"),
        (
            under("train.keep_best", metric="recall@7"),
            r"keep_best\.metric='recall@7': is not a metric of the validation; available: hit_rate",
        ),
        (
            under("train.keep_best", metric="recall@10"),
            r"keep_best\.metric='recall@10': needs validations to choose from; set eval\.every_num",
        ),
        (under("train.keep_best", metric="loss"), r"larger_is_better=True: must be False for met"),
        (
            under("train.keep_best", larger_is_better=False),
            r"larger_is_better=False: has no effect",
        ),
        (
            under("train_metrics", recall_at_k=(7,)),
            r"train_metrics\.recall_at_k=\(7,\): must be some of metrics\.recall_at_k=\(1, 5\)",
        ),
        (under("train_metrics", decay_step=7), r"decay_step=7: has no effect without recall_at_k"),
        (under("train_metrics", recall_at_k=(5,), decay_step=0), r"decay_step=0: must be positive"),
    ],
)
def test_a_setting_that_breaks_a_rule(options, message):
    with pytest.raises(ValueError, match=message):
        resolved(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(regex_pattern=""), r"regex_pattern='': must not be empty"),
        (dict(regex_pattern="("), r"regex_pattern='\(': is not a regular expression"),
        (dict(regex_pattern="x", kind="sgd", beta1=0.1), r"beta1=0\.1: is read with kind="),
    ],
)
def test_a_part_that_breaks_a_rule(options, message):
    with pytest.raises(checks.ConfigError, match=message):
        train_schema.PartOptimizerConfig(**options)


def test_parts_are_resolved_with_their_place_in_errors():
    part = train_schema.PartOptimizerConfig(regex_pattern="a", kind="sgd", lr=0.1)
    whole = train_schema.DenseOptimizerConfig(part_optimizers=(part, part))
    raw = kuairand.get_config("sample")
    with raw.unlocked():
        raw.train.dense_optimizer = resolve.section(whole)
    assert resolve.resolve(raw).train.dense_optimizer == whole
    raw.train.dense_optimizer.part_optimizers[1].lr = -1.0
    with pytest.raises(ValueError, match=r"part_optimizers\[1\]\.lr=-1\.0: must not be negative"):
        resolve.resolve(raw)


def test_every_schedule_of_a_run_is_listed():
    rate = train_schema.LearningRateConfig(schedule="cosine_annealing")
    parts = (
        train_schema.PartOptimizerConfig(regex_pattern="a", learning_rate=rate),
        train_schema.PartOptimizerConfig(regex_pattern="b"),
    )
    dense = train_schema.DenseOptimizerConfig(part_optimizers=parts)
    config = train_schema.TrainConfig(num_steps=1, dense_optimizer=dense)
    assert config.schedules == (train_schema.LearningRateConfig(),) * 2 + (rate,)
    assert [s.depends_on_run_length for s in config.schedules] == [False, False, True]


def test_eps_of_zero_is_the_kinds_own():
    eps = {
        kind: train_schema.OptimizerConfig(kind=kind).eps_in_use
        for kind in ("adam", "adamw", "rmsprop", "adagrad", "adadelta")
    }
    assert list(eps.values()) == [1e-8, 1e-8, 1e-8, 1e-10, 1e-6]
    assert train_schema.OptimizerConfig(kind="adagrad", eps=1e-3).eps_in_use == 1e-3


_OVERRIDE = """
import sys
from absl import app
from ml_collections import config_flags
from hstu_jax.config import resolve
flag = config_flags.DEFINE_config_file("config")
app.run(lambda _: print(resolve.to_text(resolve.resolve(flag.value))))
"""


def test_every_field_can_be_set_on_the_command_line(tmp_path):
    """Parts too, by their number."""
    config = tmp_path / "with_parts.py"
    config.write_text(
        "from configs import kuairand\n"
        "from hstu_jax.config import resolve, train_schema\n"
        "def get_config():\n"
        "    c = kuairand.get_config()\n"
        "    part = train_schema.PartOptimizerConfig(regex_pattern='item_tower/.*')\n"
        "    c.train.dense_optimizer.part_optimizers = (resolve.section(part),)\n"
        "    return c\n"
    )
    expected = {
        "dense_optimizer.kind": "'rmsprop'",
        "dense_optimizer.beta2": "0.999",
        "dense_optimizer.alpha": "0.9",
        "dense_optimizer.ema.decay": "0.99",
        "sparse_optimizer.kind": "'adam'",
        "grad_clipping.clipping_type": "'norm'",
        "grad_clipping.norm_type": "inf",
    }
    flags = [f"--config.train.{k}={v.strip(chr(39))}" for k, v in expected.items()]
    flags.append("--config.train.dense_optimizer.part_optimizers[0].lr=0.25")
    result = subprocess.run(
        [sys.executable, "-c", _OVERRIDE, f"--config={config}", *flags],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "PATH": ""},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name, value in expected.items():
        assert f"train.{name} = {value}" in lines
    assert "lr=0.25" in next(line for line in lines if "part_optimizers" in line)


def test_the_references_fields_that_do_nothing_here_are_absent():
    names = {
        field.name
        for section in vars(train_schema).values()
        if dataclasses.is_dataclass(section)
        for field in dataclasses.fields(section)
    }
    assert not names & {"fused", "enable_global_grad_clip", "grad_scaler"}
