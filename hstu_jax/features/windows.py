"""Which windows form the groups of which step: an order per epoch, cut by what a batch can hold.

Here: epoch orders, group plans, step -> epoch. A plan holds window numbers and slots, no values.
Not here: who gets what within a step (`balance.py`) and the values of a batch (`packing.py`, the
next file on the path).
"""

import dataclasses
import functools
import itertools
import threading

import numpy as np
from jaxtyping import Int

from hstu_jax.features import balance, random_streams
from hstu_jax.features.batch import BatchShape
from hstu_jax.features.window_sizes import SplitWindows

# Windows passed over because they do not fit a group's rest, before the group is closed. They open
# the next group; more of them fill groups a little better and cost planning time.
_LOOK_AHEAD = 16
_LOAD_WINDOWS = 50_000  # dealt to see how even an epoch is: a second's work, whatever its length


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """The windows of one group, in the order that numbers its users.

    Attributes:
        windows: window numbers in the store.
        starts: first slot of each window's segment within the group, row * row_len + slot. A packed
            window without any slot (no contextual tokens, empty history) has rows * row_len.
    """

    windows: Int[np.ndarray, "n"]
    starts: Int[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """All groups of one epoch; each window of the split is in exactly one.

    The arrays hold the windows in groups as they were filled one after the other, which decides
    what comes into a step. `groups` deals a step's windows to its groups anew (`balance.deal`).

    Attributes:
        split: the windows and their sizes.
        shapes: of the run.
        one_user_per_row: plain padding; False = packed rows.
        positions: places in `split`, group after group.
        starts: first slot of each, as in `GroupPlan`.
        group_offsets: windows of group g are `group_offsets[g]:group_offsets[g + 1]`.
        first_group: first group of each step.
        num_groups: groups of each step that were filled.
        shape_index: which of the run's shapes each step has.
    """

    split: SplitWindows
    shapes: tuple[BatchShape, ...]
    one_user_per_row: bool
    positions: Int[np.ndarray, "W"]
    starts: Int[np.ndarray, "W"]
    group_offsets: Int[np.ndarray, "_"]
    first_group: Int[np.ndarray, "steps"]
    num_groups: Int[np.ndarray, "steps"]
    shape_index: Int[np.ndarray, "steps"]

    @property
    def windows(self) -> Int[np.ndarray, "W"]:
        """Window numbers in the order of `positions`."""
        return self.split.windows[self.positions]

    @property
    def num_steps(self) -> int:
        """Global batches of the epoch."""
        return len(self.first_group)

    def groups(self, index: int) -> list[GroupPlan]:
        """The groups of the epoch's step `index`; one may be empty, and those missing are."""
        members, shares = self._dealt(index)
        return [
            GroupPlan(windows=self.split.windows[members[share.members]], starts=share.starts)
            for share in shares
        ]

    def loads(self) -> balance.Loads:
        """Tokens and attention pairs of the groups; of some steps, evenly spread, if many."""
        share = min(_LOAD_WINDOWS / len(self.positions), 1)
        num_chosen = max(int(share * self.num_steps), 1)
        chosen = np.linspace(0, self.num_steps - 1, num_chosen, dtype=np.int64)
        tokens = np.zeros((len(chosen), self.shapes[0].groups), dtype=np.int64)
        pairs = np.zeros_like(tokens)
        for row, index in enumerate(chosen.tolist()):
            members, shares = self._dealt(index)
            for group, share in enumerate(shares):
                tokens[row, group] = self.split.lengths[members[share.members]].sum()
                pairs[row, group] = self.split.pairs[members[share.members]].sum()
        return balance.Loads(tokens=tokens, pairs=pairs, num_steps=self.num_steps)

    def _dealt(self, index: int) -> tuple[np.ndarray, list[balance.Share]]:
        """Places in `split` of a step's windows, and how they are dealt."""
        first = int(self.first_group[index])
        offsets = self.group_offsets[first : first + int(self.num_groups[index]) + 1]
        members = self.positions[offsets[0] : offsets[-1]]
        shares = [
            balance.Share(members=np.arange(start, end) - offsets[0], starts=self.starts[start:end])
            for start, end in itertools.pairwise(offsets.tolist())
        ]
        shares = balance.deal(
            shares,
            lengths=self.split.lengths[members],
            pairs=self.split.pairs[members],
            num_positives=self.split.num_positives[members],
            shape=self.shapes[self.shape_index[index]],
            one_user_per_row=self.one_user_per_row,
        )
        return members, shares


def plan_epoch(
    split: SplitWindows,
    *,
    shapes: tuple[BatchShape, ...],
    one_user_per_row: bool,
    order: Int[np.ndarray, "W"],
    step_rng: np.random.Generator | None = None,
) -> EpochPlan:
    """Cuts an order of windows into groups and steps.

    A window goes to the shortest row length that holds it. Within one, windows are taken in order;
    one that does not fit what is left of a group waits for the next group.

    Args:
        split: the windows and their sizes.
        shapes: by ascending row length; the last holds every window (`split_windows` cuts
            lengths, `shapes.batch_shapes` makes room for them).
        one_user_per_row: plain padding; False = first-fit into rows.
        order: permutation of the split's windows.
        step_rng: shuffles the steps of different shapes; None = shape after shape.
    """
    row_lens = [shape.row_len for shape in shapes]
    shape_of = np.searchsorted(row_lens, split.lengths[order], side="left")
    positions, starts, sizes = [], [], []
    first_group, num_groups, shape_index = [], [], []
    for index, shape in enumerate(shapes):
        members = order[shape_of == index]
        lengths = split.lengths[members]
        group_sizes, placed = _fill_groups(
            np.full_like(lengths, shape.row_len) if one_user_per_row else lengths,
            split.num_positives[members],
            shape=shape,
            starts=starts,
        )
        positions.append(members[placed])
        first = np.arange(0, len(group_sizes), shape.groups)
        first_group.append(first + len(sizes))
        num_groups.append(np.minimum(len(group_sizes) - first, shape.groups))
        shape_index.append(np.full(len(first), index))
        sizes.extend(group_sizes)
    steps = np.arange(sum(map(len, first_group)))
    if step_rng is not None and len(shapes) > 1:
        steps = step_rng.permutation(steps)
    return EpochPlan(
        split=split,
        shapes=shapes,
        one_user_per_row=one_user_per_row,
        positions=np.concatenate(positions),
        starts=np.array(starts, dtype=np.int32),
        group_offsets=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
        first_group=np.concatenate(first_group)[steps],
        num_groups=np.concatenate(num_groups)[steps],
        shape_index=np.concatenate(shape_index)[steps],
    )


def place_windows(
    lengths: Int[np.ndarray, "n"], *, shape: BatchShape, one_user_per_row: bool
) -> Int[np.ndarray, "n"]:
    """First slots of a given list of windows in one group, by the rule of `plan_epoch`.

    Args:
        lengths: slots of each window.
        shape: of the group.
        one_user_per_row: plain padding; False = first-fit into rows.

    Raises:
        ValueError: the windows do not fit one group.
    """
    starts: list[int] = []
    sizes: list[int] = []
    if (lengths <= shape.row_len).all():
        needs = np.full_like(lengths, shape.row_len) if one_user_per_row else lengths
        sizes, placed = _fill_groups(needs, np.zeros_like(lengths), shape=shape, starts=starts)
    if sizes[:1] != [len(lengths)]:
        raise ValueError(
            f"lengths={lengths.tolist()}: do not fit one group of {shape.rows} rows of "
            f"{shape.row_len} slots and {shape.users} users; use fewer windows."
        )
    ordered = np.empty(len(lengths), dtype=np.int32)
    ordered[placed] = starts
    return ordered


def _fill_groups(
    needs: Int[np.ndarray, "n"],
    num_positives: Int[np.ndarray, "n"],
    *,
    shape: BatchShape,
    starts: list[int],
) -> tuple[list[int], Int[np.ndarray, "n"]]:
    """First-fit of windows into rows, group by group; appends to `starts`.

    Returns the number of windows of each group, and the windows in group order. Plain lists and
    integers: this loop sees every window of an epoch, and NumPy scalars would triple its time.
    """
    need_of, positives_of = needs.tolist(), num_positives.tolist()
    smallest = min(need_of, default=0)
    row_len, num_rows, nowhere = shape.row_len, shape.rows, shape.rows * shape.row_len
    # A window that fits no empty group would wait for ever.
    assert max(need_of, default=0) <= row_len and max(positives_of, default=0) <= shape.queries
    sizes: list[int] = []
    placed: list[int] = []
    waiting: list[int] = []
    cursor, total = 0, len(need_of)
    while waiting or cursor < total:
        free = [row_len] * num_rows
        first_row, queries_left = 0, shape.queries
        size_before, users_left = len(placed), shape.users
        passed_over: list[int] = []
        queue, waiting = waiting, []
        taken = 0
        while users_left and first_row < num_rows and len(passed_over) < _LOOK_AHEAD:
            if taken < len(queue):
                window = queue[taken]
                taken += 1
            elif cursor < total:
                window = cursor
                cursor += 1
            else:
                break
            need = need_of[window]
            if positives_of[window] > queries_left:
                passed_over.append(window)
                continue
            start = nowhere
            if need:
                for row in range(first_row, num_rows):
                    if free[row] >= need:
                        start = row * row_len + row_len - free[row]
                        free[row] -= need
                        break
                else:
                    passed_over.append(window)
                    continue
                while first_row < num_rows and free[first_row] < max(smallest, 1):
                    first_row += 1
            placed.append(window)
            starts.append(start)
            users_left -= 1
            queries_left -= positives_of[window]
        waiting = passed_over + queue[taken:]
        sizes.append(len(placed) - size_before)
    return sizes, np.array(placed, dtype=np.int64)


class Schedule:
    """Steps of a whole run: which epoch a step is in, and the plans of the epochs.

    Each is a function of (seed, split, shapes) alone; plans and epoch sizes are cached. Safe to use
    from several threads.

    Args:
        split: the windows.
        shapes: of the run.
        one_user_per_row: plain padding; False = packed rows.
        seed: of the run; None = the store's order in every epoch (evaluation).
    """

    def __init__(
        self,
        split: SplitWindows,
        *,
        shapes: tuple[BatchShape, ...],
        one_user_per_row: bool,
        seed: int | None,
    ):
        self._split, self._shapes, self._seed = split, shapes, seed
        self._one_user_per_row = one_user_per_row
        self._first_step = [0]  # of epochs 0, 1, ...; one more than the epochs planned so far
        self._lock = threading.RLock()
        # Two: the epoch that is consumed and the one that is prefetched.
        self._cached_plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch, from 0."""
        with self._lock:
            return self._cached_plan(epoch)

    def first_step(self, epoch: int) -> int:
        """Step at which an epoch begins: the number of steps of all epochs before it."""
        with self._lock:
            while len(self._first_step) <= epoch:
                done = len(self._first_step) - 1
                self._first_step.append(self._first_step[-1] + self.plan(done).num_steps)
            return self._first_step[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, index within the epoch) of a step, from 0."""
        with self._lock:
            epoch = max(int(np.searchsorted(self._first_step, step, side="right")) - 1, 0)
            while self.first_step(epoch + 1) <= step:
                epoch += 1
            return epoch, step - self._first_step[epoch]

    def _make_plan(self, epoch: int) -> EpochPlan:
        order, step_rng = np.arange(len(self._split.windows)), None
        if self._seed is not None:
            stream = random_streams.Stream
            rng = random_streams.generator(seed=self._seed, stream=stream.WINDOW_ORDER, major=epoch)
            order = rng.permutation(len(order))
            step_rng = random_streams.generator(
                seed=self._seed, stream=stream.STEP_ORDER, major=epoch
            )
        return plan_epoch(
            self._split,
            shapes=self._shapes,
            one_user_per_row=self._one_user_per_row,
            order=order,
            step_rng=step_rng,
        )
