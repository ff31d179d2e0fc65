"""Made-up rows of users and items, on which an export is compared with the live model.

They cover what a row may be: no history, one event, all that the model reads; no value, several,
missing ones and unknown ones. Only the exporter reads this file (`live_check.py`).
"""

import numpy as np
import pyarrow as pa

from hstu_jax.config.feature_schema import IdFeature, RawFeature
from hstu_jax.data import list_layout
from hstu_jax.serving import artifact, trained
from hstu_jax.serving import manifest as manifest_lib

NUM_USERS, NUM_ITEMS = 8, 64
_REQUEST_S = 1_700_000_000


class Inventor:
    """Makes up rows of the values that training could have met, in the ids of the inputs."""

    def __init__(self, model: trained.Trained, opened: artifact.Artifact):
        self._model, self._manifest, self._path = model, opened.manifest, opened.path
        self._rng = np.random.default_rng(0)
        self._known = {
            name: dict(zip(self._read(each.keys), self._read(each.numbers), strict=True))
            for name, each in opened.manifest.translations.items()
        }

    def users(self) -> dict[str, pa.Array]:
        """Rows without history, with one event, with all that the model reads, and others."""
        manifest, history, rng = self._manifest, self._manifest.history, self._rng
        limit = history.max_seq_len
        if history.sequence_length:
            limit = min(limit, history.sequence_length)
        lengths = np.array([0, 1, limit, *rng.integers(0, limit + 1, NUM_USERS - 3)])
        total = int(lengths.sum())
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        place = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ago = np.repeat(lengths, lengths) - place
        events = {
            history.timestamp: pa.array(_REQUEST_S - ago * 977 - 1),
            history.action: pa.array(rng.integers(0, 256, total)),
            history.watch_time: pa.array(rng.uniform(0, 90, total).astype(np.float32)),
        }
        events.pop(None, None)
        items = {f.column: f for f in manifest.candidate_features}.get(manifest.item_id_column)
        for feature in manifest.history_features:
            if feature.item_values is None and feature.column not in events:
                events[feature.column] = self._values(
                    feature, total, is_free=self._is_free(feature) and not history.sequence_delim
                )
        if history.items not in events and items is not None:
            events[history.items] = self._values(items, total)
        columns = {
            name: pa.ListArray.from_arrays(offsets, values) for name, values in events.items()
        }
        for feature in manifest.contextual_features:
            if feature.column not in columns:
                columns[feature.column] = self._rows(feature)
        if history.request_time is not None:
            columns[history.request_time] = pa.array(np.full(len(lengths), _REQUEST_S))
        return columns

    def items(self) -> dict[str, pa.Array]:
        """Items with every feature."""
        columns: dict[str, pa.Array] = {}
        for feature in self._manifest.candidate_features:
            if feature.column not in columns:
                is_free = self._is_free(feature)
                columns[feature.column] = self._values(feature, NUM_ITEMS, is_free=is_free)
        if self._manifest.item_id_column not in columns:
            known = self._read(self._manifest.training_items.ids)
            kind = str if known and isinstance(known[0], str) else int
            columns[self._manifest.item_id_column] = pa.array(list(map(kind, range(NUM_ITEMS))))
        return columns

    def in_ids_of_the_model(self, columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
        """The columns as training had them: original ids translated one by one, lists as lists."""
        manifest = self._manifest
        features = (
            *manifest.history_features, *manifest.contextual_features, *manifest.candidate_features,
        )  # fmt: skip
        result = dict(columns)
        for feature in features:
            if feature.translation is None or feature.column not in columns:
                continue
            known = self._known[feature.translation]
            unlisted = manifest.translations[feature.translation].unlisted
            array = columns[feature.column]
            flat = array.flatten() if pa.types.is_list(array.type) else array
            ids = [int(known.get(value, unlisted)) for value in flat.to_pylist()]
            numbers = pa.array(ids, pa.int64())
            if pa.types.is_list(array.type):
                numbers = pa.ListArray.from_arrays(array.offsets, numbers)
            result[feature.column] = numbers
        return result

    def item_values(self, users: dict[str, pa.Array]) -> dict[str, np.ndarray]:
        """Features that histories look up by item: their values of every event, one by one."""
        manifest = self._manifest
        if manifest.item_keys is None:
            return {}
        keys = {str(key): place for place, key in enumerate(self._read(manifest.item_keys))}
        items = users[manifest.history.items].flatten().to_pylist()
        place = np.array([keys.get(str(item), -1) for item in items], dtype=np.int64)
        return {
            feature.name: np.load(self._path / feature.item_values)[place]
            for feature in manifest.history_features
            if feature.item_values is not None
        }

    def _is_free(self, feature: manifest_lib.Feature) -> bool:
        """Whether a value may be missing: item ids may not."""
        return list_layout.bare_name(feature.column) != self._manifest.item_id_column

    def _read(self, file: str) -> list:
        return np.load(self._path / file, allow_pickle=False).tolist()

    def _rows(self, feature: manifest_lib.Feature) -> pa.Array:
        """A value a row, or a list of `value_dim`, or of none to three where any number may be."""
        described = self._model.config.all_features[feature.name]
        is_pooled = isinstance(described, IdFeature) and feature.value_dim == 0
        if feature.value_dim < 2 and not is_pooled:
            return self._values(feature, NUM_USERS, is_free=True)
        counts = np.full(NUM_USERS, feature.value_dim)
        if is_pooled:
            counts = self._rng.permutation(np.arange(NUM_USERS) % 4)
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        values = self._values(feature, int(counts.sum()), is_free=True)
        return pa.ListArray.from_arrays(offsets, values)

    def _values(
        self, feature: manifest_lib.Feature, num: int, *, is_free: bool = False
    ) -> pa.Array:
        """Random values.

        Args:
            feature: whose.
            num: how many.
            is_free: some are missing, and some not those of training; of original ids only where
                those have a row.
        """
        described: IdFeature | RawFeature = self._model.config.all_features[feature.name]
        rng = self._rng
        # Of five values one is missing and one unknown, from a place that the seed chooses.
        kind = (np.arange(num) + rng.integers(0, 5)) % 5 if is_free else np.full(num, 4)
        replaced = {0: None, 1: "no such word"}
        if feature.translation is not None:
            keys = list(self._known[feature.translation])
            drawn = [keys[at] for at in rng.integers(0, len(keys), num)]
            if is_free and self._manifest.translations[feature.translation].unlisted >= 0:
                drawn = [replaced.get(k, key) for k, key in zip(kind.tolist(), drawn, strict=True)]
            return pa.array(drawn)
        if isinstance(described, RawFeature):
            return pa.array(rng.uniform(-5, 50, num), mask=kind == 0)
        if described.num_buckets:
            numbers = rng.integers(0, described.num_buckets, num)
            return pa.array(np.where(kind == 1, described.num_buckets + 3, numbers), mask=kind == 0)
        words: list = list(described.words() or map(str, range(1000)))
        if not self._is_free(feature):
            # Item ids are of the kind that training had: integers or strings.
            words = self._read(self._manifest.training_items.ids)[:1000] or words
        drawn = [words[at] for at in rng.integers(0, len(words), num)]
        drawn = [replaced.get(k, word) for k, word in zip(kind.tolist(), drawn, strict=True)]
        return pa.array(drawn, pa.string() if isinstance(words[0], str) else pa.int64())


def as_inputs(columns: dict[str, pa.Array], manifest: manifest_lib.Manifest) -> dict[str, pa.Array]:
    """Lists, oldest first, as the folder reads histories: turned, or as strings."""
    history, result = manifest.history, dict(columns)
    for each in manifest.user_inputs:
        if each.kind != "sequence":
            continue
        rows = columns[each.name].to_pylist()
        if history.newest_first:
            rows = [row[::-1] for row in rows]
        if history.sequence_delim:
            result[each.name] = pa.array([history.sequence_delim.join(map(str, r)) for r in rows])
        elif history.newest_first:
            result[each.name] = pa.array(rows, columns[each.name].type)
    return result
