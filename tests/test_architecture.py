"""The floors of the tree: imports go down only, no cycles, no relative imports, short files."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_LINES = 400

# Floor of each package; a module imports its own package and packages on lower floors only.
FLOORS = {
    "pallas_kernels": 0,
    "hstu_jax.launchers": 0,  # standard library alone
    "hstu_jax.config": 1,
    "hstu_jax.data": 2,
    "hstu_jax.features": 3,
    "hstu_jax.tables": 4,
    "hstu_jax.model": 4,
    "hstu_jax.losses": 4,
    "hstu_jax.metrics": 4,
    "hstu_jax.training": 5,
    "hstu_jax.serving": 6,
    "hstu_jax": 7,
}
# What the lower floors may see of each other, besides the rule above.
ALLOWED = {
    "hstu_jax.data": {"hstu_jax.config"},
    "hstu_jax.features": {"hstu_jax.config", "hstu_jax.data", "pallas_kernels"},
    "hstu_jax.tables": {"hstu_jax.config", "hstu_jax.launchers"},
    "hstu_jax.model": {
        "hstu_jax.config",
        "hstu_jax.features",
        "hstu_jax.launchers",
        "pallas_kernels",
    },
    "hstu_jax.losses": {"pallas_kernels"},
    "hstu_jax.metrics": {"pallas_kernels"},
}


def python_files():
    for folder in ("hstu_jax", "pallas_kernels", "configs", "tests"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module):
    parts = module.split(".")
    if parts[0] != "hstu_jax":
        return parts[0]
    return ".".join(parts[:2]) if ".".join(parts[:2]) in FLOORS else "hstu_jax"


def imports(source, name):
    """Absolute names of the first-party modules that a source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{name}: relative import in line {node.lineno}")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (n for n in names if n.split(".")[0] in ("hstu_jax", "pallas_kernels"))


def violation(module, imported):
    """Why `module` may not import `imported`, or None."""
    here, there = package_of(module), package_of(imported)
    if here == there:
        return None
    if here == "configs":
        return None if there == "hstu_jax.config" else "configs import hstu_jax.config only"
    if here in ALLOWED:
        return None if there in ALLOWED[here] else f"{here} may import {sorted(ALLOWED[here])}"
    if FLOORS[there] >= FLOORS[here]:
        return f"floor {FLOORS[there]} is not below floor {FLOORS[here]}"
    return None


@pytest.mark.parametrize("path", list(python_files()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_and_files_are_short(path):
    source, module = path.read_text(), module_name(path)
    assert len(source.splitlines()) <= MAX_LINES, f"{path}: over {MAX_LINES} lines"
    found = list(imports(source, module))
    if module.split(".")[0] == "tests":
        return
    problems = {name: violation(module, name) for name in found}
    assert not {n: why for n, why in problems.items() if why}, module


def test_violations_are_seen():
    assert violation("hstu_jax.data.schema", "hstu_jax.model.stu")
    assert violation("hstu_jax.model.stu", "hstu_jax.tables.spec")
    assert violation("pallas_kernels.dispatch", "hstu_jax.config.schema")
    assert violation("hstu_jax.training.loop", "hstu_jax.train")
    assert violation("hstu_jax.features.packing", "hstu_jax.data.schema") is None
    with pytest.raises(AssertionError, match="relative import"):
        list(imports("from . import x", "hstu_jax.model"))


# What an exported folder is loaded with; its other packages are in tests/serving.
LOADER = ("hstu_jax.serving.artifact", "hstu_jax.serving.item_writer")


def test_the_loader_imports_nothing_of_ours_but_serving():
    names = {module_name(path): path for path in python_files()}
    found, waiting = set(), list(LOADER)
    while waiting:
        module = waiting.pop()
        found.add(module)
        for name in imports(names[module].read_text(), module):
            target = name if name in names else name.rpartition(".")[0]
            assert package_of(target) == "hstu_jax.serving", f"{module} imports {name}"
            if target not in found:
                waiting.append(target)
    assert "hstu_jax.serving.manifest" in found and "hstu_jax.serving.exporter" not in found


def test_no_import_cycles():
    graph = {}
    names = {module_name(p) for p in python_files()}
    for path in python_files():
        found = imports(path.read_text(), module_name(path))
        # `from package import module` and `from module import name` both end in a known module.
        targets = {n if n in names else n.rpartition(".")[0] for n in found}
        graph[module_name(path)] = {t for t in targets if t in names}
    done, active = set(), []

    def visit(module):
        if module in done:
            return
        assert module not in active, " -> ".join([*active[active.index(module) :], module])
        active.append(module)
        for target in sorted(graph.get(module, ())):
            visit(target)
        active.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


def test_data_and_config_do_not_import_jax():
    for folder in ("config", "data"):
        for path in (ROOT / "hstu_jax" / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                else:
                    continue
                assert not {n.split(".")[0] for n in names} & {"jax", "flax", "optax"}, path


def test_inner_packages_are_empty():
    """So that importing one module of a package does not pull in the others."""
    for package in ("hstu_jax", "pallas_kernels"):
        for path in (ROOT / package).rglob("__init__.py"):
            if path.parent != ROOT / package:
                assert path.read_text() == "", path
