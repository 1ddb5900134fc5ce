"""Certified training: exact gradients, a trained model that keeps its certificates, the attack, the report, the pictures."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from implicitdl import ArgumentError, ImplicitAdjoint, ImplicitModel, Picard, StateSpace, certify, viz
from implicitdl.activations import RELU, TANH
from implicitdl.certify import Box, CertifiedAccuracy, CertifiedLoss, Crown, Interval, Sensitivity
from implicitdl.certify.functionals import losing_by
from implicitdl.cli import main
from implicitdl.data import load

EPS = 0.08


class Wrapped:
    """A StateSpace in the place of a model."""

    def __init__(self, space: StateSpace) -> None:
        self.space = space

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        return self.space(u)

    def statespace(self) -> StateSpace:
        return self.space


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    data = load("digits", 100)
    train, test = data.train_ds, data.test_ds
    return train.pixels.flatten(1) / train.white, train.labels, test.pixels.flatten(1) / test.white, test.labels


def cross_entropy(model: ImplicitModel, u: torch.Tensor, labels: torch.Tensor, step: int) -> torch.Tensor:
    return F.cross_entropy(model(u), labels)


LOSSES = {"standard": cross_entropy, "certified": CertifiedLoss(eps=EPS, ramp=100, wait=20)}


def trained(how: str) -> ImplicitModel:
    return trained_in(torch.get_default_dtype(), how)


@functools.cache
def trained_in(dtype: torch.dtype, how: str) -> ImplicitModel:
    torch.manual_seed(0)
    u, labels, _, _ = digits()
    model = ImplicitModel(input_dim=64, output_dim=10, hidden_dim=20, bias=True, kappa=0.9)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(200):
        rows = torch.randint(len(u), (128,))
        loss = LOSSES[how](model, u[rows], labels[rows], step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


class TestLoss:
    @pytest.mark.float64
    @pytest.mark.parametrize("phi", [RELU, TANH])
    @pytest.mark.parametrize("shares", [{}, {"clean": (0.0, 0.3)}, {"crown": (0.0, 0.5)}, {"crown": (1.0, 1.0)}])
    def test_gradients_are_exact(self, phi, shares):
        exact = Picard(rtol=1e-13, max_steps=2000)
        loss = CertifiedLoss(eps=0.1, ramp=4, **shares, solver=exact, adjoint=ImplicitAdjoint(solver=exact))
        u, labels = torch.rand(3, 4), torch.tensor([0, 2, 1])
        A = torch.randn(5, 5)
        parts = (0.8 * A / A.abs().sum(1, keepdim=True), torch.randn(5, 4), torch.randn(3, 5), torch.randn(3, 4))
        parts = (*parts, torch.randn(5), torch.randn(3))

        def of(*weights: torch.Tensor) -> torch.Tensor:
            return loss(Wrapped(StateSpace(*weights, blocks=phi)), u, labels, step=3)

        assert torch.autograd.gradcheck(of, tuple(part.requires_grad_() for part in parts), fast_mode=True)

    @pytest.mark.float64
    def test_it_is_the_cross_entropy_of_the_certified_margins(self):
        model = trained("certified")
        _, _, u, labels = digits()
        u, labels = u[:20], labels[:20]
        for method, shares in ((Interval(), (0.0, 0.0)), (Crown(), (1.0, 1.0))):
            loss = CertifiedLoss(eps=EPS, ramp=1, crown=shares)
            worst = loss.worst(model.statespace(), Box.around(u, EPS), labels, shares[0])
            lower = certify.margins(model, Box.around(u, EPS), labels, method).lower
            others = torch.arange(10) != labels.unsqueeze(1)
            assert (-worst[others] <= lower[others] + 1e-6).all()
            assert loss(model, u, labels, step=1).item() == pytest.approx(F.cross_entropy(worst, labels).item())
            assert (worst[~others] == 0).all()

    def test_the_ramp(self):
        loss = CertifiedLoss(eps=0.1, ramp=10, wait=5, clean=(1.0, 0.0))
        assert [loss.progress(step) for step in (0, 5, 10, 15, 99)] == [0, 0, 0.5, 1, 1]
        model, u, labels = trained("certified"), digits()[2][:5], digits()[3][:5]
        assert loss(model, u, labels, step=0).item() == pytest.approx(F.cross_entropy(model(u), labels).item())
        assert loss(model, u, labels, step=99) > loss(model, u, labels, step=0)

    def test_refusals(self):
        with pytest.raises(ArgumentError, match="CertifiedLoss: expected eps ≥ 0, got -1"):
            CertifiedLoss(eps=-1, ramp=1)
        with pytest.raises(ArgumentError, match="expected ramp to be a positive integer, got 0"):
            CertifiedLoss(eps=0.1, ramp=0)
        with pytest.raises(ArgumentError, match=r"expected crown to be two shares in \[0, 1\], got \(0, 2\)"):
            CertifiedLoss(eps=0.1, ramp=1, crown=(0, 2))


class TestTrained:
    @pytest.mark.float64
    @pytest.mark.parametrize("method", [Sensitivity(), Interval(), Crown(rounds=1), Crown(steps=3)])
    def test_10000_random_perturbations(self, method):
        model = trained("certified").statespace().detach()
        _, _, u, labels = digits()
        box = Box.around(u[:100], EPS)
        found = certify.margins(model, box, labels[:100], method)
        where = torch.rand(100, 100, 64).round()
        tried = (box.lower + where * (box.upper - box.lower)).flatten(0, 1)
        y = model(tried).view(100, 100, 10)
        lead = y.gather(2, labels[:100].expand(100, 100).unsqueeze(2)) - y
        others = torch.arange(10) != labels[:100].unsqueeze(1)
        assert (lead.amin(0)[others] >= found.lower[others] - 1e-8).all()

    def test_it_pays(self):
        _, _, u, labels = digits()
        standard, robust = (
            certify.certified_accuracy(trained(how), [(u[:180], labels[:180]), (u[180:], labels[180:])], EPS)
            for how in LOSSES
        )
        for report in (standard, robust):
            assert report.samples == 360
            assert report.certified <= report.attacked <= report.clean
        assert standard.clean > 0.9
        assert robust.clean > 0.85
        assert robust.certified > standard.certified + 0.2
        assert f"certified {robust.certified:.2%} of 360 samples" in str(robust)

    def test_tighter_methods_certify_more(self):
        _, _, u, labels = digits()
        counts = [
            int(certify.margins(trained("standard"), Box.around(u, 0.01), labels, method).certified.sum())
            for method in (Sensitivity(), Interval(), Crown(), Crown(rounds=1))
        ]
        assert counts == sorted(counts)
        assert counts[-1] > counts[0]


class TestAttack:
    @pytest.mark.float64
    def test_it_finds_the_corner_of_a_linear_model(self):
        D = torch.randn(3, 6)
        u, labels = torch.rand(5, 6), torch.randint(3, (5,))
        worst = certify.pgd(StateSpace.affine(D), u, labels, 0.1, steps=10, domain=None)
        rivals = (D - D[labels].unsqueeze(1)).masked_fill((torch.arange(3) == labels.unsqueeze(1)).unsqueeze(2), 0.0)
        margin = (rivals @ u.unsqueeze(2)).squeeze(2) + 0.1 * rivals.abs().sum(2)
        margin = margin.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
        found = losing_by(worst @ D.t(), labels)
        assert (found <= margin + 1e-12).all()
        assert (found >= margin - 1e-12).sum() >= 4

    @pytest.mark.float64
    def test_it_stays_in_ball_and_domain_and_never_helps(self):
        model = trained("standard")
        _, _, u, labels = digits()
        images = u[:30].view(30, 1, 8, 8)
        worst = certify.pgd(model, images, labels[:30], 0.1, steps=5, restarts=2, generator=torch.Generator())
        assert worst.shape == images.shape
        assert ((worst - images).abs() <= 0.1 + 1e-12).all()
        assert ((worst >= 0) & (worst <= 1)).all()
        assert (losing_by(model(worst), labels[:30]) >= losing_by(model(images), labels[:30])).all()
        assert not worst.requires_grad
        assert all(parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in model.parameters())

    def test_more_restarts_are_never_worse(self):
        model, u, labels = trained("standard"), digits()[2][:30], digits()[3][:30]
        one, many = (certify.pgd(model, u, labels, 0.1, steps=3, restarts=count) for count in (1, 4))
        assert (losing_by(model(many), labels) >= losing_by(model(one), labels)).all()

    def test_refusals(self):
        u, labels = torch.rand(2, 3), torch.zeros(2, dtype=torch.int64)
        for settings, words in (
            ({"eps": -1.0}, "pgd: expected eps ≥ 0"),
            ({"eps": 0.1, "steps": 0}, "expected steps to be a positive integer"),
            ({"eps": 0.1, "restarts": 0}, "expected restarts to be a positive integer"),
        ):
            with pytest.raises(ArgumentError, match=words):
                certify.pgd(torch.sin, u, labels, **settings)
        with pytest.raises(ArgumentError, match=r"expected labels of shape \(batch=2,\) int64, got \(\(1,\)"):
            certify.pgd(torch.sin, u, labels[:1], 0.1)
        with pytest.raises(ArgumentError, match="certified_accuracy: expected a loader with samples, got none"):
            certify.certified_accuracy(trained("certified"), [], 0.1)
        with pytest.raises(ArgumentError, match="attacked_accuracy: expected a loader with samples, got none"):
            certify.attacked_accuracy(torch.sin, [], 0.1)


class TestPictures:
    def test_robust_accuracy_draws_the_reports_in_order(self):
        reports = [CertifiedAccuracy(eps, 10, 0.9, 0.8 - eps, 0.7 - eps, 0.0) for eps in (0.1, 0.01)]
        lines = viz.robust_accuracy(reports).axes[0].lines
        assert [line.get_label() for line in lines] == ["clean", "attacked", "certified"]
        np.testing.assert_allclose(lines[2].get_xdata(), [0.01, 0.1])
        np.testing.assert_allclose(lines[2].get_ydata(), [69.0, 60.0])
        with pytest.raises(ArgumentError, match="robust_accuracy: expected a report per radius, got none"):
            viz.robust_accuracy([])

    def test_pixel_sensitivity_draws_the_rows_of_the_matrix(self, tmp_path):
        model = trained("certified")
        figure = viz.pixel_sensitivity(model, (1, 8, 8), path=tmp_path / "pixels.png")
        S = certify.sensitivity(model)
        np.testing.assert_allclose(figure.axes[3].images[0].get_array(), S[3].view(8, 8))
        assert (tmp_path / "pixels.png").stat().st_size > 0
        with pytest.raises(ArgumentError, match=r"expected a \(channels, height, width\) of p=64 pixels, got \(8, 8\)"):
            viz.pixel_sensitivity(model, (8, 8))


@pytest.mark.usefixtures("float32")
class TestCommand:
    @pytest.fixture(scope="class")
    @staticmethod
    def run(tmp_path_factory):
        folder = tmp_path_factory.mktemp("certify") / "run"
        assert main(["train", "--hidden-dim", "8", "--epochs", "1", "--out", str(folder)]) == 0
        return folder

    def test_it_reports_and_draws(self, run, capsys):
        assert (
            main(["certify", str(run), "--eps", "0.02", "--eps", "0.001", "--samples", "70", "--attack-steps", "3"])
            == 0
        )
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "well posed"
        assert any(line.startswith("Lipschitz constants: ") for line in lines)
        figures = [line for line in lines if line.startswith("ε = ")]
        assert [line.split(":")[0] for line in figures] == ["ε = 0.001", "ε = 0.02"]
        assert all("of 70 samples" in line for line in figures)
        assert {path.name for path in (run / "plots").iterdir()} >= {"robust.png", "sensitivity.png"}

    @pytest.mark.parametrize("method", ["interval", "sensitivity"])
    def test_other_methods(self, run, method, capsys):
        words = ["--eps", "0.001", "--samples", "8", "--method", method, "--attack-steps", "1"]
        assert main(["certify", str(run), *words]) == 0
        assert "of 8 samples" in capsys.readouterr().out

    def test_refusals(self, run, capsys):
        for words, message in (
            (
                ["--method", "magic"],
                "certify: expected --method to be one of crown, interval, sensitivity, got 'magic'",
            ),
            (["--samples", "0"], "certify: expected --samples to be a positive integer, got 0"),
            (["--method", "interval", "--rounds", "1"], "with --method crown alone, got --method interval"),
            (["--eps", "-1"], "certify: expected --eps ≥ 0, got -1.0"),
            (["--eps", "nan"], "certify: expected --eps ≥ 0, got nan"),
            (["--eps", "0.1", "--eps", "inf"], "certify: expected a finite --eps, got inf"),
            (["--attack-steps", "0"], "certify: expected --attack-steps to be a positive integer, got 0"),
            (["--restarts", "0"], "certify: expected --restarts to be a positive integer, got 0"),
            (["--rounds", "-1"], "certify: expected --rounds to be an integer ≥ 0, got -1"),
            (["--slope-steps", "-1"], "certify: expected --slope-steps to be an integer ≥ 0, got -1"),
        ):
            capsys.readouterr()
            assert main(["certify", str(run), *words]) == 2
            out, err = capsys.readouterr()
            assert message in err
            assert out == ""  # refused at the door, before anything is proved

    def test_what_no_box_bounds_is_attacked(self, tmp_path, capsys):
        """Monotone, λ_pf(|A|) far above 1: where iteration does not find the state, the model's own solver does."""
        out = str(tmp_path / "run")
        assert main(["train", "--hidden-dim", "8", "--epochs", "1", "--constraint", "monotone", "--out", out]) == 0
        model = ImplicitModel.from_pretrained(tmp_path / "run" / "best")
        with torch.no_grad():
            model.A *= 3
        model.save_pretrained(tmp_path / "run" / "best")
        assert not certify.well_posed(model).conditions[2].holds
        capsys.readouterr()
        assert main(["certify", out, "--eps", "0.02", "--eps", "0", "--samples", "70", "--attack-steps", "3"]) == 0
        printed, err = capsys.readouterr()
        assert err == ""
        *_, lipschitz, unknown, at_zero, at_radius = printed.splitlines()
        assert lipschitz == (
            f"Lipschitz constants: unknown in the ∞-norm, {certify.lipschitz_two(model):.4g} in the 2-norm"
        )
        assert "box bounds need λ_pf(max|φ'||A|) < 1" in unknown
        data = load("digits", 70, holdout=0.1)
        u, labels = next(iter(data.test_dl))
        clean = float((model(u).argmax(1) == labels).float().mean())
        assert at_zero == f"ε = 0: clean {clean:.2%}, attacked {clean:.2%} of 70 samples"
        assert re.match(rf"ε = 0.02: clean {clean:.2%}, attacked [\d.]+% of 70 samples", at_radius)
        assert not (tmp_path / "run" / "plots").exists()
