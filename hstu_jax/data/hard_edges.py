"""A hard-edge table from an event store: what users were shown and did not want.

Here: which events become edges, and the three files that a `HardNegativeSampler` reads. Not here:
their format (`sampler_files.py`) and their use (`hstu_jax.features.hard_negatives`).
"""

import dataclasses
import pathlib

import numpy as np
from jaxtyping import Bool, Int

from hstu_jax.data import event_store, sampler_files, schema, windowing

EDGE_KINDS = ("hated", "not_clicked")
ID_KINDS = ("original", "index")
USERS_FILE, ITEMS_FILE, EDGES_FILE = "users.tsv", "items.tsv", "hard_edges.tsv"
FOLDER = "hard_negatives"  # inside the event store, unless told otherwise


@dataclasses.dataclass(frozen=True)
class HardEdgeOptions:
    """Which events become hard edges.

    Attributes:
      kind: "hated" (the event has the action "hate") or "not_clicked" (it has none of the store's
        positive actions).
      max_per_user: at most this many edges of a user, the newest; 0 = all.
      item_weight_exponent: weight in the item table = train_count ** exponent; 0 for items without
        a training event.
      ids: "original" (for training on the store) or "index": the dense indices that list columns
        exported from the store have as ids.
    """

    kind: str = "hated"
    max_per_user: int = 0
    item_weight_exponent: float = 0.0
    ids: str = "original"

    def __post_init__(self) -> None:
        for name, known in (("kind", EDGE_KINDS), ("ids", ID_KINDS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: unknown; choose from {known}.")
        if self.max_per_user < 0:
            raise ValueError(f"max_per_user={self.max_per_user}: must not be negative.")
        if self.item_weight_exponent < 0:
            raise ValueError(
                f"item_weight_exponent={self.item_weight_exponent}: must not be negative."
            )


@dataclasses.dataclass(frozen=True)
class HardEdgeFiles:
    """What `write_hard_edges` left.

    Attributes:
      folder: where the files are.
      num_edges: edges written.
      num_users: users that have some.
      num_positive: pairs left out because the user also has a positive training event with the item.
      ids: which ids the files hold.
      is_weighted: the item table has weights of its own.
    """

    folder: pathlib.Path
    num_edges: int
    num_users: int
    num_positive: int
    ids: str = "original"
    is_weighted: bool = False

    def describe(self) -> str:
        """Counts, and the flags that use the files."""
        flag = "--config.data.negative_sampler"
        source = "" if self.ids == "original" else "--config.data.source=list_columns "
        # Without the file, weights are `weight_exponent`'s.
        weights = f" {flag}.item_input_path={self.folder / ITEMS_FILE}" if self.is_weighted else ""
        return (
            f"{self.folder}: {self.num_edges:,} hard edges of {self.num_users:,} users; "
            f"{self.num_positive:,} left out that are positive elsewhere in training; ids in the "
            f"files: {self.ids}\n"
            f"train with them:  {source}{flag}.kind=HardNegativeSampler {flag}.num_hard_sample=8 "
            f"{flag}.hard_neg_edge_input_path={self.folder / EDGES_FILE}" + weights
        )


def write_hard_edges(
    store: event_store.EventStore,
    out_dir: str | pathlib.Path | None = None,
    *,
    options: HardEdgeOptions | None = None,
    overwrite: bool = False,
) -> HardEdgeFiles:
    """Writes users, items and hard edges, from training events only.

    Nothing on or after the validation day is looked at, neither to find edges nor to leave some
    out. (Within training one table serves all windows, as in the reference: an edge may be newer than
    the window it is used for.) A user's edges are ordered from the newest event to the oldest, since the sampler's "full"
    strategy takes the first; a pair comes once, at its newest event.

    Args:
      store: the opened event store.
      out_dir: folder to make; None = `hard_negatives` in the store's own, with ids "index"
        `hard_negatives_index`: the one kind must not be taken for the other.
      options: rules; None for the defaults.
      overwrite: replace files that are already there.

    Raises:
      FileExistsError: the edge file exists and is not to be replaced.
      ValueError: no event is an edge, or the store does not say when its validation day begins.
    """
    options = options or HardEdgeOptions()
    own = store.path / (FOLDER if options.ids == "original" else f"{FOLDER}_{options.ids}")
    folder = own if out_dir is None else pathlib.Path(out_dir)
    if (folder / EDGES_FILE).exists() and not overwrite:
        raise FileExistsError(f"{folder / EDGES_FILE}: exists; add --overwrite to replace it.")
    unwanted, positive = _training_events(store, options.kind)
    chosen, num_positive = _newest_pairs(store, unwanted, positive)
    user = store.events.user_index[chosen]
    if options.max_per_user:
        rank = np.arange(len(user)) - np.searchsorted(user, user, side="left")
        chosen = chosen[rank < options.max_per_user]
        user = store.events.user_index[chosen]
    if not len(chosen):
        raise ValueError(
            f"kind={options.kind!r}: {store.path} has no such training event; choose another of "
            f"{EDGE_KINDS}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    user_id, item_id = store.users["user_id"], store.items.item_id
    if options.ids == "index":
        user_id, item_id = np.arange(store.num_users), np.arange(store.num_items)
    train_count = store.items.train_count
    weight = np.where(
        train_count > 0, np.maximum(train_count, 1.0) ** options.item_weight_exponent, 0.0
    )
    files = {
        USERS_FILE: (sampler_files.USER_COLUMNS, [user_id, np.ones(len(user_id))]),
        ITEMS_FILE: (sampler_files.ITEM_COLUMNS, [item_id, weight, item_id]),
        EDGES_FILE: (
            sampler_files.EDGE_COLUMNS,
            [user_id[user], item_id[store.events.item_index[chosen]], np.ones(len(chosen))],
        ),
    }
    for name, (columns, values) in files.items():
        sampler_files.write_columns(folder / name, columns, values)
    return HardEdgeFiles(
        folder=folder,
        num_edges=len(chosen),
        num_users=len(np.unique(user)),
        num_positive=num_positive,
        ids=options.ids,
        is_weighted=options.item_weight_exponent > 0,
    )


def _training_events(
    store: event_store.EventStore, kind: str
) -> tuple[Bool[np.ndarray, "events"], Bool[np.ndarray, "events"]]:
    """Which events are unwanted, and which are positive, before the validation day."""
    if windowing.LEAVE_ONE_OUT in store.stats:
        raise ValueError(
            f"{store.path}: was cut by leave-one-out, where training ends at another time for every "
            "user; hard negatives are made from stores that are split by day."
        )
    try:
        end_s = store.stats["days"]["validation_start_s"]
        names = tuple(store.stats["window_options"]["positive_actions"])
    except KeyError as error:
        raise ValueError(
            f"{store.path}/{schema.STATS_FILE}: has no {error}; prepare the data again."
        ) from error
    action = np.asarray(store.events.action)
    is_training = np.asarray(store.events.timestamp_s) < end_s
    wanted = (action & schema.action_mask(names)) != 0
    is_hated = (action & schema.ACTION_BITS["hate"]) != 0
    unwanted = is_hated if kind == "hated" else ~wanted
    return is_training & unwanted, is_training & wanted & ~is_hated


def _newest_pairs(
    store: event_store.EventStore,
    unwanted: Bool[np.ndarray, "events"],
    positive: Bool[np.ndarray, "events"],
) -> tuple[Int[np.ndarray, "_"], int]:
    """Events of the pairs, by user, newest first; and how many pairs are positive elsewhere."""
    events = store.events
    pair = events.user_index.astype(np.int64) * store.num_items + events.item_index
    newest_first = np.flatnonzero(unwanted)[::-1]
    _, first = np.unique(pair[newest_first], return_index=True)
    once = newest_first[np.sort(first)]
    is_positive = np.isin(pair[once], pair[positive])
    kept = once[~is_positive]
    return kept[np.argsort(events.user_index[kept], kind="stable")], int(is_positive.sum())
