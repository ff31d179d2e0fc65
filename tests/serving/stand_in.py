"""A stand-in for an export: item vectors at hand, users who are the mean of their history.

What `artifact.Artifact` gives, for the tests of what is built on it; those of the whole path are in
`test_commands.py`.
"""

import pathlib
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_jax.serving import artifact

HISTORY, POSITIVES = "uih_seq__video_id", "cand_seq__video_id"


class StandIn(artifact.Artifact):
    """Items 10, 11, ... with random vectors, the last fifth of them cold."""

    def __init__(self, path, *, num_items=300, dim=8, seed=0, spread=0.0, version="model-a",
                 delimiter=""):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.path = pathlib.Path(path)
        self.manifest = types.SimpleNamespace(
            model_version=version,
            history_column=HISTORY,
            item_id_column="video_id",
            history=types.SimpleNamespace(sequence_delim=delimiter),
            user_inputs=(types.SimpleNamespace(name=HISTORY),),
            item_inputs=(types.SimpleNamespace(name="video_id"),),
            outputs={"user": "user_tower_emb", "item": "item_tower_emb"},
            training_items=types.SimpleNamespace(ids="ids.npy", counts="counts.npy"),
            dim=dim,
        )
        self._ids = rng.permutation(np.arange(10, 10 + num_items))
        centres = rng.normal(size=(max(num_items // 50, 1), dim))
        vectors = centres[rng.integers(0, len(centres), num_items)]
        vectors = vectors + 0.5 * rng.normal(size=vectors.shape)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors *= np.exp(spread * rng.normal(size=(num_items, 1)))
        self._vectors = vectors.astype(np.float32)
        known = np.sort(self._ids[~self.item_is_cold()])
        np.save(self.path / "ids.npy", known)
        np.save(self.path / "counts.npy", 1 + (known % 7) ** 2)

    def item_ids(self):
        return self._ids

    def item_vectors(self):
        return self._vectors

    def item_is_cold(self):
        return self._ids >= 10 + 0.8 * len(self._ids)

    def embed_users(self, columns):
        histories = columns[HISTORY].to_pylist()
        if self.manifest.history.sequence_delim:
            delimiter = self.manifest.history.sequence_delim
            histories = [[int(word) for word in row.split(delimiter) if word] for row in histories]
        place = {int(item): row for row, item in enumerate(self._ids)}
        vectors = np.zeros((len(histories), self._vectors.shape[1]), np.float32)
        for row, history in enumerate(histories):
            known = [self._vectors[place[item]] for item in history if item in place]
            if known:
                vectors[row] = np.mean(known[-5:], axis=0)
        return vectors

    def embed_items(self, columns):
        place = {int(item): row for row, item in enumerate(self._ids)}
        return self._vectors[[place[item] for item in columns["video_id"].to_pylist()]]


def write_users(path, histories, *, delimiter="", row_group_size=5, **columns):
    """A parquet file of users: their histories, and other columns as given."""
    lists = pa.array(histories, pa.list_(pa.int64()))
    if delimiter:
        lists = pa.array([delimiter.join(map(str, history)) for history in histories])
    table = pa.table({"user_id": np.arange(len(histories)), HISTORY: lists, **columns})
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)
