"""The shape of the code: which way imports point, where doors are, how large a file or a function may be."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("adapters", "service", "training", "eval_clients")
TREES = (*PACKAGES, "lora_fusion", "benchmarks", "requirements", "tests")
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50

WINGS = {
    "adapters": {"adapters"},
    "service": {"service", "adapters"},
    "training": {"training", "adapters"},
    "eval_clients": {"eval_clients", "adapters.recipes"},
}
"""What each package may import of ours; benchmarks and tests may import all of it."""

ROOMS = {
    "adapters.recipes": {"adapters.recipes", "adapters.errors"},
    "adapters.algebra": {
        *("adapters.recipes", "adapters.algebra", "adapters.adapter", "adapters.together", "adapters.errors")
    },
    "adapters.files": {
        *("adapters.files", "adapters.adapter", "adapters.module_names", "adapters.readout", "adapters.errors")
    },
    "service.engine": {"service.engine", "service.logs", "service.process", "adapters"},
    "service.edge": {"service.callers", "service.edge", "service.errors", "service.settings", "service.validation"},
    "eval_clients.scoring": {"eval_clients.scoring", "eval_clients.shares"},
}
"""What the rooms that everything else rests on may import of ours."""

DOORS = {"adapters", "adapters.recipes", "adapters.files"}
"""Where one package enters another."""


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of ours, by dotted name."""
    trees = {}
    for top in TREES:
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            trees[name] = ast.parse(path.read_text())
    return trees


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of all imports of a module, those inside functions included; the name may be empty."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((node.module or "", alias.name) for alias in node.names)


@cache
def edges() -> dict[str, set[str]]:
    """Module → modules of ours that it imports."""
    known = sources()
    found: dict[str, set[str]] = {}
    for name, tree in known.items():
        targets = {f"{m}.{n}" if f"{m}.{n}" in known else m for m, n in imports(tree)}
        found[name] = {target for target in targets if target in known and target != name}
    return found


def inside(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(edges()).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize(("place", "allowed"), [*WINGS.items(), *ROOMS.items()])
def test_imports_point_one_way(place: str, allowed: set[str]) -> None:
    strays = {
        f"{module} → {target}"
        for module, targets in edges().items()
        if inside(module, {place})
        for target in targets
        if not inside(target, allowed)
    }
    assert not strays


def test_one_package_enters_another_by_its_door() -> None:
    strays = {
        f"{module} → {target}"
        for module, targets in edges().items()
        for target in targets
        if (top := module.partition(".")[0]) in PACKAGES and target.partition(".")[0] != top and target not in DOORS
    }
    assert not strays


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_s_public_names_are_its_sorted_all(package: str) -> None:
    door = importlib.import_module(package)
    assert door.__all__ == sorted(set(door.__all__))
    assert not [name for name in door.__all__ if inspect.ismodule(getattr(door, name))]
    assert set(door.__all__) <= set(dir(door))


def test_heavy_libraries_stay_in_their_rooms() -> None:
    for library, room in (("bentoml", "service.bento"), ("vllm", "service.engine"), ("ray", "service.fleet")):
        users = {n for n, tree in sources().items() if any(m.partition(".")[0] == library for m, _ in imports(tree))}
        assert not {user for user in users if not inside(user, {room, "benchmarks", "tests"})}


def test_files_and_functions_stay_small() -> None:
    large = []
    for name, tree in sources().items():
        path = ROOT / Path(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES:
            large.append(f"{name}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    large.append(f"{name}.{node.name}: {lines} lines")
    assert not large


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_imports(tree: ast.Module) -> Iterator[str]:
    """Private modules and names of other distributions that a module imports."""
    for module, name in imports(tree):
        if module.partition(".")[0] not in TREES:
            yield from (part for part in (*module.split("."), name) if is_private(part))


def private_attributes(tree: ast.Module) -> Iterator[str]:
    """Private attributes of objects other than `self` and `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner not in ("self", "cls") and (owner, node.attr) != ("os", "_exit"):  # documented
                yield node.attr


def required_names(tree: ast.Module) -> Iterator[str]:
    """The names that a module checks with `require`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("require", "_require"):
            yield from (
                arg.value for arg in ast.walk(node) if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )


@pytest.mark.parametrize("package", [*PACKAGES, "lora_fusion", "benchmarks"])
def test_private_names_of_other_packages_are_checked(package: str) -> None:
    """Private names may change with any release: who uses one calls `require` on it, or on what a module holds."""
    unchecked = []
    for module, tree in sources().items():
        if inside(module, {package}):
            required = set(required_names(tree))
            unchecked += [f"{module}: {name}" for name in private_attributes(tree) if name not in required]
            if not required:
                unchecked += [f"{module}: {name}" for name in private_imports(tree)]
    assert not unchecked
