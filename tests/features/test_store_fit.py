"""Stores that a configuration cannot learn from are refused before the first batch."""

import dataclasses
import re

import pytest

from hstu_jax.config import model_schema
from hstu_jax.features import pipeline


def with_hstu(config, **fields):
    """The configuration with other fields of its HSTU section, and no time encoding."""
    positions = model_schema.PositionalEncoderConfig(use_time_encoding=False)
    hstu = model_schema.HstuConfig(**{"positional_encoder": positions, **fields})
    tower = dataclasses.replace(config.model.user_tower, hstu=hstu)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, user_tower=tower))


TIMED = {
    "positional_encoder.use_time_encoding=True": {
        "positional_encoder": model_schema.PositionalEncoderConfig()
    },
    "stu.use_time_bias=True": {"stu": model_schema.StuConfig(use_time_bias=True)},
    "output_postprocessor='timestamp_layernorm'": {
        "output_postprocessor": "timestamp_layernorm",
        "timestamp_layernorm": model_schema.TimestampLayerNormConfig(
            time_duration_period_units=(3600,), time_duration_units_per_period=(24,)
        ),
    },
}


@pytest.mark.parametrize("field", TIMED)
def test_positions_are_no_times(field, make_store, make_config):
    store = make_store([4] * 10)
    config = with_hstu(make_config(), **TIMED[field])
    pipeline.Pipeline(config, store)
    positions = dataclasses.replace(store, stats={"event_times": "position"})
    message = f"model.user_tower.hstu.{field}: reads the events' times, and those of this store are"
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.Pipeline(config, positions)
    pipeline.Pipeline(with_hstu(make_config()), positions)


def test_windows_without_any_history_are_refused(make_store, make_config):
    message = "model.objective='window': the history of every training window is empty, .* prepare "
    with pytest.raises(ValueError, match=message + "with --window_events, or use 'next_item'."):
        pipeline.Pipeline(make_config(), make_store([0] * 9 + [5], splits=[0] * 9 + [2]))
    pipeline.Pipeline(make_config(), make_store([0] * 8 + [1, 5], splits=[0] * 9 + [2]))
