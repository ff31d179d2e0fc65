"""Small list-column files for tests: rows as Python lists, and a configuration that reads them."""

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq

from configs import kuairand
from hstu_jax.config import feature_schema, resolve

REQUEST = 1_650_000_000


def row(items, candidates, *, user=7, request=REQUEST, **columns):
    """A row whose history has one event a minute up to the request."""
    num = len(items)
    return {
        "user_id": user,
        "uih_seq__video_id": items,
        "uih_seq__action_timestamp": [request - 60 * (num - i) for i in range(num)],
        "uih_seq__action_weight": [1 + i % 3 for i in range(num)],
        "uih_seq__watch_time": [0.5 + i for i in range(num)],
        "cand_seq__video_id": candidates,
        "cand_seq__action_weight": [3] * len(candidates),
        "cand_seq__watch_time": [1.25] * len(candidates),
        "request_time": request,
        **columns,
    }


ROWS = [
    row([5, 6, 7], [8], user=1),
    row([], [5, 9], user=2),
    row([7, 5], [], user=1),
    row([9, 9, 5, 6, 7], [6], user=3),
]

_TYPES = {
    "uih_seq__video_id": pa.list_(pa.int64()),
    "cand_seq__video_id": pa.list_(pa.int64()),
    "uih_seq__action_timestamp": pa.list_(pa.int64()),
    "uih_seq__action_weight": pa.list_(pa.int64()),
    "cand_seq__action_weight": pa.list_(pa.int64()),
    "uih_seq__watch_time": pa.list_(pa.float32()),
    "cand_seq__watch_time": pa.list_(pa.float32()),
}


def write(path, rows, *, delimiter="", types=None):
    """Writes rows; `types` override the columns' Arrow types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    types = {**_TYPES, **(types or {})}
    columns = {}
    for name in rows[0]:
        values = [r[name] for r in rows]
        if delimiter and "__" in name:
            values = [None if v is None else delimiter.join(map(str, v)) for v in values]
            columns[name] = pa.array(values, pa.string())
        else:
            columns[name] = pa.array(values, types.get(name))
    pq.write_table(pa.table(columns), path)


def config(folder, *, features=None, raw_features=None, groups=None, sequences=None, **paths):
    """A small configuration over `folder`/train and `folder`/test, without contextual features.

    Args:
        folder: of the files.
        features: further id features, by name.
        raw_features: raw features, by name.
        groups: feature groups to replace.
        sequences: `sequences` section.
        **paths: fields of `data.list_columns`, and `label_fields`.
    """
    raw = kuairand.get_config("sample")
    base = resolve.resolve(raw)
    video = dataclasses.replace(base.features["uih_seq__video_id"], num_buckets=100)
    all_features = {"uih_seq__video_id": video, "cand_seq__video_id": video, **(features or {})}
    all_groups = {**base.feature_groups, "contextual": (), **(groups or {})}
    labels = paths.pop("label_fields", ("cand_seq__action_weight", "cand_seq__watch_time"))
    train = {"train_input_path": f"{folder}/train/*.parquet"}
    section = {**train, "eval_input_path": f"{folder}/test/*.parquet", **paths}
    return dataclasses.replace(
        base,
        features=all_features,
        raw_features=raw_features or {},
        sequences=sequences or {},
        feature_groups={name: value for name, value in all_groups.items() if value},
        data=dataclasses.replace(
            base.data,
            source="list_columns",
            list_columns=feature_schema.ListColumnsConfig(**section),
            label_fields=labels,
            batch_size=4,
        ),
        eval=dataclasses.replace(base.eval, baselines=False),
    )


def write_both(folder, rows=ROWS, **options):
    """The same rows as training and test files."""
    for split in ("train", "test"):
        write(folder / split / "a.parquet", rows, **options)
