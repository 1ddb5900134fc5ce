"""Every number that a user gives is looked at where it comes in: finite, in its range, and of any numeric type."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from implicitdl import (
    GMRES,
    SHINE,
    SIM,
    Aitken,
    Anderson,
    ArgumentError,
    Broyden,
    ImplicitModel,
    ImplicitRNN,
    Newton,
    PeacemanRachford,
    PhantomGradient,
    Picard,
    jacobian_regularization,
    spectral_radius,
    train,
)
from implicitdl.cli import main
from implicitdl.data import Images, arithmetic, image_loader, load, spiky
from implicitdl.nn import (
    ConvEquilibriumClassifier,
    DenseEquilibriumClassifier,
    JacobianPenalty,
    MonotoneConvClassifier,
    RandomStart,
)
from implicitdl.sim import get_states
from implicitdl.sim.solvers import ADMMSolver, OneSidedSolver, ProjectedGDLowRankSolver

# What is no finite number is refused by each option itself, what is none at all by their common reader.
NEGATIVE = ["inf", "nan", "-1"]
NO_NUMBER = ["-inf", "1e400", "abc", ""]
POSITIVE = [*NEGATIVE, "0"]
UNIT = [*POSITIVE, "1"]
COUNT = [*POSITIVE, "0.5", "9223372036854775808"]
SEED = [*NEGATIVE, "0.5", "9223372036854775808"]
TRAIN = {
    "--holdout": UNIT, "--split-seed": SEED, "--structure low-rank --rank": COUNT, "--hidden-dim": COUNT,
    "--kappa": UNIT, "--model deq-conv --channels": COUNT, "--model deq-conv --inner-channels": COUNT,
    "--model deq-conv --halvings": SEED, "--model deq-conv --cells": COUNT,
    "--solver picard --damping": [*POSITIVE, "2.1"], "--solver anderson --memory": COUNT,
    "--solver aitken --period": [*COUNT, "1"], "--tol": UNIT, "--max-steps": COUNT,
    "--adjoint phantom --phantom-steps": COUNT, "--grad-tol": UNIT, "--grad-max-steps": COUNT, "--epochs": COUNT,
    "--batch-size": COUNT, "--lr": POSITIVE, "--weight-decay": NEGATIVE,
    "--optimizer sgd --momentum": [*NEGATIVE, "1"], "--warmup": [*NEGATIVE, "1"], "--label-smoothing": [*NEGATIVE, "1"],
    "--model deq-dense --jac-reg": POSITIVE, "--clip": [*POSITIVE, *NO_NUMBER], "--seed": [*SEED, *NO_NUMBER],
    "--threads": [*COUNT, "100000"],
}  # fmt: skip
MATCH = {
    "--samples": COUNT, "--seed": SEED, "--split-seed": SEED, "--holdout": UNIT, "--lambda-z": NEGATIVE,
    "--lambda-y": NEGATIVE, "--kappa": UNIT, "--path": [*NEGATIVE, *NO_NUMBER], "--path 1,": [*NEGATIVE, *NO_NUMBER],
    "--nonzeros": [*COUNT, *NO_NUMBER],
    "--solver low-rank --rank": COUNT, "--threads": [*COUNT, "100000"],
}  # fmt: skip
CERTIFY = {
    "--eps": NEGATIVE, "--samples": COUNT, "--slope-steps": SEED, "--rounds": SEED, "--attack-steps": COUNT,
    "--restarts": COUNT,
}  # fmt: skip
COMMANDS = {"train": TRAIN, "sim --teacher nothing": MATCH, "certify nothing": CERTIFY}


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [(command, option, values) for command, options in COMMANDS.items() for option, values in options.items()],
    ids=lambda part: part.replace(" ", "_") if isinstance(part, str) else "",
)
def test_a_bad_number_on_the_command_line_is_one_line_at_the_door(
    command, option, values, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    joint = "" if option.endswith(",") else "="
    name = next(word for word in reversed(option.split()) if word.startswith("--"))
    for bad in values:
        assert main([*command.split(), *f"{option}{joint}{bad}".split(" ")]) == 2, bad
        out, err = capsys.readouterr()
        assert out == "", bad
        assert err.startswith("implicitdl: "), bad
        assert err.count("\n") == 1, err
        assert name in err, bad
        assert not list(tmp_path.iterdir()), bad


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def trained(tmp_path, **options):
    model = net()
    batches = [(torch.randn(5, 4), torch.randint(2, (5,)))]
    given = {"epochs": 1, "dirname": tmp_path / "run", "progress": False} | options
    return train(model, batches, batches, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), **given)


REAL = [math.inf, -math.inf, math.nan, 10**400, "1", None, True, -1]
WHOLE = [math.inf, math.nan, 0.5, "1", True, -1, 1 << 63]
CALLS = [
    *((f"Picard({name}=)", lambda v, name=name: Picard(**{name: v}), bad) for name, bad in {
        "rtol": [math.inf, math.nan, 0, 1, "1", -1, 10**400], "atol": REAL, "max_steps": [*WHOLE, 0, None],
        "damping": [*REAL, 0, 2.5],
    }.items()),
    ("Anderson(memory=)", lambda v: Anderson(memory=v), [*WHOLE, 0, None]),
    ("Anderson(growth=)", lambda v: Anderson(growth=v), [*REAL, 0, "os.system"]),
    ("Broyden(growth=)", lambda v: Broyden(growth=v), [*REAL, 0]),
    ("Broyden(memory=)", lambda v: Broyden(memory=v), [*WHOLE, 0, None]),
    ("Newton(krylov=)", lambda v: Newton(krylov=v), [*WHOLE, 0, None]),
    ("GMRES(restart=)", lambda v: GMRES(restart=v), [*WHOLE, 0, None]),
    ("Aitken(period=)", lambda v: Aitken(period=v), [*WHOLE, 0, 1]),
    ("PeacemanRachford(alpha=)", lambda v: PeacemanRachford(alpha=v), [math.inf, math.nan, 0, -1, "1", 10**400]),
    ("SHINE(fallback=)", lambda v: SHINE(fallback=v), [math.inf, math.nan, 0, -1, "1"]),
    ("PhantomGradient(steps=)", lambda v: PhantomGradient(steps=v), [*WHOLE, 0, None]),
    ("PhantomGradient(damping=)", lambda v: PhantomGradient(damping=v), [*REAL, 0, 2.5]),
    ("ImplicitModel(hidden_dim=)", lambda v: ImplicitModel(3, 2, v), [*WHOLE, 0, None]),
    ("ImplicitModel(kappa=)", lambda v: ImplicitModel(3, 2, 4, kappa=v), [math.inf, math.nan, 0, 1, "1", True, -1]),
    ("ImplicitModel(tol=)", lambda v: ImplicitModel(3, 2, 4, tol=v), [math.inf, math.nan, 0, 1, "1", -1]),
    ("ImplicitModel(mitr=)", lambda v: ImplicitModel(3, 2, 4, mitr=v), [*WHOLE, 0]),
    ("DenseEquilibriumClassifier(hidden_dim=)", lambda v: DenseEquilibriumClassifier(3, 2, v), [*WHOLE, 0, None]),
    *((f"ConvEquilibriumClassifier({name}=)",
       lambda v, name=name: ConvEquilibriumClassifier(**{"input_channels": 1, "output_dim": 2, name: v}), bad)
      for name, bad in {
          "input_channels": [*WHOLE, 0], "output_dim": [*WHOLE, 0], "channels": [*WHOLE, 0],
          "inner_channels": [*WHOLE, 0], "cells": [*WHOLE, 0], "kernel_size": [*WHOLE, 0], "num_groups": [*WHOLE, 0],
          "halvings": WHOLE,
      }.items()),
    ("MonotoneConvClassifier(m=)", lambda v: MonotoneConvClassifier(1, 2, m=v), [*REAL, 0, 1]),
    ("RandomStart(scale=)", lambda v: RandomStart(scale=v), [*REAL, 0]),
    ("RandomStart(share=)", lambda v: RandomStart(share=v), [*REAL, 1.5]),
    ("JacobianPenalty(weight=)", lambda v: JacobianPenalty(DenseEquilibriumClassifier(3, 2, 4).deq, v), [*REAL, 0]),
    ("jacobian_regularization(samples=)",
     lambda v: jacobian_regularization(lambda x: x, torch.ones(2, 3), samples=v), [*WHOLE, 0, None]),
    ("spectral_radius(rtol=)", lambda v: spectral_radius(lambda x: x, torch.ones(2, 3), rtol=v), [*REAL, 0, 1]),
    ("spectral_radius(dimension=)",
     lambda v: spectral_radius(lambda x: x, torch.ones(2, 3), dimension=v), [*WHOLE, 0, None]),
    ("load(batch_size=)", lambda v: load("digits", v), [*WHOLE, 0, None]),
    ("load(holdout=)", lambda v: load("digits", 5, holdout=v), [*REAL, 1]),
    ("load(seed=)", lambda v: load("digits", 5, seed=v), [*WHOLE, None]),
    ("image_loader(batch_size=)",
     lambda v: image_loader(Images(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1), "a"), v), [*WHOLE, 0]),
    ("Images(white=)",
     lambda v: Images(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1), "a", white=v), [*WHOLE, 0]),
    *((f"spiky({name}=)", lambda v, name=name: spiky(**{"points": 300, name: v}), bad) for name, bad in {
        "level": WHOLE, "points": [*WHOLE, 0], "span": [*REAL, 0], "look_back": [*WHOLE, 0], "test_fraction": [*REAL, 1],
        "amplitude": [math.inf, math.nan, -1, "1"], "noise": [math.inf, math.nan, -1, "1"], "spikes": WHOLE,
        "spike_length": [*WHOLE, 0], "seed": WHOLE,
        "frequencies": [[math.inf], [math.nan], [-1], ["1"], [True], [1, 10**400], 3],
    }.items()),
    *((f"arithmetic({name}=)", lambda v, name=name: arithmetic(**{name: v}), bad) for name, bad in {
        "inputs": [*WHOLE, 0], "samples": [*WHOLE, 0], "factor": [*REAL, 0], "seed": WHOLE,
        "slices": [((0.5, 2), (0, 1)), ((0, 99), (0, 1)), ((3, 1), (0, 1)), (("a", "b"), (0, 1)), 3, ((0, 1), 3)],
    }.items()),
    ("SIM(kappa=)", lambda v: SIM(kappa=v), [*REAL, 0, 1]),
    ("SIM(skip_layers=)", lambda v: SIM(skip_layers=v), [*WHOLE, 0]),
    ("SIM(max_memory=)", lambda v: SIM(max_memory=v), [*WHOLE, 0, None]),
    ("SIM.path(lambdas=)", lambda v: SIM().path(model=net(), dataloader=[torch.ones(5, 4)], lambdas=[1.0, v]), REAL),
    ("SIM.path(nonzeros=)",
     lambda v: SIM().path(model=net(), dataloader=[torch.ones(5, 4)], nonzeros=[5, v]), [*WHOLE, 0, None]),
    ("get_states(max_memory=)", lambda v: get_states(net(), [torch.ones(5, 4)], max_memory=v), [*WHOLE, 0, None]),
    *((f"ADMMSolver({name}=)", lambda v, name=name: ADMMSolver(**{name: v}), bad) for name, bad in {
        "lambda_z": REAL, "lambda_y": REAL, "tol": [*REAL, 1], "l1_ratio": [*REAL, 0, 1.5],
        "rho_ab": [math.inf, math.nan, 0, -1, "1"], "num_epoch_ab": [*WHOLE, 0, None], "max_steps": [*WHOLE, 0],
        "batch_feature_size": [*WHOLE, 0],
    }.items()),
    ("OneSidedSolver(num_epoch=)", lambda v: OneSidedSolver(num_epoch=v), [*WHOLE, 0, None]),
    ("ProjectedGDLowRankSolver(rank=)", lambda v: ProjectedGDLowRankSolver(rank=v), [*WHOLE, 0]),
    ("ProjectedGDLowRankSolver(lr=)", lambda v: ProjectedGDLowRankSolver(lr=v), [*REAL, 0]),
]  # fmt: skip


@pytest.mark.parametrize("owner", dict.fromkeys(name.split("(")[0] for name, *_ in CALLS))
def test_a_bad_number_is_worded(owner):
    for name, call, bad in CALLS:
        for value in bad if name.split("(")[0] == owner else ():
            try:
                call(value)
            except ArgumentError as error:
                text = str(error)
            else:
                text = "accepted"
            assert "expected" in text, (name, value)
            assert "\n" not in text, (name, value)


@pytest.mark.parametrize(
    ("name", "bad"),
    [("epochs", [*WHOLE, 0, None]), ("seed", WHOLE), ("clip_grad_norm", [math.inf, math.nan, 0, -1, "1", 10**400])],
)
def test_a_bad_number_of_training_leaves_nothing(name, bad, tmp_path):
    for value in bad:
        with pytest.raises(ArgumentError, match=f"train: expected .*{name}"):
            trained(tmp_path, **{name: value})
        assert not list(tmp_path.iterdir())


def test_numbers_of_numpys_are_numbers(tmp_path):
    three, half = np.int64(3), np.float32(0.5)
    model = ImplicitModel(three, np.int32(2), np.uint8(4), kappa=half, rank=np.int16(2), is_low_rank=True)
    model.save_pretrained(tmp_path / "implicit")
    assert ImplicitModel.from_pretrained(tmp_path / "implicit").kappa == 0.5
    conv = ConvEquilibriumClassifier(
        three, three, channels=np.int64(8), inner_channels=np.int64(8), num_groups=np.int64(4), cells=np.int64(1),
        kernel_size=three, halvings=np.int64(0), solver=Anderson(memory=three, max_steps=np.int64(50), rtol=half),
    )  # fmt: skip
    conv.save_pretrained(tmp_path / "conv")
    assert ConvEquilibriumClassifier.from_pretrained(tmp_path / "conv").solver == Anderson(
        memory=3, max_steps=50, rtol=0.5
    )
    DenseEquilibriumClassifier(three, three, three).save_pretrained(tmp_path / "dense")
    ImplicitRNN(input_dim=three, output_dim=three, hidden_dim=three, implicit_hidden_dim=three)
    trained(tmp_path, epochs=np.int64(1), seed=np.int64(5), clip_grad_norm=Fraction(1, 2))
    assert repr(Picard(max_steps=three, damping=half)) == repr(Picard(max_steps=3, damping=0.5))
    assert len(load("digits", three, holdout=half, seed=three).train_ds) == 718
    assert spiky(points=np.int64(300), seed=three).u_train.shape == (144, 60, 1)
    assert arithmetic(samples=three, slices=((np.int64(0), three), (0, 1))).u_train.shape == (3, 50)


class TestCommands:
    def test_a_size_that_no_memory_holds_is_one_line(self, tmp_path, capsys):
        for words in ("--hidden-dim 1000000000", "--hidden-dim 4000000000000"):
            assert main(["train", "--out", str(tmp_path / "run"), *words.split()]) == 2
            assert "not enough memory for sizes such as these" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_a_device_without_numbers(self, capsys):
        assert main(["train", "--device", "meta"]) == 2
        assert "--device to be one that is here, such as cpu, got 'meta'" in capsys.readouterr().err

    def test_a_path_needs_a_solver_with_penalties(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["sim", "--teacher", "nothing", "--path", "1", "--solver", "low-rank"]) == 2
        assert "a --solver with penalties for --path or --nonzeros, got low-rank" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
