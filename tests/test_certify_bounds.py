"""Bounds hold on everything that was tried against them, nest as they should, and are exact where that is known."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicitdl import ArgumentError, ImplicitModel, Picard, StateSpace, certify
from implicitdl.activations import (
    ELU,
    HARDTANH,
    IDENTITY,
    LEAKY_RELU,
    RELU,
    SIGMOID,
    SILU,
    SOFTPLUS,
    TANH,
    Activation,
)  # fmt: skip
from implicitdl.certify import Box, Crown, Interval, Sensitivity
from implicitdl.certify.crown import lines
from implicitdl.statespace import perron_root

METHODS = {
    "sensitivity": Sensitivity(),
    "interval": Interval(),
    "crown": Crown(),
    "crown, refined": Crown(rounds=2),
    "crown, optimised": Crown(steps=2, rounds=1),
}
EXACT = Picard(rtol=1e-13, max_steps=3000)
TINY = 1e-10  # what EXACT may leave
ALL = (RELU, LEAKY_RELU, IDENTITY, TANH, SIGMOID, HARDTANH, SOFTPLUS, ELU)


def random_space(seed: int, kinds=ALL) -> StateSpace:
    """Small, of one or two blocks, contracting in a norm of its own: often ‖A‖∞ > 1, and loops of either sign."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    n, p, q = draw(2, 8), draw(1, 4), draw(2, 4)
    first = draw(1, n - 1)
    A = normal(n, n) * (torch.rand(n, n, generator=g, dtype=torch.float64) < 0.7)
    A = A * (0.9 / max(perron_root(A), 0.5))
    scale = torch.exp(normal(n))
    blocks = [(kinds[draw(0, len(kinds) - 1)], first), (kinds[draw(0, len(kinds) - 1)], n - first)]
    return StateSpace(
        scale.unsqueeze(1) * A / scale, normal(n, p), normal(q, n), normal(q, p), normal(n), normal(q), blocks
    )


def outputs(space: StateSpace, u: torch.Tensor) -> torch.Tensor:
    """y of inputs (..., p), to 1e-13."""
    rows = u.flatten(0, -2)
    x = space.solve(rows, solver=EXACT, on_failure="ignore").value
    return space.read_out(x, rows).view(*u.shape[:-1], -1)


def inside(box: Box, count: int) -> torch.Tensor:
    """Points of every sample's box, (count, batch, p): random ones, and every third a random corner."""
    where = torch.rand(count, *box.lower.shape, dtype=torch.float64)
    where[::3] = where[::3].round()
    return box.lower + where * (box.upper - box.lower)


class TestSoundness:
    def test_random_points_of_random_models(self):
        for seed in range(50):
            space = random_space(seed)
            box = Box.around(torch.rand(2, space.p, dtype=torch.float64), 0.02 + 0.2 * (seed % 5))
            proved = certify.contractive("test", space)
            self.holds(
                space, box, *(certify.output_bounds(proved, box, kind()) for kind in (Sensitivity, Interval, Crown))
            )

    @pytest.mark.parametrize(("method", "models"), [(Crown(rounds=2), 12), (Crown(steps=2, rounds=1), 4)])
    def test_random_points_after_refinement(self, method, models):
        for seed in range(models):
            space = random_space(seed)
            box = Box.around(torch.rand(2, space.p, dtype=torch.float64), 0.02 + 0.2 * (seed % 5))
            self.holds(space, box, certify.output_bounds(space, box, method))

    @staticmethod
    def holds(space: StateSpace, box: Box, *bounds: Box) -> None:
        found = outputs(space, inside(box, 12))
        for y in bounds:
            assert (y.lower - TINY <= found).all()
            assert (found <= y.upper + TINY).all()

    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_attacks_on_random_models(self, method):
        for seed in range(4):
            space = random_space(seed)
            u, labels = torch.rand(3, space.p, dtype=torch.float64), torch.randint(space.q, (3,))
            margins = certify.margins(space, Box.around(u, 0.2), labels, method)
            worst = certify.pgd(space, u, labels, 0.2, steps=5, restarts=2)
            y = outputs(space, worst)
            lead = y.gather(1, labels.unsqueeze(1)) - y
            others = torch.arange(space.q) != labels.unsqueeze(1)
            assert (margins.lower <= lead + TINY)[others].all(), seed
            assert (margins.lower[~others] == torch.inf).all()

    @pytest.mark.parametrize("method", [Sensitivity, Interval, Crown])
    @pytest.mark.parametrize("steps", [1, 2, 4])
    def test_a_solve_that_was_stopped_early_is_corrected(self, method, steps):
        for seed in range(4):
            space = random_space(seed)
            box = Box.around(torch.rand(2, space.p, dtype=torch.float64), 0.1)
            self.holds(space, box, certify.output_bounds(space, box, method(solver=Picard(max_steps=steps))))

    def test_a_bad_solve_is_looser_and_a_better_one_never_wrong(self):
        space = random_space(3, (RELU,))
        box = Box.around(torch.rand(2, space.p, dtype=torch.float64), 0.1)
        rough, fine = (certify.output_bounds(space, box, Crown(solver=Picard(max_steps=k))) for k in (2, 500))
        assert ((rough.upper - rough.lower) > (fine.upper - fine.lower)).all()

    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_float32_weights_are_taken_exactly(self, method):
        for seed in range(4):
            space = random_space(seed, (RELU, TANH)).to(torch.float32)
            box = Box.around(torch.rand(2, space.p, dtype=torch.float32), 0.01)
            y = certify.output_bounds(space, box, method)
            assert y.lower.dtype == torch.float64
            self.holds(space.to(torch.float64), box, y)

    def test_rounding_goes_outwards(self):
        # Sums of a thousand terms that binary fractions do not hold, against exact arithmetic on the same floats.
        weights, low, high = (
            torch.full((1, 1000), 0.1, dtype=torch.float64),
            torch.full((1, 1000), 0.1, dtype=torch.float64),
            torch.full((1, 1000), 0.3, dtype=torch.float64),
        )
        space = StateSpace.affine(torch.cat([weights, -weights]))
        for method in METHODS.values():
            y = certify.output_bounds(space, Box(low, high), method)
            least = 1000 * Fraction(weights[0, 0].item()) * Fraction(low[0, 0].item())
            most = 1000 * Fraction(weights[0, 0].item()) * Fraction(high[0, 0].item())
            assert Fraction(y.lower[0, 0].item()) < least < Fraction(y.lower[0, 0].item()) + Fraction(1, 10**9)
            assert Fraction(y.upper[0, 0].item()) > most > Fraction(y.upper[0, 0].item()) - Fraction(1, 10**9)
            assert Fraction(y.lower[0, 1].item()) < -most

    def test_any_slope_is_served_by_the_sensitivity_alone(self):
        for seed in range(15):
            space = random_space(seed, (SILU, TANH))
            space = space.replace(A=space.A / 1.2)
            box = Box.around(torch.rand(2, space.p, dtype=torch.float64), 0.1)
            self.holds(space, box, certify.output_bounds(space, box, Sensitivity()))


class TestNesting:
    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 10**6), eps=st.floats(0, 0.5))
    def test_each_method_is_inside_the_looser_one(self, seed, eps):
        space = random_space(seed)
        box = Box.around(
            torch.rand(2, space.p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), eps
        )
        kinds = (Sensitivity, {}), (Interval, {}), (Crown, {}), (Crown, {"rounds": 1}), (Crown, {"rounds": 2})
        bounds = [certify.output_bounds(space, box, kind(solver=EXACT, **more)) for kind, more in kinds]
        for outer, inner in pairwise(bounds):
            slack = 1e-8 * (1 + outer.upper.abs() + outer.lower.abs())
            assert (outer.lower - slack <= inner.lower).all()
            assert (inner.upper <= outer.upper + slack).all()

    def test_improved_slopes_are_never_worse(self):
        gained = 0.0
        for seed in range(4):
            space = random_space(seed, (RELU,))
            box = Box.around(torch.rand(2, space.p, dtype=torch.float64), 0.3)
            chosen, improved = (certify.output_bounds(space, box, Crown(steps=steps)).upper for steps in (0, 10))
            assert (improved <= chosen + 1e-8 * (1 + chosen.abs())).all()
            gained += float((chosen - improved).sum())
        assert gained > 0.1

    def test_the_raw_adjoint_bound_loses_sometimes_and_never_shows(self):
        shares = []
        for seed in range(30):
            space = random_space(seed, (RELU,))
            labels = torch.zeros(4, dtype=torch.int64)
            box = Box.around(torch.rand(4, space.p, dtype=torch.float64), 0.5)
            by_interval, by_crown = (certify.margins(space, box, labels, m) for m in (Interval(), Crown()))
            assert (by_crown.lower >= by_interval.lower).all()
            assert by_interval.lost is None
            shares.append(by_crown.lost)
        print(f"raw adjoint bound above the interval bound: {sum(shares) / len(shares):.2%} of margins")
        assert 0 < sum(shares) < 0.5 * len(shares)

    def test_margins_are_no_looser_than_the_difference_of_outputs(self):
        for seed in range(30):
            space = random_space(seed)
            labels = torch.randint(space.q, (2,))
            box = Box.around(torch.rand(2, space.p, dtype=torch.float64), 0.1)
            y = certify.output_bounds(space, box)
            apart = y.lower.gather(1, labels.unsqueeze(1)) - y.upper
            assert (certify.margins(space, box, labels, Interval()).lower >= apart - 1e-9).all()

    def test_wider_boxes_have_wider_bounds(self):
        space = random_space(1)
        u = torch.rand(2, space.p, dtype=torch.float64)
        narrow, wide = (certify.output_bounds(space, Box.around(u, eps)) for eps in (0.1, 0.2))
        assert ((wide.lower <= narrow.lower) & (narrow.upper <= wide.upper)).all()


class TestExactness:
    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_an_affine_model(self, method):
        D, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        u, labels = torch.rand(5, 6, dtype=torch.float64), torch.randint(4, (5,))
        found = certify.margins(StateSpace.affine(D, b), Box.around(u, 0.1, domain=None), labels, method)
        difference = D[labels].unsqueeze(1) - D
        exact = (difference @ u.unsqueeze(2)).squeeze(2) + b[labels].unsqueeze(1) - b - 0.1 * difference.abs().sum(2)
        others = torch.arange(4) != labels.unsqueeze(1)
        torch.testing.assert_close(found.lower[others], exact[others], rtol=0, atol=1e-12)
        assert not found.lost

    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_a_box_of_one_point(self, method):
        for seed in range(4):
            space = random_space(seed)
            u = torch.rand(3, space.p, dtype=torch.float64)
            y = certify.output_bounds(space, Box.around(u, 0.0), method)
            torch.testing.assert_close(y.lower, outputs(space, u), rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(y.upper, outputs(space, u), rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("phi", [RELU, TANH, SOFTPLUS])
    def test_one_state_that_nothing_else_joins(self, phi):
        # y = 2 φ(3u − 1) is monotone in u, so interval propagation has nothing to lose.
        space = StateSpace(
            torch.zeros(1, 1, dtype=torch.float64),
            torch.tensor([[3.0]], dtype=torch.float64),
            torch.tensor([[2.0]], dtype=torch.float64),
            b_x=torch.tensor([-1.0], dtype=torch.float64),
            blocks=phi,
        )
        y = certify.output_bounds(
            space,
            Box(torch.tensor([[0.1]], dtype=torch.float64), torch.tensor([[0.7]], dtype=torch.float64)),
            Interval(),
        )
        ends = 2 * phi.phi(torch.tensor([3 * 0.1 - 1, 3 * 0.7 - 1], dtype=torch.float64))
        torch.testing.assert_close(torch.cat([y.lower, y.upper], 1)[0], ends, rtol=0, atol=1e-12)

    def test_where_no_kink_is_crossed_the_adjoint_bound_is_the_models_own_slope(self):
        # All states active on the box: y is affine there, with slope C(I − A)⁻¹B + D.
        g = torch.Generator().manual_seed(5)
        A, B, C, D = (
            torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((6, 6), (6, 3), (2, 6), (2, 3))
        )
        A = 0.8 * A / A.abs().sum(1, keepdim=True)
        space = StateSpace(A, B, C, D, torch.full((6,), 30.0, dtype=torch.float64))
        u = torch.rand(2, 3, dtype=torch.float64)
        slope = C @ torch.linalg.solve(torch.eye(6, dtype=torch.float64) - A, B) + D
        y = certify.output_bounds(space, Box.around(u, 0.1, domain=None), Crown())
        reach = 0.1 * slope.abs().sum(1)
        torch.testing.assert_close(y.upper, outputs(space, u) + reach, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(y.lower, outputs(space, u) - reach, rtol=1e-9, atol=1e-9)

    def test_self_loops_are_solved_for(self):
        # x = relu(−x + u) is x = u/2: counted with |a| = 1 it would not even contract.
        one = torch.ones(1, 1, dtype=torch.float64)
        y = certify.output_bounds(StateSpace(-one, one, one), Box(0.2 * one, 0.6 * one), Interval())
        torch.testing.assert_close(
            torch.cat([y.lower, y.upper]), torch.tensor([[0.1], [0.3]], dtype=torch.float64), rtol=0, atol=1e-12
        )

    def test_the_sensitivity_matrix_by_its_formula(self):
        space = random_space(7, (TANH,))
        n = space.n
        S = (
            space.C.abs() @ torch.linalg.solve(torch.eye(n, dtype=torch.float64) - space.A.abs(), space.B.abs())
            + space.D.abs()
        )
        found = certify.sensitivity(space)
        torch.testing.assert_close(found, S, rtol=1e-10, atol=1e-10)
        assert (found >= S).all()

    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_one_sample_against_a_batch(self, method):
        space = random_space(11)
        box = Box.around(torch.rand(4, space.p, dtype=torch.float64), 0.1)
        together = certify.output_bounds(space, box, method)
        for i in range(4):
            alone = certify.output_bounds(space, Box(box.lower[i : i + 1], box.upper[i : i + 1]), method)
            torch.testing.assert_close(alone.lower[0], together.lower[i], rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(alone.upper[0], together.upper[i], rtol=1e-8, atol=1e-8)


class TestLines:
    @given(kind=st.sampled_from(ALL), ends=st.tuples(st.floats(-8, 8), st.floats(-8, 8)), share=st.floats(0, 1))
    def test_they_hold_the_activation(self, kind, ends, share):
        low, high = sorted(ends)
        z = torch.linspace(low, high, 201, dtype=torch.float64)
        space = StateSpace(
            torch.zeros(1, 1, dtype=torch.float64),
            torch.ones(1, 1, dtype=torch.float64),
            torch.ones(1, 1, dtype=torch.float64),
            blocks=kind,
        )
        found = lines(
            space, Box(torch.tensor([[low]], dtype=torch.float64), torch.tensor([[high]], dtype=torch.float64))
        )
        above = found.high_slope * z + found.high_offset
        free = found.least + share * (found.most - found.least)
        phi = kind.phi(z)
        assert (phi <= above + 1e-12).all()
        assert (found.low_slope * z + found.low_offset <= phi + 1e-12).all()
        assert (free * z + found.low_offset <= phi + 1e-12).all()

    def test_no_gradient_is_lost_where_the_interval_is_a_point(self):
        space = StateSpace(
            torch.zeros(2, 2, dtype=torch.float64),
            torch.ones(2, 1, dtype=torch.float64),
            torch.ones(1, 2, dtype=torch.float64),
        )
        z = torch.tensor([[-1.0, 2.0]], requires_grad=True, dtype=torch.float64)
        sum(part.sum() for part in lines(space, Box(z, z))).backward()
        assert torch.isfinite(z.grad).all()


class TestRefusals:
    def test_boxes(self):
        u = torch.rand(2, 3, dtype=torch.float64)
        with pytest.raises(ArgumentError, match=r"expected ε ≥ 0, got -0.1"):
            Box.around(u, -0.1)
        with pytest.raises(ArgumentError, match=r"expected u in the domain \[0, 1\], got values in .* domain=None"):
            Box.around(u + 2, 0.1)
        with pytest.raises(ArgumentError, match=r"expected lower ≤ upper, got 1 > 0 at \(1, 2\)"):
            Box(torch.tensor([[0.0] * 3, [0.0, 0.0, 1.0]], dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))
        with pytest.raises(ArgumentError, match="expected finite upper, got 1 NaN or infinite entries of 3"):
            Box(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[0.0, torch.nan, 1.0]], dtype=torch.float64))
        with pytest.raises(ArgumentError, match=r"of shape \(batch ≥ 1, p\)"):
            Box(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))

    def test_boxes_that_do_not_fit(self):
        model = ImplicitModel(input_dim=3, output_dim=2, hidden_dim=4)
        box = Box.around(torch.rand(2, 4, dtype=torch.float64), 0.1)
        with pytest.raises(ArgumentError, match=r"output_bounds: expected a box of shape \(batch, p=3\), got \(2, 4\)"):
            certify.output_bounds(model, box)
        with pytest.raises(ArgumentError, match="margins: expected a Box of inputs, got Tensor"):
            certify.margins(model, torch.rand(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ArgumentError, match="expected method to be a Method, got <class"):
            certify.output_bounds(model, Box.around(torch.rand(2, 3, dtype=torch.float64), 0.1), Crown)

    def test_labels(self):
        model = ImplicitModel(input_dim=3, output_dim=2, hidden_dim=4)
        box = Box.around(torch.rand(2, 3, dtype=torch.float64), 0.1)
        with pytest.raises(ArgumentError, match=r"expected labels of shape \(batch=2,\) int64, got \(\(2,\), torch.fl"):
            certify.margins(model, box, torch.zeros(2, dtype=torch.float64))
        with pytest.raises(ArgumentError, match="expected labels from 0 to 1, got 0 to 2"):
            certify.margins(model, box, torch.tensor([0, 2]))

    def test_models(self):
        box = Box.around(torch.rand(1, 2, dtype=torch.float64), 0.1)
        turn = StateSpace(
            torch.tensor([[0.0, 9.0], [-9.0, 0.0]], dtype=torch.float64),
            torch.eye(2, dtype=torch.float64),
            torch.eye(2, dtype=torch.float64),
        )
        with pytest.raises(ArgumentError, match=r"expected a model with λ_pf.* < 1.*, got 9"):
            certify.output_bounds(turn, box)
        with pytest.raises(ArgumentError, match=r"expected an ImplicitModel, a StateSpace, .*, got Linear. Convert"):
            certify.output_bounds(torch.nn.Linear(2, 2), box)

    def test_activations(self):
        box = Box.around(torch.rand(1, 2, dtype=torch.float64), 0.1)
        zero, eye = torch.zeros(2, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        silu = StateSpace(zero, eye, eye, blocks=SILU)
        with pytest.raises(ArgumentError, match=r"Interval: expected a nondecreasing φ, got silu.* Use Sensitivity"):
            certify.output_bounds(silu, box, Interval())
        own = Activation("own", torch.sin, torch.cos, (0.0, 1.0))
        with pytest.raises(ArgumentError, match=r"Crown: expected activations of relu, .*, got own. Use Interval"):
            certify.output_bounds(StateSpace(zero, eye, eye, blocks=own), box, Crown())
        for setting in ({"steps": -1}, {"rounds": 1.5}):
            with pytest.raises(ArgumentError, match=r"Crown: expected (steps|rounds) to be an integer ≥ 0"):
                Crown(**setting)
