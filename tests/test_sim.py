"""SIM: a model that is the teacher, exactly inside its ball; evaluation, devices and dtypes, paths, bad input."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, Subset, TensorDataset

import implicitdl
from implicitdl import ArgumentError, Auto, ImplicitModel
from implicitdl.activations import BUILTIN
from implicitdl.certify import well_posed
from implicitdl.constraints import LowRank, RowScaling, Unconstrained, WeightedRowScaling
from implicitdl.data import import_torchvision, load
from implicitdl.sim import SIM, SIMWarning, get_states, score
from implicitdl.sim.solvers import ADMMSolver, BaseSolver, CVXSolver, LeastSquareSolver, ProjectedGDLowRankSolver
from implicitdl.solution import ImplicitFunctionWarning
from standins import bytes_of, write_idx

SEEDS = Path(__file__).resolve().parents[2] / "shared" / "seeds"


def mlp(phi, sizes=(6, 10, 8, 3), bias=True, size=2.0):
    parts = []
    for into, out in pairwise(sizes):
        linear = nn.Linear(into, out, bias=bias)
        with torch.no_grad():
            linear.weight *= size
        parts += [linear, phi()]
    return nn.Sequential(*parts[:-1])


def split(u):
    return u.split(128)


# Hardly any penalty, and one that few rows need long for.
EXACT, QUICK = ADMMSolver(lambda_z=1e-9, lambda_y=1e-9), ADMMSolver(lambda_z=1e-2, lambda_y=1e-2)

TEACHERS = {
    "relu": (nn.ReLU, torch.relu, RowScaling),
    "leaky relu": (nn.LeakyReLU, F.leaky_relu, RowScaling),
    "tanh": (nn.Tanh, torch.tanh, WeightedRowScaling),
    "silu": (nn.SiLU, F.silu, WeightedRowScaling),
    "sigmoid": (nn.Sigmoid, torch.sigmoid, WeightedRowScaling),
}


@pytest.fixture(params=TEACHERS)
def case(request):
    phi, function, ball = TEACHERS[request.param]
    return mlp(phi), function, ball, torch.randn(300, 6)


def test_the_seeds_names_of_sim_are_at_the_root():
    for name in ("ADMMSolver", "ADMMMultiGPUSolver", "CVXSolver", "LeastSquareSolver", "ProjectedGDLowRankSolver"):
        assert getattr(implicitdl, name) is getattr(implicitdl.sim.solvers, name)
    assert implicitdl.SIM is implicitdl.sim.SIM


class TestModel:
    def test_it_is_the_teacher_although_the_teacher_is_outside_the_ball(self, case):
        teacher, phi, ball, u = case
        assert max(part.weight.abs().sum(1).max() for part in teacher[2::2]) > 1.5
        sim = SIM(phi, dtype=torch.float64)
        report = sim.train(EXACT, teacher, split(u))
        assert type(sim.model.constraint) is ball
        assert report.weights.max() > 1.5
        fresh = torch.randn(100, 6)
        torch.testing.assert_close(sim(fresh), teacher(fresh).double(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_rows_are_in_the_ball_exactly_and_the_constraint_leaves_them(self, case, dtype):
        teacher, phi, _, u = case
        sim = SIM(phi, kappa=0.9, dtype=dtype)
        report = sim.train(QUICK, teacher, split(u))
        A = sim.model.weights()[0].detach()
        assert A.dtype == dtype
        assert torch.equal(A, sim.model.A)
        v = getattr(sim.model.constraint, "weights", torch.ones(len(A))).double()
        rows = (A.double().abs() * v / v[:, None]).sum(1)
        assert rows.max() <= 0.9
        assert report.norm == pytest.approx(float(rows.max()), rel=1e-12)

    def test_without_rescaling_rows_lie_on_the_ball_and_the_model_is_not_the_teacher(self):
        teacher, u = mlp(nn.ReLU, size=3.0), torch.randn(300, 6)
        free, bound = SIM(dtype=torch.float64), SIM(dtype=torch.float64, rescale=False)
        free.train(QUICK, model=teacher, dataloader=split(u))
        report = bound.train(QUICK, model=teacher, dataloader=split(u))
        assert report.weights is None
        assert (report.hidden.norm > 0.989).any()
        y = teacher(u)
        assert (bound(u) - y).norm() > 10 * (free(u) - y).norm()

    def test_it_trains_further_saves_and_certifies(self, case, tmp_path):
        teacher, phi, _, u = case
        sim = SIM(phi)
        sim.train(QUICK, model=teacher, dataloader=split(u))
        u = u.float()
        assert well_posed(sim.model)
        sim.model.save_pretrained(tmp_path / "model")
        again = ImplicitModel.from_pretrained(tmp_path / "model")
        assert torch.equal(again(u), sim.model(u))
        target, opt = torch.randn(300, 3).float(), optim.SGD(sim.model.parameters(), lr=1e-3)
        before = F.mse_loss(sim.model(u), target)
        before.backward()
        opt.step()
        assert F.mse_loss(sim.model(u), target) < before
        assert sim.model.constraint.contains(sim.model.weights()[0].detach())

    def test_biases_are_the_teachers_or_as_asked(self):
        u = torch.randn(300, 6)
        for teacher, asked, biased in (
            (mlp(nn.ReLU), None, True), (mlp(nn.ReLU, bias=False), None, False), (mlp(nn.ReLU, bias=False), True, True),
        ):  # fmt: skip
            sim = SIM(bias=asked)
            sim.train(QUICK, model=teacher, dataloader=split(u))
            assert sim.model.bias is biased

    def test_biases_are_not_penalised(self):
        teacher = mlp(nn.ReLU, (6, 4, 2))
        sim = SIM(dtype=torch.float64)
        states = get_states(teacher, [torch.randn(300, 6)])
        large = float((states["Z"] @ torch.cat([states["X"], states["U"]]).t()).abs().max())
        sim.train(ADMMSolver(lambda_z=10 * large, lambda_y=10 * large), teacher, [states["U"].t()])
        assert not sim.model.A.any()
        torch.testing.assert_close(sim.model.b_x.detach(), states["Z"].double().mean(1))

    def test_a_low_rank_solution_is_a_low_rank_model(self):
        sim = SIM(dtype=torch.float64)
        sim.train(ProjectedGDLowRankSolver(rank=3), mlp(nn.ReLU), [torch.randn(200, 6)])
        assert isinstance(sim.model.constraint, LowRank)
        assert sim.model.rank == 3

    def test_a_solution_outside_the_ball_is_not_constrained_and_said_so(self):
        teacher, u = mlp(nn.ReLU, size=4.0), torch.randn(300, 6)
        sim = SIM(dtype=torch.float64, rescale=False)
        with pytest.warns(SIMWarning):
            sim.train(LeastSquareSolver(), teacher, [u])
        assert isinstance(sim.model.constraint, Unconstrained)
        torch.testing.assert_close(sim(u), teacher(u).double(), rtol=1e-5, atol=1e-6)

    def test_an_implicit_teacher_becomes_a_sparser_model(self):
        teacher, u = ImplicitModel(6, 2, 12, dtype=torch.float64), torch.randn(300, 6, dtype=torch.float64)
        with torch.no_grad():
            teacher.A *= 3
        sim = SIM(dtype=torch.float64)
        report = sim.train(ADMMSolver(lambda_z=1e-3, lambda_y=1e-3), teacher, split(u))
        torch.testing.assert_close(sim(u), teacher(u), rtol=1e-2, atol=1e-3)
        assert report.nonzeros < sum(p.numel() for p in teacher.parameters())

    def test_a_teacher_in_bfloat16_is_matched_in_float32(self):
        teacher, u = mlp(nn.ReLU).bfloat16(), torch.randn(300, 6)
        sim = SIM()
        sim.train(QUICK, model=teacher, dataloader=split(u))
        assert sim.model.A.dtype == torch.float32
        assert (sim(u) - teacher(u.bfloat16())).norm() < 0.05 * teacher(u.bfloat16()).norm()

    def test_chosen_layers_only(self):
        teacher, u = mlp(nn.ReLU), torch.randn(300, 6)
        sim = SIM(layers=["1"])
        sim.train(QUICK, model=teacher, dataloader=[u])
        assert sim.model.hidden_dim == 10


class TestReport:
    @pytest.fixture
    def trained(self):
        sim, u = SIM(dtype=torch.float64), torch.randn(300, 6)
        return sim.train(QUICK, model=mlp(nn.ReLU), dataloader=[u]), sim, u

    def test_rows(self, trained):
        report, sim, _ = trained
        for rows, count in ((report.hidden, 18), (report.output, 3)):
            for values in (rows.objective, rows.gap, rows.relative_gap, rows.norm, rows.support, rows.converged):
                assert values.shape == (count,)
            assert bool(rows.converged.all())
            assert bool((rows.gap >= 0).all())
        assert report.nonzeros == sum(int((getattr(sim.model, name) != 0).sum()) for name in "ABCD")
        assert report.samples == 300
        assert [layer.features for layer in report.layers] == [8, 10]

    def test_words(self, trained):
        words = str(trained[0])
        assert re.search(r"rows converged: 21 of 21, worst relative gap \d\.\de-\d+", words)
        assert re.search(r"states: 18 of 300 samples, in units of 1 to \d", words)

    @pytest.mark.float64
    @pytest.mark.filterwarnings("ignore::implicitdl.sim.SIMWarning")  # nothing bounds A
    def test_a_gap_of_rounding_alone_is_none(self):
        """A teacher that least squares matches to the last digit: the gap is the objective, and both are rounding."""
        report = SIM(dtype=torch.float64).train(LeastSquareSolver(), mlp(nn.ReLU), [torch.randn(300, 6)])
        for rows in (report.hidden, report.output):
            assert bool((rows.gap > 0.1 * rows.objective).any())
            assert torch.equal(rows.converged, rows.relative_gap <= 1e-6)
        assert "rows converged: 21 of 21, worst relative gap 0.0e+00" in str(report)

    def test_nothing_is_printed(self, trained, capsys):
        _, sim, u = trained
        sim.evaluate([(u, torch.randn(300, 3))])
        out, err = capsys.readouterr()
        assert (out, err) == ("", "")

    def test_a_bar_where_one_is_asked_for(self, monkeypatch):
        moves = []

        class Spy(ADMMSolver):
            def fit(self, *args, progress=None, **options):
                progress(1, 21)
                moves.append(progress)
                return super().fit(*args, progress=progress, **options)

        SIM().train(Spy(), mlp(nn.ReLU), [torch.randn(50, 6)], progress=True)
        assert len(moves) == 1


class TestStates:
    def test_from_a_folder_as_from_the_teacher(self, tmp_path):
        teacher, u = mlp(nn.ReLU), torch.randn(200, 6)
        first, second = SIM(), SIM()
        first.train(QUICK, model=teacher, dataloader=split(u), save_states_path=tmp_path / "states")
        second.train(QUICK, model=teacher, states_data_path=tmp_path / "states")
        assert torch.equal(first.model.A, second.model.A)

    def test_a_folder_alone_does_not_tell_the_units(self, tmp_path):
        teacher, u = mlp(nn.ReLU), torch.randn(200, 6)
        SIM().train(QUICK, model=teacher, dataloader=split(u), save_states_path=tmp_path / "states")
        sim = SIM()
        with pytest.warns(SIMWarning, match="the teacher's weights are not known"):
            report = sim.train(states_data_path=tmp_path / "states")
        assert report.weights is None

    def test_states_and_solvers_never_rescale(self):
        teacher, u = mlp(nn.ReLU), torch.randn(100, 6)
        states = SIM(dtype=torch.float64).get_states(teacher, [u])
        torch.testing.assert_close(states["X"][8:], teacher[:2](u).detach().double().t())

    def test_mapped_states_give_the_same_model(self):
        teacher, u = mlp(nn.ReLU), torch.randn(300, 6)
        sims = [SIM(dtype=torch.float64), SIM(dtype=torch.float64, max_memory=1000)]
        for sim in sims:
            sim.train(QUICK, model=teacher, dataloader=split(u))
        torch.testing.assert_close(sims[0].model.A, sims[1].model.A)


class TestEvaluate:
    def test_accuracy_for_classes_with_the_loaders_own_transform(self):
        teacher, u = mlp(nn.ReLU), torch.randn(100, 6)
        labels = teacher(2 * u).argmax(1)
        labels[:25] = (labels[:25] + 1) % 3

        def doubled(pairs):
            return 2 * torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])

        loader = DataLoader(TensorDataset(u, labels), 32, collate_fn=doubled)
        sim = SIM(dtype=torch.float64)
        sim.train(ADMMSolver(), teacher, loader)
        assert sim.evaluate(loader) == 0.75

    def test_mean_square_for_numbers(self):
        teacher, u = mlp(nn.Tanh, (6, 8, 1)), torch.randn(200, 6)
        sim = SIM(torch.tanh, dtype=torch.float64)
        sim.train(model=teacher, dataloader=[u])
        target = torch.randn(200)
        expected = float((teacher(u)[:, 0] - target).square().mean().detach())
        assert sim.evaluate([(u[:150], target[:150]), (u[150:], target[150:])]) == pytest.approx(expected, rel=1e-3)

    def test_the_teacher_is_scored_alike(self):
        teacher = mlp(nn.ReLU).bfloat16()
        u = torch.randn(10, 6)
        assert score(teacher, [(u, teacher(u.bfloat16()).argmax(1))]) == 1.0


class TestPlaces:
    def test_to_moves_what_is_trained(self):
        teacher, u = mlp(nn.ReLU), torch.randn(100, 6)
        sim = SIM(dtype=torch.float64)
        sim.train(QUICK, model=teacher, dataloader=[u])
        before = sim(u)
        assert sim.to(torch.float32) is sim
        sim.model.solver = Auto(rtol=1e-6)  # an entry is compared more closely than a state is solved by default
        assert sim(u).dtype == torch.float32
        torch.testing.assert_close(sim(u).double(), before, rtol=1e-4, atol=1e-5)
        assert sim.to("cpu", torch.float64).dtype == torch.float64

    def test_before_training_it_moves_too(self):
        sim = SIM().to(dtype=torch.float64)
        sim.train(QUICK, model=mlp(nn.ReLU), dataloader=[torch.randn(100, 6)])
        assert sim.model.A.dtype == torch.float64

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_a_gpu(self):
        teacher, u = mlp(nn.ReLU).cuda(), torch.randn(300, 6)
        sim = SIM(device="cuda", dtype=torch.float64)
        sim.train(QUICK, model=teacher, dataloader=split(u))
        assert sim.model.A.is_cuda
        torch.testing.assert_close(sim(u), teacher(u.cuda()), rtol=1e-3, atol=1e-3)


class Doubling(BaseSolver):
    """A user's own solver: the seeds' interface and nothing else."""

    def solve(self, X, U, Z, Y, model_config=None):
        n, p, q = len(X), len(U), len(Y)
        return X.new_zeros(n, n), X.new_ones(n, p), X.new_ones(q, n), X.new_zeros(q, p)


def test_a_solver_of_ones_own_plugs_in():
    sim = SIM(dtype=torch.float64, rescale=False, bias=False)
    report = sim.train(Doubling(), mlp(nn.ReLU, (6, 4, 2)), [torch.randn(50, 6)])
    assert torch.equal(sim.model.B, torch.ones(4, 6))
    assert not bool(report.hidden.converged.any())


class Outside(Doubling):
    def solve(self, X, U, Z, Y, model_config=None):
        A, *rest = super().solve(X, U, Z, Y, model_config)
        return A + 2 * torch.eye(len(A)), *rest


def test_a_solver_of_ones_own_that_leaves_the_ball_is_told_of():
    sim = SIM(dtype=torch.float64, rescale=False, bias=False)
    with pytest.warns(SIMWarning, match=r"A is not inside the ball of κ = 0.99"):
        sim.train(Outside(), mlp(nn.ReLU, (6, 4, 2)), [torch.randn(50, 6)])
    assert isinstance(sim.model.constraint, Unconstrained)
    assert torch.equal(sim.model.A.detach(), 2 * torch.eye(4))


class TestWeightedBall:
    """What `check_constraint` does not look at."""

    v = torch.tensor([8.0, 2.0, 1.0], dtype=torch.float64)

    def test_it_is_the_plain_ball_in_other_units(self):
        raw = 5 * torch.randn(3, 3, dtype=torch.float64)
        S = torch.diag(self.v)
        expected = S @ RowScaling(0.9)(torch.linalg.inv(S) @ raw @ S) @ torch.linalg.inv(S)
        torch.testing.assert_close(WeightedRowScaling(0.9, weights=self.v)(raw), expected)

    def test_without_weights_it_is_the_plain_ball_until_a_state_dict_brings_some(self):
        raw, ball = 5 * torch.randn(3, 3), WeightedRowScaling(0.9)
        torch.testing.assert_close(ball(raw), RowScaling(0.9)(raw))
        weighted = WeightedRowScaling(0.9, weights=self.v)
        ball.load_state_dict(weighted.state_dict())
        assert torch.equal(ball(raw), weighted(raw))

    @pytest.mark.parametrize("weights", [torch.zeros(2), -torch.ones(2), torch.full((2,), torch.inf), torch.ones(2, 2)])
    def test_bad_weights_are_worded(self, weights):
        with pytest.raises(ArgumentError, match=r"positive finite weights of shape \(n,\)"):
            WeightedRowScaling(weights=weights)

    def test_what_is_outside_has_no_raw_matrix(self):
        with pytest.raises(ArgumentError, match=r"Σ_j \|a_ij\| v_j / v_i ≤ 0.9\), got 10"):
            WeightedRowScaling(0.9, weights=self.v).right_inverse(torch.ones(3, 3).tril(-1))


MODULES = {
    "relu": nn.ReLU(), "in place": nn.ReLU(inplace=True), "leaky_relu": nn.LeakyReLU(), "identity": nn.Identity(),
    "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "hardtanh": nn.Hardtanh(), "softplus": nn.Softplus(), "elu": nn.ELU(),
    "silu": nn.SiLU(), "gelu": nn.GELU(),
}  # fmt: skip


@pytest.mark.parametrize(("name", "module"), MODULES.items(), ids=MODULES)
def test_torchs_modules_are_known(name, module):
    assert SIM(module).activation is BUILTIN["relu" if name == "in place" else name]


@pytest.mark.parametrize("module", [nn.LeakyReLU(0.2), nn.GELU("tanh"), nn.ELU(2.0), nn.Hardtanh(0, 1)], ids=repr)
def test_with_other_settings_they_are_bounded_numerically(module):
    with pytest.warns(ImplicitFunctionWarning, match="the slope of φ is not known"):
        activation = SIM(module).activation
    z = torch.randn(9)
    assert torch.equal(activation.phi(z), module(z))


class TestPath:
    @pytest.fixture
    def problem(self):
        return mlp(nn.ReLU), torch.randn(300, 6)

    def test_points_come_as_asked_and_each_is_the_model_of_its_penalty(self, problem):
        teacher, u = problem
        points = SIM(dtype=torch.float64).path(model=teacher, dataloader=[u], lambdas=[0.1, 10.0, 1.0])
        assert [point.lambda_z for point in points] == [0.1, 10.0, 1.0]
        for point in points:
            alone = SIM(dtype=torch.float64)
            alone.train(ADMMSolver(lambda_z=point.lambda_z, lambda_y=point.lambda_y), teacher, [u])
            torch.testing.assert_close(point.model.A, alone.model.A, rtol=1e-3, atol=1e-5)
        counts = {point.lambda_z: point.report.nonzeros for point in points}
        assert counts[0.1] > counts[1.0] > counts[10.0]

    def test_the_ratio_of_the_penalties_stays(self, problem):
        teacher, u = problem
        points = SIM().path(ADMMSolver(lambda_z=1.0, lambda_y=3.0), teacher, [u], lambdas=[2.0])
        assert points[0].lambda_y == pytest.approx(6.0)

    def test_counts_are_met_from_below(self, problem):
        teacher, u = problem
        points = SIM(dtype=torch.float64).path(model=teacher, dataloader=[u], nonzeros=[40, 120])
        for point, count in zip(points, (40, 120), strict=True):
            assert 0.8 * count <= point.report.nonzeros <= count

    @pytest.mark.parametrize("phi", [nn.ReLU, nn.Tanh])
    def test_refitting_keeps_the_zeros_and_the_ball_and_comes_closer(self, phi):
        teacher, u = mlp(phi), torch.randn(300, 6)
        function = torch.relu if phi is nn.ReLU else torch.tanh
        plain, refitted = (
            SIM(function, dtype=torch.float64).path(model=teacher, dataloader=[u], lambdas=[20.0], refit=refit)[0]
            for refit in (False, True)
        )
        for name in "ABCD":
            zero = getattr(plain.model, name) == 0
            assert zero.any()
            assert not getattr(refitted.model, name)[zero].any()
        assert refitted.report.norm <= 0.99
        y = teacher(u)
        assert (refitted.model(u.double()) - y).norm() < (plain.model(u.double()) - y).norm()

    def test_training_is_left_as_it_was(self, problem):
        teacher, u = problem
        sim = SIM()
        report = sim.train(QUICK, model=teacher, dataloader=[u])
        model = sim.model
        sim.path(model=teacher, dataloader=[u], lambdas=[1.0])
        assert sim.report is report
        assert sim.model is model


U = torch.zeros(4, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SIM(nn.ReLU), "activation_fn to be an Activation or a function"),
        (lambda: SIM("relu"), "activation_fn to be an Activation or a function"),
        (lambda: SIM().train("admm", mlp(nn.ReLU), [U]), "SIM.train: expected solver to be a BaseSolver, got 'admm'"),
        (lambda: SIM().train(ADMMSolver, mlp(nn.ReLU), [U]), r"got <class .*Pass an object .* such as ADMMSolver\(\)"),
        (lambda: SIM().path("admm", mlp(nn.ReLU), [U], lambdas=[1.0]), "SIM.path: expected solver to be a BaseSolver"),
        (
            lambda: SIM().path(model=mlp(nn.ReLU), dataloader=[U], lambdas=[]),
            r"lambdas with at least one value, got \[\]",
        ),
        (lambda: SIM().path(model=mlp(nn.ReLU), dataloader=[U], nonzeros=()), "nonzeros with at least one value"),
        (
            lambda: SIM().train(model=mlp(nn.ReLU), dataloader=[U[:, :5]]),
            r"a teacher that takes inputs of shape \(4, 5\), got one that does not \(mat1",
        ),
        (lambda: SIM(kappa=1.0), "kappa strictly between 0 and 1"),
        (lambda: SIM(kappa=-0.5), "kappa strictly between 0 and 1"),
        (lambda: SIM(dtype=torch.float16), "dtype float32 or float64"),
        (lambda: SIM().to(torch.float16), "dtype float32 or float64"),
        (lambda: SIM().model, "a trained SIM"),
        (lambda: SIM()(U), "a trained SIM"),
        (lambda: SIM().evaluate([]), "a trained SIM"),
        (lambda: SIM().train(), "model and dataloader, or states_data_path, got no model"),
        (lambda: SIM().train(model=mlp(nn.ReLU)), "got model alone"),
        (lambda: SIM().train(dataloader=[U], states_data_path="x"), "states from one place"),
        (lambda: SIM().train(save_states_path="y", states_data_path="x"), "Leave out save_states_path"),
        (lambda: SIM().train(states_data_path="nowhere"), "expected a folder of states"),
        (lambda: SIM().train(model=nn.Linear(6, 2), dataloader=[U]), "a teacher with activations"),
        (
            lambda: SIM(torch.relu).train(model=mlp(nn.Tanh), dataloader=[torch.randn(9, 6)]),
            r"x = φ\(z\) with φ = relu in every layer, got a difference of .* in '3' \(tanh\)",
        ),
        (lambda: SIM().path(model=mlp(nn.ReLU), dataloader=[U]), "lambdas or nonzeros, got neither"),
        (lambda: SIM().path(model=mlp(nn.ReLU), dataloader=[U], lambdas=[1], nonzeros=[1]), "got both"),
        (lambda: SIM().path(model=mlp(nn.ReLU), dataloader=[U], lambdas=[-1.0]), "lambdas ≥ 0"),
        (lambda: SIM().path(model=mlp(nn.ReLU), dataloader=[U], nonzeros=[0]), "nonzeros to be a positive integer"),
        (
            lambda: SIM().path(Doubling(), mlp(nn.ReLU), [torch.randn(4, 6)], lambdas=[1.0]),
            "a solver with lambda_z and lambda_y",
        ),
        (lambda: score(nn.Identity(), []), "a loader with batches"),
    ],
)
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


class TestSeed:
    """003_… §1c: on digits as it is written there, and the document's own code on images of the right shape."""

    pytestmark = pytest.mark.usefixtures("float32")

    @pytest.mark.filterwarnings("ignore::implicitdl.sim.SIMWarning")  # an interior point is not that close
    def test_1c_on_200_samples(self, capsys):
        data = load("digits", 128)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False), nn.ReLU(),
            nn.Linear(8, 10, bias=False),
        )  # fmt: skip
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        for _ in range(5):
            for batch, target in data.train_dl:
                optimizer.zero_grad()
                F.cross_entropy(model(batch), target, reduction="sum").backward()
                optimizer.step()
        subset_loader = DataLoader(Subset(data.train_ds, range(200)), batch_size=1000, shuffle=True)

        sim = SIM(activation_fn=torch.nn.functional.relu, device="cpu", dtype=torch.float32)
        solver = CVXSolver(regen_states=True)
        sim.train(solver=solver, model=model, dataloader=subset_loader)

        assert sim.evaluate(data.test_dl) * 100 >= 100 * score(model, data.test_dl) - 5
        assert sim.model.A.abs().sum(1).max() <= 0.99
        assert capsys.readouterr().out == ""

    @pytest.mark.long
    @pytest.mark.filterwarnings("ignore::implicitdl.sim.SIMWarning")
    def test_1c_as_it_stands(self, tmp_path, monkeypatch, capsys):
        if not SEEDS.is_dir():
            pytest.skip("../shared/seeds is not there; test_1c_on_200_samples runs the same code")
        folder = tmp_path / "data" / "FashionMNIST" / "raw"
        folder.mkdir(parents=True)
        for part, count in (("train", 400), ("t10k", 100)):
            write_idx(folder / f"{part}-images-idx3-ubyte", bytes_of(count, (28, 28), count))
            write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
        monkeypatch.chdir(tmp_path)
        import_torchvision()
        text = next(SEEDS.glob("003_*")).read_text(encoding="utf-8")
        text = text[text.index("#### 1c.") : text.index("## 2. Custom")]
        cells = [re.split(r"\n(?:Test Epoch|100%)", cell)[0] for cell in re.split(r"In \[\d+\]:\n", text)[1:]]
        code = "\n".join(cells).replace("from idl", "from implicitdl").replace("cuda:1", "cpu").replace("2000", "200")
        space = {"__name__": "seed"}
        exec(compile(code, "003 1c", "exec"), space)
        sim = space["sim"]
        assert sim.model.A.abs().sum(1).max() <= 0.99
        assert len(sim.report.hidden.gap) == 112
