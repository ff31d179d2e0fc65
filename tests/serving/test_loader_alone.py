"""The loader needs jax, numpy, orbax-checkpoint, flatbuffers, pyarrow and its own files alone."""

import ast
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_jax.serving import live_check

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ENTRIES = ("hstu_jax.serving.artifact", "hstu_jax.serving.item_writer")
THIRD_PARTY = {"jax", "numpy", "orbax", "flatbuffers", "pyarrow"}
PACKAGES = ("jax", "jaxlib", "numpy", "orbax-checkpoint", "flatbuffers", "pyarrow")


def file_of(module):
    path = ROOT / pathlib.Path(*module.split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"


def imported(module):
    """Absolute names that a module of the repository imports, anywhere in it."""
    for node in ast.walk(ast.parse(file_of(module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = node.module.startswith("hstu_jax") and file_of(name).is_file()
                yield name if is_module else node.module


def loader_files():
    """The loader's modules, and every other module that they import."""
    found, others, open_ = set(), set(), list(ENTRIES)
    while open_:
        module = open_.pop()
        if module in found:
            continue
        found.add(module)
        for name in imported(module):
            if name.startswith(("hstu_jax", "pallas_kernels")):
                open_.append(name)
            else:
                others.add(name.split(".")[0])
    return found, others


def test_imports_of_the_loader():
    found, others = loader_files()
    outside = sorted(name for name in found if not name.startswith("hstu_jax.serving."))
    assert not outside, f"the loader may import hstu_jax.serving only: {outside}"
    third_party = {name for name in others if name not in sys.stdlib_module_names}
    assert third_party <= THIRD_PARTY, third_party
    assert "hstu_jax.serving.exporter" not in found and len(found) >= 7


def allowed_modules():
    """Top-level names of the five packages and of what they need themselves."""
    names, open_ = set(), list(PACKAGES)
    while open_:
        name = re.match(r"[\w.-]+", open_.pop())[0].lower().replace("_", "-")
        if name in names:
            continue
        names.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        open_ += [each for each in needed if "extra ==" not in each]
    distributions = importlib.metadata.packages_distributions()
    return sorted(
        module
        for module, owners in distributions.items()
        if any(owner.lower().replace("_", "-") in names for owner in owners)
    )


_PROGRAM = """
import importlib.machinery, json, sys
allowed, own, site, folder, rows, items, out = json.loads(sys.argv[1])
allowed = set(allowed) | set(sys.stdlib_module_names) | {"hstu_jax"}


class Only:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in allowed or name.startswith("_sysconfigdata"):
            return importlib.machinery.PathFinder.find_spec(name, path, target)


machinery = importlib.machinery
sys.meta_path[:] = [machinery.BuiltinImporter, machinery.FrozenImporter, Only]
sys.path[:0] = [own, site]
import numpy as np
import pyarrow.parquet as pq
from hstu_jax.serving import artifact

opened = artifact.load(folder)
users = opened.embed_users(pq.read_table(rows))
np.savez(out, users=users, items=opened.embed_items(pq.read_table(items)))
loaded = {name.split(".")[0] for name in sys.modules}
print(json.dumps(sorted(loaded)))
"""


def lengths_of(table):
    return table["uih_seq__video_id"].combine_chunks().value_lengths().to_numpy()


def some_places(lengths, num):
    """Random places of rows, among them one without history and the longest."""
    order = np.random.default_rng(0).permutation(len(lengths))
    wanted = [order[lengths[order] == length][0] for length in (0, lengths.max())]
    return np.concatenate([wanted, order[~np.isin(order, wanted)]])[:num]


def cut_to_one(row):
    """A row with its newest event alone."""
    columns = {}
    for name in row.column_names:
        values = row[name].combine_chunks()
        is_list = name.startswith("uih_seq__")
        columns[name] = pa.array([[values[0].as_py()[-1]]], values.type) if is_list else values
    return pa.table(columns, row.schema)


def test_a_fresh_process_with_nothing_else(exported, live, tmp_path):
    """Both towers in a process that holds the loader's files and the five packages alone."""
    assert exported.report.manifest.source_step == 4  # of a run of the training's own loop
    for module in sorted(loader_files()[0]):
        target = tmp_path / "own" / pathlib.Path(*module.split(".")).with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file_of(module), target)
    rows, items, out = (tmp_path / name for name in ("rows.parquet", "items.parquet", "out.npz"))
    train = exported.rows("train")
    places = some_places(lengths_of(train), 199)  # none of these has one event
    one = cut_to_one(train.take([int(places[1])]))
    users = pa.concat_tables([train.take(places), one])
    # Empty, of one event, and longer than the 42 that the model reads.
    assert len(users) == 200 and {0, 1, lengths_of(train).max()} <= set(lengths_of(users).tolist())
    assert lengths_of(train).max() > 42
    columns = {name: one[name].combine_chunks() for name in one.column_names}
    live_one = live_check.user_vectors(
        exported.model, exported.report.manifest, columns, item_values={}
    )
    pq.write_table(users, rows)
    pq.write_table(pq.read_table(exported.lists / "items.parquet"), items)
    site = sysconfig.get_paths()["purelib"]
    arguments = [allowed_modules(), *map(str, (tmp_path / "own", site, exported.folder))]
    arguments += [str(rows), str(items), str(out)]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PROGRAM, json.dumps(arguments)],
        env={name: os.environ[name] for name in ("JAX_PLATFORMS", "PATH", "XLA_FLAGS")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    refused = {"flax", "optax", "ml_collections", "jaxtyping", "duckdb", "pallas_kernels"}
    assert not loaded & refused
    found = np.load(out)
    expected = np.concatenate([live[0][places], live_one])
    np.testing.assert_allclose(found["users"], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["items"], live[1], rtol=0, atol=1e-6)
