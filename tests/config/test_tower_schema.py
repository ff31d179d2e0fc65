"""Options of the towers' small modules: what is refused, with path, value, rule and way out."""

import pytest

from configs import kuairand
from hstu_jax.config import checks, resolve, tower_schema

_ITEM = "model.item_tower.mlp"
_HSTU = "model.user_tower.hstu"
_ACTION_MLP = f"{_HSTU}.input_preprocessor.uih_preprocessor.action_mlp"


def resolved(values, variant="seed"):
    """The configuration with some fields replaced."""
    raw = kuairand.get_config(variant)
    for path, value in values.items():
        *sections, name = path.split(".")
        section = raw
        for part in sections:
            section = section[part]
        with section.ignore_type(), section.unlocked():
            section[name] = value
    return resolve.resolve(raw)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({f"{_ITEM}.activation": "nn.Relu"}, r"activation='nn.Relu': unknown choice; did you mean"),
        ({f"{_ITEM}.activation": "relu!"}, r"activation='relu!': unknown choice; .*'nn.SiLU'"),
        (
            {f"{_ITEM}.activation": "nn.ELU(slope=2)"},
            r"mlp\.activation='nn.ELU\(slope=2\)': nn.ELU has no argument 'slope' here; its "
            r"arguments are alpha\.",
        ),
        (
            {f"{_ITEM}.activation": "nn.ReLU(inplace=True)"},
            r"nn.ReLU has no argument 'inplace' here; its arguments are none",
        ),
        ({f"{_ITEM}.activation": "nn.ELU(alpha=x)"}, r"alpha=x\)': alpha must be a number\."),
        ({f"{_ITEM}.activation": "nn.GELU(approximate='erf')"}, r"approximate='erf' is unknown"),
        (
            {f"{_ITEM}.use_bn": True, f"{_ITEM}.use_ln": True},
            r"mlp\.use_ln=True: a layer has one norm, and use_bn=True; set one of them to False",
        ),
        (
            {f"{_ITEM}.dropout_ratio": (0.1, 0.2)},
            r"dropout_ratio=\(0\.1, 0\.2\): must be empty, one",
        ),
        ({f"{_ITEM}.dropout_ratio": (1.0,)}, r"mlp\.dropout_ratio=1\.0: must be in \[0, 1\)"),
        (
            {f"{_ACTION_MLP}.parameterized_mlp": dict(hidden_dim=8)},
            r"action_mlp\.parameterized_mlp=.*: exactly one kind of MLP must be set, and simple",
        ),
        ({f"{_ACTION_MLP}.simple_mlp": None}, r"parameterized_mlp=None: exactly one kind of MLP"),
        (
            {
                f"{_ACTION_MLP}.simple_mlp": None,
                f"{_ACTION_MLP}.parameterized_mlp": dict(contextual_dropout_ratio=1.5),
            },
            r"parameterized_mlp\.contextual_dropout_ratio=1\.5: must be in \[0, 1\)",
        ),
        (
            {f"{_HSTU}.output_postprocessor": "timestamp_layernorm"},
            r"hstu\.timestamp_layernorm=.*: must name one period or more with output_post",
        ),
        (
            {
                f"{_HSTU}.timestamp_layernorm.time_duration_period_units": (3600,),
                f"{_HSTU}.timestamp_layernorm.time_duration_units_per_period": (24,),
            },
            r"hstu\.timestamp_layernorm=.*: is not read with output_postprocessor='l2norm'",
        ),
        (
            {f"{_HSTU}.timestamp_layernorm.time_duration_period_units": (3600,)},
            r"period_units=\(3600,\): must pair with time_duration_units_per_period=\(\)",
        ),
        (
            {f"{_HSTU}.timestamp_layernorm.time_duration_period_units": (0,)},
            r"period_units=\(0,\): must be positive numbers",
        ),
        (
            {"model.similarity": "EUCLID"},
            r"similarity='EUCLID': .*use 'INNER_PRODUCT' for what the",
        ),
        (
            {"model.sequence_timestamp_is_ascending": False},
            r"ascending=False: rows .* are turned where they are read, .*newest_first=True",
        ),
    ],
)
def test_refused(values, message):
    with pytest.raises(ValueError, match=message):
        resolved(values)


@pytest.mark.parametrize("option", ["use_bn", "use_ln"])
def test_aligned_towers_are_linear(option):
    with pytest.raises(ValueError, match="initialization='aligned': .*without use_bn and use_ln"):
        resolved({f"{_ITEM}.{option}": True}, variant="sample")


def test_maps_of_users_need_contextual_features():
    values = {f"{_ACTION_MLP}.simple_mlp": None, f"{_ACTION_MLP}.parameterized_mlp": {}}
    raw = kuairand.get_config("seed")
    names = raw.feature_groups.contextual
    with raw.unlocked():
        del raw.feature_groups["contextual"]
        for name in names:
            del raw.features[name]
    assert resolve.resolve(raw).num_contextual == 0
    section = raw.model.user_tower.hstu.input_preprocessor.uih_preprocessor.action_mlp
    with section.ignore_type(), section.unlocked():
        section.simple_mlp, section.parameterized_mlp = (
            None,
            values[f"{_ACTION_MLP}.parameterized_mlp"],
        )
    with pytest.raises(
        ValueError, match=r"contextual=\(\): .*from contextual features; add one, or"
    ):
        resolve.resolve(raw)


def test_the_times_of_the_postprocessor_need_their_group():
    periods = f"{_HSTU}.timestamp_layernorm.time_duration"
    values = {
        f"{_HSTU}.output_postprocessor": "timestamp_layernorm",
        f"{_HSTU}.positional_encoder.use_time_encoding": False,
        f"{periods}_period_units": (3600, 86400),
        f"{periods}_units_per_period": (24, 7),
    }
    assert resolved(values).model.user_tower.hstu.timestamp_layernorm.pairs == (
        (3600, 24),
        (86400, 7),
    )
    with pytest.raises(ValueError, match=r"uih_timestamp=\(\): must name a feature"):
        resolved({**values, "feature_groups.uih_timestamp": ()})


def test_activations_with_arguments():
    parse = tower_schema.parse_activation
    assert parse("nn.LeakyReLU") == ("nn.LeakyReLU", {"negative_slope": 0.01})
    assert parse(" nn.Softplus( beta = 2, threshold=5.5 )") == (
        "nn.Softplus",
        {"beta": 2.0, "threshold": 5.5},
    )
    assert parse('nn.GELU(approximate="tanh")') == ("nn.GELU", {"approximate": "tanh"})
    assert parse("nn.SiLU()") == ("nn.SiLU", {})
    with pytest.raises(checks.ConfigError, match="approximate must be a quoted word"):
        parse("nn.GELU(approximate=1)")


def test_dropout_of_every_layer():
    def layers(*ratios):
        return tower_schema.MlpConfig(hidden_units=(4, 3), dropout_ratio=ratios).layer_dropout

    assert layers() == (0.0, 0.0) and layers(0.1) == (0.1, 0.1) and layers(0.1, 0.2) == (0.1, 0.2)
