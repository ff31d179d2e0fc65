"""Which columns of the list-column files a configuration reads, and what each is for.

Here: names and types, from the feature groups. Not here: reading (`list_files.py`) and the store
that the columns become (`list_store.py`).
"""

import dataclasses
from collections.abc import Mapping

import pyarrow as pa

from hstu_jax.config import schema as config_schema
from hstu_jax.config.feature_checks import sequence_name
from hstu_jax.config.feature_schema import SEQUENCE_SEPARATOR, RawFeature, SequenceConfig
from hstu_jax.data import list_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListLayout:
    """Names of the columns that a configuration reads.

    Attributes:
      history_item: item ids of the history (`uih_seq__video_id`).
      candidate_item: item ids to be found (`cand_seq__video_id`).
      timestamp: times of the history.
      action: action bits of the history, or None.
      watch_time: seconds watched, or None.
      request_time: time of a row, or None (then the newest time of its history).
      labels: columns of the candidates.
      history_side: other columns of the history's features -> type of delimited values.
      contextual: columns of the row's own features, `hard_user` and `sample_weight`.
      hard_user: ids that the hard-edge table knows users by, or "" without one.
      sample_weight: weights of rows, or "".
      item_features: bare names of the candidates' features in the item file.
      item_type: type of delimited item ids.
      user_id: column of user ids, or "".
      sequences: by name.
    """

    history_item: str
    candidate_item: str
    timestamp: str
    action: str | None
    watch_time: str | None
    request_time: str | None
    labels: tuple[str, ...]
    history_side: Mapping[str, pa.DataType]
    contextual: tuple[str, ...]
    hard_user: str
    sample_weight: str
    item_features: tuple[str, ...]
    item_type: pa.DataType
    user_id: str
    sequences: Mapping[str, SequenceConfig]

    @property
    def item_column(self) -> str:
        """Bare name of the item id (`video_id`)."""
        return bare_name(self.candidate_item)

    def label_like(self, column: str | None) -> str | None:
        """The label of the same bare name as a history column, or None."""
        if column is None:
            return None
        return next((name for name in self.labels if bare_name(name) == bare_name(column)), None)


def bare_name(column: str) -> str:
    """A column's name without its sequence.

    >>> bare_name("cand_seq__video_id")
    'video_id'
    """
    return column.partition(SEQUENCE_SEPARATOR)[2] or column


def layout_of(config: config_schema.Config) -> ListLayout:
    """The columns that a configuration reads.

    The first feature of the group `candidate` tells items apart; the column of the same bare name
    in the history's sequence holds the history's items.
    """
    groups = config.feature_groups

    def single(group: str) -> str | None:
        names = groups.get(group, ())
        return config.column(names[0]) if names else None

    candidate_item = config.column(groups["candidate"][0])
    uih_sequence = sequence_name(groups["uih"][0])
    history_item = f"{uih_sequence}{SEQUENCE_SEPARATOR}{bare_name(candidate_item)}"
    history_side = {
        config.column(name): _delimited_type(config.all_features[name])
        for name in groups["uih"]
        if config.column(name) != history_item
    }
    sampler, weights = config.data.negative_sampler, config.data.sample_weight_fields
    hard_user = sampler.user_id_field if sampler.kind == "HardNegativeSampler" else ""
    sample_weight = weights[0] if weights else ""
    contextual = [config.column(name) for name in groups.get("contextual", ())]
    contextual += [name for name in (hard_user, sample_weight) if name]
    return ListLayout(
        history_item=history_item,
        candidate_item=candidate_item,
        timestamp=single("uih_timestamp") or "",
        action=single("uih_action"),
        watch_time=single("uih_watchtime"),
        request_time=single("query_time"),
        labels=config.data.label_fields,
        history_side=history_side,
        contextual=tuple(dict.fromkeys(contextual)),
        hard_user=hard_user,
        sample_weight=sample_weight,
        item_features=tuple(
            dict.fromkeys(bare_name(config.column(name)) for name in groups["candidate"][1:])
        ),
        item_type=_delimited_type(config.all_features[groups["candidate"][0]]),
        user_id=config.data.list_columns.user_id_field,
        sequences=config.sequences,
    )


def _delimited_type(feature: config_schema.IdFeature | RawFeature) -> pa.DataType:
    if isinstance(feature, RawFeature):
        return pa.float64()
    return pa.int64() if feature.num_buckets else pa.string()


def sequences_to_read(layout: ListLayout) -> dict[str, list_files.SequenceColumns]:
    """The history's and the candidates' columns, by sequence."""
    history: dict[str, pa.DataType | None] = {layout.history_item: None}
    history |= {layout.timestamp: pa.int64()}
    history |= {layout.action: pa.int64()} if layout.action else {}
    history |= {layout.watch_time: pa.float32()} if layout.watch_time else {}
    never_null = frozenset(history)
    # A feature may read one of the columns above too, which keep their types.
    side = {name: kind for name, kind in layout.history_side.items() if name not in history}
    history |= dict.fromkeys(side)
    candidate: dict[str, pa.DataType | None] = {layout.candidate_item: None}
    candidate |= dict.fromkeys(layout.labels)
    for column, kind in ((layout.action, pa.int64()), (layout.watch_time, pa.float32())):
        label = layout.label_like(column)
        candidate |= {label: kind} if label else {}
    result = {}
    for columns, refuse_null in (
        (history, never_null),
        (candidate, frozenset(candidate)),
    ):
        name = sequence_name(next(iter(columns)))
        config = layout.sequences.get(name, SequenceConfig())
        if config.sequence_delim:
            columns[next(iter(columns))] = layout.item_type
            columns |= side if columns is history else {}
        result[name] = list_files.SequenceColumns(
            types=columns, config=config, refuse_null=refuse_null
        )
    return result


def scalars_to_read(layout: ListLayout) -> tuple[str, ...]:
    """Columns of one value, or several, a row."""
    singles = [column for column in (layout.request_time, layout.user_id) if column]
    return tuple(dict.fromkeys([*layout.contextual, *singles]))
