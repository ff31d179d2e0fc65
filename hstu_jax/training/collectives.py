"""What a compiled program sends between devices, read from its text.

    for each in collectives.read(jitted.lower(...).compile().as_text()): print(each)

XLA prints every collective with the shape of its result and the groups of devices that take part;
the bytes follow from both. A collective in a loop stands once in the text and counts as often as
XLA knows the loop to run, or once: of the exchange of ids and rows (`tables/exchange.py`), that is
one round.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_INSTRUCTION = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{('\w+'(?:,\s*'\w+')*)\}")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(?:body|condition|to_apply|calls|branch_computations|(?:true|false)_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NUM_DEVICES = re.compile(r"(num_partitions|replica_count)=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: XLA's name, as "all-to-all".
        shape: the result as XLA writes it, without layouts; on one device.
        result_bytes: size of the result on one device.
        group: the devices that take part together, as numbers in the mesh: one such group of them.
        times: how often the program runs it; a loop of unknown length counts as one run.
    """

    kind: str
    shape: str
    result_bytes: int
    group: tuple[int, ...]
    times: int = 1

    @property
    def group_size(self) -> int:
        """How many devices take part together."""
        return len(self.group)

    @property
    def sent_bytes(self) -> float:
        """Bytes that leave a device in all runs, at the least.

        In one, of g devices with a result of R bytes on each: R (g - 1) / g for all-to-all and
        all-gather, 2 R (g - 1) / g for all-reduce, R (g - 1) for reduce-scatter, R for the others.
        Of a ragged-all-to-all R is the room for what arrives, filled or not: R (g - 1) / g would
        be sent if all of it were filled, and the program does not tell how much is.
        """
        share = (self.group_size - 1) / self.group_size
        factor = {
            "all-to-all": share,
            "ragged-all-to-all": share,
            "all-gather": share,
            "all-reduce": 2 * share,
            "reduce-scatter": self.group_size - 1.0,
        }
        return self.times * self.result_bytes * factor.get(self.kind, 1.0)


def read(text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, in the order of its text.

    Args:
        text: `as_text()` of a compiled program.

    Raises:
        ValueError: groups of devices in a form that is not known.
    """
    sizes = [int(count) for _, count in _NUM_DEVICES.findall(text.partition("\n")[0])]
    num_devices = max(sizes, default=1)
    lines, found, runs = text.splitlines(), [], 1
    runs_of = _runs(lines)
    for line in lines:
        if head := _COMPUTATION.match(line):
            runs = runs_of[head.group(1)]
        match = _INSTRUCTION.search(line)
        if match is None:
            continue
        shapes, kind, is_started = match.groups()
        parts = _SHAPE.findall(shapes)
        if is_started and kind in ("all-gather", "collective-permute"):
            # Its operands stand before its results, context values behind them.
            parts = [part for part in parts if part[:2] != ("u", "32") or part[2]]
            parts = parts[len(parts) // 2 :]
        found.append(
            Collective(
                kind=kind,
                shape=" ".join(f"{letters}{bits}[{sides}]" for letters, bits, sides in parts),
                result_bytes=sum(_bytes(*part) for part in parts),
                group=_first_group(line, num_devices),
                times=runs,
            )
        )
    return tuple(found)


def _runs(lines: Sequence[str]) -> dict[str, int]:
    """How often each computation of a program runs, by the lengths of loops that XLA knows.

    A branch of a condition counts as if it were taken.
    """
    callers: dict[str, list[tuple[str, int]]] = {}
    name = ""
    for line in lines:
        if head := _COMPUTATION.match(line):
            name = head.group(1)
            callers.setdefault(name, [])
        elif "async-update(" not in line and "async-done(" not in line:
            length = _TRIP_COUNT.search(line)
            times = int(length.group(1)) if length else 1
            for called in _CALLED.findall(line):
                for each in re.findall(r"[\w.\-]+", called):
                    callers.setdefault(each, []).append((name, times))

    @functools.cache
    def runs(name: str) -> int:
        found = callers.get(name)
        return sum(times * runs(caller) for caller, times in found) if found else 1

    return {name: runs(name) for name in callers}


def _bytes(letters: str, bits: str, sides: str) -> int:
    """Size of an array, as f32[4,8]; a `pred` takes a byte."""
    count = math.prod(int(side) for side in sides.split(",") if side)
    return math.ceil(count * int(bits or 8) / 8)


def _first_group(line: str, num_devices: int) -> tuple[int, ...]:
    if listed := _LISTED_GROUPS.search(line):
        return _numbers(listed.group(1))
    if counted := _COUNTED_GROUPS.search(line):  # all devices in an order, cut into groups
        size, sides, order = counted.groups()
        devices = _all_devices(_numbers(sides))
        devices = devices.transpose(_numbers(order)) if order else devices
        return tuple(devices.reshape(-1)[: int(size)].tolist())
    if named := _NAMED_GROUPS.search(line):  # by axes of a mesh, from JAX 0.11 on
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        return group_along(re.findall(r"\w+", named.group(2)), sizes)
    if "replica_groups=" not in line or "replica_groups={}" in line:
        return tuple(range(num_devices))
    raise ValueError(f"{line.strip()[:200]!r}: unknown form of replica_groups.")


def group_along(axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Numbers of the devices that share their place with device 0 on all axes but the given ones.

    Args:
        axes: names of mesh axes.
        sizes: length of every axis of the mesh, major first.
    """
    devices = _all_devices(tuple(sizes.values()))
    chosen = tuple(slice(None) if name in axes else 0 for name in sizes)
    return tuple(devices[chosen].reshape(-1).tolist())


def _all_devices(sides: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(sides)).reshape(sides)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
