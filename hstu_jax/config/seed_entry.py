"""One entry of the table of the reference's fields, and short ways to write many of them.

The table itself is in `seed_model_fields.py`, `seed_input_fields.py` and `seed_train_fields.py`;
`seed_fields.py` puts it together and answers from it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

Fate = Literal["same", "renamed", "refused"]


@dataclasses.dataclass(frozen=True)
class SeedField:
    """One field of the reference.

    Attributes:
        path: its place in the reference's pipeline configuration.
        fate: "same" name and meaning at `ours`; "renamed" or reshaped into `ours`; "refused".
        ours: our field. A trailing `.*` stands for a section or for the names in it; `<f>` for a
            feature's name (`uih_seq__video_id` where it belongs to a sequence), `<s>` for a
            sequence's.
        note: what is different, or why it is refused and what to do instead.
    """

    path: str
    fate: Fate
    ours: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit(".", 1)[-1]


@dataclasses.dataclass(frozen=True)
class SeedValue:
    """A value that the reference takes for a field of the same name and we do not.

    Attributes:
        field: our field.
        value: the reference's value.
        note: what to write instead, and why.
    """

    field: str
    value: str
    note: str


def same(theirs: str, ours: str, names: str) -> Iterable[SeedField]:
    """Fields (separated by spaces) that keep their names in our section."""
    prefix = f"{ours}." if ours else ""
    return [SeedField(f"{theirs}.{n}", "same", f"{prefix}{n}") for n in names.split()]


def renamed(theirs: str, ours: str, names: Mapping[str, tuple[str, str]]) -> Iterable[SeedField]:
    """Fields by their name: (our name in our section, what is different)."""
    prefix = f"{ours}." if ours else ""
    return [
        SeedField(f"{theirs}.{n}" if theirs else n, "renamed", prefix + new, note)
        for n, (new, note) in names.items()
    ]


def refused(theirs: str, names: Mapping[str, str]) -> Iterable[SeedField]:
    """Fields by their name: why they are refused, and the way out."""
    return [SeedField(f"{theirs}.{n}", "refused", "", note) for n, note in names.items()]
