"""The command line: whole runs, and every bad input as one line with exit code 2."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

import implicitdl
from implicitdl import (
    DEQ,
    GMRES,
    SHINE,
    Aitken,
    Anderson,
    Broyden,
    ImplicitAdjoint,
    ImplicitModel,
    Newton,
    PeacemanRachford,
    PhantomGradient,
    Picard,
    Unrolled,
    viz,
)
from implicitdl._internal import store
from implicitdl.activations import TANH
from implicitdl.cli import build, info, main
from implicitdl.cli.options import Options
from implicitdl.constraints import LowRank, Monotone, RowProjection, SoftRowScaling, StrictlyUpper
from implicitdl.nn import (
    ConvEquilibriumClassifier,
    DenseEquilibriumClassifier,
    MonotoneConvClassifier,
    RandomStart,
    ZeroStart,
)
from implicitdl.training.evaluate import Metrics
from standins import write_mnist

# A process of its own computes in float32, whatever the other tests like.
pytestmark = pytest.mark.usefixtures("float32")

SMALL = ["train", "--hidden-dim", "8", "--epochs", "2", "--batch-size", "128"]
LAST_LINE = re.compile(r"test accuracy: \d+\.\d\d %")


def refused(capsys, arguments: list[object]) -> str:
    """The one line on stderr of a command that exits with 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main([*SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


class TestRun:
    def test_train_reports_and_ends_with_the_accuracy(self, tmp_path, capsys):
        assert main([*SMALL, "--out", str(tmp_path / "run")]) == 0
        out, err = capsys.readouterr()
        *_, missed, accuracy = out.splitlines()
        assert missed == "missed the tolerance: 0.000% of 360 test samples, 0.000% of the solves in training"
        assert LAST_LINE.fullmatch(accuracy)
        assert err == ""
        assert "digits: 1,293 to train on, 144 held out, 360 to test on" in out

    def test_a_run_without_a_name_gets_a_new_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for _ in range(2):
            assert main([*SMALL, "--epochs", "1"]) == 0
        assert sorted(path.name for path in Path("runs").iterdir()) == ["digits-n8-1", "digits-n8-2"]

    def test_evaluate_repeats_the_test(self, run, capsys):
        assert main(["evaluate", str(run)]) == 0
        *_, accuracy = capsys.readouterr().out.splitlines()
        data = implicitdl.data.load("digits", 64, holdout=0.1)
        best = ImplicitModel.from_pretrained(run / "best")
        u, y = data.test_ds.pixels.float().flatten(1) / 16, data.test_ds.labels
        assert accuracy == f"test accuracy: {100 * (best(u).argmax(1) == y).float().mean():.2f} %"

    def test_plot_writes_four_pictures_and_prints_their_paths(self, run, capsys):
        assert main(["plot", str(run)]) == 0
        paths = capsys.readouterr().out.split()
        assert paths == [str(run / "plots" / f"{name}.png") for name in ("training", "residuals", "spy", "spectrum")]
        for path in paths:
            assert imread(path)[..., :3].std() > 0.05  # not blank

    def test_info_has_the_model_s_figures(self, run, capsys):
        assert main(["info", str(run)]) == 0
        out = capsys.readouterr().out
        model = ImplicitModel.from_pretrained(run / "best")
        found = viz.spectral_figures(viz.constrained(model))
        for words in (
            "n = 8, p = 64, q = 10", f"{sum(w.numel() for w in model.parameters()):,}", "0.99", f"{found.norm:.6f}",
            f"[{found.perron_low:.6f}, {found.perron_high:.6f}]", f"{found.radius:.6f}", "512 of 512, sparsity 0.00%",
        ):  # fmt: skip
            assert words in out

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--structure", "triangular"], ["28 of 64, sparsity 56.25%", "in [0.000000, 0.000000]"]),
            (["--structure", "low-rank", "--rank", "2", "--no-D"], ["L nonzero", "16 of 16", "not there", "rank 2"]),
            (["--adjoint", "phantom", "--constraint", "row-projection"], ["none", "RowProjection"]),
            (["--constraint", "monotone", "--kappa", "0.8"], ["Monotone(m=0.2)"]),
            (["--model", "deq-dense", "--jac-reg", "0.5", "--start", "random"], ["DenseEquilibriumClassifier"]),
            (["--solver", "broyden", "--adjoint", "shine"], ["none"]),
            (["--model", "deq-dense", "--solver", "newton"], ["DenseEquilibriumClassifier", "n = 8, p = 64, q = 10"]),
        ],
    )
    def test_every_kind_of_model_goes_all_the_way(self, options, words, tmp_path, capsys):
        folder = str(tmp_path / "run")
        assert main([*SMALL, "--epochs", "1", *options, "--out", folder]) == 0
        # The pictures of each kind of matrix are in test_viz; here those of one without and of one with plots of A.
        pictures = [["plot"]] if "--start" in options or "--structure" in options else []
        for command in (["evaluate"], *pictures, ["info"]):
            assert main([*command, folder]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--model", "deq-conv", "--inner-channels", "8", "--tol", "1e-2"], ["inner_channels = 8", "halvings = 1"]),
            (["--model", "monotone-conv", "--tol", "1e-2"], ["channels = 8", "cells = 2"]),
        ],
    )
    def test_convolutional_models_go_all_the_way(self, options, words, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        write_mnist(tmp_path / "FashionMNIST" / "raw")
        small = ["train", "--data", "fashion-mnist", "--root", ".", "--holdout", "0.5", "--batch-size", "16"]
        small += ["--channels", "8", "--halvings", "1", "--cells", "2", "--epochs", "1", "--grad-tol", "1e-2"]
        assert main([*small, *options]) == 0
        (folder,) = Path("runs").iterdir()
        assert folder.name == f"fashion-mnist-{options[1]}-1"
        for command in ("evaluate", "plot", "info"):
            assert main([command, str(folder)]) == 0
        assert sorted(path.stem for path in (folder / "plots").iterdir()) == ["residuals", "training"]
        out = capsys.readouterr().out
        assert all(word in out for word in words)

    @pytest.mark.parametrize("launched", [False, True])
    def test_a_run_in_bf16_is_tested_in_bf16(self, launched, tmp_path, monkeypatch, capsys):
        seen = set()
        forward = DEQ.forward

        def watched(self, *u):
            x = forward(self, *u)
            seen.add((self.training, x.dtype))
            return x

        folder = str(tmp_path / "run")
        monkeypatch.setattr(DEQ, "forward", watched)
        write_mnist(tmp_path / "FashionMNIST" / "raw")
        small = ["train", "--data", "fashion-mnist", "--root", str(tmp_path), "--holdout", "0.5", "--batch-size", "16"]
        small += ["--model", "deq-dense", "--hidden-dim", "8"]
        if launched:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        precision = [] if launched else ["--precision", "bf16"]
        assert main([*small, "--epochs", "1", *precision, "--out", folder]) == 0
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        tested = capsys.readouterr().out.splitlines()[-3:]
        # One step is tried in float32 before anything is written; what follows is all in bfloat16.
        assert seen - {(True, torch.float32)} == {(True, torch.bfloat16), (False, torch.bfloat16)}
        seen.clear()
        assert main(["evaluate", folder]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == tested[-1]
        assert launched or main(["plot", folder]) == 0
        assert seen == {(False, torch.bfloat16)}

    def test_the_folder_holds_what_a_model_is_rebuilt_from(self, run):
        saved = json.loads((run / "run.json").read_text())
        assert saved["options"] == dataclasses.asdict(Options(hidden_dim=8, epochs=2, batch_size=128))
        assert saved["model"]["arguments"]["hidden_dim"] == 8

    def test_other_datasets_by_name_and_root(self, tmp_path, capsys):
        write_mnist(tmp_path / "FashionMNIST" / "raw")
        options = ["--data", "fashion-mnist", "--root", tmp_path, "--holdout", "0.5", "--epochs", "1"]
        assert main([str(word) for word in [*SMALL, *options, "--out", tmp_path / "run"]]) == 0
        shutil.move(tmp_path / "FashionMNIST", tmp_path / "moved" / "FashionMNIST")
        assert "FashionMNIST" in refused(capsys, ["evaluate", tmp_path / "run"])
        assert main(["evaluate", str(tmp_path / "run"), "--root", str(tmp_path / "moved")]) == 0
        assert "of 20 test samples" in capsys.readouterr().out


class TestResume:
    def test_a_finished_run_is_tested_again(self, run, capsys):
        before = (run / "metrics.jsonl").read_text()
        assert main(["evaluate", str(run)]) == 0
        accuracy = capsys.readouterr().out.splitlines()[-1]
        assert main(["train", "--resume", "--out", str(run)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == accuracy
        assert (run / "metrics.jsonl").read_text() == before

    def test_an_interrupted_run_goes_on_to_the_same_numbers(self, finished, tmp_path, monkeypatch, capsys):
        means, calls = Metrics.means, []

        def interrupted(self, *arguments):
            calls.append(arguments)
            if len(calls) == 3:  # after the training of the second epoch
                raise KeyboardInterrupt
            return means(self, *arguments)

        folder = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(Metrics, "means", interrupted)
            assert main([*SMALL, "--out", str(folder)]) == 130
        err = capsys.readouterr().err
        assert err == f"implicitdl: interrupted; go on with: implicitdl train --resume --out {folder}\n"
        assert main(["train", "--resume", "--out", str(folder)]) == 0
        assert (folder / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
        assert (folder / "best" / "model.safetensors").read_bytes() == (
            finished / "best" / "model.safetensors"
        ).read_bytes()

    def test_where_nothing_was_saved_yet_the_run_starts(self, tmp_path):
        assert main([*SMALL, "--epochs", "1", "--resume", "--out", str(tmp_path / "run")]) == 0

    def test_options_given_again_must_be_the_same(self, run, capsys):
        assert main([*SMALL, "--resume", "--out", str(run)]) == 0
        line = refused(capsys, [*SMALL, "--lr", "1", "--resume", "--out", run])
        assert "expected --lr as it was (0.003), got 1.0. Leave it out" in line

    def test_a_cosine_schedule_has_its_length(self, run, capsys):
        line = refused(capsys, ["train", "--epochs", "3", "--resume", "--out", run])
        assert "expected --epochs as it was (2), got 3" in line

    def test_a_constant_rate_can_be_followed_longer_but_not_shorter(self, tmp_path, capsys):
        folder = tmp_path / "run"
        assert main([*SMALL, "--schedule", "constant", "--out", str(folder)]) == 0
        assert "expected epochs ≥ 2" in refused(capsys, ["train", "--epochs", "1", "--resume", "--out", folder])
        assert json.loads((folder / "run.json").read_text())["options"]["epochs"] == 2
        assert main(["train", "--epochs", "3", "--resume", "--out", str(folder)]) == 0
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3

    def test_needs_a_folder(self, capsys):
        assert "expected --out with --resume, got none" in refused(capsys, ["train", "--resume"])


BAD = {
    "--data letters": "expected --data to be one of digits, mnist",
    "--model mlp": "expected --model to be one of implicit, deq-dense, deq-conv, monotone-conv, got 'mlp'",
    "--structure sparse": "expected --structure to be one of dense, triangular, low-rank, got 'sparse'",
    "--activation swish": "expected --activation to be one of relu",
    "--constraint ball": "expected --constraint to be one of row-scaling",
    "--solver secant": "expected --solver to be one of auto, picard",
    "--grad-solver newton": "expected --grad-solver to be one of",
    "--adjoint none": "expected --adjoint to be one of exact",
    "--optimizer lion": "expected --optimizer to be one of adam",
    "--schedule linear": "expected --schedule to be one of cosine",
    "--precision int8": "expected --precision to be one of no, bf16, fp16",
    "--precision fp16": "expected an accelerator for mixed_precision='fp16', got the CPU",
    "--on-failure cry": "expected --on-failure to be one of warn",
    "--device tpu9": "expected --device to be one that is here",
    "--hidden-dim -3": "expected --hidden-dim to be a positive integer, got -3",
    "--epochs 0": "expected --epochs to be a positive integer, got 0",
    "--batch-size 0": "expected --batch-size to be a positive integer, got 0",
    "--max-steps -1": "expected --max-steps to be a positive integer, got -1",
    "--grad-max-steps 0": "expected --grad-max-steps to be a positive integer, got 0",
    "--threads 0": "expected --threads to be a positive integer, got 0",
    "--seed -1": "expected --seed to be an integer ≥ 0, got -1",
    "--split-seed -1": "expected --split-seed to be an integer ≥ 0, got -1",
    "--kappa 1": "expected --kappa strictly between 0 and 1, got 1.0",
    "--kappa 0": "expected --kappa strictly between 0 and 1, got 0.0",
    "--kappa nan": "expected --kappa strictly between 0 and 1, got nan",
    "--tol -1": "expected --tol strictly between 0 and 1, got -1.0",
    "--lr 0": "expected --lr to be a positive finite number, got 0.0",
    "--weight-decay -1": "expected --weight-decay ≥ 0, got -1.0",
    "--label-smoothing 1": "expected 0 ≤ --label-smoothing < 1, got 1.0",
    "--warmup 1": "expected 0 ≤ --warmup < 1, got 1.0",
    "--optimizer sgd --momentum 1": "expected 0 ≤ --momentum < 1, got 1.0",
    "--holdout 0": "expected --holdout strictly between 0 and 1, got 0.0",
    "--holdout 1": "expected --holdout strictly between 0 and 1, got 1.0",
    "--clip 0": "expected --clip to be a positive finite number, got 0.0",
    "--structure low-rank": "expected --rank with --structure low-rank, got none",
    "--structure low-rank --rank 9": "expected rank ≤ hidden_dim=8, got 9",
    "--rank 3": "expected --rank together with --structure low-rank, got it alone",
    "--structure triangular --constraint row-scaling": "expected --constraint together with --structure dense",
    "--structure triangular --adjoint unrolled": "expected --adjoint exact or phantom with --structure triangular",
    "--damping 0.5": "expected --damping together with --solver picard or momentum or anderson, got it alone",
    "--solver picard --damping 3": "expected --damping in (0, 2], got 3.0",
    "--memory 3": "expected --memory together with --solver anderson or broyden",
    "--channels 8": "expected --channels together with --model deq-conv, got --model implicit",
    "--model deq-conv": "expected --hidden-dim together with --model implicit, got --model deq-conv",
    "--model deq-dense --kappa 0.9": "expected --kappa together with --model implicit, got --model deq-dense",
    "--model deq-conv --hidden-dim 100 --solver peaceman-rachford": "PeacemanRachford: expected a map φ(Ax + b)",
    "--adjoint shine": "expected --solver broyden with --adjoint shine, got --solver auto. SHINE takes the inverse",
    "--structure triangular --solver broyden --adjoint shine": "expected --adjoint exact or phantom with",
    "--jac-reg 1": "expected --jac-reg together with --model deq-dense, got --model implicit",
    "--model deq-dense --jac-reg 0": "expected --jac-reg to be a positive finite number, got 0.0",
    "--model deq-dense --start warm": "expected --start to be one of zero, random, got 'warm'",
    "--start random": "expected --start together with --model deq-dense, got --model implicit",
    "--phantom-steps 3": "expected --phantom-steps together with --adjoint phantom",
    "--adjoint phantom --grad-tol 1e-3": "expected --grad-tol together with --adjoint exact",
    "--adjoint phantom --grad-solver gmres": "expected --grad-solver together with --adjoint exact",
    "--momentum 0.5": "expected --momentum together with --optimizer sgd",
    "--on-failure raise --max-steps 1": "did not reach rtol",
    "--epochs many": "--epochs",
    "--nonsense": "No such option",
    "extra": "extra",
}


def test_bad_options_are_one_line_and_leave_nothing(tmp_path, capsys):
    for options, words in BAD.items():
        line = refused(capsys, [*SMALL, "--out", tmp_path / "runs" / "run", *options.split()])
        assert line.startswith("implicitdl: "), options
        assert words in line, options
        assert not list(tmp_path.iterdir()), options


class TestBadFolders:
    def test_a_missing_dataset(self, tmp_path, capsys, monkeypatch):
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens: no download, at once
        arguments = [*SMALL, "--data", "fashion-mnist", "--root", tmp_path / "none", "--out", tmp_path / "run"]
        line = refused(capsys, arguments)
        assert "expected the files train-images-idx3-ubyte" in line
        assert not list(tmp_path.iterdir())

    def test_an_existing_run_is_not_overwritten(self, run, capsys):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert "Pass --resume to go on with it, or another --out." in refused(capsys, [*SMALL, "--out", run])
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    def test_a_file_in_the_way(self, tmp_path, capsys):
        (tmp_path / "file").write_text("kept")
        for out in (tmp_path / "file", tmp_path / "file" / "run"):
            assert "A file is in the way" in refused(capsys, [*SMALL, "--out", out])
        assert (tmp_path / "file").read_text() == "kept"

    @pytest.mark.parametrize(
        ("number", "words"),
        [(errno.EACCES, "expected a folder that can be written"), (errno.ENOSPC, "expected room on the disk")],
    )
    def test_a_folder_that_cannot_be_written(self, number, words, tmp_path, capsys, monkeypatch):
        def fails(path, data):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(store, "_write", fails)
        assert words in refused(capsys, [*SMALL, "--out", tmp_path / "runs" / "run"])
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("command", ["evaluate", "plot", "info"])
    def test_what_is_no_run(self, command, run, tmp_path, capsys):
        assert f"{command}: expected a run's folder, with run.json, got nothing at" in refused(
            capsys, [command, tmp_path / "none"]
        )
        (tmp_path / "empty").mkdir()
        assert "got none in" in refused(capsys, [command, tmp_path / "empty"])
        torch.save({"A": torch.eye(2)}, tmp_path / "model.pt")
        assert "got the pickle model.pt. Pickles run code" in refused(capsys, [command, tmp_path / "model.pt"])
        assert "RUN" in refused(capsys, [command])

    @pytest.mark.parametrize("command", ["evaluate", "plot", "info"])
    def test_damaged_checkpoints(self, command, run, capsys):
        weights = run / "best" / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        assert "truncated or damaged" in refused(capsys, [command, run])
        torch.save({"A": torch.eye(2)}, weights)
        assert "got the pickle model.safetensors" in refused(capsys, [command, run])
        shutil.rmtree(run / "best")
        assert "expected a finished epoch" in refused(capsys, [command, run])
        assert not (run / "plots").exists()

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda text: text[:40], "expected a whole run.json"),
            (lambda text: text.replace("hidden_dim", "hidden_size", 1), "unknown field `hidden_size`"),
            (lambda text: text.replace('"kappa": null', '"kappa": 7', 1), "expected --kappa strictly between 0 and 1"),
            (lambda text: "[]", "expected a whole run.json"),
        ],
        ids=["truncated", "unknown", "impossible", "list"],
    )
    def test_a_damaged_run_file(self, damage, words, run, capsys):
        path = run / "run.json"
        path.write_text(damage(path.read_text()))
        assert words in refused(capsys, ["evaluate", run])
        assert words in refused(capsys, ["train", "--resume", "--out", run])

    def test_damaged_figures(self, run, capsys):
        (run / "metrics.jsonl").write_text('{"epoch": 1, ')
        for command in ("plot", "info"):
            assert "expected a whole metrics.jsonl" in refused(capsys, [command, run])


class TestNoise:
    def test_misses_warn_once_and_are_counted(self, tmp_path, capsys):
        assert main([*SMALL, "--max-steps", "2", "--out", str(tmp_path / "run")]) == 0
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert re.match("implicitdl: warning: train: in epoch 1 .* did not reach the tolerance", line)
        assert out.splitlines()[-2].startswith("missed the tolerance: 100.000% of 360 test samples")

    def test_a_bug_shows_its_traceback(self, monkeypatch):
        def broken(run):
            raise RuntimeError("ours")

        monkeypatch.setattr(info, "run", broken)
        with pytest.raises(RuntimeError, match="ours"):
            main(["info", "run"])

    def test_an_interrupt_anywhere_is_one_line(self, monkeypatch, capsys):
        def interrupted(run):
            raise KeyboardInterrupt

        monkeypatch.setattr(info, "run", interrupted)
        assert main(["info", "run"]) == 130
        assert capsys.readouterr().err == "implicitdl: interrupted\n"

    def test_a_signal_ends_a_run_with_one_line(self, tmp_path):
        words = [*SMALL, "--epochs", "1000", "--out", str(tmp_path / "run")]
        # A shell's job in the background, as this test may be, has interrupts ignored.
        heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{heard}; from implicitdl.cli import main; raise SystemExit(main({words!r}))"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 120
            while not (tmp_path / "run" / "best" / "model.safetensors").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.decode().splitlines() == [
            f"implicitdl: interrupted; go on with: implicitdl train --resume --out {tmp_path / 'run'}"
        ]

    def test_help_and_version(self, capsys):
        assert main([]) == 0
        assert main(["--help"]) == 0
        assert main(["train", "--help"]) == 0
        out = capsys.readouterr().out
        # The help wraps at the terminal's width: names are looked for without what it may cut.
        assert all(command in out for command in ("train", "evaluate", "plot", "info"))
        assert main(["--version"]) == 0
        assert re.fullmatch(r"implicitdl \d+\.\d+\S*\n", capsys.readouterr().out)

    @pytest.mark.parametrize("module", ["typer", "rich"])
    def test_without_its_extra_it_says_what_to_install(self, module, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, module, None)
        assert "pip install 'implicitdl[cli]'" in refused(capsys, ["info", "run"])

    def test_the_entry_point_is_main(self):
        (script,) = entry_points(group="console_scripts", name="implicitdl")
        assert script.load() is main


def built(**options) -> build.Model:
    return build.model(Options(**options).check(), (1, 28, 28), 3)


class TestBuild:
    def test_structures_and_constraints(self):
        assert isinstance(built(structure="triangular").constraint, StrictlyUpper)
        low_rank = built(structure="low-rank", rank=2, kappa=0.9)
        assert isinstance(low_rank.constraint, LowRank)
        assert low_rank.L.shape == (100, 2)
        assert low_rank.constraint.kappa == 0.9
        assert isinstance(built(constraint="row-projection").constraint, RowProjection)
        assert isinstance(built(constraint="soft-row-scaling").constraint, SoftRowScaling)
        monotone = built(constraint="monotone", kappa=0.75).constraint
        assert isinstance(monotone, Monotone)
        assert monotone.m == 0.25

    def test_models(self):
        dense = built(model="deq-dense", hidden_dim=7)
        assert (type(dense), dense.input_dim, dense.hidden_dim) == (DenseEquilibriumClassifier, 784, 7)
        conv = built(model="deq-conv", channels=8, inner_channels=16, halvings=2, cells=1)
        assert (type(conv), conv.input_channels, conv.channels, conv.inner_channels) == (
            ConvEquilibriumClassifier, 1, 8, 16,
        )  # fmt: skip
        assert (conv.halvings, conv.cells) == (2, 1)
        monotone = built(model="monotone-conv", channels=4, kappa=0.75)
        assert (type(monotone), monotone.channels, monotone.m) == (MonotoneConvClassifier, 4, 0.25)
        assert {parameter.dtype for parameter in monotone.parameters()} == {torch.float32}
        assert monotone.solver == monotone.adjoint.solver == PeacemanRachford()

    def test_parts_and_activation(self):
        plain = built(no_D=True, bias=False, activation="tanh", on_failure="raise")
        assert plain.D is None
        assert plain.b_x is None
        assert plain.activation is TANH
        assert plain.on_failure == "raise"
        assert plain.B.dtype == torch.float32
        assert built().b_x is not None

    def test_solvers(self):
        assert built(solver="picard", damping=0.5, tol=1e-3, max_steps=7).solver == Picard(
            damping=0.5, rtol=1e-3, max_steps=7
        )
        assert built(solver="anderson", memory=3).solver == Anderson(memory=3)
        assert built(solver="aitken", period=5).solver == Aitken(period=5)
        assert built(solver="broyden", memory=4).solver == Broyden(memory=4)
        assert built(model="deq-dense", solver="newton").solver == Newton()
        assert built(solver="peaceman-rachford", constraint="monotone").solver == PeacemanRachford()

    def test_adjoints(self):
        exact = built(grad_solver="picard", grad_tol=1e-2, grad_max_steps=9).adjoint
        assert exact == ImplicitAdjoint(solver=Picard(rtol=1e-2, max_steps=9))
        assert built(grad_solver="gmres").adjoint == ImplicitAdjoint(solver=GMRES())
        assert built(adjoint="phantom").adjoint == PhantomGradient(steps=1)
        assert built(adjoint="phantom", phantom_steps=4).adjoint == PhantomGradient(steps=4)
        assert built(adjoint="unrolled").adjoint == Unrolled()
        assert built(adjoint="shine", solver="broyden").adjoint == SHINE()

    def test_starts(self):
        assert isinstance(built(model="deq-dense", start="random").deq.start, RandomStart)
        assert type(built(model="deq-dense").deq.start) is ZeroStart

    def test_the_jacobian_is_in_the_loss_of_training_only(self):
        options = Options(model="deq-dense", jac_reg=2.0).check()
        dense = build.model(options, (1, 2, 2), 3)
        loss, plain = build.loss(options, dense), torch.nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
        u, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        trained = dense(u)
        assert loss(trained, y) > plain(trained, y)
        scores = dense.eval()(u)
        assert loss(scores, y) == plain(scores, y)

    @pytest.mark.parametrize(
        ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
    )
    def test_optimizers(self, name, kind):
        options = Options(optimizer=name, lr=0.5, weight_decay=0.25).check()
        optimizer = build.optimizer(options, [torch.nn.Parameter(torch.zeros(1))])
        assert type(optimizer) is kind
        assert optimizer.defaults["lr"] == 0.5
        assert optimizer.defaults["weight_decay"] == 0.25

    def test_momentum(self):
        parameters = [torch.nn.Parameter(torch.zeros(1))]
        assert build.optimizer(Options(optimizer="sgd"), parameters).defaults["momentum"] == 0.9
        assert build.optimizer(Options(optimizer="sgd", momentum=0.0), parameters).defaults["momentum"] == 0.0

    def test_schedules(self):
        cosine, step, constant = (build.Schedule(name, 100, 0.1) for name in ("cosine", "step", "constant"))
        for schedule in (cosine, step, constant):
            assert [schedule(k) for k in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
        assert cosine(55) == pytest.approx(0.5)
        assert cosine(100) == pytest.approx(0.0)
        assert [step(k) for k in (54, 55, 77, 78, 99)] == [1.0, 0.1, 0.1, 0.01, 0.01]
        assert constant(99) == 1.0
        assert build.Schedule("cosine", 1, 0.0)(1) == pytest.approx(1.0)
