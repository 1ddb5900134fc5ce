"""Who may import whom: a file imports only from layers above its own (and from files of its own package)."""

from __future__ import annotations

import ast
from pathlib import Path

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


def test_import_is_light():
    import subprocess
    import sys

    code = (
        "import sys, implicitdl; heavy = {'torchvision', 'sklearn', 'matplotlib', 'accelerate', 'typer', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
