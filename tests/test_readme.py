"""The README's Python runs, in its order, in one namespace, to the results that it promises; its commands select tests."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def moved(module: torch.nn.Module) -> bool:
    return all(weight.grad is not None and weight.grad.isfinite().all() for weight in module.parameters())


# What must hold after each block, in their order; a block is known by its first words.
PROMISES = {
    "import torch\nfrom implicitdl import ImplicitModel": lambda s: s.solution.converged.all() and s.loss < 2.6,
    "from implicitdl import fixed_point": lambda s: s.solution.backward.converged.all() and moved(s.block),
    "from implicitdl import DEQ": lambda s: s.deq.stats.backward.converged.all() and s.image.grad.abs().sum() > 0,
    "adjacency = ": lambda s: s.nodes.shape == (6, 3),
    "import torch.nn.functional as F": lambda s: len(s.logger.rows) == 1 and Path("CIFAR_Implicit_300_Inf/best").is_dir(),
    "from implicitdl import ImplicitRNN": lambda s: s.prediction.shape == (50, 1),
    "from implicitdl.activations import": lambda s: s.Tanh.activation() is s.TANH and s.model.activation is s.SILU,
    "net = ": lambda s: moved(s.net) and s.model.activation is s.SILU,
    "from implicitdl.sim import SIM": lambda s: s.report.hidden.converged.all() and s.sim.evaluate(s.loader) > 0.9,
    "from implicitdl import compress": lambda s: torch.allclose(
        s.space(s.image.flatten(1)), s.cnn(s.image), atol=1e-4
    ) and (s.composed.p, s.both.output_dim) == (8, 3),
    "from implicitdl import certify": lambda s: bool(s.certify.well_posed(s.model)),
    "loss = certify": lambda s: moved(s.model),
}  # fmt: skip


@pytest.mark.usefixtures("float32")
def test_readme_code(root, tmp_path, monkeypatch):
    monkeypatch.setenv("IMPLICITDL_DATA", str(root))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == len(PROMISES)
    names: dict[str, object] = {"__name__": "readme"}
    for block, (begin, holds) in zip(blocks, PROMISES.items(), strict=True):
        assert block.startswith(begin)
        exec(compile(block, "README.md", "exec"), names)
        assert holds(type("Names", (), {key: staticmethod(value) for key, value in names.items()})), begin


@functools.cache
def written_in(path: Path) -> list[tuple[str, str]]:
    """File, class and function of every test of a file, with its decorators."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for test in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                owner = node.name if test is not node else ""
                found.append((f"{path.name} {owner} {test.name}", " ".join(map(ast.unparse, test.decorator_list))))
    return found


def holds_for(expression: str, name: str) -> bool:
    """What `-k` makes of names joined by and, or, not."""
    return eval(re.sub(r"\b(?!(?:or|and|not)\b)\w+", lambda word: str(word[0].lower() in name.lower()), expression))


def selected(command: str) -> list[str]:
    """The tests that `pytest FILES -k EXPRESSION -m MARK` selects, but for those that only their parameters name."""
    words = shlex.split(command)[1:]
    options = {word: words[words.index(word) + 1] for word in ("-k", "-m") if word in words}
    files = [README.parent / word for word in words if word.endswith(".py")]
    wanted, mark = options.get("-k"), options.get("-m", "")
    return [
        name
        for path in files or sorted((README.parent / "tests").rglob("test_*.py"))
        for name, marks in written_in(path)
        if mark in marks and (wanted is None or holds_for(wanted, name))
    ]


def test_every_command_of_the_readme_names_something_that_exists():
    text = README.read_text(encoding="utf-8")
    commands = re.findall(r"`(pytest [^`]+)`", text)
    assert len(commands) > 10
    for command in commands:
        assert selected(command), command
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make (\w+)", text, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, target
    for link in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (README.parent / link).exists(), link


def test_a_command_that_selects_nothing_is_found():
    assert selected("pytest tests/test_readme.py -k 'nothing or selects'")
    assert not selected("pytest tests/test_readme.py -k 'nowhere and selects'")
    assert not selected("pytest -m long -k nowhere")
