"""What a compiled program sends between devices, read from its text.

    for each in collectives.read(jitted.lower(...).compile().as_text()): print(each)

XLA prints every collective with the shape of its result and the groups of devices that take part;
the bytes follow from both. A collective in a loop stands once in the text: of the exchange of ids
and rows (`tables/exchange.py`), that is one round.
"""

import dataclasses
import math
import re

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
_COUNTED_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_NAMED_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{('\w+'(?:,\s*'\w+')*)\}")
_NUM_DEVICES = re.compile(r"(num_partitions|replica_count)=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: XLA's name, as "all-to-all".
        shape: the result as XLA writes it, without layouts; on one device.
        result_bytes: size of the result on one device.
        group_size: devices that take part together.
    """

    kind: str
    shape: str
    result_bytes: int
    group_size: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that leave a device, at the least.

        Of g devices with a result of R bytes on each: R (g - 1) / g for all-to-all and all-gather,
        2 R (g - 1) / g for all-reduce, R (g - 1) for reduce-scatter, R for the others.
        """
        share = (self.group_size - 1) / self.group_size
        factor = {
            "all-to-all": share,
            "ragged-all-to-all": share,
            "all-gather": share,
            "all-reduce": 2 * share,
            "reduce-scatter": self.group_size - 1.0,
        }
        return self.result_bytes * factor.get(self.kind, 1.0)


def read(text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, in the order of its text.

    Args:
        text: `as_text()` of a compiled program.

    Raises:
        ValueError: groups of devices in a form that is not known.
    """
    sizes = [int(count) for _, count in _NUM_DEVICES.findall(text.partition("\n")[0])]
    num_devices = max(sizes, default=1)
    found = []
    for line in text.splitlines():
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
                group_size=_group_size(line, num_devices),
            )
        )
    return tuple(found)


def _bytes(letters: str, bits: str, sides: str) -> int:
    """Size of an array, as f32[4,8]; a `pred` takes a byte."""
    count = math.prod(int(side) for side in sides.split(",") if side)
    return math.ceil(count * int(bits or 8) / 8)


def _group_size(line: str, num_devices: int) -> int:
    if listed := _LISTED_GROUPS.search(line):
        return len(listed.group(1).split(","))
    if counted := _COUNTED_GROUPS.search(line):
        return int(counted.group(1))
    if named := _NAMED_GROUPS.search(line):  # by axes of a mesh, from JAX 0.11 on
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", named.group(2)))
    if "replica_groups=" not in line or "replica_groups={}" in line:
        return num_devices
    raise ValueError(f"{line.strip()[:200]!r}: unknown form of replica_groups.")
