"""The reference's recorded numbers: loading, and what this version does not support yet.

A case is one `.npz` of the folder; nothing here or in `test_golden.py` knows a case by name. How a
case is replayed is in `golden_runners.py`.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np

_ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIES = _ROOT / "tests" / "golden"


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded case.

    Attributes:
        path: its file.
        args: constructor and call arguments, with the name of the operation under "op".
    """

    path: pathlib.Path
    args: dict

    @property
    def op(self) -> str:
        """Name of the reference's operation."""
        return self.args["op"]

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the file."""
        with np.load(self.path) as z:
            return {name: z[name] for name in z.files if name != "meta_json"}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def renamed(self, old: str, new: str) -> "Case":
        """The same case with `old` replaced by `new` in the names of its arrays."""
        case = Case(self.path, self.args)
        arrays = {name.replace(old, new): value for name, value in self.arrays.items()}
        case.__dict__["arrays"] = arrays
        return case

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays `prefix.*` without their prefix."""
        return {
            name.removeprefix(f"{prefix}."): value
            for name, value in self.arrays.items()
            if name.startswith(f"{prefix}.")
        }


def golden_folder() -> tuple[pathlib.Path, bool]:
    """The folder to replay, and whether it is the whole collection that comes with the project.

    `HSTU_GOLDEN_DIR` if it is set, else `../shared/golden` where that exists, else the few files
    that come with the repository.
    """
    named = os.environ.get("HSTU_GOLDEN_DIR")
    if named:
        return pathlib.Path(named), False
    shared = _ROOT.parent / "shared" / "golden"
    return (shared, True) if shared.is_dir() else (COPIES, False)


def load_cases(folder: pathlib.Path) -> list[Case]:
    """Every case of a folder, sorted by file name."""
    cases = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as z:
            cases.append(Case(path, json.loads(str(z["meta_json"]))))
    return cases


def _has_targets(case: Case) -> bool:
    return bool(np.any(case.arrays.get("in.num_targets", 0)))


def _truncates(case: Case) -> bool:
    tail_len = case.args.get("encoder", {}).get("attn_truncation_tail_len", 0)
    return tail_len > 0 or bool(case.args.get("stack"))


# (option, why it is not here yet, which cases use it). The list must shrink to nothing.
NOT_YET_SUPPORTED: tuple[tuple[str, str, Callable[[Case], bool]], ...] = (
    ("delta attention", "cached decoding is a later issue", lambda c: c.op == "delta_hstu_mha"),
    (
        "mid-stack truncation",
        "attn_truncation_* are fields of the next issue",
        _truncates,
    ),
    (
        "targets",
        "ranking variants only; attention itself supports them",
        lambda c: c.op in ("STUStack", "HSTUPositionalEncoder") and _has_targets(c),
    ),
    (
        "hard negatives",
        "the hard samplers are a later issue",
        lambda c: (
            c.args.get("num_hard_neg", 0) > 0
            or any("hard_neg_indices" in name for name in c.arrays)
        ),
    ),
    (
        "learning rate schedules",
        "only constant and cosine exist, without the reference's other kinds",
        lambda c: c.op == "lr_scheduler",
    ),
    (
        "recorded trainings",
        "the training replay comes with the schedules",
        lambda c: c.op == "HSTUMatch train steps",
    ),
)


def not_yet_supported(case: Case) -> str:
    """The options of a case that are not supported yet, with reasons; "" if it must pass."""
    hits = [f"{option}: {why}" for option, why, uses in NOT_YET_SUPPORTED if uses(case)]
    return "; ".join(hits)
