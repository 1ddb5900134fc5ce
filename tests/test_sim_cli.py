"""`implicitdl sim`: every kind of teacher, the figures it leaves, and bad input in one line."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import zipfile

import pytest
import safetensors.torch
import torch
from matplotlib.image import imread
from torch import nn

from implicitdl import ImplicitModel
from implicitdl._internal import store
from implicitdl.cli import main
from implicitdl.data import load
from implicitdl.sim import SIM
from kernel_paths import threads
from two_processes import joined

# A process of its own computes in float32, whatever the other tests like.
pytestmark = pytest.mark.usefixtures("float32")

SMALL = ["--data", "digits", "--samples", "200"]
QUICK = [*SMALL, "--lambda-z", "0.1", "--lambda-y", "0.1"]
LAST_LINE = re.compile(r"test accuracy: \d+\.\d\d %")


def trained_network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 10)
    )
    data = load("digits", 64)
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(5):
        for images, labels in data.train_dl:
            opt.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            opt.step()
    return net


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A network as an exported program and as weights, and a run of our own."""
    torch.set_default_dtype(torch.float32)
    folder, net = tmp_path_factory.mktemp("teachers"), trained_network()
    images = torch.zeros(2, 1, 8, 8)
    free = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(net, (images,), dynamic_shapes=(free,)), folder / "net.pt2")
    flat = torch.export.export(net[1:], (images.flatten(1),), dynamic_shapes=(free,))
    torch.export.save(flat, folder / "flat.pt2")
    torch.export.save(torch.export.export(net, (images,)), folder / "fixed.pt2")
    safetensors.torch.save_file(net.state_dict(), folder / "net.safetensors")
    assert main(["train", "--hidden-dim", "8", "--epochs", "2", "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(teachers):
    out = teachers / "out"
    words = ["sim", "--teacher", str(teachers / "net.pt2"), *QUICK, "--path", "30,3,0.3", "--refit", "--out", str(out)]
    assert main(words) == 0
    return out


def test_it_leaves_a_model_figures_and_plots(finished):
    model = ImplicitModel.from_pretrained(finished / "model")
    figures = json.loads((finished / "sim.json").read_text())
    data = load("digits", 64)
    u, y = data.test_ds.pixels.float() / 16, data.test_ds.labels
    assert figures["accuracy"]["sim"] == pytest.approx(float((model(u).argmax(1) == y).float().mean()))
    assert figures["accuracy"]["sim"] > figures["accuracy"]["teacher"] - 0.05
    assert figures["norm"] <= 0.99
    assert len(figures["rows"]["hidden"]["objective"]) == 24
    counts = [row["nonzeros"] for row in figures["path"]]
    assert counts == sorted(counts)
    assert all("pruned" in row for row in figures["path"] if row["nonzeros"] < 1232)  # of an exported program too
    for name in ("spy", "gaps", "sparsity"):
        assert imread(finished / "plots" / f"{name}.png")[..., :3].std() > 0.02


@pytest.mark.parametrize(
    ("teacher", "options"),
    [
        ("flat.pt2", []),
        ("net.safetensors", ["--layers", "64-16-8-10", "--path", "30,3"]),
        ("run", ["--solver", "admm", "--regen-states"]),
        ("run/best", ["--dtype", "float64", "--no-rescale", "--kappa", "0.9"]),
    ],
)
def test_teachers_and_options(teachers, teacher, options, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sim", "--teacher", str(teachers / teacher), *QUICK, *options, "--out", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert LAST_LINE.fullmatch(printed.splitlines()[-1])
    for words in ("digits: 200 of", "rows converged", "‖A‖∞", "teacher, test accuracy"):
        assert words in printed


def accuracy_of_the_teacher(out):
    return json.loads((out / "sim.json").read_text())["accuracy"]["teacher"]


def test_the_network_of_the_weights_is_the_exported_one(teachers, finished, tmp_path):
    words = ["--teacher", str(teachers / "net.safetensors"), "--layers", "64-16-8-10"]
    assert main(["sim", *words, *QUICK, "--out", str(tmp_path / "out")]) == 0
    assert accuracy_of_the_teacher(tmp_path / "out") == accuracy_of_the_teacher(finished)


@pytest.mark.parametrize("options", [[], ["--dtype", "float64"]], ids=["float32", "float64"])
def test_the_other_commands_take_what_it_leaves(options, teachers, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["sim", "--teacher", str(teachers / "net.pt2"), *QUICK, *options, "--out", out]) == 0
    accuracy = capsys.readouterr().out.splitlines()[-1]
    assert main(["evaluate", out]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == accuracy
    assert main(["info", out]) == 0
    printed = capsys.readouterr().out
    for words in ("200 samples matched", "teacher, test accuracy", "n = 24, p = 64, q = 10", "rows converged", "ρ(A)"):
        assert words in printed
    assert main(["certify", out, "--eps", "0.001", "--samples", "20", "--attack-steps", "1"]) == 0
    assert "of 20 samples" in capsys.readouterr().out
    assert f"Its pictures are in '{tmp_path / 'out' / 'plots'}'" in refused(capsys, ["plot", out])
    assert "got one with sim.json. Name another --out." in refused(capsys, ["train", "--resume", "--out", out])
    (tmp_path / "out" / "sim.json").write_text("{}")
    for command in ("evaluate", "info", "certify"):
        assert "expected a whole sim.json" in refused(capsys, [command, out])


def test_a_sim_is_a_teacher(finished, tmp_path, capsys):
    assert main(["sim", "--teacher", str(finished), *QUICK, "--out", str(tmp_path / "out")]) == 0
    assert LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])


def drawn(out):
    options = json.loads((out / "sim.json").read_text())["options"]
    return options["samples"], options["seed"], options["split_seed"]


def test_the_draw_leaves_the_split_alone(teachers, finished, tmp_path):
    """Else what is tested on is what the teacher was trained on."""
    for name, words in (("drawn", ["--seed", "1"]), ("split", ["--split-seed", "3"])):
        words = ["--teacher", str(teachers / "net.pt2"), *QUICK, *words, "--out", str(tmp_path / name)]
        assert main(["sim", *words]) == 0
    assert [drawn(out)[1:] for out in (finished, tmp_path / "drawn", tmp_path / "split")] == [(0, 0), (1, 0), (0, 3)]
    accuracy = accuracy_of_the_teacher(finished)
    assert accuracy_of_the_teacher(tmp_path / "drawn") == accuracy != accuracy_of_the_teacher(tmp_path / "split")


def test_a_run_is_matched_on_its_own_split(tmp_path):
    run = tmp_path / "run"
    assert main(["train", "--hidden-dim", "8", "--epochs", "1", "--split-seed", "5", "--out", str(run)]) == 0
    for teacher, out in ((run, "whole"), (run / "best", "best")):
        assert main(["sim", "--teacher", str(teacher), *QUICK, "--out", str(tmp_path / out)]) == 0
        assert drawn(tmp_path / out) == (200, 0, 5)


def test_as_many_samples_as_there_are(teachers, tmp_path):
    out = tmp_path / "out"
    assert main(["sim", "--teacher", str(teachers / "net.pt2"), "--lambda-z", "10", "--out", str(out)]) == 0
    assert drawn(out)[0] == 1293


def test_models_by_their_nonzeros(teachers, tmp_path):
    out = tmp_path / "out"
    words = ["--teacher", str(teachers / "net.safetensors"), "--layers", "64-16-8-10", "--nonzeros", "400,100"]
    assert main(["sim", *words, *QUICK, "--out", str(out)]) == 0
    rows = json.loads((out / "sim.json").read_text())["path"]
    assert all(row["nonzeros"] <= count for row, count in zip(rows, (400, 100), strict=True))


@pytest.mark.parametrize(("words", "also"), [([], ""), (["--refit"], ", refitted")])
def test_the_two_ways_to_sparsity_are_both_refitted_or_neither(words, also, teachers, tmp_path, monkeypatch, capsys):
    calls, drawn = [], []
    monkeypatch.setattr("implicitdl.cli.sim.refit", lambda space, *rest: calls.append(space) or space)
    monkeypatch.setattr("implicitdl.viz.sparsity", lambda curves, **how: drawn.extend(curves))
    teacher = ["--teacher", str(teachers / "net.safetensors"), "--layers", "64-16-8-10"]
    assert main(["sim", *teacher, *QUICK, "--path", "3", *words, "--out", str(tmp_path / "out")]) == 0
    assert len(calls) == len(words)
    assert drawn == [f"SIM{also}", f"pruned by magnitude{also}"]


def test_a_penalty_that_leaves_nothing_has_a_row_and_no_picture(teachers, tmp_path):
    words = ["--teacher", str(teachers / "net.safetensors"), "--layers", "64-16-8-10", *QUICK, "--path", "1e18"]
    assert main(["sim", *words, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "sim.json").read_text())["path"][0]["nonzeros"] == 0
    assert not (tmp_path / "out" / "plots" / "sparsity.png").exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EACCES, "expected a folder that can be written"), (errno.ENOSPC, "expected room on the disk")],
)
def test_a_folder_that_cannot_be_written_shows_before_anything_is_solved(
    number, words, teachers, tmp_path, monkeypatch, capsys
):
    def fails(path, data):
        raise OSError(number, os.strerror(number))

    def solved(*arguments, **options):
        raise AssertionError("too late")

    monkeypatch.setattr(store, "_write", fails)
    monkeypatch.setattr(SIM, "train", solved)
    out = tmp_path / "new" / "out"
    assert words in refused(capsys, ["sim", "--teacher", teachers / "net.pt2", *QUICK, "--out", out])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes_are_one(teachers, tmp_path, capsys):
    common = ["sim", "--teacher", str(teachers / "net.pt2"), *QUICK, "--path", "30,3"]
    solvers = ("admm", "admm-multi-gpu")
    one, two = (
        [[*common, "--solver", solver, "--out", str(tmp_path / count / solver)] for solver in solvers]
        for count in ("1", "2")
    )
    with threads(1):
        assert [main(words) for words in one] == [0, 0]
    work = f"work = lambda: any([main(words) for words in {two!r}])"
    printed = joined(f"import implicitdl.cli.app, implicitdl.viz\nfrom implicitdl.cli import main\n{work}\n")
    assert printed.replace(str(tmp_path / "2"), str(tmp_path / "1")) == capsys.readouterr().out
    files = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "1", tmp_path / "2")
    ]
    assert files[0] == files[1]


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def with_pickle(source, target, name, bomb):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.namelist():
            new.writestr(item, bomb if item.endswith(name) else old.read(item))


def refused(capsys, words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_pickle_in_an_exported_program_is_not_run(teachers, tmp_path, capsys):
    bomb = pickle.dumps(Marker(str(tmp_path / "fired")))
    with_pickle(teachers / "net.pt2", tmp_path / "inputs.pt2", "sample_inputs/model.pt", bomb)
    with zipfile.ZipFile(teachers / "net.pt2") as archive:
        (config,) = (name for name in archive.namelist() if name.endswith("model_constants_config.json"))
    with_pickle(teachers / "net.pt2", tmp_path / "object.pt2", "nothing", bomb)
    with zipfile.ZipFile(tmp_path / "object.pt2", "a") as archive:
        archive.writestr(config.replace("model_constants_config.json", "opaque_obj_0"), bomb)
    out = tmp_path / "out"
    line = refused(capsys, ["sim", "--teacher", tmp_path / "inputs.pt2", *SMALL, "--out", out])
    assert "one that cannot be read" in line
    line = refused(capsys, ["sim", "--teacher", tmp_path / "object.pt2", *SMALL, "--out", out])
    assert "the pickled object" in line
    assert not (tmp_path / "fired").exists()
    assert not out.exists()


BAD = [
    (["--teacher", "net.pt2", "--layers", "64-10"], "--layers together with a .safetensors file"),
    (["--teacher", "net.safetensors"], "a .safetensors file without --layers"),
    (["--teacher", "net.safetensors", "--layers", "64,10"], "sizes such as 784-64-10, got '64,10'"),
    (["--teacher", "net.safetensors", "--layers", "64-16-10"], "weights of 16 × 64, 10 × 16"),
    (["--teacher", "none.safetensors", "--layers", "64-10"], "a whole .safetensors file"),
    (["--teacher", "none.pt2"], "an exported program"),
    (["--teacher", "net.pth"], "the pickle net.pth"),
    (["--teacher", "nowhere"], "nothing there"),
    (["--teacher", "fixed.pt2"], "a teacher that takes inputs of shape (200, 1, 8, 8)"),
    (["--teacher", "net.pt2", "--activation", "tanh"], "x = φ(z) with φ = tanh"),
    (["--teacher", "net.pt2", "--activation", "swish"], "--activation to be one of"),
    (["--teacher", "net.pt2", "--solver", "simplex"], "--solver to be one of"),
    (["--teacher", "net.pt2", "--dtype", "half"], "--dtype to be one of"),
    (["--teacher", "net.pt2", "--kappa", "1"], "--kappa strictly between 0 and 1"),
    (["--teacher", "net.pt2", "--samples", "9999"], "--samples of at most"),
    (["--teacher", "net.pt2", "--lambda-z", "-1"], "--lambda-z ≥ 0"),
    (["--teacher", "net.pt2", "--rank", "3"], "a --solver with --rank"),
    (["--teacher", "net.pt2", "--solver", "least-squares", "--lambda-z", "1"], "a --solver with --lambda-z"),
    (["--teacher", "net.pt2", "--refit"], "--refit together with --path"),
    (["--teacher", "net.pt2", "--path", "1,x"], "--path with numbers"),
    (["--teacher", "net.pt2", "--nonzeros", "1,1.5"], "--nonzeros with numbers"),
    (["--teacher", "net.pt2", "--nonzeros", "0"], "--nonzeros to be a positive integer"),
    (["--teacher", "net.pt2", "--nonzeros", "5", "--path", "1"], "--path or --nonzeros, got both"),
    (["--teacher", "net.pt2", "--split-seed", "-1"], "--split-seed to be an integer ≥ 0"),
    (["--teacher", "net.pt2", "--device", "moon"], "--device to be one that is here"),
    (["--teacher", "net.pt2", "--out", "net.pt2"], "--out to be a new folder"),
]


def test_bad_input_is_one_line(teachers, tmp_path, monkeypatch, capsys):
    torch.save({}, teachers / "net.pth")
    monkeypatch.chdir(teachers)
    before = sorted(teachers.iterdir())
    for words, message in BAD:
        out = [] if "--out" in words else ["--out", tmp_path / "out"]
        samples = [] if "--samples" in words else SMALL[2:]
        assert message in refused(capsys, ["sim", *words, *SMALL[:2], *samples, *out]), words
        assert sorted(teachers.iterdir()) == before, words
        assert not (tmp_path / "out").exists(), words
