"""Configuration of what stands around the sequence layers: MLPs, activations, time in the output.

The sections of both towers' small modules, with their own checks; `model_schema.py` puts them
together. Activations are named as the reference names them; what each computes is in
`hstu_jax/model/activations.py`.
"""

import ast
import dataclasses
import difflib
import re

from hstu_jax.config.checks import ConfigError, require, require_ratio

# Name -> its arguments with torch's defaults. "" is no activation at all.
ACTIVATIONS: dict[str, dict[str, float | str]] = {
    "": {},
    "nn.ReLU": {},
    "nn.ReLU6": {},
    "nn.LeakyReLU": {"negative_slope": 0.01},
    "nn.ELU": {"alpha": 1.0},
    "nn.SELU": {},
    "nn.GELU": {"approximate": "none"},
    "nn.SiLU": {},
    "nn.Mish": {},
    "nn.Softplus": {"beta": 1.0, "threshold": 20.0},
    "nn.Sigmoid": {},
    "nn.Tanh": {},
    "Dice": {},
}


def parse_activation(text: str) -> tuple[str, dict[str, float | str]]:
    """Name and arguments of an activation written as "name" or "name(argument=value, ...)".

    Args:
        text: such as "nn.ReLU", "nn.LeakyReLU(negative_slope=0.2)" or "".

    Returns:
        The name, and every argument of it, defaults included.

    Raises:
        ConfigError: of the field `activation`: an unknown name or argument, or a value that is not
            of the argument's type.

    >>> parse_activation("nn.ELU(alpha=0.5)")
    ('nn.ELU', {'alpha': 0.5})
    """
    match = re.fullmatch(r"(?P<name>[\w.]*)(?:\((?P<arguments>.*)\))?", text.strip())
    name = match["name"] if match else text
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(name, ACTIVATIONS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        available = ", ".join(map(repr, ACTIVATIONS))
        raise ConfigError("activation", text, "unknown choice", f"{hint}available: {available}")
    arguments = dict(ACTIVATIONS[name])
    for part in filter(None, (match["arguments"] or "").split(",")):
        key, _, value = (piece.strip() for piece in part.partition("="))
        require(
            key in arguments,
            "activation",
            text,
            f"{name} has no argument {key!r} here",
            f"its arguments are {', '.join(arguments) or 'none'}",
        )
        arguments[key] = _argument(text, key, value, like=arguments[key])
    approximate = arguments.get("approximate", "none")
    require(
        approximate in ("none", "tanh"),
        "activation",
        text,
        f"approximate={approximate!r} is unknown",
        "available: 'none', 'tanh'",
    )
    return name, arguments


def _argument(text: str, key: str, value: str, *, like: float | str) -> float | str:
    kind, expected = (str, "a quoted word") if isinstance(like, str) else (float, "a number")
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        parsed = None
    if kind is float and isinstance(parsed, int) and not isinstance(parsed, bool):
        parsed = float(parsed)
    require(isinstance(parsed, kind), "activation", text, f"{key} must be {expected}")
    return parsed


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Layers of Linear, norm, activation, dropout; the last one has them too."""

    hidden_units: tuple[int, ...] = ()
    dropout_ratio: tuple[float, ...] = ()  # () = none, one = of all layers, else one per layer
    activation: str = "nn.ReLU"  # see ACTIVATIONS
    use_bn: bool = False  # batch norm; the layers then have no bias, whatever `bias` says
    bias: bool = True
    use_ln: bool = False

    def __post_init__(self):
        require(
            len(self.hidden_units) > 0 and all(n > 0 for n in self.hidden_units),
            "hidden_units",
            self.hidden_units,
            "must be one or more positive widths",
        )
        require(
            len(self.dropout_ratio) in (0, 1, len(self.hidden_units)),
            "dropout_ratio",
            self.dropout_ratio,
            f"must be empty, one value or one per layer of hidden_units={self.hidden_units}",
        )
        for ratio in self.dropout_ratio:
            require_ratio("dropout_ratio", ratio)
        require(
            not (self.use_bn and self.use_ln),
            "use_ln",
            self.use_ln,
            "a layer has one norm, and use_bn=True",
            "set one of them to False",
        )
        parse_activation(self.activation)

    @property
    def layer_dropout(self) -> tuple[float, ...]:
        """The dropout ratio of every layer."""
        if len(self.dropout_ratio) == len(self.hidden_units):
            return self.dropout_ratio
        return (self.dropout_ratio or (0.0,)) * len(self.hidden_units)

    @property
    def is_linear(self) -> bool:
        """Whether nothing but linear layers (and dropout) is between input and output."""
        return self.activation == "" and not self.use_bn and not self.use_ln


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimpleMlpConfig:
    """Linear, SwishLayerNorm, Linear, LayerNorm."""

    hidden_dim: int = 64

    def __post_init__(self):
        require(self.hidden_dim > 0, "hidden_dim", self.hidden_dim, "must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterizedMlpConfig:
    """A linear map of each user's own, made from the contextual features."""

    hidden_dim: int = 64  # the contextual features are compressed to this width
    contextual_dropout_ratio: float = 0.3  # of the contextual features, in training

    def __post_init__(self):
        require(self.hidden_dim > 0, "hidden_dim", self.hidden_dim, "must be positive")
        require_ratio("contextual_dropout_ratio", self.contextual_dropout_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionMlpConfig:
    """Which MLP projects the action encoding: one of the two, the other None."""

    simple_mlp: SimpleMlpConfig | None = SimpleMlpConfig()
    parameterized_mlp: ParameterizedMlpConfig | None = None

    def __post_init__(self):
        require(
            (self.simple_mlp is None) != (self.parameterized_mlp is None),
            "parameterized_mlp",
            self.parameterized_mlp,
            f"exactly one kind of MLP must be set, and simple_mlp={self.simple_mlp!r}",
            "set the other to None",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimestampLayerNormConfig:
    """Periods that the `timestamp_layernorm` postprocessor tells the user vector of.

    Pair i has a period of `time_duration_units_per_period[i]` units of
    `time_duration_period_units[i]` seconds: (3600, 24) is the hour of the day, (86400, 7) the day
    of the week.
    """

    time_duration_period_units: tuple[int, ...] = ()  # seconds
    time_duration_units_per_period: tuple[int, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            require(all(n > 0 for n in values), field.name, values, "must be positive numbers")
        require(
            len(self.time_duration_period_units) == len(self.time_duration_units_per_period),
            "time_duration_period_units",
            self.time_duration_period_units,
            f"must pair with time_duration_units_per_period={self.time_duration_units_per_period}",
        )

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(seconds of a unit, units of a period) of every pair."""
        return tuple(
            zip(self.time_duration_period_units, self.time_duration_units_per_period, strict=True)
        )
