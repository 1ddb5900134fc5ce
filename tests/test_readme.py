"""The README's Python runs, in its order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.usefixtures("float32")
def test_readme_code(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IMPLICITDL_DATA", str(root))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 6
    space: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    assert "True" in capsys.readouterr().out


def test_every_command_of_the_readme_names_something_that_exists():
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"tests/\w+\.py", text):
        assert (README.parent / path).is_file(), path
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make (\w+)", text, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, target
    for link in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (README.parent / link).exists(), link
