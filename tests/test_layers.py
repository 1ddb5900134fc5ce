"""Who may import whom: a file imports only from layers above its own (and from files of its own package)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy.sparse.csgraph import connected_components

import implicitdl

ROOT = Path(implicitdl.__file__).parent
# Each line is a layer, first the ones that stand on nothing.
LAYERS = [
    ["_internal"],
    ["solution"],
    ["activations"],
    ["kernels"],
    ["equations"],
    ["solvers"],
    ["loop"],
    ["adjoints"],
    ["fixed_point"],
    ["constraints"],
    ["statespace"],
    ["nn"],
    ["certify"],
    ["data", "training"],
    ["sim"],
    ["viz"],
    ["utils", "cli"],
    ["testing"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = [
    path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or path.stem not in ("__init__", "__main__")
]


def imported(path: Path) -> set[str]:
    """Rooms of the library that a file imports."""
    inside = path.relative_to(ROOT).parts
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level]
            target = [*base, *(node.module or "").split(".")] if node.module else list(base)
            rooms |= {target[0]} if target else {alias.name for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not any(name.split(".")[0] == "implicitdl" for name in names), f"{path}: import relatively"
    return rooms


def test_imports_go_upwards():
    for path in FILES:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for room in imported(path) - {own}:
            assert room in LEVEL, f"{path}: {room} has no layer"
            assert LEVEL[room] < LEVEL[own], f"{path}: layer {LEVEL[own]} imports {room} of layer {LEVEL[room]}"


def imported_files(path: Path) -> set[Path]:
    """Files of the library that a file imports, for typing only and inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                inner = base / alias.name
                places = (
                    inner.with_suffix(".py"),
                    inner / "__init__.py",
                    base.with_suffix(".py"),
                    base / "__init__.py",
                )
                found |= set([place for place in places if place in FILES][:1])
    return found


def test_no_circle_of_files():
    number = {path: k for k, path in enumerate(FILES)}
    graph = np.zeros((len(FILES), len(FILES)), dtype=bool)
    for path in FILES:
        graph[number[path], [number[other] for other in imported_files(path)]] = True
    assert graph.sum() > len(FILES)  # the imports were found
    _, label = connected_components(graph, connection="strong")
    circles = {frozenset(str(FILES[k].relative_to(ROOT)) for k in np.flatnonzero(label == c)) for c in label}
    assert {circle for circle in circles if len(circle) > 1} == set()


def test_every_test_belongs_to_a_room_and_every_room_has_tests():
    tests = Path(__file__).parent
    contributing = (tests.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in contributing.splitlines() if line.startswith("| `")]
    rooms = [room for cell, _ in rows for room in re.findall(r"`(\w+)`", cell)]
    named = [name.strip() for _, cell in rows for name in cell.split(",")]
    assert sorted(named) == sorted(path.stem.removeprefix("test_") for path in tests.glob("test_*.py"))
    assert sorted(rooms) == sorted(LEVEL)


def test_imports_are_light_and_pyplot_is_never_imported(tmp_path):
    code = """
import sys, implicitdl, implicitdl.data
from implicitdl import ImplicitModel, viz
heavy = {"torchvision", "sklearn", "matplotlib", "accelerate", "typer", "rich"} & set(sys.modules)
viz.spy(ImplicitModel(input_dim=3, output_dim=2, hidden_dim=4), path=sys.argv[1])
print(sorted(heavy | {"matplotlib.pyplot"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "spy.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
