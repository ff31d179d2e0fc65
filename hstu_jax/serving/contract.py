"""Configuration -> what an exported folder promises: its inputs and the rules of its features.

Only the exporter reads this file. What is here is data in the manifest; the loader's
`input_columns.py` and `feature_values.py` follow it.
"""

import dataclasses
import urllib.parse
from collections.abc import Mapping
from typing import Any

from hstu_jax.config import schema
from hstu_jax.config.feature_checks import sequence_name
from hstu_jax.config.feature_schema import IdFeature, RawFeature, SequenceConfig
from hstu_jax.data import list_layout
from hstu_jax.features import next_item
from hstu_jax.serving import manifest as manifest_lib

_STORE_ITEM = "video_id"  # of an event store: the item_index
# What an event store knows of an event; all else in a history is a feature of its item.
_STORE_HISTORY = ("video_id", "action_weight", "watch_time", "action_timestamp")
ITEM_KEYS = "item_values/keys.npy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
    """The manifest's fields about inputs, under the same names, and the words of vocabularies.

    Attributes:
        vocabularies: file -> its words in the order of their ids.
    """

    user_inputs: tuple[manifest_lib.Input, ...]
    item_inputs: tuple[manifest_lib.Input, ...]
    history_column: str
    item_id_column: str
    history: manifest_lib.History
    history_features: tuple[manifest_lib.Feature, ...]
    contextual_features: tuple[manifest_lib.Feature, ...]
    candidate_features: tuple[manifest_lib.Feature, ...]
    vocabularies: Mapping[str, tuple[str, ...]]

    def fields(self) -> dict[str, Any]:
        """What goes into the manifest as it is."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "vocabularies"]
        return {name: getattr(self, name) for name in names}


def is_store(config: schema.Config) -> bool:
    """Whether the model was trained on an event store, whose ids are dense indices."""
    return config.data.source != "list_columns"


def make_contract(
    config: schema.Config,
    *,
    translated: Mapping[str, str] | None = None,
    of_items: tuple[str, ...] = (),
) -> Contract:
    """The promises of a configuration.

    Args:
        config: of the training run.
        translated: columns, items' by their bare name, that hold original ids -> "id" for
            integers or "key" for strings.
        of_items: features of the history that are looked up by its items.

    Raises:
        ValueError: a feature that an export cannot serve.
    """
    if config.data.ablation != "none":
        raise ValueError(
            f"data.ablation={config.data.ablation!r}: cannot be exported, since the model knows "
            "only batches with an input taken away, and rows to serve have it; train with 'none'."
        )
    groups, translated = config.feature_groups, translated or {}
    layout = list_layout.layout_of(config)
    item_column = _STORE_ITEM if is_store(config) else layout.item_column
    sequence = sequence_name(groups["uih"][0])
    history_column = f"{sequence}__{item_column}"

    def features(group: str) -> tuple[manifest_lib.Feature, ...]:
        return tuple(
            dataclasses.replace(
                _feature(config, name, group, translated),
                item_values=item_values_file(name) if name in of_items else None,
            )
            for name in groups.get(group, ())
        )

    found = {group: features(group) for group in ("uih", "contextual", "candidate")}
    sequence_config = config.sequences.get(sequence, SequenceConfig())
    item_feature = config.all_features[_item_feature(config, item_column)]
    timestamp_layernorm = config.model.user_tower.hstu.timestamp_layernorm
    return Contract(
        user_inputs=tuple(
            dataclasses.replace(
                each, dtype=translated.get(list_layout.bare_name(each.name), each.dtype)
            )
            for each in _user_inputs(config, layout, history_column, item_feature, of_items)
        ),
        item_inputs=tuple(
            dataclasses.replace(each, dtype=translated.get(each.name, each.dtype))
            for each in _item_inputs(config, item_column, item_feature)
        ),
        history_column=history_column,
        item_id_column=item_column,
        history=manifest_lib.History(
            items=history_column,
            timestamp=layout.timestamp or None,
            action=layout.action,
            watch_time=layout.watch_time,
            request_time=layout.request_time,
            sequence_length=sequence_config.sequence_length,
            sequence_delim=sequence_config.sequence_delim,
            newest_first=sequence_config.newest_first,
            max_seq_len=config.model.user_tower.max_seq_len,
            periods=tuple(timestamp_layernorm.pairs),
            step_time=next_item.step_time(config),
        ),
        history_features=found["uih"],
        contextual_features=found["contextual"],
        candidate_features=found["candidate"],
        vocabularies={
            _vocabulary_file(config, name): feature.words()
            for name, feature in config.features.items()
            if feature.words()
        },
    )


def store_item_features(config: schema.Config) -> tuple[str, ...]:
    """Features of the history that an event store looks up by the item of an event."""
    return tuple(
        name
        for name in config.feature_groups["uih"]
        if list_layout.bare_name(config.column(name)) not in _STORE_HISTORY
    )


def item_values_file(feature: str) -> str:
    """File of a history feature's values by item."""
    return f"item_values/{file_name(feature)}.npy"


def _item_feature(config: schema.Config, item_column: str) -> str:
    """The feature that says what item ids are: the candidates', or else the history's."""
    for group in ("candidate", "uih"):
        for name in config.feature_groups[group]:
            if list_layout.bare_name(config.column(name)) == item_column:
                return name
    raise ValueError(
        f"feature_groups.candidate={config.feature_groups['candidate']}: no feature reads the item "
        f"id {item_column!r}, so an export could not tell items apart."
    )


def _user_inputs(
    config, layout, history_column, item_feature, of_items
) -> tuple[manifest_lib.Input, ...]:
    inputs: dict[str, manifest_lib.Input] = {}

    def add(name, kind, dtype, unit, *, is_null_allowed):
        shape = ("history",) if kind == "sequence" else ()
        padding = "zeros behind the newest event" if kind == "sequence" else "none"
        inputs.setdefault(
            name,
            manifest_lib.Input(
                name=name,
                kind=kind,
                dtype=dtype,
                shape=("values",) if unit == "ids" else shape,
                padding="zero vectors behind the last value" if unit == "ids" else padding,
                unit="id" if unit == "ids" else unit,
                is_null_allowed=is_null_allowed,
            ),
        )

    sequence = dict(kind="sequence", is_null_allowed=False)
    add(history_column, dtype=_dtype(item_feature), unit="id", **sequence)
    if layout.timestamp:
        add(layout.timestamp, dtype="int64", unit="seconds", **sequence)
    if layout.action:
        add(layout.action, dtype="int64", unit="bits", **sequence)
    if layout.watch_time:
        add(layout.watch_time, dtype="float32", unit="seconds", **sequence)
    for name in config.feature_groups["uih"]:
        if name in of_items:
            continue
        feature = config.all_features[name]
        unit = "number" if isinstance(feature, RawFeature) else "id"
        add(config.column(name), "sequence", _dtype(feature), unit, is_null_allowed=True)
    for name in config.feature_groups.get("contextual", ()):
        feature = config.all_features[name]
        unit = "number" if isinstance(feature, RawFeature) else "ids"
        add(config.column(name), "value", _dtype(feature), unit, is_null_allowed=True)
    if layout.request_time:
        add(layout.request_time, "value", "int64", "seconds", is_null_allowed=False)
    return tuple(inputs.values())


def _item_inputs(config, item_column, item_feature) -> tuple[manifest_lib.Input, ...]:
    features = {item_column: item_feature}
    for name in config.feature_groups["candidate"]:
        features.setdefault(list_layout.bare_name(config.column(name)), config.all_features[name])
    return tuple(
        manifest_lib.Input(
            name=column,
            kind="value",
            dtype=_dtype(feature),
            shape=(),
            padding="none",
            unit="number" if isinstance(feature, RawFeature) else "id",
            is_null_allowed=column != item_column,
        )
        for column, feature in features.items()
    )


def _dtype(feature: IdFeature | RawFeature) -> str:
    if isinstance(feature, RawFeature):
        return "number"
    return "id" if feature.num_buckets else "key"


def _feature(
    config: schema.Config, name: str, group: str, translated: Mapping[str, str]
) -> manifest_lib.Feature:
    feature = config.all_features[name]
    column = config.column(name)
    bare = list_layout.bare_name(column)
    is_contextual = group == "contextual"
    translation = column if is_contextual else bare
    return manifest_lib.Feature(
        name=name,
        column=bare if group == "candidate" else column,
        table=config.embedding_names.get(name),
        width=feature.width,
        pooling=feature.pooling if isinstance(feature, IdFeature) else "sum",
        value_dim=feature.value_dim,
        separator=feature.separator if is_contextual else "",
        translation=translation if translation in translated else None,
        item_values=None,
        rule=_rule(config, name, feature),
    )


def _rule(config: schema.Config, name: str, feature: IdFeature | RawFeature) -> dict[str, Any]:
    if isinstance(feature, RawFeature):
        return {
            "kind": "boundaries" if feature.boundaries else "number",
            "boundaries": list(feature.boundaries),
            "default_value": feature.default_value,
            "normalizer": dataclasses.asdict(feature.normalizer),
        }
    default = {"default_value": feature.default_value}
    if feature.num_buckets:
        return {"kind": "num_buckets", "size": feature.num_buckets, **default}
    if feature.hash_bucket_size:
        return {"kind": "hash", "size": feature.hash_bucket_size, **default}
    return {"kind": "vocabulary", "file": _vocabulary_file(config, name), **default}


def _vocabulary_file(config: schema.Config, name: str) -> str:
    """Features of one table share its words."""
    return f"vocabularies/{file_name(config.embedding_names[name])}.npy"


def file_name(name: str) -> str:
    """A name as part of a file's name."""
    return urllib.parse.quote(name, safe="")
