"""The reference's recorded numbers: where they are, and loading.

A case is one `.npz` of the folder; nothing here or in `test_golden.py` knows a case by name. How a
case is replayed is in `golden_runners.py`.
"""

import dataclasses
import functools
import json
import os
import pathlib

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


def golden_folder() -> pathlib.Path:
    """The folder to replay.

    `HSTU_GOLDEN_DIR` if it is set, else `../shared/golden` where that exists, else the few files
    that come with the repository.
    """
    named = os.environ.get("HSTU_GOLDEN_DIR")
    if named:
        return pathlib.Path(named)
    shared = _ROOT.parent / "shared" / "golden"
    return shared if shared.is_dir() else COPIES


def load_cases(folder: pathlib.Path) -> list[Case]:
    """Every case of a folder, sorted by file name."""
    cases = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as z:
            cases.append(Case(path, json.loads(str(z["meta_json"]))))
    return cases
