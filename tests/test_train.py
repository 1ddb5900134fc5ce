"""Training: the numbers of a run, its files, and that nothing a kill does changes either."""

from __future__ import annotations

import contextlib
import copy
import csv
import errno
import inspect
import json
import math
import os
import pickle
import random
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from implicitdl import ArgumentError, ImplicitAdjoint, ImplicitModel, Picard, Status, fixed_point, solution
from implicitdl._internal import errors, store
from implicitdl._internal.errors import MissingExtraError
from implicitdl.loop.announce import announce_miss
from implicitdl.loop.iterate import SolveResult
from implicitdl.training import Logger, NonFiniteLossError, get_valid_accuracy, load_weights, loop, processes, train
from implicitdl.training.state import pack, unpack
from precision import digits

SOURCE = Path(errors.__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch):
    """What is written outlives a process without waiting for the disk; tests that count the waits put theirs on top."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def samples(n: int = 60) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    u = torch.randn(n, 6, generator=generator)
    return TensorDataset(u, (u @ torch.randn(6, 3, generator=generator)).argmax(1))


def loader(n: int = 60, **options) -> DataLoader:
    return DataLoader(samples(n), batch_size=8, **{"shuffle": True, **options})


class Equilibrium(nn.Module):
    """A real implicit layer, so that the solver's figures are real too."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(n, n) / n**0.5)

    def forward(self, u):
        A = 0.8 * self.raw / (1 + self.raw.abs().sum(1, keepdim=True))  # a contraction whatever is learned
        solver = Picard(rtol=1e-3)
        return fixed_point(
            lambda x, u: torch.tanh(x @ A.T + u), torch.zeros_like(u), u,
            solver=solver, adjoint=ImplicitAdjoint(solver=solver),
        ).value  # fmt: skip


def net() -> nn.Module:
    """All that a checkpoint could forget: batch statistics, dropout, an equilibrium."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), Equilibrium(8), nn.Linear(8, 3))


def plain() -> nn.Module:
    """What optimizers, schedulers and loaders are tried on."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.02)


def fit(folder, epochs=3, *, opt=adam, scheduler=None, model=None, data=None, loss_fn=F.cross_entropy, **options):
    """One start of a script: everything made anew."""
    model = net() if model is None else model
    opt = opt(model)
    options = {"seed": 3, "progress": False, **options}
    if scheduler is not None:
        options["scheduler"] = scheduler(opt)
    data = loader() if data is None else data
    return train(model, data, loader(20, shuffle=False), opt, loss_fn, epochs, folder, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts
    }


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The files of a whole run of so many epochs, made once."""
    made = {}

    def run(epochs: int) -> dict[str, bytes]:
        if epochs not in made:
            folder = tmp_path_factory.mktemp("whole")
            fit(folder, epochs)
            made[epochs] = files(folder)
        return made[epochs]

    return run


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def test_signature_is_the_seeds():
    names = list(inspect.signature(train).parameters)
    assert names[:8] == ["model", "train_dl", "valid_dl", "opt", "loss_fn", "epochs", "dirname", "device"]
    assert list(inspect.signature(get_valid_accuracy).parameters)[:4] == ["model", "loss_fn", "dl", "device"]
    assert list(inspect.signature(Logger).parameters)[:2] == ["printstr", "dir_name"]


def test_names_of_the_seeds():
    from implicitdl import utils

    assert utils.train is train
    assert utils.Logger is Logger
    assert utils.get_valid_accuracy is get_valid_accuracy
    assert callable(utils.mnist_load)
    assert callable(utils.cifar_load)


def test_it_learns_and_writes_what_it_says(tmp_path):
    model = net()
    returned, logger = fit(tmp_path / "run", 8, model=model)
    assert returned is model
    assert model.training
    assert logger.rows[-1]["loss"] < 0.7 * logger.rows[0]["loss"]
    assert logger.best["valid_acc"] == max(row["valid_acc"] for row in logger.rows)
    assert [row["epoch"] for row in logger.rows] == list(range(1, 9))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == logger.rows
    with (tmp_path / "run" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [{name: float(cell) for name, cell in row.items()} for row in table] == logger.rows
    assert sorted(os.listdir(tmp_path / "run")) == ["best", "last", "metrics.csv", "metrics.jsonl"]


def test_figures_are_those_of_a_plain_loop(tmp_path):
    """SGD without dropout or shuffling, each figure computed by hand."""
    model = nn.Linear(6, 3)
    plain = copy.deepcopy(model)
    data = loader(20, shuffle=False)  # 8 + 8 + 4: the last batch counts for less
    model, logger = fit(tmp_path, 1, model=model, data=data, opt=lambda m: torch.optim.SGD(m.parameters(), 0.1))
    opt = torch.optim.SGD(plain.parameters(), 0.1)
    total = right = 0.0
    for u, y in data:
        pred = plain(u)
        loss = F.cross_entropy(pred, y)
        total += loss.item() * len(y)
        right += (pred.argmax(1) == y).sum().item()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert bits(model) == bits(plain)
    u, y = samples(20).tensors
    (row,) = logger.rows
    assert row["loss"] == pytest.approx(total / 20, rel=1e-14)
    assert row["acc"] == right / 20
    assert row["valid_loss"] == pytest.approx(F.cross_entropy(plain(u), y).item(), rel=digits(1e-12, 1e-6))
    assert row["valid_acc"] == (plain(u).argmax(1) == y).double().mean().item()
    assert row["lr"] == 0.1
    assert row["forward_steps"] is row["backward_steps"] is row["missed"] is row["valid_steps"] is None


def test_best_is_the_first_of_the_best_and_last_is_returned(tmp_path):
    model, logger = fit(tmp_path, 6, opt=lambda m: torch.optim.Adam(m.parameters(), lr=0.3))
    accuracies = [row["valid_acc"] for row in logger.rows]
    assert logger.best["epoch"] == 1 + accuracies.index(max(accuracies))
    best, last = net(), net()
    load_weights(best, tmp_path / "best")
    load_weights(last, tmp_path / "last")
    assert get_valid_accuracy(best, F.cross_entropy, loader(20))[1] == max(accuracies)
    assert bits(last) == bits(model)
    assert bits(best) != bits(model)


def test_regression_has_no_accuracy_and_is_judged_by_its_loss(tmp_path):
    u = torch.randn(40, 6)
    data = DataLoader(TensorDataset(u, u.sum(1, keepdim=True)), batch_size=8)
    model = nn.Linear(6, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.45)  # bounces: the last epoch is not the best
    _, logger = train(model, data, data, opt, F.mse_loss, 5, tmp_path, progress=False)
    losses = [row["valid_loss"] for row in logger.rows]
    assert [row["acc"] for row in logger.rows] == [None] * 5
    assert [row["valid_acc"] for row in logger.rows] == [None] * 5
    assert logger.best["valid_loss"] == min(losses)
    load_weights(model, tmp_path / "best")
    assert get_valid_accuracy(model, F.mse_loss, data) == (pytest.approx(min(losses)), None)
    header, first = (tmp_path / "metrics.csv").read_text().splitlines()[:2]
    assert first.split(",")[header.split(",").index("valid_acc")] == ""


TARGETS = [
    (torch.zeros(4), (4, 3), False),
    (torch.zeros(4, dtype=torch.bool), (4, 3), False),
    (torch.zeros(4, 3, dtype=torch.int64), (4, 3), False),
    (torch.zeros(4, dtype=torch.int64), (4,), False),
    (torch.zeros(4, dtype=torch.int64), (4, 3, 5), False),
    (torch.zeros(4, dtype=torch.int64), (4, 3), True),
    (torch.zeros(4, dtype=torch.uint8), (4, 3), True),
    (torch.zeros(4, dtype=torch.int32), (4, 3), True),
]


@pytest.mark.parametrize(("target", "shape", "classes"), TARGETS)
def test_what_counts_as_classes(target, shape, classes):
    class Constant(nn.Module):
        def forward(self, u):
            return torch.zeros(shape)

    batches = [(torch.zeros(4, 1), target)]
    _, accuracy = get_valid_accuracy(Constant(), lambda pred, target: pred.sum(), batches)
    assert (accuracy is not None) == classes


def test_a_metric_of_ones_own(tmp_path):
    u = torch.randn(24, 6)
    data = [(u, u.sum(1, keepdim=True))]
    model = nn.Linear(6, 1)
    _, logger = train(
        model, data, data, adam(model), F.mse_loss, 3, tmp_path, progress=False,
        metric=lambda pred, target: -(pred - target).abs()[:, 0],
    )  # fmt: skip
    assert logger.best["valid_acc"] == max(row["valid_acc"] for row in logger.rows)
    with torch.no_grad():
        assert logger.rows[-1]["valid_acc"] == pytest.approx(-(model(u) - data[0][1]).abs().mean().item())


class Announcing(nn.Module):
    """Reports, for each sample, as many steps as its batch has had, and a miss in the first of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.calls = 0

    def report(self, direction, n):
        converged = torch.ones(n, dtype=torch.bool)
        converged[0] = False
        steps = torch.full((n,), self.calls)
        status = torch.where(converged, int(Status.CONVERGED), int(Status.STALLED))
        stats = solution.SolveStats(torch.ones(n), steps, converged, status=status)
        solution.monitored(direction, stats)
        missed = SolveResult(torch.ones(n, 1), stats, False, 1e-5, 0.0)
        announce_miss("Fake", direction, missed, Picard(), "warn")

    def forward(self, u):
        self.calls += 1
        self.report("forward", len(u))
        y = self.linear(u)
        if y.requires_grad:
            y.register_hook(lambda _: self.report("backward", len(u)))
        return y


def test_steps_and_misses_are_counted_over_the_epoch_and_warned_of_once(tmp_path):
    data = loader(20, shuffle=False)
    with pytest.warns(solution.ImplicitFunctionWarning) as caught:
        _, logger = fit(tmp_path, 1, model=Announcing(), data=data)
    (warning,) = caught
    assert "15.00% of the solves in training and 15.00% in validation" in str(warning.message)
    assert warning.filename == __file__
    (row,) = logger.rows
    assert row["forward_steps"] == row["backward_steps"] == (8 * 1 + 8 * 2 + 4 * 3) / 20
    assert row["missed"] == row["valid_missed"] == 3 / 20
    assert row["valid_steps"] == (8 * 4 + 8 * 5 + 4 * 6) / 20


def test_reading_at_every_batch_or_never_gives_the_same_figures(tmp_path, monkeypatch):
    """Figures must not depend on the clock: float sums in another order would differ in the last digit."""
    monkeypatch.setattr(loop, "_PAUSE", 0.0)
    fit(tmp_path / "always")
    monkeypatch.setattr(loop, "_PAUSE", math.inf)
    fit(tmp_path / "never")
    assert files(tmp_path / "always") == files(tmp_path / "never")


def test_seed_decides_everything_and_the_users_streams_stay(tmp_path):
    def state():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    model = net()
    random.seed(99)
    np.random.seed(99)
    before = state()
    fit(tmp_path / "1", model=model)
    assert state() == before
    torch.rand(5)
    random.random()
    fit(tmp_path / "2")
    fit(tmp_path / "3", seed=4)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert files(tmp_path / "1") != files(tmp_path / "3")


def test_without_a_seed_torch_manual_seed_decides(tmp_path):
    def run(name, seed):
        model = net()
        torch.manual_seed(seed)
        fit(tmp_path / name, 1, model=model, seed=None)
        return files(tmp_path / name)

    assert run("1", 0) == run("2", 0)
    assert run("3", 1) != run("4", 2)


def test_two_runs_in_a_row_without_a_seed_differ(tmp_path):
    fit(tmp_path / "1", 1, seed=None)
    seeds = {json.loads((tmp_path / "1" / "last" / "config.json").read_text())["seed"]}
    model = net()
    torch.manual_seed(5)
    for name in ("2", "3"):
        fit(tmp_path / name, 1, seed=None, model=copy.deepcopy(model))
        seeds.add(json.loads((tmp_path / name / "last" / "config.json").read_text())["seed"])
    assert len(seeds) == 3


def cosine(opt):
    return lr_scheduler.CosineAnnealingLR(opt, 4)


OPTIMIZERS = {
    "adam": adam,
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.02, amsgrad=True),
    "adamw fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, fused=True),
    "adam with a tensor lr": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.02)),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "sgd momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.05),
    "two groups": lambda m: torch.optim.AdamW(
        [{"params": m[0].parameters(), "lr": 0.01}, {"params": m[1:].parameters(), "weight_decay": 0.1}],
        lr=0.03,
    ),
}


@pytest.mark.parametrize("opt", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_optimizer_resumes_to_the_bit(tmp_path, opt):
    whole, logger = fit(tmp_path / "whole", 2, opt=opt, model=plain())
    fit(tmp_path / "parts", 1, opt=opt, model=plain())
    model, resumed = fit(tmp_path / "parts", 2, opt=opt, model=plain(), resume=True)
    assert bits(model) == bits(whole)
    assert resumed.rows == logger.rows
    assert resumed.best == logger.best
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


SCHEDULERS = {
    "cosine": (cosine, "epoch"),
    "multistep, a Counter": (lambda o: lr_scheduler.MultiStepLR(o, [1, 1, 3], 0.5), "epoch"),
    "plateau": (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5), "epoch"),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=32), "batch"),
    "cyclic": (lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 5, cycle_momentum=False), "batch"),
    "exponential": (lambda o: lr_scheduler.ExponentialLR(o, 0.9), "batch"),
    "lambda": (lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)), "batch"),
    "restarts": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3), "batch"),
    "sequential": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
        ),
        "epoch",
    ),
    "chained": (lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), cosine(o)]), "epoch"),
}


@pytest.mark.parametrize(("scheduler", "step"), SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_every_scheduler_resumes_to_the_bit(tmp_path, scheduler, step):
    def run(name, epochs, **options):
        return fit(tmp_path / name, epochs, model=plain(), scheduler=scheduler, scheduler_step=step, **options)

    whole, logger = run("whole", 4)
    run("parts", 2)
    model, _ = run("parts", 4, resume=True)
    assert bits(model) == bits(whole)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert len({row["lr"] for row in logger.rows}) > 1


@pytest.mark.parametrize("stop", [1, 4])
def test_interrupted_at_every_boundary(undisturbed, tmp_path, stop):
    fit(tmp_path / "parts", stop)
    fit(tmp_path / "parts", 5, resume=True)
    assert files(tmp_path / "parts") == undisturbed(5)


def test_resumed_after_every_epoch(undisturbed, tmp_path):
    for epochs in (1, 2, 3, 4, 4):
        fit(tmp_path / "parts", epochs, resume=True)
    assert files(tmp_path / "parts") == undisturbed(4)


@pytest.mark.parametrize("call", [1, 8, 9, 12, 20])
def test_interrupted_inside_an_epoch_of_training_or_validation(undisturbed, tmp_path, call):
    """8 batches of training and 3 of validation an epoch; Ctrl-C at the given one."""
    calls = []

    def interrupted(pred, target):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return F.cross_entropy(pred, target)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", 3, loss_fn=interrupted)
    fit(tmp_path / "parts", 3, resume=True)
    assert files(tmp_path / "parts") == undisturbed(3)


def test_resumed_in_the_same_session_with_the_same_objects(tmp_path):
    fit(tmp_path / "whole", 4, scheduler=cosine)
    model = net()
    opt = adam(model)
    scheduler = cosine(opt)
    for epochs in (2, 4):
        train(
            model, loader(), loader(20, shuffle=False), opt, F.cross_entropy, epochs, tmp_path / "parts",
            scheduler=scheduler, resume=epochs == 4, seed=3, progress=False,
        )  # fmt: skip
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


LOADERS = {
    "its own generator": lambda: loader(generator=torch.Generator().manual_seed(0)),
    "a weighted sampler": lambda: loader(shuffle=None, sampler=WeightedRandomSampler([1.0] * 60, 40)),
    "a sampler's generator": lambda: loader(
        shuffle=None, sampler=torch.utils.data.RandomSampler(samples(), generator=torch.Generator())
    ),
    "a list": lambda: [(u, y) for u, y in loader(shuffle=False)],
    "drop last": lambda: loader(drop_last=True),
}


@pytest.mark.parametrize("data", LOADERS.values(), ids=LOADERS.keys())
def test_every_loader_resumes_to_the_bit(tmp_path, data):
    fit(tmp_path / "whole", 2, data=data(), model=plain())
    fit(tmp_path / "parts", 1, data=data(), model=plain())
    fit(tmp_path / "parts", 2, data=data(), model=plain(), resume=True)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


class Augmented(Dataset):
    """Random transforms that draw from each of the three global streams."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return torch.full((6,), i + torch.rand(()).item() + random.random() + np.random.rand()), i % 3


def test_random_transforms_resume_to_the_bit(tmp_path):
    def data():
        return DataLoader(Augmented(), batch_size=8, shuffle=True)

    fit(tmp_path / "whole", 3, data=data())
    fit(tmp_path / "parts", 2, data=data())
    fit(tmp_path / "parts", 3, data=data(), resume=True)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_each_epoch_has_its_own_order(tmp_path):
    seen = []

    class Recorder(nn.Linear):
        def forward(self, u):
            seen.append(u[:, 0].tolist() if self.training else [])
            return super().forward(u)

    fit(tmp_path, 2, model=Recorder(6, 3))
    first, second = ([x for batch in seen[at : at + 8] for x in batch] for at in (0, 11))
    assert first != second
    assert sorted(first) == sorted(second) == sorted(samples().tensors[0][:, 0].tolist())


def test_an_implicit_model_resumes_to_the_bit_and_its_best_is_pretrained(tmp_path):
    def model():
        torch.manual_seed(1)
        return ImplicitModel(input_dim=6, output_dim=3, hidden_dim=8)

    whole, _ = fit(tmp_path / "whole", 3, model=model())
    fit(tmp_path / "parts", 1, model=model())
    resumed, logger = fit(tmp_path / "parts", 3, model=model(), resume=True)
    assert bits(resumed) == bits(whole)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    best = ImplicitModel.from_pretrained(tmp_path / "parts" / "best")
    assert get_valid_accuracy(best, F.cross_entropy, loader(20, shuffle=False))[1] == logger.best["valid_acc"]


def test_gradients_left_from_before_do_not_count(undisturbed, tmp_path):
    model = net()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    fit(tmp_path, 2, model=model)
    assert files(tmp_path) == undisturbed(2)


def test_resume_on_nothing_starts_the_run(tmp_path):
    fit(tmp_path / "1", 2)
    fit(tmp_path / "2", 2, resume=True)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_a_finished_run_is_given_back_as_it_is(tmp_path):
    whole, logger = fit(tmp_path, 3)
    before = files(tmp_path)
    model, again = fit(tmp_path, 3, resume=True)
    assert bits(model) == bits(whole)
    assert again.rows == logger.rows
    assert again.best == logger.best
    assert files(tmp_path) == before
    assert model.training


def test_torn_or_doubled_figures_are_made_good_on_resume(undisturbed, tmp_path):
    """Figures are written after the checkpoint: a kill can leave them behind it, a copy ahead of it."""
    fit(tmp_path / "parts", 2)
    (tmp_path / "parts" / "metrics.csv").write_text("epoch,loss\n1,0.5\n2,0.4\n2,0.4\n3,0.")
    (tmp_path / "parts" / "metrics.jsonl").unlink()
    fit(tmp_path / "parts", 3, resume=True)
    assert files(tmp_path / "parts") == undisturbed(3)


def test_the_first_checkpoint_comes_before_the_first_step(tmp_path):
    """A run killed in its first epoch keeps its seed and initial weights: it need not be given them again."""

    def stop(pred, target):
        raise KeyboardInterrupt

    for folder in ("1", "2"):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / folder, 2, loss_fn=stop)
    fit(tmp_path / "1", 2, resume=True)
    other = net()
    with torch.no_grad():
        other[0].weight.zero_()
    fit(tmp_path / "2", 2, resume=True, model=other, seed=None)
    assert files(tmp_path / "1") == files(tmp_path / "2")


# Each trial forks the script, kills it with SIGKILL at a random moment, goes on, kills that too, and goes on
# to the end; what is on the disk must be what the undisturbed run left there.
KILLS = """
import os, random, signal, sys, time
import torch
import torch.nn.functional as F
from pathlib import Path

sys.path.insert(0, sys.argv[3])
from test_train import OPTIMIZERS, cosine, files, fit

torch.set_default_dtype(torch.float64)
root, kills, epochs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])

def start(folder):
    # Short epochs: most of the time goes into saving, which is where a kill could hurt.
    fit(folder, epochs, scheduler=cosine, resume=True, opt=OPTIMIZERS["adamw fused"])

start(root / "warm")
begin = time.monotonic()
start(root / "whole")
duration = time.monotonic() - begin
expected = files(root / "whole")
moments = random.Random(0)
landed = 0
for trial in range(kills):
    folder = root / str(trial)
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                start(folder)
            except BaseException:
                os._exit(1)
            os._exit(0)
        time.sleep(moments.uniform(0, duration / 2))  # the machine may be faster than when it was timed
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        landed += code != 0
        if code == 0:
            duration /= 2  # it was through: the machine has less to do than when it was timed
    start(folder)
    found = files(folder)
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, different
print("killed", landed, "of", 2 * kills)
"""


def outcome(command: list[str], timeout: int = 280, **environment: str) -> str:
    path = os.pathsep.join([str(SOURCE), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_and_resume(tmp_path: Path, kills: int, epochs: int, timeout: int) -> None:
    command = [sys.executable, "-c", KILLS, str(tmp_path), str(kills), str(Path(__file__).parent), str(epochs)]
    assert "killed 0 " not in outcome(command, timeout)


def test_killed_at_random_moments(tmp_path):
    kill_and_resume(tmp_path, 1, 8, 280)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_moments(tmp_path):
    kill_and_resume(tmp_path, 20, 20, 1700)


def test_scheduler_steps_once_an_epoch_or_once_a_batch(tmp_path):
    def halving(opt):
        return lr_scheduler.StepLR(opt, 1, 0.5)

    _, by_epoch = fit(tmp_path / "1", 3, scheduler=halving)
    assert [row["lr"] for row in by_epoch.rows] == [0.02, 0.01, 0.005]
    _, by_batch = fit(tmp_path / "2", 1, scheduler=halving, scheduler_step="batch")
    assert by_batch.rows[0]["lr"] == 0.02 / 2**8


def test_plateau_looks_at_the_validation_loss(tmp_path):
    """lr = 0 changes nothing, so that from the second epoch on nothing has become better."""
    _, logger = fit(
        tmp_path, 4, model=nn.Linear(6, 3), opt=lambda m: torch.optim.SGD(m.parameters(), lr=1e-30),
        scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.1, eps=0.0),
    )  # fmt: skip
    assert [row["lr"] for row in logger.rows] == pytest.approx([1e-30, 1e-30, 1e-31, 1e-32])


def scaled(monkeypatch, scale: float) -> None:
    """The gradient scaler of fp16, on the CPU."""
    real = processes._joined

    def joined(*arguments):
        accelerator = real(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
        return accelerator

    monkeypatch.setattr(processes, "_joined", joined)


def test_clipping_bounds_the_step(tmp_path, monkeypatch):
    def step_length(name, **options):
        model = nn.Linear(6, 3)
        before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
        data = [(torch.randn(8, 6), torch.randint(3, (8,)))]
        fit(
            tmp_path / name, 1, model=model, data=data,
            opt=lambda m: torch.optim.SGD(m.parameters(), lr=1.0), **options,
        )  # fmt: skip
        after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        return (after - before).norm().item()

    assert step_length("clipped", clip_grad_norm=1e-3) == pytest.approx(1e-3, rel=1e-2)
    assert step_length("free") > 1e-2
    assert step_length("loose", clip_grad_norm=1e3) > 1e-2
    scaled(monkeypatch, 1024.0)
    assert step_length("scaled", clip_grad_norm=1e-3) == pytest.approx(1e-3, rel=1e-2)


class DtypeRecorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3, dtype=torch.float32)
        self.seen = set()

    def forward(self, u):
        y = self.linear(u.float())
        self.seen.add(y.dtype)
        return y


def test_bf16_computes_in_bf16_and_leaves_the_model_alone(tmp_path):
    model = DtypeRecorder()
    dtypes = set()

    def loss_fn(pred, target):
        dtypes.add(pred.dtype)
        return F.cross_entropy(pred, target)

    _, logger = fit(tmp_path / "1", 4, model=model, loss_fn=loss_fn, mixed_precision="bf16")
    assert model.seen == {torch.bfloat16}
    assert dtypes == {torch.float32}
    assert logger.rows[-1]["loss"] < logger.rows[0]["loss"]
    assert "forward" not in vars(model)
    model.seen.clear()
    fit(tmp_path / "2", 1, model=copy.deepcopy(model))  # and the next run may be another
    assert model(torch.zeros(1, 6)).dtype == torch.float32
    pickle.dumps(model)


@pytest.mark.parametrize(
    ("precision", "seen"),
    [("bf16", torch.bfloat16), ("fp16", torch.bfloat16), ("no", torch.float32), (None, torch.float32)],
)
def test_a_model_is_evaluated_in_the_precision_of_its_training(precision, seen):
    model, dtypes = DtypeRecorder(), []

    def loss_fn(pred, target):
        dtypes.append(pred.dtype)
        return F.cross_entropy(pred, target)

    data = [(torch.randn(8, 6), torch.randint(3, (8,)))]
    get_valid_accuracy(model, loss_fn, data, mixed_precision=precision)
    assert model.seen == {seen}
    assert dtypes == [torch.float32]


def test_an_unknown_precision_of_an_evaluation_is_worded():
    with pytest.raises(ArgumentError, match="get_valid_accuracy: expected mixed_precision to be one of None, no, bf16"):
        get_valid_accuracy(nn.Linear(6, 3), F.cross_entropy, [], mixed_precision="fp4")


def test_bf16_resumes_to_the_bit(tmp_path):
    def run(name, epochs, **options):
        torch.manual_seed(0)
        fit(tmp_path / name, epochs, model=DtypeRecorder(), mixed_precision="bf16", **options)

    run("whole", 3)
    run("parts", 1)
    run("parts", 3, resume=True)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_scaled_loss_skips_overflows_and_resumes_to_the_bit(tmp_path, monkeypatch):
    scaled(monkeypatch, 2.0**127)  # so large that the first steps overflow

    def run(name, epochs, **options):
        torch.manual_seed(0)
        return fit(
            tmp_path / name, epochs, model=DtypeRecorder(), scheduler_step="batch", clip_grad_norm=0.5,
            scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.5),
            loss_fn=lambda pred, target: 16 * F.cross_entropy(pred, target), **options,
        )  # fmt: skip

    _, logger = run("whole", 3)
    steps = math.log2(0.02 / logger.rows[0]["lr"])
    assert 0 < steps < 8
    assert logger.rows[-1]["loss"] < logger.rows[0]["loss"]
    run("parts", 1)
    run("parts", 3, resume=True)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert "scaler" in store.load(tmp_path / "whole" / "last")[1]["states"]


def test_an_accelerator_of_the_users_own_stays_as_it_was(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    own = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=4)
    try:
        fit(tmp_path, 1, mixed_precision="no")
        assert own.mixed_precision == "bf16"
        assert own.gradient_accumulation_steps == 4
        assert own.num_processes == 1
    finally:
        for kind in (AcceleratorState, GradientState, PartialState):
            kind._reset_state()


def test_modes_of_modules(tmp_path):
    modes = []

    class Recorder(nn.Linear):
        def forward(self, u):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(u)

    model = Recorder(6, 3)
    model.eval()
    fit(tmp_path, 2, model=model)
    assert modes == ([(True, True)] * 8 + [(False, False)] * 3) * 2
    assert model.training


def test_get_valid_accuracy_leaves_each_module_in_its_mode():
    model = net()
    model[1].eval()  # frozen statistics
    before = [module.training for module in model.modules()]
    get_valid_accuracy(model, F.cross_entropy, loader())
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())


def test_get_valid_accuracy_weighs_samples_not_batches():
    u, y = samples(20).tensors
    model = nn.Linear(6, 3)
    loss, accuracy = get_valid_accuracy(model, F.cross_entropy, loader(20), torch.device("cpu"))
    assert loss == pytest.approx(F.cross_entropy(model(u), y).item(), rel=digits(1e-12, 1e-6))
    assert accuracy == (model(u).argmax(1) == y).double().mean().item()
    assert isinstance(loss, float)


def test_get_valid_accuracy_says_nan_where_it_is():
    model = nn.Linear(6, 3)
    nn.init.constant_(model.weight, float("nan"))
    assert math.isnan(get_valid_accuracy(model, F.cross_entropy, loader(20))[0])


def test_nested_inputs_reach_the_model(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, u):
            return self.linear(u["a"] + u["b"][0])

    model = Two()
    data = [({"a": torch.randn(4, 6), "b": [torch.randn(4, 6)]}, torch.tensor([0, 1, 2, 0]))]
    _, logger = train(model, data, data, adam(model), F.cross_entropy, 2, tmp_path, progress=False)
    assert len(logger.rows) == 2


def test_relative_dirname_is_under_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit("CIFAR_Implicit_300_Inf", 1)
    assert (tmp_path / "CIFAR_Implicit_300_Inf" / "best" / "model.safetensors").is_file()


def test_the_model_writes_its_best_itself_when_it_can(tmp_path):
    class Own(nn.Linear):
        def save_pretrained(self, folder):
            store.save(folder, self.state_dict(), {"kind": "Own"})

    model, _ = fit(tmp_path, 2, model=Own(6, 3))
    assert store.load(tmp_path / "best", kind="Own")[0].keys() == {"weight", "bias"}
    load_weights(model, tmp_path / "best")


def test_extra_state_of_a_module(tmp_path):
    class Counting(nn.Linear):
        calls = 0

        def forward(self, u):
            self.calls += self.training
            return super().forward(u)

        def get_extra_state(self):
            return {"calls": self.calls, "seen": torch.tensor(float(self.calls))}

        def set_extra_state(self, state):
            assert state["seen"] == state["calls"]
            self.calls = state["calls"]

    fit(tmp_path, 1, model=nn.Sequential(Counting(6, 3)))
    model, _ = fit(tmp_path, 2, model=nn.Sequential(Counting(6, 3)), resume=True)
    assert model[0].calls == 16
    best = nn.Sequential(Counting(6, 3))
    load_weights(best, tmp_path / "best")
    assert best[0].calls in (8, 16)


def test_tied_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, u):
            return self.two(torch.relu(self.one(u)))

    fit(tmp_path / "whole", 3, model=Tied())
    fit(tmp_path / "parts", 1, model=Tied())
    model, _ = fit(tmp_path / "parts", 3, model=Tied(), resume=True)
    assert model.two.weight is model.one.weight
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_frozen_parameters(tmp_path):
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(
        tmp_path,
        1,
        model=model,
        opt=lambda m: adam(nn.ParameterList(p for p in m.parameters() if p.requires_grad)),
    )
    assert torch.equal(model[0].weight, before)


def test_a_line_per_epoch_where_there_is_no_terminal(tmp_path, capsys):
    fit(tmp_path, 2, progress=True)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1/2  loss ")
    assert second.startswith("epoch 2/2  loss ")
    for part in ("  acc ", "  valid loss ", "  valid acc ", "  forward ", "  backward ", "  missed 0.00%"):
        assert part in first


def test_the_bar_shows_every_figure_while_an_epoch_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the stream for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(loop, "_PAUSE", 0.0)
    fit(tmp_path, 1, progress=True)
    shown = capsys.readouterr().out
    assert "8/8" in shown
    for part in ("epoch 1/1", "loss ", "acc ", "forward ", "backward ", "missed "):
        assert part in shown


def test_progress_can_be_off(tmp_path, capsys):
    fit(tmp_path, 1)
    assert capsys.readouterr() == ("", "")


def test_tensorboard_gets_the_rows_once_each(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((Path(folder), purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            written.append("flush")

        def close(self):
            written.append("close")

    import importlib.util
    import types

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    real = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *p: object() if n == "tensorboard" else real(n, *p))
    _, logger = fit(tmp_path, 1)
    fit(tmp_path, 2, resume=True)
    folder = tmp_path / "tensorboard"
    assert written[0] == (folder, 1)
    assert (folder, 2) in written
    assert ("valid_acc", logger.rows[0]["valid_acc"], 1) in written
    assert Counter(entry[2] for entry in written if entry[0] == "loss") == {1: 1, 2: 1}
    assert written.count("close") == 2


def test_without_accelerate_or_rich(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'implicitdl\[train\]'"):
        fit(tmp_path)


def test_without_rich_the_bar_is_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(MissingExtraError, match=r"this version of rich has no rich.progress"):
        fit(tmp_path / "1", progress=True)
    fit(tmp_path / "2", 1)


def refused(kind=ArgumentError, who="train: expected ", **options) -> str:
    folder = options.pop("folder")
    with pytest.raises(kind) as caught:
        fit(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert who in text
    return text


BAD = {
    "no epochs": ({"epochs": 0}, "epochs to be a positive integer, got 0"),
    "half an epoch": ({"epochs": 1.5}, "epochs to be a positive integer, got 1.5"),
    "negative clipping": ({"clip_grad_norm": -1}, "clip_grad_norm to be a positive finite number, got -1"),
    "negative seed": ({"seed": -1}, "seed to be an integer ≥ 0, got -1"),
    "unknown precision": ({"mixed_precision": "fp4"}, "mixed_precision to be one of None, no, bf16, fp16"),
    "fp16 on the CPU": ({"mixed_precision": "fp16"}, "got the CPU. Use 'bf16' on the CPU."),
    "unknown scheduler step": ({"scheduler_step": "year"}, "scheduler_step to be one of epoch, batch"),
    "no batches": ({"data": []}, "train_dl with batches, got an empty one"),
    "an empty loader": ({"data": loader(4, drop_last=True)}, "train_dl with batches, got an empty one"),
    "no pairs": ({"data": [torch.zeros(3, 6)]}, "batches (input, target), got a Tensor"),
    "triples": ({"data": [(1, 2, 3)]}, "batches (input, target), got 3 parts"),
    "no target tensor": (
        {
            "model": nn.Linear(6, 3, dtype=torch.float64),
            "loss_fn": lambda pred, target: pred.sum(),
            "data": [(torch.zeros(2, 6, dtype=torch.float64), [0, 1])],
        },
        "targets to be a tensor with a row per sample, got a list",
    ),
    "a loss per sample": (
        {"loss_fn": lambda pred, target: F.cross_entropy(pred, target, reduction="none")},
        "loss_fn(pred, target) to be one number, got shape (8,). Average it",
    ),
    "a loss that is no tensor": ({"loss_fn": lambda pred, target: 1.0}, "to be one number, got float"),
    "a mean metric": (
        {"metric": lambda pred, target: (pred.argmax(1) == target).double().mean()},
        "metric(pred, target) of shape (8,), got shape ()",
    ),
    "another model's optimizer": ({"opt": lambda m: adam(net())}, "got 7 of 7 that the model does not have"),
    "another optimizer's scheduler": ({"scheduler": lambda o: cosine(adam(net()))}, "a scheduler of opt"),
    "a closure": ({"opt": lambda m: torch.optim.LBFGS(m.parameters())}, "without a closure, got LBFGS"),
    "a device that is none": ({"device": "gpu"}, "a device such as 'cpu' or 'cuda:0', got 'gpu'"),
    "a device that is not there": ({"device": "xpu:3"}, "a device that this process has (cpu), got 'xpu:3'"),
}


@pytest.mark.parametrize(("options", "words"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(tmp_path, options, words):
    assert words in refused(folder=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "best").exists()


def test_an_empty_validation_loader(tmp_path):
    model = net()
    with pytest.raises(ArgumentError, match="valid_dl with batches, got an empty one"):
        train(model, loader(), [], adam(model), F.cross_entropy, 1, tmp_path / "run")
    with pytest.raises(ArgumentError, match="get_valid_accuracy: expected a loader with batches"):
        get_valid_accuracy(model, F.cross_entropy, [])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dirname", ["", None, 3])
def test_a_dirname_that_is_none(dirname):
    assert "dirname to be a path" in refused(folder=dirname)


def test_a_generator_that_runs_dry(tmp_path):
    text = refused(folder=tmp_path, data=((u, y) for u, y in loader()))
    assert "train_dl with batches, got none in epoch 2. A generator runs dry" in text
    assert store.load(tmp_path / "last")[1]["epoch"] == 1


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(6), 0)] * 16)


def test_a_loader_without_a_length(tmp_path):
    _, logger = fit(tmp_path, 2, data=DataLoader(Stream(), batch_size=8))
    assert len(logger.rows) == 2


def test_a_run_is_not_overwritten(tmp_path):
    fit(tmp_path, 1)
    before = files(tmp_path)
    text = refused(folder=tmp_path)
    assert f"a folder without a run in '{tmp_path}', got one with best. Pass resume=True" in text
    assert files(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", ["best", "metrics.csv", "metrics.jsonl"])
def test_leftovers_of_a_run_are_not_overwritten_either(tmp_path, resume, left):
    fit(tmp_path / "run", 1)
    (tmp_path / "part").mkdir()
    (tmp_path / "run" / left).rename(tmp_path / "part" / left)
    before = files(tmp_path)
    assert f"got one with {left}" in refused(folder=tmp_path / "part", resume=resume)
    assert files(tmp_path) == before


def narrower(m):
    return torch.optim.Adam(list(m.parameters())[1:])


CHANGED = {
    "shapes": (
        {"model": lambda: nn.Sequential(*net()[:-1], nn.Linear(8, 4))},
        "'4.weight' (4, 8) float64 as in the",
    ),
    "dtype": (
        {"model": lambda: net().float()},
        "'0.weight' (8, 6) float32 as in the model, got (8, 6) float64",
    ),
    "more layers": (
        {"model": lambda: nn.Sequential(*net(), nn.Linear(3, 3))},
        "the model's '5.weight', got one with",
    ),
    "fewer layers": (
        {"model": lambda: net()[:4]},
        "a model with the checkpoint's '4.bias', got one without it",
    ),
    "model class": ({"model": lambda: DtypeRecorder()}, "model Sequential, got DtypeRecorder"),
    "optimizer": ({"opt": lambda m: torch.optim.AdamW(m.parameters())}, "optimizer Adam, got AdamW"),
    "parameters": ({"opt": narrower}, "an optimizer over 0.weight 0.bias"),
    "groups": (
        {"opt": lambda m: torch.optim.Adam([{"params": [p]} for p in m.parameters()])},
        "0.weight | 0.bias",
    ),
    "no scheduler": ({"scheduler": None}, "scheduler CosineAnnealingLR, got None"),
    "scheduler": ({"scheduler": lambda o: lr_scheduler.ConstantLR(o)}, "CosineAnnealingLR, got ConstantLR"),
    "seed": ({"seed": 4}, "seed=3, got 4. Leave the seed out"),
    "fewer epochs": ({"epochs": 1}, "epochs ≥ 2, which are done, got 1"),
}


@pytest.mark.float64
def test_resuming_something_else(tmp_path):
    fit(tmp_path, 2, scheduler=cosine)
    before = files(tmp_path)
    for name, (changes, words) in CHANGED.items():
        options = {"scheduler": cosine, "epochs": 3, **changes}
        options["model"] = options.pop("model", net)()
        untouched = bits(options["model"])
        who = f"train(resume) of '{tmp_path}': expected "
        assert words in refused(folder=tmp_path, who=who, resume=True, **options), name
        assert files(tmp_path) == before, name
        assert bits(options["model"]) == untouched, name


def test_resuming_a_damaged_checkpoint(tmp_path):
    fit(tmp_path, 1)
    path = tmp_path / "last" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    text = refused(store.CheckpointError, f"checkpoint '{tmp_path / 'last'}'", folder=tmp_path, resume=True)
    assert "truncated or damaged" in text


def test_resuming_where_last_is_no_run(tmp_path):
    store.save(tmp_path / "last", {}, {"kind": "weights"})
    text = refused(store.CheckpointError, "checkpoint", folder=tmp_path, resume=True)
    assert "a checkpoint of kind 'training', got 'weights'" in text


def test_loading_the_weights_of_another_model(tmp_path):
    fit(tmp_path, 1)
    with pytest.raises(ArgumentError, match=r"load_weights: expected a model with the checkpoint's '3.raw'"):
        load_weights(nn.Sequential(*net()[:3]), tmp_path / "best")


def test_a_state_that_only_a_pickle_could_hold(tmp_path):
    class Odd(lr_scheduler.LRScheduler):
        def __init__(self, opt):
            self.rule = lambda step: step
            super().__init__(opt)

        def get_lr(self):
            return [group["lr"] for group in self.optimizer.param_groups]

    text = refused(folder=tmp_path / "run", scheduler=Odd)
    assert "in the state of scheduler.rule, got a function" in text
    assert "pickles are not used" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("call", "where"), [(3, "batch 3 of epoch 1"), (15, "batch 4 of epoch 2")])
def test_a_loss_that_is_not_finite(undisturbed, tmp_path, value, call, where):
    calls = []

    def loss_fn(pred, target):
        calls.append(1)
        return F.cross_entropy(pred, target) * (value if len(calls) == call else 1.0)

    model = net()
    text = refused(NonFiniteLossError, folder=tmp_path, model=model, loss_fn=loss_fn)
    assert f"a finite loss, got {value} in {where}. Lower the learning rate" in text
    assert store.load(tmp_path / "last")[1]["epoch"] == call // 11
    assert all(p.isfinite().all() for p in model.parameters())  # noticed before the step
    fit(tmp_path, 3, resume=True)
    assert undisturbed(3)["metrics.csv"] == (tmp_path / "metrics.csv").read_bytes()


def test_a_validation_loss_that_is_not_finite(tmp_path):
    def loss_fn(pred, target):
        return F.cross_entropy(pred, target) * (1.0 if pred.requires_grad else float("nan"))

    text = refused(NonFiniteLossError, folder=tmp_path, loss_fn=loss_fn)
    assert "got nan in batch 1 of the validation of epoch 1" in text


def test_a_late_reader_still_names_the_first_bad_batch(tmp_path, monkeypatch):
    """On an accelerator losses are read later; what a NaN broke meanwhile must not hide it."""
    from implicitdl.training.evaluate import Metrics

    metrics = Metrics("train", F.cross_entropy, where="epoch 1")
    metrics._kept = [(torch.tensor(value), 2, 0.0, 0) for value in (1.0, float("nan"), float("inf"))]
    with pytest.raises(NonFiniteLossError, match="got nan in batch 2 of epoch 1"):
        metrics.read()


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_a_folder_that_cannot_be(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    text = refused(store.CheckpointError, "checkpoint", folder=tmp_path / place)
    assert "A file is in the way" in text
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder(tmp_path, monkeypatch, code):
    def refuse(path, *arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    text = refused(store.CheckpointError, "checkpoint", folder=tmp_path / "run")
    assert f"a folder that can be written, got {os.strerror(code)}" in text
    assert os.listdir(tmp_path) == []


# A checkpoint takes 4 syncs, the figures 4: the run opens with 8, its first epoch, which is the best, takes 12,
# and the others 8.
@pytest.mark.parametrize("at", [1, 2, 4, 5, 7, 8, 9, 13, 16, 17, 20, 21, 25])
def test_a_full_disk_at_any_write(tmp_path, monkeypatch, at):
    """Whichever file of whichever epoch finds it full: with room again the run goes on as if nothing was."""
    real, calls = os.fsync, []

    def full(handle):
        calls.append(1)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    def standing_still():
        """No epoch after the first becomes the best: if that one were lost, nothing would bring it back."""
        torch.manual_seed(1)
        return {"model": nn.Linear(6, 3), "opt": lambda m: torch.optim.SGD(m.parameters(), lr=1e-30)}

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        text = refused(store.CheckpointError, "checkpoint", folder=tmp_path / "run", **standing_still())
    assert "room on the disk, got No space left on device. Free some space" in text
    _, logger = fit(tmp_path / "run", 3, resume=True, **standing_still())
    assert logger.best["epoch"] == 1
    fit(tmp_path / "whole", 3, **standing_still())
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_the_seeds_own_training_loop(tmp_path, monkeypatch, capsys):
    """Verbatim from seed 000, with the imports it leaves out."""
    monkeypatch.chdir(tmp_path)

    def train(model, train_dl, valid_dl, optimizer, loss_fn, epochs, dirname, device=None):
        # load the model to GPU / CPU device
        if device is None:
            device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        model.to(device)
        logger = Logger(printstr=["batch: {}. loss: {:.2f}, valid_loss/acc: {:.2f}/{}",
                                  "batch", "loss", "valid_loss", "valid_acc"],
                        dir_name=dirname)  # fmt: skip
        for i in range(epochs):
            j = 0
            for xs, ys in train_dl:
                # forward step
                pred = model(xs.to(device))
                loss = loss_fn(pred, ys.to(device))
                # backward step
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                # log the performance and the model
                valid_res = get_valid_accuracy(model, loss_fn, valid_dl, device)
                log_dict = {"batch": j, "loss": loss, "valid_loss": valid_res[0], "valid_acc": valid_res[1]}
                logger.log(log_dict, model, "valid_acc")
                j += 1
            print(f"--------------epoch: {i}. loss: {loss}")
            pass
        return model, logger

    model = net()
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    model, logger = train(model, loader(), loader(20), opt, F.cross_entropy, 2, "CIFAR_Inf")
    assert model.training
    assert [row["batch"] for row in logger.rows] == [*range(8)] * 2
    assert all(isinstance(row["loss"], float) for row in logger.rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 18
    first = logger.rows[0]
    assert lines[0] == (
        f"batch: 0. loss: {first['loss']:.2f}, valid_loss/acc: {first['valid_loss']:.2f}/{first['valid_acc']}"
    )
    text = (tmp_path / "CIFAR_Inf" / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == logger.rows
    with (tmp_path / "CIFAR_Inf" / "metrics.csv").open() as file:
        assert [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)] == logger.rows
    best = net()
    load_weights(best, "CIFAR_Inf/best")
    accuracies = [row["valid_acc"] for row in logger.rows]
    assert logger.best == logger.rows[accuracies.index(max(accuracies))]
    assert get_valid_accuracy(best, F.cross_entropy, loader(20))[1] == max(accuracies)


def test_logger_holds_no_graph(tmp_path):
    logger = Logger(dir_name=tmp_path)
    loss = torch.ones(1, requires_grad=True).sum()
    logger.log({"loss": loss, "count": np.int64(3), "share": np.float32(0.5), "note": 'a, "b"', "none": None})
    assert logger.rows == [{"loss": 1.0, "count": 3, "share": 0.5, "note": 'a, "b"', "none": None}]
    assert {type(value) for value in logger.rows[0].values()} == {float, int, str, type(None)}
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.reader(file))[1] == ["1.0", "3", "0.5", 'a, "b"', ""]


def test_logger_judges_losses_by_the_smallest_and_nan_by_nothing(tmp_path):
    logger = Logger(dir_name=tmp_path)
    model = nn.Linear(1, 1, bias=False)
    for value in (3.0, float("nan"), 2.0, 2.5, None):
        nn.init.constant_(model.weight, -1.0 if value is None else value)
        logger.log({"valid_loss": value}, model, "valid_loss")
    assert logger.best == {"valid_loss": 2.0}
    load_weights(model, tmp_path / "best")
    assert model.weight.item() == 2.0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["valid_loss"] for line in lines] == [3.0, None, 2.0, 2.5, None]


def test_logger_takes_the_direction_that_it_is_told():
    logger = Logger()
    for value in (2.0, 1.0, 3.0):
        logger.log({"error": value}, metric="error", lower=True)
    assert logger.best == {"error": 1.0}


def test_logger_without_a_folder_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logger = Logger(printstr=["{:.1f}", "a"])
    logger.log({"a": 1}, nn.Linear(1, 1), "a")
    assert capsys.readouterr().out == "1.0\n"
    assert os.listdir(tmp_path) == []


def test_logger_does_not_overwrite_a_run(tmp_path):
    Logger(dir_name=tmp_path).log({"a": 1})
    before = files(tmp_path)
    with pytest.raises(ArgumentError, match=r"Logger: expected a folder without a run in .*Choose another dir_name"):
        Logger(dir_name=tmp_path)
    assert files(tmp_path) == before


def test_logger_goes_on_from_given_rows(tmp_path):
    logger = Logger(dir_name=tmp_path)
    logger.log({"a": 1})
    again = Logger(dir_name=tmp_path, rows=logger.rows)
    again.log({"a": 2})
    assert (tmp_path / "metrics.csv").read_text() == "a\n1\n2\n"


LOGGED = {
    "a vector": ({"a": torch.zeros(2)}, {}, "'a' to be one number, got a tensor of shape (2,)"),
    "an object": ({"a": object()}, {}, "'a' to be one number, got object"),
    "no such metric": ({"a": 1}, {"metric": "b"}, "'b' among the values, got a"),
    "a name too few": ({}, {}, "'a' among the values, got none"),
}


@pytest.mark.parametrize(("values", "options", "words"), LOGGED.values(), ids=LOGGED.keys())
def test_logger_refuses(tmp_path, values, options, words):
    logger = Logger(printstr=["{}", "a"], dir_name=tmp_path)
    with pytest.raises(ArgumentError) as caught:
        logger.log(values, **options)
    assert words in str(caught.value)
    assert logger.rows == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("printstr", [["{} {}", "a"], ["{:d}", "a"], ["{a}", "a"]])
def test_logger_format_that_does_not_fit(printstr):
    with pytest.raises(ArgumentError, match="a format string for a"):
        Logger(printstr=printstr).log({"a": "x"})


@pytest.mark.parametrize("printstr", ["{}", []])
def test_logger_printstr_is_a_list(printstr):
    with pytest.raises(ArgumentError, match=r"printstr=\[format, name"):
        Logger(printstr=printstr)


def test_logger_rows_keep_their_names():
    logger = Logger()
    logger.log({"a": 1, "b": 2})
    with pytest.raises(ArgumentError, match=r"the first row's names \(a, b\), got a, c"):
        logger.log({"a": 1, "c": 2})


def test_logger_columns_keep_their_order(tmp_path):
    logger = Logger(dir_name=tmp_path)
    logger.log({"a": 1, "b": 2})
    logger.log({"b": 4, "a": 3})
    assert (tmp_path / "metrics.csv").read_text() == "a,b\n1,2\n3,4\n"


@contextlib.contextmanager
def files_at_most(size: int):
    """The kernel cuts the write that would go beyond it, in the middle, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_logger_leaves_no_half_line_of_a_cut_write(tmp_path):
    logger = Logger(dir_name=tmp_path)
    logger.log({"a": 1})
    before = files(tmp_path)
    with files_at_most(7), pytest.raises(store.CheckpointError, match="got File too large"):
        logger.log({"a": 123456789})
    assert files(tmp_path) == before


def test_a_cut_write_of_a_checkpoint(undisturbed, tmp_path):
    fit(tmp_path, 1)
    before = files(tmp_path / "last")
    with files_at_most(4096), pytest.raises(store.CheckpointError, match="got File too large"):
        fit(tmp_path, 2, resume=True)
    assert files(tmp_path / "last") == before
    fit(tmp_path, 2, resume=True)
    assert files(tmp_path) == undisturbed(2)


STATES = [
    None, True, 3, -1.5, 1e-300, "text", [], [1, [2]], (), (1, (2, "a")), {}, {"a": {"b": (1, None)}},
    {0: "a", 1: {2.5: "b"}}, {"$tensor": "not one"}, {"$dict": 1}, Counter({3: 2}), float("inf"),
    {"x": float("-inf")}, {None: 1, True: 2}, [np.float32(0.5), np.int64(3), np.bool_(True)],
]  # fmt: skip


def test_packing_through_json():
    for value in STATES:
        tensors: dict = {}
        found = unpack(json.loads(json.dumps(pack(value, "x", tensors), allow_nan=False)), tensors)
        assert found == value
        assert type(found) is type(value), value
        assert tensors == {}, value


def test_packing_tensors_by_path():
    value = {"a.b": torch.zeros(1), "a": {"b": torch.ones(2), 0: (torch.ones(3), [torch.ones(4)])}}
    tensors: dict = {}
    packed = json.loads(json.dumps(pack(value, "x", tensors)))
    assert len(tensors) == 4
    found = unpack(packed, tensors)
    assert torch.equal(found["a.b"], torch.zeros(1))
    assert torch.equal(found["a"]["b"], torch.ones(2))
    assert torch.equal(found["a"][0][0], torch.ones(3))
    assert torch.equal(found["a"][0][1][0], torch.ones(4))


def test_packing_nan():
    assert math.isnan(unpack(pack(float("nan"), "x", {}), {}))


@pytest.mark.parametrize("value", [torch.relu, object(), {1, 2}, b"bytes", 1j, torch.float32])
def test_packing_refuses(value):
    with pytest.raises(ArgumentError, match="Only a pickle could keep it"):
        pack({"a": value}, "x", {})


TWO = """
import json, os, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

sys.path.insert(0, sys.argv[2])
from test_train import adam, files, fit, loader, net, samples
from implicitdl._internal import store
from implicitdl.training import train, get_valid_accuracy

torch.set_default_dtype(torch.float64)
root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
if rank > 0:
    def refuse(*arguments):
        raise AssertionError("only the main process writes")
    os.replace = store._write = store._make = refuse

seen = []
class Recorder(nn.Linear):
    def forward(self, u):
        if self.training:
            seen.append(u[:, 0].tolist())
        return super().forward(u)

def digest(model):
    return {name: value.numpy().tobytes().hex() for name, value in model.state_dict().items()}

# 64 samples, 4 batches of 8 for each; 20 samples of validation are 3 batches, 2 here and 1 there.
model, logger = fit(root / "whole", 3, data=loader(64), mixed_precision=None)
loss, accuracy = get_valid_accuracy(model, F.cross_entropy, loader(20))
fit(root / "parts", 1, data=loader(64))
resumed, _ = fit(root / "parts", 3, data=loader(64), resume=True)
torch.manual_seed(rank)
fit(root / "order", 1, model=Recorder(6, 3), data=loader(64), seed=None)
weighted = loader(64, shuffle=None, sampler=WeightedRandomSampler([1.0] * 64, 64, replacement=False))
order = list(seen)
seen.clear()
fit(root / "weighted", 1, model=Recorder(6, 3), data=weighted)
odd, _ = fit(root / "odd", 1, data=loader(60))
report = {
    "weights": digest(model), "resumed": digest(resumed), "odd": digest(odd), "rows": logger.rows,
    "order": order, "weighted": list(seen), "valid": [loss, accuracy], "best": logger.best,
}
(root / f"rank{rank}.json").write_text(json.dumps(report))
"""


@pytest.mark.float64
def test_two_processes(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    outcome([*launch, str(script), str(tmp_path), str(Path(__file__).parent)], MASTER_ADDR="localhost")
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one["weights"] == two["weights"] == one["resumed"] == two["resumed"]
    assert one["odd"] == two["odd"]
    assert one["rows"] == two["rows"]
    assert one["best"] == two["best"]
    assert one["rows"][-1]["loss"] < one["rows"][0]["loss"]
    assert all(math.isfinite(value) for row in one["rows"] for value in row.values())
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    # Every sample of validation once, however many batches each process had.
    assert one["rows"][-1]["valid_loss"] == pytest.approx(one["valid"][0], rel=1e-12)
    assert one["rows"][-1]["valid_acc"] == one["valid"][1]
    # Together the two see every sample once an epoch: the shares do not overlap.
    everything = sorted(samples(64).tensors[0][:, 0].tolist())
    for name in ("order", "weighted"):
        assert [len(batch) for batch in one[name] + two[name]] == [8] * 8
        assert sorted(x for batch in one[name] + two[name] for x in batch) == everything


def test_a_launch_whose_processes_cannot_be_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    class Alone:
        num_processes, process_index, is_main_process, device, scaler = 1, 0, True, torch.device("cpu"), None

        def __init__(self, **options):
            assert options["cpu"]

    class Module:
        Accelerator = Alone

    real = processes.extra
    monkeypatch.setattr(processes, "extra", lambda m, n: Module if m == "accelerate" else real(m, n))
    assert "2 processes, as this one was launched, got 1 that could be joined" in refused(folder=tmp_path)


def test_gradient_accumulation_from_the_launcher_is_not_swallowed(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert "no gradient accumulation, got 4 steps" in refused(folder=tmp_path / "run")


def test_precision_from_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model = DtypeRecorder()
    fit(tmp_path, 1, model=model)
    assert model.seen == {torch.bfloat16}


def test_ties_in_accuracy_go_to_the_lower_validation_loss():
    logger = Logger()
    for accuracy, loss in ((0.9, 0.5), (0.9, 0.4), (0.8, 0.1), (0.9, 0.45)):
        logger.log({"valid_acc": accuracy, "valid_loss": loss}, metric="valid_acc")
    assert logger.best == {"valid_acc": 0.9, "valid_loss": 0.4}
