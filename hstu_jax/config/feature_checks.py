"""How features, their groups, sequences and list-column files must fit together.

Called by `schema.Config`; the classes themselves check single fields (`feature_schema.py`).
"""

import dataclasses
from typing import Any

from hstu_jax.config.checks import require
from hstu_jax.config.feature_schema import (
    SEQUENCE_SEPARATOR,
    IdFeature,
    ListColumnsConfig,
    RawFeature,
    SequenceConfig,
)

VECTOR_GROUPS = ("contextual", "uih", "candidate")  # their features become vectors
_SEQUENCE_GROUPS = ("uih", "candidate", "uih_action", "uih_watchtime", "uih_timestamp")
# What an event store knows of a positive besides its item: columns of the event itself.
STORE_LABELS = ("cand_seq__action_weight", "cand_seq__watch_time")


def check(config: Any) -> None:
    """Raises `ConfigError` where features, groups, sequences and sources do not fit together.

    Args:
        config: a `schema.Config` (which imports this module, so it is not named here).
    """
    _check_names(config)
    _check_sides(config)
    _check_sequence_features(config)
    _check_single_columns(config)
    _check_sequences(config)
    _check_ablation(config)
    if config.data.source == "list_columns":
        _check_list_columns(config)
    else:
        _check_no_list_columns(config)


def sequence_name(column: str) -> str:
    """Name of the sequence that a column belongs to, "" if none.

    >>> sequence_name("uih_seq__video_id")
    'uih_seq'
    """
    name, separator, _ = column.partition(SEQUENCE_SEPARATOR)
    return name if separator else ""


def _check_names(config: Any) -> None:
    for name in config.raw_features:
        require(
            name not in config.features,
            f"raw_features.{name}",
            config.raw_features[name],
            f"features.{name} has the same name",
            "rename one of them; `expression` says which column each reads",
        )
        require(
            any(name in names for names in config.feature_groups.values()),
            f"raw_features.{name}",
            config.raw_features[name],
            "is in no feature group, so nothing would read it",
            "add it to one, or leave it out",
        )


def _check_sides(config: Any) -> None:
    """A row has no item of its own, and a negative has no user."""
    for group, names in config.feature_groups.items():
        for name in names:
            feature = config.all_features.get(name)
            side = feature.expression.partition(":")[0] if feature else ""
            section = "features" if name in config.features else "raw_features"
            refused = {
                "contextual": (
                    ("item",),
                    "a row has no item of its own",
                    "write user: or context:",
                ),
                "query_time": (
                    ("item",),
                    "a row has no item of its own",
                    "write user: or context:",
                ),
                "candidate": (
                    ("user", "context"),
                    "candidates and negatives have the features of items alone",
                    "write item:",
                ),
            }.get(group)
            if refused:
                sides, rule, advice = refused
                require(
                    side not in sides,
                    f"{section}.{name}.expression",
                    feature.expression if feature else "",
                    f"{rule}, and the feature stands in the group {group}",
                    advice,
                )


def _check_sequence_features(config: Any) -> None:
    """Features of histories and candidates: one value a position, of one sequence a group."""
    for group in ("uih", "candidate"):
        names = config.feature_groups.get(group, ())
        found = {sequence_name(name) for name in names}
        require(
            len(found) <= 1,
            f"feature_groups.{group}",
            names,
            f"must be features of one sequence, not of {sorted(found)}",
            "the name of a sequence stands in front of '__'",
        )
        for name in names:
            feature = config.all_features[name]
            is_id = isinstance(feature, IdFeature)
            where = f"{'features' if is_id else 'raw_features'}.{name}"
            require(
                feature.value_dim in (0, 1),
                f"{where}.value_dim",
                feature.value_dim,
                f"must be 1 in the group {group}, where a position holds one value",
            )
            require(
                not is_id or feature.pooling == "sum",
                f"{where}.pooling",
                getattr(feature, "pooling", ""),
                f"is not read in the group {group}, where a position holds one value",
                "leave it 'sum'",
            )


def _check_single_columns(config: Any) -> None:
    """Raw features of groups that read plain numbers may only say where their column is."""
    read_as_vectors = {n for g in VECTOR_GROUPS for n in config.feature_groups.get(g, ())}
    for name, feature in config.raw_features.items():
        if name in read_as_vectors:
            continue
        plain = RawFeature(expression=feature.expression)
        for field in dataclasses.fields(RawFeature):
            value = getattr(feature, field.name)
            require(
                value == getattr(plain, field.name),
                f"raw_features.{name}.{field.name}",
                value,
                f"is not read: the feature stands in none of {', '.join(VECTOR_GROUPS)}",
                "leave it at its default",
            )


def _check_sequences(config: Any) -> None:
    used = sorted(
        {sequence_name(n) for g in _SEQUENCE_GROUPS for n in config.feature_groups.get(g, ())}
    )
    for name, sequence in config.sequences.items():
        require(
            config.data.source == "list_columns" or sequence == SequenceConfig(),
            f"sequences.{name}",
            sequence,
            f"is read by data.source='list_columns' only, not by {config.data.source!r}",
            "an event store's histories are cut by model.user_tower.max_seq_len alone",
        )
        require(
            name in used,
            f"sequences.{name}",
            sequence,
            "is the sequence of no feature",
            f"the features have {', '.join(used)}",
        )


def _check_ablation(config: Any) -> None:
    """What an ablation takes away must not come back as a feature of the history."""
    taken = {"no_actions": ("uih_action", "uih_watchtime"), "no_time": ("uih_timestamp",)}
    groups = taken.get(config.data.ablation, ())
    columns = {config.column(n) for group in groups for n in config.feature_groups.get(group, ())}
    for name in config.feature_groups.get("uih", ()):
        require(
            config.column(name) not in columns,
            "data.ablation",
            config.data.ablation,
            f"the feature {name!r} of the group uih reads {config.column(name)!r}, which it takes "
            "away",
            "leave the feature out as well",
        )


def _check_no_list_columns(config: Any) -> None:
    data, source = config.data, config.data.source
    for field in dataclasses.fields(ListColumnsConfig):
        value = getattr(data.list_columns, field.name)
        require(
            value == field.default,
            f"data.list_columns.{field.name}",
            value,
            f"is read by data.source='list_columns' only, not by {source!r}",
            "leave it unset, or change the source",
        )
    for name in data.label_fields:
        require(
            name in STORE_LABELS,
            "data.label_fields",
            data.label_fields,
            f"an event store has no column {name!r} of its positives",
            f"it has {', '.join(STORE_LABELS)}",
        )


def _check_list_columns(config: Any) -> None:
    paths, groups = config.data.list_columns, config.feature_groups
    is_validated = config.eval.every_num_steps > 0 or config.eval.split == "validation"
    needed = {
        "train_input_path": True,
        "eval_input_path": config.eval.split == "test",
        # The co-occurrence baseline is tuned on it.
        "validation_input_path": is_validated or config.eval.baselines,
    }
    for name, is_needed in needed.items():
        require(
            bool(getattr(paths, name)) or not is_needed,
            f"data.list_columns.{name}",
            getattr(paths, name),
            "must name parquet files",
            "for validation: give some, or set eval.baselines=False, eval.every_num_steps=0 and "
            "eval.split='test'"
            if name == "validation_input_path"
            else "a pattern such as data/train/*.parquet",
        )
    require(
        bool(groups.get("uih_timestamp")),
        "feature_groups.uih_timestamp",
        groups.get("uih_timestamp", ()),
        "must name the history's times, which data.source='list_columns' always reads",
    )
    item = groups["candidate"][0]
    require(
        item in config.features and bool(sequence_name(item)),
        "feature_groups.candidate",
        groups["candidate"],
        "its first feature tells items apart: it must be an id feature of a sequence",
        "such as cand_seq__video_id",
    )
    sequence = sequence_name(groups["uih"][0])
    for group in ("uih", "uih_action", "uih_watchtime", "uih_timestamp"):
        for name in groups.get(group, ()):
            require(
                sequence_name(name) == sequence and sequence not in ("", sequence_name(item)),
                f"feature_groups.{group}",
                groups[group],
                "data.source='list_columns' reads the history from the columns of one sequence, "
                f"which is not the candidates' {sequence_name(item)!r}",
                "such as uih_seq__video_id and uih_seq__action_timestamp",
            )
    _check_row_columns(config, sequences=(sequence, sequence_name(item)))
    for name in config.data.label_fields:
        require(
            sequence_name(name) == sequence_name(item),
            "data.label_fields",
            config.data.label_fields,
            f"{name!r} must be a column of the candidates' sequence {sequence_name(item)!r}",
        )


def _check_row_columns(config: Any, *, sequences: tuple[str, ...]) -> None:
    """What belongs to a row must not be read from the columns of its sequences."""
    groups = ("contextual", "query_time")
    columns = [
        ("data.list_columns.user_id_field", config.data.list_columns.user_id_field),
        ("data.negative_sampler.user_id_field", config.data.negative_sampler.user_id_field),
        *(("data.sample_weight_fields", name) for name in config.data.sample_weight_fields),
        *(
            (f"feature_groups.{group}", config.column(name))
            for group in groups
            for name in config.feature_groups.get(group, ())
        ),
    ]
    for field, column in columns:
        require(
            not column or sequence_name(column) not in sequences,
            field,
            column,
            f"is a column of the sequence {sequence_name(column)!r}, not of the row",
            "name a column of the row itself",
        )
