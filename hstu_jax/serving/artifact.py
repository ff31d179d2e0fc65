"""An exported folder, opened for serving: plain columns in, vectors of users and items out.

    artifact = load("export")
    artifact.embed_users({"uih_seq__video_id": [[5, 6]], ...})   # float32 [1, E]
    artifact.embed_items({"video_id": [5, 6, 7]})                # float32 [3, E]

This file and those it imports (`hstu_jax.serving`, but for the exporter's files) are the loader:
they need jax, numpy, orbax-checkpoint, flatbuffers and pyarrow, and no code of the training. Code
from the folder is never run: programs are StableHLO, arrays are read without pickle. What is in the
folder is in docs/serving.md.
"""

import os
import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import numpy as np
import pyarrow as pa

from hstu_jax.serving import (
    feature_values,
    input_columns,
    item_folder,
    row_table,
    tower_parameters,
    user_batches,
)
from hstu_jax.serving import manifest as manifest_lib

Columns = Mapping[str, Any] | pa.Table | pa.RecordBatch
UNFINISHED = ".unfinished"  # how the names of folders end that are being written
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}  # JAX's name -> the programs'


def load(
    folder: str | os.PathLike[str],
    *,
    verify: bool = True,
    on_unknown: str = "count",
) -> "Artifact":
    """Opens an exported folder.

    Args:
        folder: that `python -m hstu_jax.export` wrote.
        verify: read every part once and compare its hash. False compares sizes only, which does not
            see parts of another export of equal size.
        on_unknown: what to do with item ids of a history without a training event: "count" them
            and go on (an id without a row is a zero vector, another one has its first, random
            values), or "refuse".

    Raises:
        FileNotFoundError: no finished export there.
        ValueError: another format version, other fields, or a part that is missing, truncated,
            damaged or of another export; names the part.
    """
    if on_unknown not in ("count", "refuse"):
        raise ValueError(
            f"on_unknown={on_unknown!r}: unknown choice; available: 'count', 'refuse'."
        )
    path = pathlib.Path(folder)
    if path.absolute().name.endswith(UNFINISHED):
        raise ValueError(f"{path}: left by an export that was interrupted; remove it.")
    manifest = manifest_lib.read(path)
    manifest_lib.check_parts(path, manifest.parts, verify=verify)
    items = item_folder.read(path, model_version=manifest.model_version, verify=verify)
    return Artifact(path, manifest, items, on_unknown=on_unknown)


def open_parts(path: pathlib.Path, manifest: manifest_lib.Manifest) -> "Artifact":
    """A folder that has no manifest file yet, while it is being exported.

    Raises:
        ValueError: as for `load`.
    """
    manifest_lib.check_parts(path, manifest.parts, verify=True)
    return Artifact(path, manifest, None, on_unknown="count")


class Artifact:
    """Both towers of an exported folder; made by `load`.

    Methods may be called from several threads.

    Attributes:
        path: the folder.
        manifest: what it says of itself.
        counts: running: users, empty_histories, truncated_histories, dropped_history_items,
            history_items, unknown_item_ids (history items without a training event), items,
            cold_items (the same of `embed_items`), unknown_values and missing_values (of all other
            features).
    """

    def __init__(
        self,
        path: pathlib.Path,
        manifest: manifest_lib.Manifest,
        items: item_folder.Items | None,
        *,
        on_unknown: str,
    ):
        self.path, self.manifest = path, manifest
        self.counts: dict[str, int] = dict.fromkeys(
            (
                "users", "empty_histories", "truncated_histories", "dropped_history_items",
                "history_items", "unknown_item_ids", "items", "cold_items", "unknown_values",
                "missing_values",
            ),
            0,
        )  # fmt: skip
        self._items, self._on_unknown = items, on_unknown
        self._lock = threading.RLock()
        self._rules = feature_values.Rules(path, manifest.translations)
        self._tables = {
            name: row_table.RowTable(path / table.file, num_rows=table.num_rows, dim=table.dim)
            for name, table in manifest.tables.items()
        }
        keys = manifest.item_keys
        self._item_keys = None if keys is None else _open_array(path / keys)
        training = manifest.training_items
        self._training_items = _open_array(path / training.ids)
        column = manifest.item_id_column
        # Hashes and vocabularies take an integer and its decimal string for one id.
        self._has_keys = column not in manifest.translations and any(
            each.name == column and each.dtype == "key" for each in manifest.item_inputs
        )
        self._parameters = {
            tower: tower_parameters.read(path, tower, manifest.parameters)
            for tower in ("user", "item")
        }
        self._platform = _PLATFORMS.get(jax.default_backend(), jax.default_backend())
        available = sorted({program.platform for program in manifest.programs})
        if self._platform not in available:
            raise ValueError(
                f"{path}: has programs for {available}, and JAX runs on {self._platform!r}; export "
                "again with --platforms, or set JAX_PLATFORMS."
            )
        self._programs: dict[tuple[str, int, int], Callable[..., jax.Array]] = {}

    def embed_users(self, columns: Columns) -> np.ndarray:
        """Vectors of users.

        Args:
            columns: `manifest.user_inputs`, one user a row; further columns are not read. A history
                longer than the model reads keeps its newest events, and is counted.

        Returns:
            float32 [n, E].

        Raises:
            ValueError, TypeError: a column is missing or breaks a rule; names column and row.
        """
        manifest = self.manifest
        arrays = input_columns.to_arrow(columns, manifest.user_inputs)
        histories = input_columns.read_histories(arrays, manifest.user_inputs, manifest.history)
        counts = {
            "users": len(histories.lengths),
            "empty_histories": int(np.count_nonzero(histories.lengths == 0)),
            "truncated_histories": histories.num_truncated,
            "dropped_history_items": histories.num_dropped,
            "history_items": int(histories.lengths.sum()),
        }
        counts["unknown_item_ids"] = self._count_unknown(histories)
        events = [
            self._event_values(feature, histories, counts) for feature in manifest.history_features
        ]
        contextual = self._contextual(arrays, counts)
        vectors = np.zeros((len(histories.lengths), manifest.dim), np.float32)
        for batch in user_batches.plan(histories.lengths, manifest.sizes):
            inputs = user_batches.plain_inputs(batch, histories, manifest.history)
            history = self._side_by_side(
                manifest.history_features, [values[batch.events] for values in events]
            )
            inputs["history"] = user_batches.padded_history(batch, history)
            if contextual is not None:
                inputs["contextual"] = user_batches.padded_rows(batch, contextual)
            program = self._program("user", batch.length, batch.batch)
            found = np.asarray(program(self._parameters["user"], inputs))
            vectors[batch.rows] = found[: len(batch.rows)]
        self._add(counts)
        return vectors

    def embed_items(self, columns: Columns) -> np.ndarray:
        """Vectors of items.

        Args:
            columns: `manifest.item_inputs` by their bare names (`video_id`), one item a row.

        Returns:
            float32 [n, E].

        Raises:
            ValueError, TypeError: a column is missing or breaks a rule; names it.
        """
        manifest = self.manifest
        arrays = input_columns.to_arrow(columns, manifest.item_inputs)
        counts = {"items": len(arrays[manifest.item_id_column])}
        counts["cold_items"] = int(
            np.count_nonzero(~self.has_training_event(arrays[manifest.item_id_column]))
        )
        values = [
            self._values(feature, arrays[feature.column], counts)
            for feature in manifest.candidate_features
        ]
        vectors = np.zeros((counts["items"], manifest.dim), np.float32)
        for start, batch in user_batches.item_batches(counts["items"], manifest.item_batches):
            some = slice(start, start + batch)
            embedding = self._side_by_side(
                manifest.candidate_features, [each[some] for each in values]
            )
            padded = np.zeros((batch, embedding.shape[1]), np.float32)
            padded[: len(embedding)] = embedding
            program = self._program("item", 0, batch)
            found = np.asarray(program(self._parameters["item"], padded))
            vectors[some] = found[: len(embedding)]
        self._add(counts)
        return vectors

    def has_training_event(self, ids: Any) -> np.ndarray:
        """bool [n]: items that training has seen.

        Args:
            ids: item ids, as an array or list or an Arrow array. Where ids are hashed or words of
                a vocabulary, an integer is its decimal string.

        Raises:
            TypeError: fractions, or strings where ids are integers, or the other way round.
        """
        array = ids if isinstance(ids, pa.Array) else pa.array(ids)
        name = self.manifest.item_id_column
        column = feature_values.from_arrow(array, where=f"column {name}")
        known, values = self._training_items, column.values
        if not len(values) or not len(known):
            return np.zeros(len(column), bool)
        is_other = (values.dtype.kind == "U") != (known.dtype.kind == "U")
        if values.dtype.kind == "f" or (is_other and not self._has_keys):
            kind = "strings" if known.dtype.kind == "U" else "integers"
            raise TypeError(f"column {name}: type {array.type}: item ids are {kind} here.")
        return column.spread(feature_values.find(known, values) >= 0, False)

    def item_ids(self) -> np.ndarray:
        """int64 [N] (or strings): ids of the exported items, in the order of `item_vectors`."""
        return self._exported_items().ids

    def item_vectors(self) -> np.ndarray:
        """float32 [N, E]: a memory map."""
        return self._exported_items().vectors

    def item_is_cold(self) -> np.ndarray:
        """bool [N]: items without a training event, whose vectors training has not seen."""
        return self._exported_items().is_cold

    def _exported_items(self) -> item_folder.Items:
        if self._items is None:
            raise FileNotFoundError(
                f"{self.path / item_folder.FOLDER}: no such folder; export with --item_input_path, "
                "or write it with `item_folder.write_items`."
            )
        return self._items

    def _count_unknown(self, histories: input_columns.Histories) -> int:
        column = self.manifest.history_column
        is_unknown = ~self.has_training_event(histories.columns[column])
        if is_unknown.any() and self._on_unknown == "refuse":
            at = int(np.argmax(is_unknown))
            raise ValueError(
                f"row {input_columns.row_of(at, histories.lengths)}: {column}="
                f"{histories.columns[column][at]}: an item without a training event "
                f"({int(is_unknown.sum())} in all); leave it out, or load with on_unknown='count'."
            )
        return int(np.count_nonzero(is_unknown))

    def _event_values(self, feature, histories, counts) -> np.ndarray:
        if feature.item_values is None:
            return self._values(feature, histories.columns[feature.column], counts)
        items = histories.columns[self.manifest.history_column]
        column = feature_values.from_arrow(items, where=f"column {self.manifest.history_column}")
        place = feature_values.find(self._item_keys, column.values)  # -1 = the last
        values = np.load(self.path / feature.item_values, mmap_mode="r", allow_pickle=False)
        return np.asarray(values[column.spread(place, -1)])

    def _values(self, feature: manifest_lib.Feature, array: pa.Array, counts: dict) -> np.ndarray:
        """Ids or numbers of every row: [n], or [n, V]."""
        where = f"column {feature.column}"
        column = feature_values.from_arrow(array, where=where)
        column = feature_values.split_strings(column, feature.separator)
        if feature.translation is not None:
            column = self._rules.translate(column, feature.translation, where=where)
        mapped = self._rules.map(column, feature, where=where)
        for name, count in (
            ("unknown_values", int(np.count_nonzero(mapped.is_unknown))),
            ("missing_values", mapped.num_missing),
        ):
            counts[name] = counts.get(name, 0) + count
        return feature_values.to_rows(mapped.places, column.offsets, feature, where=where)

    def _vectors(self, feature: manifest_lib.Feature, values: np.ndarray) -> np.ndarray:
        """float32 [n, width]: looked up and pooled, or the numbers themselves."""
        if feature.table is None:
            return values.reshape(len(values), -1).astype(np.float32)
        vectors = self._tables[feature.table].take(values)
        if values.ndim == 1:
            return vectors
        total = vectors.sum(axis=1)  # an id of -1 is a vector of zeros
        if feature.pooling == "sum":
            return total
        return total / np.maximum((values >= 0).sum(axis=1), 1)[:, None].astype(np.float32)

    def _side_by_side(self, features, values) -> np.ndarray:
        vectors = [self._vectors(f, v) for f, v in zip(features, values, strict=True)]
        return np.concatenate(vectors, axis=-1)

    def _contextual(self, arrays, counts) -> np.ndarray | None:
        """float32 [n, C, Cf], or None without contextual features."""
        vectors = []
        for feature in self.manifest.contextual_features:
            values = self._values(feature, arrays[feature.column], counts)
            found = self._vectors(feature, values)
            if found.shape[1] != feature.width:
                raise ValueError(
                    f"column {feature.column}: {found.shape[1]} numbers a row found, "
                    f"{feature.width} expected."
                )
            vectors.append(found)
        return np.stack(vectors, axis=1) if vectors else None

    def _program(self, tower: str, length: int, batch: int) -> Callable[..., jax.Array]:
        with self._lock:
            key = (tower, length, batch)
            if key not in self._programs:
                self._programs[key] = self._read_program(tower, length, batch)
            return self._programs[key]

    def _read_program(self, tower: str, length: int, batch: int) -> Callable[..., jax.Array]:
        wanted = (tower, self._platform, length)
        described = next(
            program
            for program in self.manifest.programs
            if (program.tower, program.platform, program.length) == wanted
            and program.batch in (0, batch)
        )
        file = self.path / described.file
        # One jitted function a file: a symbolic batch compiles once a size.
        for key, program in self._programs.items():
            if described.batch == 0 and key[:2] == (tower, length):
                return program
        try:
            exported = jax.export.deserialize(bytearray(file.read_bytes()))
        except Exception as error:  # flatbuffers and JAX raise whatever they meet
            versions = dict(self.manifest.versions)
            raise ValueError(
                f"{file}: this jax {jax.__version__} cannot read the program, which "
                f"{versions.get('jax')} wrote ({error}); export again with this version."
            ) from error
        run = jax.jit(exported.call)
        if tower == "item":
            return run
        (_, read), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        return lambda parameters, inputs: run(parameters, {name: inputs[name] for name in read})

    def _add(self, counts: dict[str, int]) -> None:
        with self._lock:
            for name, count in counts.items():
                self.counts[name] += count


def _open_array(file: pathlib.Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)
