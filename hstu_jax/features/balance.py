"""Deals the windows of a batch to its groups, so that all groups have about as much to do.

Here: the dealing, and what it reaches over an epoch. Which windows form a batch is decided before
(`windows.py`), the values of a batch are made after (`packing.py`).
"""

import dataclasses
import heapq

import numpy as np
from jaxtyping import Int

from hstu_jax.features.batch import BatchShape
from pallas_kernels.hstu_attention import mask as attention_mask

# How far a group's tokens may be above the mean for the sake of equal attention pairs.
_TOKEN_SLACK = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """The windows of one group.

    Attributes:
        members: places in the list of windows that was dealt, ascending.
        starts: first slot of each, as in `windows.GroupPlan`.
    """

    members: Int[np.ndarray, "n"]
    starts: Int[np.ndarray, "n"]


def visible_pairs(
    lengths: Int[np.ndarray, "n"], *, rule: attention_mask.MaskRule
) -> Int[np.ndarray, "n"]:
    """Pairs of a query and a key that the mask lets through, in segments of so many tokens.

    Args:
        lengths: tokens of each segment, contextual ones included.
        rule: the mask.
    """
    distinct, place = np.unique(lengths, return_inverse=True)
    counts = np.zeros(len(distinct), dtype=np.int64)
    for number, length in enumerate(distinct.tolist()):
        position = np.arange(length)
        whole = np.full(length, length)
        for keys in attention_mask.key_intervals(position, whole, None, rule=rule, xp=np):
            counts[number] += np.maximum(keys.end - keys.start, 0).sum()
    return counts[place]


def deal(
    shares: list[Share],
    *,
    lengths: Int[np.ndarray, "n"],
    pairs: Int[np.ndarray, "n"],
    num_positives: Int[np.ndarray, "n"],
    shape: BatchShape,
    one_user_per_row: bool,
) -> list[Share]:
    """Deals windows anew, the longest first, each to the group with the fewest attention pairs.

    A group takes a window only while its tokens stay within 5 % above the mean, or within the
    longest window where that is more: no dealing can be below max(mean, longest). So tokens come
    first, and pairs, which one long window may decide alone, as far as tokens leave room. A window
    that would take every group above that goes where the fewest tokens are. Rows are filled by
    first fit. Devices take neighbouring groups, so the groups are then put into an order in which
    halves, halves of halves and so on are even. With one group nothing changes.

    Args:
        shares: windows as they came, a dealing that fits; it stays where no better one is found.
        lengths: slots of each window.
        pairs: attention pairs of each.
        num_positives: queries of each.
        shape: of the batch; no group gets more users, queries or slots than it has.
        one_user_per_row: plain padding; False = several users in a row.

    Returns:
        A share of every group; one may be empty. A pure function of the arguments.
    """
    if shape.groups == 1:
        return shares
    most = int((1 + _TOKEN_SLACK) * lengths.sum() / shape.groups)
    limit = max(most, int(lengths.max(initial=0)))

    def load(share):
        return int(lengths[share.members].sum()), int(pairs[share.members].sum())

    def worst(dealt):
        tokens, most_pairs = (max(each) for each in zip(*map(load, dealt), strict=True))
        return max(tokens, limit), most_pairs

    sizes = [each.tolist() for each in (lengths, pairs, num_positives)]
    options = dict(shape=shape, limit=limit, one_user_per_row=one_user_per_row)
    found = _deal_longest_first(*sizes, **options, by_pairs=True)
    candidates = [found, shares]
    if found is None or worst(found)[0] > limit:
        candidates.insert(0, _deal_longest_first(*sizes, **options, by_pairs=False))
    best = min((each for each in candidates if each is not None), key=worst)
    nothing = np.zeros(0, dtype=np.int64)
    empty = Share(members=nothing, starts=nothing.astype(np.int32))
    best = [*best, *[empty] * (shape.groups - len(best))]
    all_tokens, all_pairs = max(int(lengths.sum()), 1), max(int(pairs.sum()), 1)
    loads = [tokens * all_pairs + some * all_tokens for tokens, some in map(load, best)]
    return [best[number] for number in _in_even_halves(list(range(shape.groups)), loads)]


def _in_even_halves(groups: list[int], loads: list[int]) -> list[int]:
    """An order whose halves have about the same load, and their halves, as long as there are."""
    if len(groups) % 2:
        return groups
    halves, sums = ([], []), [0, 0]
    for group in sorted(groups, key=lambda group: -loads[group]):
        side = int(sums[1] < sums[0])
        if len(halves[side]) == len(groups) // 2:
            side = 1 - side
        halves[side].append(group)
        sums[side] += loads[group]
    return [*_in_even_halves(halves[0], loads), *_in_even_halves(halves[1], loads)]


@dataclasses.dataclass
class _Group:
    """What is left of a group while windows are dealt."""

    free: list[int]
    users: int
    queries: int
    tokens: int = 0
    first_row: int = 0
    members: list[int] = dataclasses.field(default_factory=list)
    starts: list[int] = dataclasses.field(default_factory=list)


def _deal_longest_first(
    lengths: list[int],
    pairs: list[int],
    num_positives: list[int],
    *,
    shape: BatchShape,
    limit: int,
    one_user_per_row: bool,
    by_pairs: bool,
) -> list[Share] | None:
    """The dealing itself, by pairs or by tokens; None where a window is left that fits no group."""
    row_len, smallest = shape.row_len, max(min(lengths, default=0), 1)
    fewest = min(num_positives, default=0)
    groups = [
        _Group(free=[row_len] * shape.rows, users=shape.users, queries=shape.queries)
        for _ in range(shape.groups)
    ]
    # (pairs or tokens, tokens, users, group): the least first.
    heap = [(0, 0, 0, number) for number in range(shape.groups)]
    for window in sorted(range(len(lengths)), key=lambda window: -lengths[window]):
        length, queries = lengths[window], num_positives[window]
        need = row_len if one_user_per_row else length
        passed_over, above = [], []
        taken = None
        while heap and taken is None:
            entry = heapq.heappop(heap)
            group = groups[entry[-1]]
            if queries > group.queries or _row_for(group, need, smallest) is None:
                passed_over.append(entry)
            elif group.tokens + length > limit:
                above.append(entry)
            else:
                taken = entry
        if taken is None:
            if not above:
                return None
            taken = min(above, key=lambda entry: (entry[1], entry))
            above.remove(taken)
        for entry in (*passed_over, *above):
            heapq.heappush(heap, entry)
        group = groups[taken[-1]]
        _put(group, window, need=need, smallest=smallest, row_len=row_len)
        group.tokens += length
        group.queries -= queries
        # A full group is not looked at again.
        if group.users > len(group.members) and group.queries >= fewest:
            most = pairs[window] if by_pairs else length
            entry = (taken[0] + most, group.tokens, len(group.members), taken[-1])
            heapq.heappush(heap, entry)
    return [_share(group, one_user_per_row=one_user_per_row) for group in groups]


def _row_for(group: _Group, need: int, smallest: int) -> int | None:
    """The first row with room; -1 for a window without slots; None where there is none."""
    if need == 0:
        return -1
    free = group.free
    while group.first_row < len(free) and free[group.first_row] < smallest:
        group.first_row += 1
    for row in range(group.first_row, len(free)):
        if free[row] >= need:
            return row
    return None


def _put(group: _Group, window: int, *, need: int, smallest: int, row_len: int) -> None:
    row = _row_for(group, need, smallest)
    start = len(group.free) * row_len
    if row >= 0:
        start = row * row_len + row_len - group.free[row]
        group.free[row] -= need
    group.members.append(window)
    group.starts.append(start)


def _share(group: _Group, *, one_user_per_row: bool) -> Share:
    order = np.argsort(group.members)
    starts = np.array(group.starts, dtype=np.int32)
    # Rows of one user are alike: they are given out in the order of the members.
    starts = starts if one_user_per_row else starts[order]
    return Share(members=np.array(group.members, dtype=np.int64)[order], starts=starts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loads:
    """Tokens and attention pairs of every group of some steps.

    Attributes:
        tokens: slots in use.
        pairs: visible pairs of tokens in a layer before any truncation.
        num_steps: steps of the whole epoch.
    """

    tokens: Int[np.ndarray, "steps G"]
    pairs: Int[np.ndarray, "steps G"]
    num_steps: int

    def line(self, num_devices: int) -> str:
        """The most over the mean, of groups and of devices: mean and worst of the steps."""
        steps, groups = self.tokens.shape
        shown = "steps" if steps == self.num_steps else f"steps, {steps:,} of {self.num_steps:,}"
        parts = [f"{groups} groups {self._ratios(groups)}"]
        if num_devices > 1:
            parts.append(f"{num_devices} devices {self._ratios(num_devices)}")
        return f"most / mean of an epoch's {shown}, mean (worst): " + "; ".join(parts)

    def _ratios(self, num_parts: int) -> str:
        named = (("tokens", self.tokens), ("attention pairs", self.pairs))
        ratios = [(name, imbalance(loads, num_parts=num_parts)) for name, loads in named]
        return ", ".join(f"{name} {each.mean():.2f} ({each.max():.2f})" for name, each in ratios)


def imbalance(loads: Int[np.ndarray, "steps G"], *, num_parts: int) -> np.ndarray:
    """The most loaded part over the mean of all, for every step; 1 where there is no load.

    Args:
        loads: of the groups.
        num_parts: devices, each of which has as many neighbouring groups; the number of groups for
            the groups themselves.
    """
    parts = loads.reshape(len(loads), num_parts, -1).sum(axis=-1)
    mean = parts.mean(axis=-1)
    return np.where(mean > 0, parts.max(axis=-1) / np.where(mean > 0, mean, 1), 1.0)
