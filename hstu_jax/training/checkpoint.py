"""Orbax checkpoints of a `TrainState`: asynchronous, atomic, restored onto any mesh.

A checkpoint is a nested dict of named arrays (the fields of `TrainState`) plus a JSON record with
the resolved configuration, the fingerprint of the data and the sums of open log lines. Orbax writes
under a temporary name and renames at the end, so a run that is killed while saving leaves the
earlier checkpoints and nothing else that `latest_step` would pick up.
"""

import dataclasses
import pathlib
from typing import Any

import flax.traverse_util
import jax
import orbax.checkpoint as ocp

from hstu_jax.training import state as state_lib

# A run may be continued with other values of these; all others make another run.
_FREE_FIELDS = (
    "workdir",
    "train.num_steps",
    "train.num_epochs",
    "train.log_step_count_steps",
    "train.save_checkpoints_steps",
    "train.keep_checkpoint_max",
    "train.use_tensorboard",
    "train.dry_run",
    "data.path",
    "data.source",
    "data.list_columns.train_input_path",
    "data.list_columns.validation_input_path",
    "data.list_columns.eval_input_path",
    "data.list_columns.item_input_path",
    "data.num_prefetch",
    "eval.",
    "mesh.",
    "model.kernel",
)


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself besides its arrays.

    Attributes:
        config: the resolved configuration as text (`resolve.to_text`).
        data_fingerprint: of the event store.
        num_steps: length of the run that wrote it.
        log_sums: what the next log line had summed up by then (`log_window.LogWindow`).
        train_metrics: the state of the smoothed metrics (`train_metrics.SmoothedRecall`).
        metric_value: of a best checkpoint, its value of `train.keep_best.metric`.
        is_bound_to_length: a schedule depends on the length of the run.
    """

    config: str
    data_fingerprint: str
    num_steps: int
    log_sums: tuple[float, ...] = ()
    train_metrics: tuple[float, ...] = ()
    metric_value: float | None = None
    is_bound_to_length: bool = False


class Checkpointer:
    """Saves and restores the states of one run.

    Args:
        folder: `<workdir>/checkpoints` or `<workdir>/best`.
        keep_max: newest checkpoints to keep; None never deletes and never writes (a reader).
    """

    def __init__(self, folder: pathlib.Path, *, keep_max: int | None):
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep_max,
                create=keep_max is not None,
                read_only=keep_max is None,
                enable_async_checkpointing=True,
            ),
            # Named here, so that reading the shapes of a checkpoint needs no restore first.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "record": ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def folder(self) -> pathlib.Path:
        """Where they are."""
        return self._folder

    def reload(self) -> None:
        """Lists the folder again: steps are otherwise those of the start and one's own."""
        self._manager.reload()

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: state_lib.TrainState, record: Record) -> None:
        """Starts saving; returns once the arrays are copied and may be donated.

        Raises:
            ValueError: the folder has a checkpoint of this step or of a later one.
        """
        is_saved = self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(to_named(state)),
                record=ocp.args.JsonSave(dataclasses.asdict(record)),
            ),
        )
        if not is_saved:
            raise ValueError(
                f"{self._folder}: holds step {self.latest_step()}, so step {int(state.step)} "
                "cannot be saved there; move the folder away."
            )

    def delete_from(self, step: int) -> None:
        """Deletes the checkpoints of a step and of all later ones."""
        for later in self.all_steps():
            if later >= step:
                self._manager.delete(later)

    def read_record(self, step: int) -> Record:
        """The record of a checkpoint."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )
        values = dict(restored["record"])
        for name in ("log_sums", "train_metrics"):
            values[name] = tuple(values.get(name, ()))
        return Record(**values)

    def restore(self, step: int, like: state_lib.TrainState) -> state_lib.TrainState:
        """The state of a checkpoint.

        Args:
            step: of the checkpoint.
            like: arrays or `jax.ShapeDtypeStruct`s with the shapes and shardings to restore to;
                they may lie on another mesh than the one that saved.

        Raises:
            ValueError: the checkpoint has other leaves or shapes; names the first ones.
        """
        target = jax.tree.map(_abstract, to_named(like))
        saved = self._manager.item_metadata(step)["state"]
        _check_same_leaves(target, saved, where=str(self._folder / str(step)))
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
        )
        return from_named(restored["state"], like)

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong while saving."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the background threads."""
        self._manager.close()


def to_named(state: state_lib.TrainState) -> dict[str, Any]:
    """The state as nested dicts of arrays, named by their path."""
    flat = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return flax.traverse_util.unflatten_dict(flat)


def from_named(named: dict[str, Any], like: state_lib.TrainState) -> state_lib.TrainState:
    """The inverse of `to_named`, in the tree of `like`."""
    flat = flax.traverse_util.flatten_dict(named)
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[_names(path)], like)


def check_resumable(saved: Record, current: Record, *, where: str) -> None:
    """Raises ValueError unless a run may go on from a checkpoint with this configuration and data.

    Args:
        saved: record of the checkpoint.
        current: record of the run that wants to go on.
        where: the checkpoint, for the message.
    """
    if saved.data_fingerprint != current.data_fingerprint:
        raise ValueError(
            f"{where}: was trained on other data (fingerprint {saved.data_fingerprint[:12]}, now "
            f"{current.data_fingerprint[:12]}); use another workdir, or the same data."
        )
    if saved.num_steps != current.num_steps and current.is_bound_to_length:
        raise ValueError(
            f"{where}: was written by a run of {saved.num_steps} steps, this one has "
            f"{current.num_steps}, and a learning-rate schedule depends on it; use another workdir "
            "to start a new run, or schedules that end by themselves (a T_max)."
        )
    old, new = (_fixed_lines(record.config) for record in (saved, current))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        shown = "; ".join(
            f"{n}: {old.get(n, 'unset')} -> {new.get(n, 'unset')}" for n in changed[:5]
        )
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(
            f"{where}: was written with another configuration ({shown}{more}); use another workdir "
            "to start a new run."
        )


def fields_of(text: str) -> dict[str, str]:
    """Path -> value, as text, of every field of a record's configuration."""
    return dict(line.split(" = ", 1) for line in text.splitlines())


def _fixed_lines(text: str) -> dict[str, str]:
    return {n: v for n, v in fields_of(text).items() if not n.startswith(_FREE_FIELDS)}


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _check_same_leaves(target: dict[str, Any], saved: Any, *, where: str) -> None:
    wanted = flax.traverse_util.flatten_dict(target, sep="/")
    found = flax.traverse_util.flatten_dict(dict(saved), sep="/")
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            side = "the checkpoint" if name not in found else "this configuration"
            raise ValueError(f"{where}: {side} has no array {name!r}; was it another model?")
        if tuple(found[name].shape) != tuple(wanted[name].shape):
            raise ValueError(
                f"{where}: {name!r} has shape {tuple(found[name].shape)}, this configuration needs "
                f"{tuple(wanted[name].shape)}."
            )
