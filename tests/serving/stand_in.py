"""A stand-in for an export: item vectors at hand, users who are the mean of their history.

What `artifact.Artifact` gives, for the tests of what is built on it; those of the whole path are in
`test_commands.py`.
"""

import pathlib
import types

import numpy as np

HISTORY, POSITIVES = "uih_seq__video_id", "cand_seq__video_id"


class StandIn:
    """Items 10, 11, ... with random vectors, the last fifth of them cold."""

    def __init__(self, path, *, num_items=300, dim=8, seed=0, spread=0.0, version="model-a"):
        rng = np.random.default_rng(seed)
        self.path = pathlib.Path(path)
        self.manifest = types.SimpleNamespace(
            model_version=version,
            history_column=HISTORY,
            item_id_column="video_id",
            dim=dim,
        )
        self._ids = rng.permutation(np.arange(10, 10 + num_items))
        centres = rng.normal(size=(max(num_items // 50, 1), dim))
        vectors = centres[rng.integers(0, len(centres), num_items)]
        vectors = vectors + 0.5 * rng.normal(size=vectors.shape)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors *= np.exp(spread * rng.normal(size=(num_items, 1)))
        self._vectors = vectors.astype(np.float32)
        self.counts = {"users": 0}

    def item_ids(self):
        return self._ids

    def item_vectors(self):
        return self._vectors

    def item_is_cold(self):
        return self._ids >= 10 + 0.8 * len(self._ids)

    def embed_users(self, columns):
        histories = columns[HISTORY].to_pylist()
        place = {int(item): row for row, item in enumerate(self._ids)}
        vectors = np.zeros((len(histories), self._vectors.shape[1]), np.float32)
        for row, history in enumerate(histories):
            known = [self._vectors[place[item]] for item in history if item in place]
            if known:
                vectors[row] = np.mean(known[-5:], axis=0)
        self.counts["users"] += len(histories)
        return vectors

    def embed_items(self, columns):
        place = {int(item): row for row, item in enumerate(self._ids)}
        return self._vectors[[place[item] for item in columns["video_id"].to_pylist()]]
