"""Well-posedness is claimed where a condition holds, and never where it does not; Lipschitz bounds are above every slope."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from implicitdl import ArgumentError, ImplicitFunctionTriu, ImplicitModel, StateSpace, certify
from implicitdl._internal.errors import MissingExtraError
from implicitdl.activations import RELU, SIGMOID, SILU, TANH, Activation
from implicitdl.certify.contraction import perron_certificate
from implicitdl.constraints import Unconstrained


def space(A: torch.Tensor, phi: Activation = RELU) -> StateSpace:
    return StateSpace(A, torch.eye(len(A), dtype=torch.float64), torch.eye(len(A), dtype=torch.float64), blocks=phi)


def proof(model) -> str:
    found = certify.well_posed(model)
    assert found
    assert found.unique is True
    assert [condition.holds for condition in found.conditions].count(True) == 1
    return found.conditions[-1].name


def dense(n: int) -> torch.Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


TURN = torch.tensor([[0.0, 9.0], [-9.0, 0.0]], dtype=torch.float64)


class TestWellPosed:
    def test_each_condition_proves_what_the_ones_before_do_not(self):
        scale = torch.tensor([[1.0], [100.0]], dtype=torch.float64)
        positive = torch.tensor([[0.4, 0.5], [0.5, 0.4]], dtype=torch.float64)
        assert proof(space(torch.tensor([[0.0, 50.0], [0.0, 0.0]], dtype=torch.float64))) == "no loops"
        assert proof(space(positive)) == "∞-norm"
        assert proof(space(scale * positive / scale.t())) == "Perron–Frobenius"
        assert (
            proof(space(torch.tensor([[-5.0, 3.0], [3.0, -5.0]], dtype=torch.float64)))
            == "Perron–Frobenius without self-loops"
        )
        assert proof(space(TURN)) == "monotone"
        assert proof(space(scale * TURN / scale.t())) == "P-matrix"

    def test_models(self):
        assert proof(ImplicitModel(input_dim=3, output_dim=2, hidden_dim=30)) == "∞-norm"
        assert proof(ImplicitModel(input_dim=3, output_dim=2, hidden_dim=5, f=ImplicitFunctionTriu)) == "no loops"

    def test_the_weights_are_a_proof(self):
        scale = torch.exp(torch.randn(12, dtype=torch.float64))
        A = dense(12)
        A = scale.unsqueeze(1) * (0.95 * A / A.abs().sum(1, keepdim=True)) / scale
        v = certify.well_posed(space(A)).weights
        assert (v > 0).all()
        assert (A.abs() @ v < v).all()

    @pytest.mark.parametrize("order", [range(5), (3, 0, 4, 1, 2)])
    def test_reducible_matrices(self, order):
        # Two loops of roots 0.9 and 0.5 with a large one-way coupling, and a state that nothing needs.
        A = torch.zeros(5, 5, dtype=torch.float64)
        A[0, 1], A[1, 0], A[2, 3], A[3, 2], A[4, 0] = 9.0, 0.09, -0.5, 0.5, 30.0
        A[1, 2] = 1e4
        A = A[list(order)][:, list(order)]
        v, gamma = perron_certificate(A.abs())
        assert (v > 0).all()
        assert (A.abs() @ v <= gamma * v).all()
        assert gamma < 1
        A[0] *= 3
        assert perron_certificate(2 * A.abs()) is None

    @pytest.mark.parametrize("n", [3, 40])
    def test_nilpotent_matrices_of_huge_range(self, n):
        A = 10 * dense(n).triu(1)
        assert proof(space(A)) == "no loops"
        v, gamma = perron_certificate(A.abs())
        assert (A.abs() @ v <= gamma * v).all()

    def test_on_the_border_nothing_is_claimed(self):
        for A in (
            torch.eye(2, dtype=torch.float64),
            torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64),
            torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64),
        ):
            assert not certify.well_posed(space(A))
            assert not certify.well_posed(space(A, TANH))
        assert certify.well_posed(space(torch.eye(2, dtype=torch.float64))).unique is False
        for gap in (0.0, 1e-17, 1e-16):
            row = torch.full((1, 10), 0.1, dtype=torch.float64)
            assert not certify.well_posed(space(row.repeat(10, 1) * (1 - gap)))

    def test_it_agrees_with_brute_force_on_small_relu_models(self):
        claims = {True: 0, False: 0}
        for seed in range(60):
            A = 0.8 * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            unique = certify.well_posed(space(A)).unique
            assert unique is all(minor > 0 for minor in minors(torch.eye(4, dtype=torch.float64) - A))
            claims[unique] += 1
        assert min(claims.values()) > 5

    def test_an_ill_posed_model_has_an_input_with_two_solutions(self):
        A = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
        assert certify.well_posed(space(A)).unique is False
        b = torch.tensor([-1.0, -1.0], dtype=torch.float64)
        for x in (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)):
            assert torch.equal(torch.relu(A @ x + b), x)

    def test_slopes_count(self):
        A = 0.95 * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        assert proof(space(A)) == "∞-norm"
        assert not certify.well_posed(space(A, SILU))
        assert certify.well_posed(space(A, SILU)).unique is None
        assert proof(space(4 * A, SIGMOID)) == "∞-norm"
        assert proof(space(A.triu(1), Activation("square", torch.square, lambda z: 2 * z, (-torch.inf, torch.inf))))
        cube = Activation("cube", lambda z: z**3, lambda z: 3 * z * z, (0.0, torch.inf))
        assert certify.well_posed(space(A, cube)).unique is None

    def test_large_models_are_left_open(self):
        A = torch.zeros(25, 25, dtype=torch.float64)
        A[:2, :2] = torch.tensor([[0.0, 900.0], [-0.09, 0.0]], dtype=torch.float64)
        found = certify.well_posed(space(A))
        assert found.unique is None
        assert found.conditions[-1].figure == "not tried: n = 25 > 20"

    def test_the_report_in_words(self):
        text = str(certify.well_posed(space(TURN)))
        assert text.startswith("well posed\n  no loops: fails   2 of 2 states in loops\n  ∞-norm: fails")
        assert "monotone: holds   λ_min(I − sym(A)) = 1," in text
        assert str(certify.well_posed(space(2 * torch.ones(2, 2, dtype=torch.float64)))).startswith("not well posed")
        assert str(certify.well_posed(space(2 * torch.ones(2, 2, dtype=torch.float64), SILU))).startswith(
            "not proved to be well posed"
        )

    def test_an_unconstrained_model_is_looked_at_as_it_is(self):
        model = ImplicitModel(input_dim=3, output_dim=2, hidden_dim=4, constraint=Unconstrained)
        with torch.no_grad():
            model.A.fill_(1.0)
        assert certify.well_posed(model).unique is False


def minors(M: torch.Tensor) -> list[float]:
    n = len(M)
    sets = itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(1, n + 1))
    return [float(torch.linalg.det(M[list(rows)][:, list(rows)])) for rows in sets]


class TestPMatrix:
    def test_against_all_minors(self):
        found = []
        for seed in range(80):
            M = torch.eye(5, dtype=torch.float64) + 0.6 * torch.randn(
                5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
            found.append(certify.p_matrix(M))
            assert found[-1] is (min(minors(M)) > 0)
        assert 10 < sum(found) < 70

    def test_what_rounding_hides_is_left_open(self):
        # The last minor is 0 in exact arithmetic: thirds are not floats.
        M = torch.tensor([[1 / 3, 1.0], [1 / 3, 1.0]], dtype=torch.float64)
        assert certify.p_matrix(M) is not True
        assert (
            certify.p_matrix(torch.eye(2, dtype=torch.float64), off=torch.full((2, 2), 2.0, dtype=torch.float64))
            is None
        )
        assert certify.p_matrix(torch.zeros(1, 1, dtype=torch.float64)) is False

    def test_twenty_states(self):
        M = torch.eye(20, dtype=torch.float64) + 0.05 * torch.rand(20, 20, dtype=torch.float64)
        assert certify.p_matrix(M) is True
        M[19, 19] = -1.0
        assert certify.p_matrix(M) is False

    def test_refusals(self):
        with pytest.raises(
            ArgumentError, match=r"p_matrix: expected n ≤ 20, got n=21, with 2\^21 principal minors. Use"
        ):
            certify.p_matrix(torch.eye(21, dtype=torch.float64))
        with pytest.raises(ArgumentError, match=r"expected a square matrix, got \(2, 3\)"):
            certify.p_matrix(torch.zeros(2, 3, dtype=torch.float64))


def random_model(seed: int, phi: Activation = RELU) -> StateSpace:
    g = torch.Generator().manual_seed(seed)
    A, B, C, D = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((6, 6), (6, 4), (3, 6), (3, 4)))
    A = 0.9 / phi.lipschitz * A / A.abs().sum(1, keepdim=True)
    return StateSpace(A, B, C, D, torch.randn(6, generator=g, dtype=torch.float64), blocks=phi)


def steepest(model: StateSpace, order: float) -> float:
    """The largest norm of the Jacobian at random points."""
    u = (3 * torch.randn(200, model.p, dtype=torch.float64)).requires_grad_()
    y = model(u)
    rows = [torch.autograd.grad(y[:, k].sum(), u, retain_graph=True)[0] for k in range(model.q)]
    return float(torch.linalg.matrix_norm(torch.stack(rows, 1), order).max())


class TestLipschitz:
    @pytest.mark.parametrize("phi", [RELU, TANH, SIGMOID])
    def test_above_every_slope_and_the_program_below_the_closed_forms(self, phi):
        for seed in range(4):
            model = random_model(seed, phi)
            two, program = certify.lipschitz_two(model), certify.lipschitz_sdp(model)
            assert certify.lipschitz_inf(model) >= steepest(model, torch.inf)
            assert steepest(model, 2) <= program <= two * (1 + 1e-4)

    def test_a_slope_above_one(self):
        model = random_model(3, SILU)
        assert certify.lipschitz_inf(model) >= steepest(model, torch.inf)
        assert certify.lipschitz_two(model) >= steepest(model, 2)
        with pytest.raises(ArgumentError, match="lipschitz_sdp: expected φ' ≥ 0, got silu"):
            certify.lipschitz_sdp(model)

    def test_affine_models_have_their_own_norm(self):
        D = torch.randn(3, 5, dtype=torch.float64)
        model = StateSpace.affine(D)
        exact = float(torch.linalg.matrix_norm(D, 2))
        assert certify.lipschitz_two(model) == pytest.approx(exact, rel=1e-10)
        assert certify.lipschitz_sdp(model) == pytest.approx(exact, rel=1e-10)
        assert certify.lipschitz_inf(model) == pytest.approx(float(D.abs().sum(1).max()), rel=1e-10)

    def test_the_only_bound_of_a_rotation_is_monotone(self):
        assert certify.lipschitz_two(space(TURN)) == pytest.approx(1.0)
        assert certify.lipschitz_sdp(space(TURN)) == pytest.approx(1.0, rel=1e-4)
        with pytest.raises(ArgumentError, match="lipschitz_inf: expected a model with λ_pf"):
            certify.lipschitz_inf(space(TURN))

    def test_many_inputs_are_turned_into_those_that_matter(self):
        g = torch.Generator().manual_seed(0)
        small = random_model(0)
        turn = torch.linalg.qr(torch.randn(30, 4, generator=g, dtype=torch.float64)).Q.t()
        model = small.replace(B=small.B @ turn, D=small.D @ turn)
        assert certify.lipschitz_sdp(model) == pytest.approx(certify.lipschitz_sdp(small), rel=1e-4)

    def test_refusals(self, monkeypatch):
        with pytest.raises(ArgumentError, match=r"lipschitz_two: expected a model with λ_pf < 1, .* one with none"):
            certify.lipschitz_two(space(2 * torch.ones(2, 2, dtype=torch.float64)))
        with pytest.raises(ArgumentError, match="lipschitz_sdp: expected a diagonal Λ for the model, got status"):
            certify.lipschitz_sdp(space(2 * torch.ones(2, 2, dtype=torch.float64)))
        with pytest.raises(ArgumentError, match=r"expected n \+ min\(p, n \+ q\) ≤ 120, got 140. Use lipschitz_two"):
            certify.lipschitz_sdp(space(torch.zeros(70, 70, dtype=torch.float64)))
        monkeypatch.setitem(sys.modules, "cvxpy", None)
        with pytest.raises(MissingExtraError, match=r"cvxpy is not installed. Install it with: pip"):
            certify.lipschitz_sdp(random_model(0))
