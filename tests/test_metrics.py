"""What an accuracy means, for whom it is one, and that it is never a number where it is none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from implicitdl import (
    SIM,
    ArgumentError,
    ImplicitModel,
    get_valid_accuracy,
    jacobian_regularization,
    spectral_radius,
    train,
)
from implicitdl._internal.errors import shown
from implicitdl.sim import SIMWarning, score
from implicitdl.sim.solvers import ADMMSolver

U = torch.tensor([[2.0], [0.5], [-0.5], [-3.0]], dtype=torch.float64)
LABELS = torch.tensor([1, 1, 0, 0])


def bce(y, target):
    return F.binary_cross_entropy_with_logits(y.reshape(len(y)), target.reshape(len(y)).to(y))


def squares(y, target):
    return F.mse_loss(y.reshape(len(y)), target.reshape(len(y)).to(y))


def probabilities(y, target):
    return F.binary_cross_entropy(y.reshape(len(y)), target.reshape(len(y)).to(y))


def accuracy(model, loss_fn, *batches):
    return get_valid_accuracy(model, loss_fn, list(batches))[1]


class TestOneOutput:
    @pytest.mark.parametrize(
        "loss_fn",
        [bce, lambda y, t: 7 * bce(y, t), lambda y, t: F.soft_margin_loss(y.reshape(-1), 2 * t.reshape(-1).to(y) - 1)],
    )
    @pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
    def test_a_logit_above_0_is_label_1(self, loss_fn, shape):
        for labels in (LABELS, LABELS[:, None], LABELS.bool(), LABELS.double(), LABELS[:, None].double()):
            assert accuracy(lambda_module(lambda u: u.reshape(shape)), loss_fn, (U, labels)) == 1.0
            assert accuracy(lambda_module(lambda u: (u + 1).reshape(shape)), loss_fn, (U, labels)) == 0.75
            # 0.3 is above 0 and not above ½: the rule is that of logits
            assert accuracy(lambda_module(lambda u: (0 * u + 0.3).reshape(shape)), loss_fn, (U, labels)) == 0.5

    def test_a_weight_of_the_positive_class_moves_no_logit(self):
        def loss_fn(y, target):
            weight = torch.tensor(50.0, dtype=y.dtype)
            return F.binary_cross_entropy_with_logits(y.squeeze(1), target.to(y), pos_weight=weight)

        assert accuracy(nn.Identity(), loss_fn, (U, LABELS)) == 1.0

    def test_an_implicit_model_that_is_right_is_right(self):
        model = ImplicitModel(6, 1, 8)
        u = torch.randn(40, 6)
        labels = (model(u).detach()[:, 0] > 0).long()
        assert accuracy(model, bce, (u[:30], labels[:30]), (u[30:], labels[30:])) == 1.0

    @pytest.mark.parametrize("labels", [LABELS, LABELS.double(), LABELS.double()[:, None]])
    def test_a_regression_has_none(self, labels):
        assert accuracy(nn.Identity(), squares, (U, labels)) is None

    def test_probabilities_are_no_logits(self):
        with pytest.raises(ArgumentError, match="get_valid_accuracy: expected a loss of logits for one output and int"):
            accuracy(nn.Sigmoid(), probabilities, (U, LABELS))
        assert accuracy(nn.Sigmoid(), probabilities, (U, LABELS.double())) is None

    def test_cross_entropy_of_one_class_says_nothing(self):
        with pytest.raises(ArgumentError, match="or give the model an output for every class"):
            accuracy(nn.Identity(), F.cross_entropy, (U, 0 * LABELS))

    def test_labels_are_0_and_1(self):
        with pytest.raises(ArgumentError, match=r"labels 0 and 1 for one output, got \[1, 2\]"):
            accuracy(nn.Identity(), bce, (U, LABELS + 1))

    def test_soft_labels_have_none_in_whatever_batch(self):
        soft = 0.9 * LABELS.double() + 0.05
        assert accuracy(nn.Identity(), bce, (U, LABELS.double()), (U, soft)) is None
        assert accuracy(nn.Identity(), bce, (U, soft), (U, LABELS.double())) is None

    def test_training_tells_the_same(self, tmp_path):
        model = ImplicitModel(1, 1, 4, dtype=torch.float64)
        opt = torch.optim.SGD(model.parameters(), lr=1e-9)
        with torch.no_grad():
            model.C.zero_()
            model.D.fill_(1.0)
        batches = [(U, LABELS), (U[:1], LABELS[:1])]
        _, logger = train(model, batches, batches, opt, bce, 1, tmp_path / "run", progress=False)
        assert (logger.rows[0]["acc"], logger.rows[0]["valid_acc"]) == (1.0, 1.0)


def lambda_module(function):
    class Module(nn.Module):
        def forward(self, u):
            return function(u)

    return Module()


class TestSeveralOutputs:
    def test_several_labels_a_sample_have_none(self):
        u = torch.randn(5, 3)
        many = (u > 0).double()
        assert accuracy(nn.Identity(), F.binary_cross_entropy_with_logits, (u, many)) is None

    def test_what_the_loss_leaves_out_is_not_counted(self):
        labels = torch.tensor([0, 1, -100, 2])
        logits = torch.eye(4, 3, dtype=torch.float64)
        logits[3] = 0.0
        assert accuracy(nn.Identity(), F.cross_entropy, (logits, labels)) == pytest.approx(2 / 3)

    @pytest.mark.parametrize("label", [-1, 3, 10**6])
    def test_a_label_that_is_no_class_is_worded(self, label, tmp_path):
        batch = torch.eye(3, dtype=torch.float64), torch.tensor([0, label, 1])
        words = f"labels from 0 to 2, one for each of 3 outputs, got {label}. Number the classes from 0"
        with pytest.raises(ArgumentError, match=words):
            accuracy(nn.Identity(), F.cross_entropy, batch)
        model = nn.Linear(3, 3, dtype=torch.float64)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ArgumentError, match=words):
            train(model, [batch], [batch], opt, F.cross_entropy, 1, tmp_path / "run", progress=False)

    def test_a_nan_is_never_right(self):
        logits = torch.full((4, 3), math.nan, dtype=torch.float64)
        assert accuracy(nn.Identity(), F.cross_entropy, (logits, torch.zeros(4, dtype=torch.long))) == 0.0
        assert score(nn.Identity(), [(logits, torch.zeros(4, dtype=torch.long))]) == 0.0

    def test_a_small_last_batch_counts_for_its_samples(self):
        logits = torch.eye(3, dtype=torch.float64)
        batches = [(logits[[0] * 9], torch.zeros(9, dtype=torch.long)), (logits[:1], torch.ones(1, dtype=torch.long))]
        assert accuracy(nn.Identity(), F.cross_entropy, *batches) == 0.9
        assert score(nn.Identity(), batches) == 0.9


class TestScore:
    """What `SIM.evaluate` returns."""

    def test_one_output_is_a_logit(self):
        assert score(nn.Identity(), [(U, LABELS)]) == 1.0
        assert score(nn.Identity(), [(U + 1, LABELS[:, None])]) == 0.75

    def test_one_hot_labels_are_classes(self):
        y = torch.eye(3, dtype=torch.float64)
        assert score(nn.Identity(), [(y, torch.eye(3, dtype=torch.long))]) == 1.0
        assert score(nn.Identity(), [(y, torch.eye(3).bool().flip(0))]) == pytest.approx(1 / 3)

    @pytest.mark.parametrize(
        ("target", "words"),
        [
            (torch.ones(4, 3, dtype=torch.long), "integer targets \\(batch, q\\) to be one-hot"),
            (torch.tensor([0, 1, 2, 3]), "labels from 0 to 2, got 3"),
            (torch.tensor([0, 1, 2, -1]), "labels from 0 to 2, got -1"),
            (torch.zeros(4, 2, dtype=torch.long), "classes of shape \\(batch=4,\\), or one-hot \\(4, 3\\), got"),
            (torch.zeros(4, 2), "floating targets of shape \\(4, 3\\), got \\(4, 2\\)"),
            (torch.zeros(3, 3), "targets to be a tensor of shape \\(batch=4, ...\\)"),
            ([0, 1, 2, 0], "targets to be a tensor of shape \\(batch=4, ...\\), got list"),
        ],
    )
    def test_what_is_neither_is_worded(self, target, words):
        with pytest.raises(ArgumentError, match=words):
            score(nn.Identity(), [(torch.zeros(4, 3, dtype=torch.float64), target)])

    def test_labels_of_one_output(self):
        with pytest.raises(ArgumentError, match="labels from 0 to 1, got 2"):
            score(nn.Identity(), [(U, LABELS + 1)])


class TestOrderOfValidation:
    """A loader that draws its order from a generator of its own sees in a resumed run what it saw undisturbed."""

    def run(self, folder, epochs, resume=False):
        torch.manual_seed(0)
        u = torch.randn(60, 4)
        data = TensorDataset(u, u.sum(dim=1).gt(0).long())
        some = torch.utils.data.RandomSampler(data, num_samples=20, generator=torch.Generator().manual_seed(5))
        loaders = (
            DataLoader(data, 8, shuffle=True),
            DataLoader(data, 8, sampler=some, generator=torch.Generator().manual_seed(6)),
        )
        model = nn.Linear(4, 2)
        opt = torch.optim.Adam(model.parameters(), lr=0.1)
        _, logger = train(
            model, *loaders, opt, F.cross_entropy, epochs, folder, seed=1, resume=resume, progress=False
        )  # fmt: skip
        return logger.rows

    def test_a_resumed_run_has_the_same_rows(self, tmp_path):
        whole = self.run(tmp_path / "whole", 4)
        self.run(tmp_path / "parts", 1)
        self.run(tmp_path / "parts", 3, resume=True)
        assert self.run(tmp_path / "parts", 4, resume=True) == whole
        assert len({row["valid_loss"] for row in whole}) == 4


class TestDeadTeacher:
    def test_constant_states_are_said_once(self):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        with torch.no_grad():
            teacher[0].bias.fill_(-100.0)
        words = r"all 6 states of '1' \(relu\) are the same for every sample: the teacher does not use its input"
        with pytest.warns(SIMWarning, match=words) as caught:
            SIM(dtype=torch.float64).train(ADMMSolver(), teacher, [torch.randn(30, 4)])
        assert len(caught) == 1

    def test_a_living_one_is_not_spoken_of(self):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        SIM(dtype=torch.float64).train(ADMMSolver(), teacher, [torch.randn(30, 4)])


class TestJacobian:
    @pytest.mark.parametrize(
        ("f", "x", "words"),
        [
            (
                lambda x: x.detach() * 0.5,
                torch.ones(2, 3),
                "an f that autograd can differentiate, got one whose result",
            ),
            (torch.no_grad()(lambda x: 0.5 * x), torch.ones(2, 3), "an f that autograd can differentiate"),
            (lambda x: torch.from_numpy(0.5 * x.detach().numpy()), torch.ones(2, 3), "an f that autograd can"),
            (lambda x: x, torch.ones(2, 3, dtype=torch.long), "floating tensor .* got \\(2, 3\\) of torch.int64"),
            (lambda x: x, torch.ones(2, 3, dtype=torch.complex64), "floating tensor .* of torch.complex64"),
            (lambda x: x, torch.tensor(1.0), "floating tensor"),
            (lambda x: x, torch.zeros(0, 3), "floating tensor \\(batch ≥ 1"),
            (lambda x: x, [torch.ones(2, 3)], "floating tensor .* got list"),
            (torch.ones(2, 3), torch.ones(2, 3), "f to be a function"),
        ],
    )
    def test_what_has_no_jacobian_is_worded(self, f, x, words):
        for of in (jacobian_regularization, spectral_radius):
            with pytest.raises(ArgumentError, match=words):
                of(f, x)

    def test_in_inference_mode_it_is_refused_and_not_zero(self):
        for of in (jacobian_regularization, spectral_radius):
            with torch.inference_mode(), pytest.raises(ArgumentError, match=r"got torch\.inference_mode"):
                of(lambda x: 0.5 * x, torch.ones(2, 3))

    def test_a_map_in_place_is_worded(self):
        for of in (jacobian_regularization, spectral_radius):
            with pytest.raises(ArgumentError, match="expected f to leave its argument x as it is"):
                of(lambda x: x.mul_(0.5), torch.ones(2, 3))

    def test_a_constant_and_a_tensor_of_inference_mode_have_one(self):
        with torch.inference_mode():
            x = torch.ones(2, 3)
        for f, value in ((lambda x: torch.ones(2, 3), 0.0), (lambda x: 0.5 * x, 0.5)):
            assert spectral_radius(f, x).value.tolist() == [value, value]
            assert float(jacobian_regularization(f, x)) == value**2


def test_a_report_can_be_printed_on_a_console_of_ascii(monkeypatch):
    class Console:
        encoding = "ascii"

    teacher = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    report = SIM(dtype=torch.float64).train(model=teacher, dataloader=[torch.randn(30, 4)])
    assert "‖A‖∞" in str(report)
    monkeypatch.setattr("implicitdl._internal.errors.sys.stdout", Console)
    assert "||A||inf" in str(report).encode("ascii").decode()
    assert shown("ε = 0.1, Ж") == "eps = 0.1, ?"
