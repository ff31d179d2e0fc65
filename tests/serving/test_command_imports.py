"""Retrieval and prediction run where only the loader's packages are installed."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# What the loader needs, and faiss where an index is asked for.
PACKAGES = {"jax", "numpy", "orbax", "flatbuffers", "pyarrow", "faiss"}


def imported(file):
    """Names that a file imports, the modules of `from package import module` among them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(name):
    file = ROOT / f"{name.replace('.', '/')}.py"
    return file if file.is_file() else None


def reach(start):
    """(first-party files, packages) that a file needs, all the way down."""
    files, packages, todo = {start}, set(), [start]
    while todo:
        for name in imported(todo.pop()):
            top = name.partition(".")[0]
            if top in ("hstu_jax", "pallas_kernels", "configs"):
                file = file_of(name)
                if file and file not in files:
                    files.add(file)
                    todo.append(file)
            elif top not in sys.stdlib_module_names:
                packages.add(top)
    return files, packages


@pytest.mark.parametrize(
    "path", ["hstu_jax/retrieve.py", "hstu_jax/predict.py", "examples/http_endpoint.py"]
)
def test_only_the_loaders_packages(path):
    files, packages = reach(ROOT / path)
    assert packages <= PACKAGES
    strangers = {f for f in files if f.parent != ROOT / "hstu_jax" / "serving"} - {ROOT / path}
    # Commands of one process ask it whether a launcher started many; standard library alone.
    launchers = ROOT / "hstu_jax" / "launchers.py"
    assert strangers <= {launchers}
    assert reach(launchers) == ({launchers}, set())


def test_what_needs_more_is_seen():
    files, packages = reach(ROOT / "hstu_jax" / "hitrate.py")
    assert "jaxtyping" in packages and ROOT / "hstu_jax" / "metrics" / "ranking.py" in files
