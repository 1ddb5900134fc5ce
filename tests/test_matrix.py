"""The matrix of machines: what it counts, and that the workflow runs every row."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from matrix import ROOT, ROWS, counts
from other_blas import OtherBlas


def test_the_workflow_has_every_row():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"^ {10}- (\S+)$", text, flags=re.MULTILINE) == [row.name for row in ROWS]


def test_the_oldest_versions_are_the_promised_ones():
    promised = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()[1:]:
        name, version = line.split("==")
        oldest = re.search(rf'"{name}>=([\d.]+)"', promised)
        assert oldest is not None
        assert version.startswith(oldest[1])


def test_counts(tmp_path: Path):
    report = tmp_path / "report.xml"
    assert counts(report) is None
    report.write_text('<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3"/></testsuites>')
    assert counts(report) == "3 passed, 2 failed, 1 errors, 3 skipped"


class TestOtherBlas:
    def test_a_row_has_other_bits_in_another_batch(self):
        x, A = torch.randn(7, 30), torch.randn(40, 30)
        terms = x.abs() @ A.abs().t()
        for product in (lambda x: x @ A.t(), lambda x: torch.addmm(torch.zeros(40), x, A.t())):
            with OtherBlas(), torch.inference_mode():
                whole, part = product(x)[:3], product(x[:3])
            assert not torch.equal(whole, part)
            # One rounding each by the mode, and the product's own; twice that where the whole suite runs under it.
            assert ((whole - part).abs() <= 8 * torch.finfo(x.dtype).eps * terms[:3]).all()

    def test_what_has_no_sum_keeps_its_bits(self):
        x = torch.randn(7, 30)
        with OtherBlas():
            assert torch.equal(torch.tanh(x[:3] * 2), torch.tanh(x * 2)[:3])
