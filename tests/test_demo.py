"""The demo reaches what the README says of it, and can be run again."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

DEMO = Path(__file__).resolve().parents[1] / "examples" / "digits.py"
PLOTS = ["residuals.png", "spectrum.png", "spy.png", "training.png"]


def beats(printed, least):
    """The accuracies and pictures of what one run printed."""
    *lines, plots, last = printed.splitlines()
    accuracy = float(re.fullmatch(r"test accuracy: (\d+\.\d\d) %", last)[1])
    (regression,) = (line for line in lines if "logistic regression" in line)
    assert accuracy >= least
    assert accuracy > float(re.search(r"(\d+\.\d+)%", regression)[1])
    folder = Path(plots.removeprefix("plots: "))
    assert sorted(path.name for path in folder.iterdir()) == PLOTS
    assert all(imread(path)[..., :3].std() > 0.05 for path in folder.iterdir())


@pytest.mark.long
def test_it_beats_logistic_regression_and_ends_with_its_accuracy(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", DEMO, "--runs", tmp_path], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    beats(done.stdout, least=97.5)


@pytest.mark.usefixtures("float32")
def test_the_same_seed_gives_the_same_numbers_in_a_folder_of_its_own(tmp_path, capsys):
    """In a fifth of the epochs, which are enough to beat logistic regression."""
    spec = importlib.util.spec_from_file_location("digits", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    first = demo.main(tmp_path, epochs=6)
    beats(capsys.readouterr().out, least=96.5)
    assert demo.main(tmp_path, epochs=6) == first
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("demo-1", "demo-2")]
    assert rows[0] == rows[1]
