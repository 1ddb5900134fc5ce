"""Monotone models, dense and convolutional: the set, the solve where plain iteration fails, training, saving."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from implicitdl import (
    DEQ,
    Anderson,
    ArgumentError,
    Auto,
    Broyden,
    CircularConvolution,
    CircularEquilibrium,
    Equilibrium,
    ForwardBackward,
    ImplicitAdjoint,
    ImplicitFunctionWarning,
    ImplicitModel,
    Monitor,
    Newton,
    PeacemanRachford,
    Picard,
    Unrolled,
    fixed_point,
    viz,
)
from implicitdl.activations import LEAKY_RELU, SILU, TANH, Activation
from implicitdl.constraints import Monotone, MonotoneKernel, SpectralNorm
from implicitdl.constraints.monotone import monotonicity
from implicitdl.data import load
from implicitdl.equations.circular import transfer
from implicitdl.loop.iterate import iterate
from implicitdl.nn import MonotoneConvBlock, MonotoneConvClassifier

SPLITTING = PeacemanRachford()
PATIENT = PeacemanRachford(rtol=1e-8, max_steps=5000)
PATIENT_SINGLE = PeacemanRachford(rtol=1e-5, max_steps=5000)
TURN = torch.tensor([[0.0, 10.0], [-10.0, 0.0]], dtype=torch.float64)
SIZES = [(4, 4), (5, 6), (4, 7), (3, 3), (2, 5)]


def lowest(A: torch.Tensor) -> float:
    """The smallest eigenvalue of sym(I − A), in float64."""
    A = A.detach().double()
    return float(torch.linalg.eigvalsh(torch.eye(len(A)) - (A + A.t()) / 2)[0])


def dense(op, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """The matrix of a linear map of images."""
    unit = torch.eye(channels * size[0] * size[1]).view(-1, channels, *size)
    return op(unit).flatten(1).t()


def circular(kernel: torch.Tensor):
    """The convolution by shifts, for a kernel of any size."""
    centre = [(taps - 1) // 2 for taps in kernel.shape[2:]]

    def op(x):
        shifts = [(i, j) for i in range(kernel.shape[2]) for j in range(kernel.shape[3])]
        moved = [x.roll((centre[0] - i, centre[1] - j), (2, 3)) for i, j in shifts]
        return sum(
            torch.einsum("oi,bihw->bohw", kernel[:, :, i, j], part) for (i, j), part in zip(shifts, moved, strict=True)
        )

    return op


class TestTheSet:
    @given(
        st.integers(1, 30), st.floats(-4, 3), st.floats(0.01, 0.99), st.sampled_from([torch.float32, torch.float64]),
        st.integers(0, 2**31),
    )  # fmt: skip
    def test_every_free_matrix_gives_a_member(self, n, log_size, m, dtype, seed):
        raw = (torch.randn(n, n, generator=torch.Generator().manual_seed(seed)) * 10**log_size).to(dtype)
        A = Monotone(m=m)(raw)
        assert Monotone(m=m).contains(A)
        assert lowest(A) >= m - n * torch.finfo(dtype).eps * max(1.0, float(A.abs().max()))

    @pytest.mark.float64
    @given(st.integers(1, 12), st.integers(0, 12), st.floats(0, 100), st.integers(0, 2**31))
    def test_every_member_has_a_free_matrix_also_on_the_boundary(self, n, rank, turn, seed):
        g = torch.Generator().manual_seed(seed)
        factor, skew = torch.randn(rank, n, generator=g), torch.randn(n, n, generator=g)
        A = 0.7 * torch.eye(n) - factor.t() @ factor + turn * (skew - skew.t())
        constraint = Monotone(m=0.3)
        assert torch.allclose(constraint(constraint.right_inverse(A)), A, rtol=1e-9, atol=1e-10)

    def test_it_is_larger_than_any_ball(self):
        assert Monotone(m=0.5).contains(TURN)
        assert Monotone(m=0.5).contains(-1000 * torch.eye(3))

    @pytest.mark.float64
    def test_zero_is_zero_and_small_changes_are_felt_at_first_order(self):
        constraint, raw = Monotone(m=0.3), torch.randn(4, 4)
        assert torch.allclose(constraint(torch.zeros(4, 4)), torch.zeros(4, 4), atol=1e-15)
        small = constraint(1e-6 * raw) / 1e-6
        upper, lower = raw.triu(), raw.tril(-1)
        assert torch.allclose(small, lower - lower.t() - 0.7**0.5 * (upper + upper.t()), atol=1e-4)

    def test_m_and_kappa_are_one_setting(self):
        assert Monotone(m=0.2).kappa == Monotone(kappa=0.8).kappa == 0.8
        assert repr(Monotone(kappa=0.75)) == "Monotone(m=0.25)"


@pytest.mark.parametrize(("constraint", "shape"), [(Monotone(m=0.1), (5, 5)), (MonotoneKernel(m=0.1), (2, 3, 3, 3, 3))])
def test_autocast_does_not_touch_the_set(constraint, shape):
    raw = torch.randn(shape, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        A = constraint(raw)
    assert torch.equal(A, constraint(raw))
    assert constraint.contains(A)


class TestDenseModel:
    def model(self, solver=SPLITTING) -> ImplicitModel:
        torch.manual_seed(3)
        built = ImplicitModel(
            3, 2, 4, bias=True, constraint=Monotone(m=0.1), solver=solver, adjoint=ImplicitAdjoint(solver=solver),
            on_failure="raise",
        )  # fmt: skip
        with torch.no_grad():
            built.A.mul_(8)
        return built

    @pytest.mark.float64
    def test_plain_iteration_diverges_where_splitting_does_not(self):
        f = Equilibrium(TURN, torch.tensor([[1.0, 20.0], [2.0, 30.0]]))
        with pytest.warns(ImplicitFunctionWarning, match="2 of 2 samples"):
            fixed_point(f, torch.zeros(2, 2), solver=Picard())
        for solver in (PeacemanRachford(max_steps=1000), ForwardBackward(max_steps=10_000)):
            x = fixed_point(f, torch.zeros(2, 2), solver=solver, on_failure="raise").value
            assert torch.allclose(x, torch.relu(x @ TURN.t() + f.b), atol=1e-8)

    @pytest.mark.float64
    @pytest.mark.parametrize("activation", [TANH, LEAKY_RELU], ids=lambda a: a.name)
    def test_other_activations(self, activation):
        f = Equilibrium(Monotone(m=0.1)(3 * torch.randn(8, 8)), torch.randn(4, 8), activation)
        x = fixed_point(f, torch.zeros(4, 8), solver=PeacemanRachford(max_steps=5000), on_failure="raise").value
        assert torch.allclose(x, f(x), atol=1e-8)

    @pytest.mark.float64
    def test_the_gradient_is_that_of_the_free_parameters(self):
        model, u = self.model(), torch.randn(2, 3, requires_grad=True)
        names = [name for name, _ in model.named_parameters()]

        def y(u, *weights):
            return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (u,))

        assert torch.autograd.gradcheck(y, (u, *model.parameters()), fast_mode=True)

    @pytest.mark.float64
    def test_steps_of_any_size_stay_in_the_set_and_every_solve_converges(self):
        model = self.model(PATIENT)
        optimiser = torch.optim.SGD(model.parameters(), lr=3.0)
        u, target = torch.randn(16, 3), torch.randn(16, 2)
        with Monitor() as monitor:
            for _ in range(15):
                optimiser.zero_grad()
                (model(u) - target).abs().mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                (A,) = model.weights()
                assert lowest(A) >= 0.1 - 1e-12 * float(A.detach().abs().max())
        assert monitor.missed == 0
        assert float(torch.linalg.eigvals(A.detach()).abs().max()) > 1, "the steps were too small to test anything"

    def test_it_is_saved_copied_and_pickled(self, tmp_path):
        model, u = self.model(), torch.randn(2, 3)
        model.save_pretrained(tmp_path)
        for other in (
            ImplicitModel.from_pretrained(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
        ):  # fmt: skip
            assert isinstance(other.constraint, Monotone)
            assert other.constraint.m == model.constraint.m
            assert torch.equal(other(u), model(u))

    def test_splitting_is_the_default_and_its_tolerance_that_of_the_model(self):
        model = ImplicitModel(3, 2, 4, constraint=Monotone(m=0.1), tol=1e-3, grad_tol=1e-2)
        assert model.solver == PeacemanRachford(rtol=1e-3)
        assert model.adjoint == ImplicitAdjoint(solver=PeacemanRachford(rtol=1e-2))

    def test_the_class_takes_the_models_kappa(self):
        model = ImplicitModel(3, 2, 6, constraint=Monotone, kappa=0.8)
        assert round(model.constraint.m, 12) == 0.2

    def test_the_spectrum_shows_the_half_plane(self):
        labels = [text.get_text() for text in viz.spectrum(self.model()).axes[0].get_legend().get_texts()]
        assert "Re λ ≤ 1 − m = 0.9" in labels


class TestCircularConvolution:
    @pytest.mark.float64
    @pytest.mark.parametrize(
        ("size", "taps"),
        [*zip(SIZES, [(1, 1), (3, 3), (5, 3), (2, 4), (3, 3)], strict=True), ((2, 5), (5, 3)), ((3, 3), (2, 4))],
    )
    def test_it_is_the_convolution_with_its_adjoint_resolvent_and_bounds(self, size, taps):
        kernel = torch.randn(3, 3, *taps)
        A = dense(circular(kernel), 3, size)
        ours = CircularConvolution.of(kernel, size)
        rows = torch.randn(4, len(A))
        assert torch.allclose(ours(rows), rows @ A.t())
        assert torch.allclose(ours.adjoint()(rows), rows @ A)
        m, L = ours.bounds()
        assert abs(m - lowest(A)) < 1e-9
        norm = float(torch.linalg.matrix_norm(torch.eye(len(A)) - A, 2))
        assert norm * (1 - 1e-9) <= L <= 1.03 * norm
        alpha = 0.3 / L  # where I + α(I − A) can be inverted, monotone or not
        inverse = torch.linalg.inv((1 + alpha) * torch.eye(len(A)) - alpha * A)
        assert torch.allclose(ours.resolvent(alpha)(rows), rows @ inverse.t())
        assert torch.allclose(ours.adjoint().resolvent(alpha)(rows), rows @ inverse)
        assert ours.adjoint().bounds() == (m, L)

    def test_it_is_torchs_circular_convolution(self):
        kernel, images = torch.randn(2, 2, 3, 5), torch.randn(3, 2, 6, 7)
        torchs = F.conv2d(F.pad(images, (2, 2, 1, 1), mode="circular"), kernel)
        assert torch.allclose(CircularConvolution.of(kernel, (6, 7))(images.flatten(1)), torchs.flatten(1))

    def test_a_known_m_is_not_sought(self):
        assert CircularConvolution.of(torch.randn(2, 2, 3, 3), (4, 4), m=0.25).bounds()[0] == 0.25

    def test_the_norm_of_zero_is_finite(self):
        identity = torch.zeros(2, 2, 1, 1)
        identity[0, 0], identity[1, 1] = 1.0, 1.0
        m, L = CircularConvolution.of(identity, (4, 4)).bounds()
        assert abs(m) < 1e-12
        assert 0 <= L < 1e-12


def equilibrium(scale: float = 1.0, size: tuple[int, int] = (4, 5), batch: int = 3) -> CircularEquilibrium:
    kernel = MonotoneKernel(m=0.2)(scale * torch.randn(2, 2, 2, 3, 3))
    return CircularEquilibrium(CircularConvolution.of(kernel, size, m=0.2), torch.randn(batch, 2, *size))


@pytest.mark.float64
class TestCircularEquilibrium:
    def test_plain_iteration_diverges_where_splitting_does_not(self):
        f = equilibrium(scale=3.0)
        x0 = torch.zeros(3, 2, 4, 5)
        with pytest.warns(ImplicitFunctionWarning, match="3 of 3 samples"):
            fixed_point(f, x0, solver=Picard())
        found = fixed_point(f, x0, solver=PeacemanRachford(max_steps=3000), on_failure="raise")
        A = dense(lambda x: f.map(x.flatten(1)).view_as(x), 2, (4, 5))
        exact = fixed_point(Equilibrium(A, f.b), torch.zeros(3, 40), solver=Newton(), on_failure="raise")
        assert torch.allclose(found.value.flatten(1), exact.value, atol=1e-7)

    @pytest.mark.parametrize(
        "solver", [Picard(damping=0.5), Anderson(), Auto(), Broyden(), Newton(), SPLITTING, ForwardBackward(alpha=0.5)],
        ids=lambda solver: type(solver).__name__,
    )  # fmt: skip
    def test_every_solver_finds_the_same_and_a_sample_alone_gets_the_same(self, solver):
        f = equilibrium(scale=0.1)
        x = fixed_point(f, torch.zeros(3, 2, 4, 5), solver=solver, on_failure="raise").value
        assert torch.allclose(x, f(x), atol=1e-8)
        for i in range(3):
            alone = fixed_point(f.take(torch.tensor([i])), torch.zeros(1, 2, 4, 5), solver=solver).value
            assert torch.allclose(alone[0], x[i], atol=1e-9)

    @pytest.mark.parametrize("adjoint", [ImplicitAdjoint(solver=SPLITTING), ImplicitAdjoint(order=2)], ids=repr)
    def test_gradients(self, adjoint):
        kernel = (0.1 * torch.randn(2, 2, 3, 3)).requires_grad_()
        b = torch.randn(1, 2, 3, 4, requires_grad=True)

        def x(kernel, b):
            f = CircularEquilibrium(CircularConvolution.of(kernel, (3, 4)), b, TANH)
            return fixed_point(f, torch.zeros_like(b), adjoint=adjoint, on_failure="raise").value

        assert torch.autograd.gradcheck(x, (kernel, b), fast_mode=True)

    def test_second_derivatives(self):
        kernel = (0.1 * torch.randn(1, 1, 3, 3)).requires_grad_()
        b = torch.randn(1, 1, 3, 3, requires_grad=True)

        def x(kernel, b):
            f = CircularEquilibrium(CircularConvolution.of(kernel, (3, 3)), b, TANH)
            return fixed_point(f, torch.zeros(1, 1, 3, 3), adjoint=ImplicitAdjoint(order=2)).value

        assert torch.autograd.gradgradcheck(x, (kernel, b), fast_mode=True)

    def test_the_tangent_of_a_monotone_model_is_found_by_splitting(self):
        f = equilibrium(scale=3.0)
        rows = fixed_point(f, torch.zeros(3, 2, 4, 5), solver=PeacemanRachford(max_steps=3000)).value.flatten(1)
        at, h = f.linearize(rows), torch.randn(3, 40)
        found = iterate(at.tangent_map(h), h, PeacemanRachford(max_steps=3000))
        assert found.all_converged
        assert torch.allclose(found.x, h + at.jvp(found.x), atol=1e-7)
        one = at.tangent_map(h).take(torch.tensor([1]))
        assert torch.allclose(one(found.x[1:2]), found.x[1:2], atol=1e-7)

    @pytest.mark.float64
    def test_transforms_of_torch_func(self):
        kernel, b = 0.1 * torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 4)

        def loss(kernel, b):
            f = CircularEquilibrium(CircularConvolution.of(kernel, (3, 4)), b, TANH)
            return fixed_point(f, torch.zeros(2, 2, 3, 4)).value.square().sum()

        free = kernel.clone().requires_grad_()
        loss(free, b).backward()
        assert torch.allclose(torch.func.grad(loss)(kernel, b), free.grad)
        along = torch.randn_like(kernel)
        _, slope = torch.func.jvp(lambda k: loss(k, b), (kernel,), (along,))
        assert torch.allclose(slope, (free.grad * along).sum())
        models = torch.stack([kernel, 0.5 * kernel])
        each = torch.stack([loss(k, b) for k in models])
        assert torch.allclose(torch.func.vmap(lambda k: loss(k, b))(models), each)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lower_precisions_are_solved_in_float32(self, dtype):
        f = equilibrium(scale=0.5)
        b = f.b.view(3, 2, 4, 5).to(dtype)
        A = CircularConvolution(f.map.symbol.to(torch.complex64), (4, 5), m=0.2)
        found = fixed_point(CircularEquilibrium(A, b), torch.zeros_like(b), solver=PATIENT_SINGLE, on_failure="raise")
        exact = fixed_point(CircularEquilibrium(f.map, b.double()), torch.zeros(3, 2, 4, 5), solver=PATIENT).value
        assert found.value.dtype == torch.float32
        assert torch.allclose(found.value.double(), exact, atol=1e-3)


class TestConvolutionalSet:
    @pytest.mark.float64
    @pytest.mark.parametrize(("size", "k"), [*zip(SIZES, (1, 3, 5, 5, 3), strict=True), ((2, 5), 5)])
    def test_members_on_every_image_circular_and_zero_padded(self, size, k):
        constraint = MonotoneKernel(m=0.2, size=size)
        kernel = constraint(torch.randn(2, 2, 2, k, k))
        assert kernel.shape == (2, 2, 2 * k - 1, 2 * k - 1)
        on_torus = lowest(dense(circular(kernel), 2, size))
        assert on_torus >= 0.2 - 1e-10
        assert abs(monotonicity(transfer(kernel, size)) - on_torus) < 1e-9
        assert constraint.contains(kernel)
        assert not constraint.contains(kernel + 2 * F.pad(torch.eye(2)[..., None, None], [k - 1] * 4))
        assert lowest(dense(lambda x: F.conv2d(x, kernel, padding=k - 1), 2, size)) >= 0.2 - 1e-10

    def test_it_is_the_formula(self):
        raw, size = torch.randn(2, 2, 2, 3, 3), (5, 6)
        P, Q = (dense(circular(part), 2, size) for part in raw)
        unit = torch.eye(len(P))
        P = P + 0.8**0.5 * unit
        expected = 0.8 * unit - P.t() @ P + Q - Q.t()
        assert torch.allclose(dense(circular(MonotoneKernel(m=0.2)(raw)), 2, size), expected)

    @pytest.mark.float64
    def test_zero_is_zero_and_gradients_are_right(self):
        constraint = MonotoneKernel(m=0.2)
        assert constraint(torch.zeros(2, 2, 2, 3, 3)).abs().max() < 1e-15
        assert torch.autograd.gradcheck(constraint, torch.randn(2, 1, 1, 3, 3, requires_grad=True), fast_mode=True)

    @given(st.floats(-3, 2), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**31))
    def test_every_size_of_weights_in_every_dtype(self, log_size, dtype, seed):
        raw = torch.randn(2, 3, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) * 10**log_size
        constraint = MonotoneKernel(m=0.1, size=(6, 6))
        assert constraint.contains(constraint(raw.to(dtype)))


class TestConvolutionalModel:
    @pytest.mark.float64
    def test_the_block_is_its_equilibrium(self):
        f, u = MonotoneConvBlock(4, m=0.3), torch.randn(2, 4, 5, 6)
        deq = DEQ(f, solver=SPLITTING, on_failure="raise")
        x = deq(u)
        assert torch.allclose(f(x, u), x, atol=1e-8)
        kernel = f.constraint(f.raw)
        assert torch.allclose(x, torch.relu(circular(kernel)(x) + u), atol=1e-8)

    @pytest.mark.float64
    def test_steps_of_any_size_stay_in_the_set_at_every_frequency_and_every_solve_converges(self):
        model = MonotoneConvClassifier(
            1, 3, channels=4, m=0.1, halvings=1, cells=2, on_failure="raise",
            solver=PATIENT, adjoint=ImplicitAdjoint(solver=PATIENT),
        )  # fmt: skip
        block = model.deq.f
        optimiser = torch.optim.SGD(model.parameters(), lr=3.0)
        u, target = torch.rand(8, 1, 10, 12), torch.arange(8) % 3
        with Monitor() as monitor:
            for _ in range(10):
                optimiser.zero_grad()
                F.cross_entropy(model(u), target).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                symbol = transfer(block.constraint(block.raw), (5, 6)).detach()
                assert monotonicity(symbol) >= 0.1 - 1e-12 * float(symbol.abs().max())
        assert monitor.missed == 0
        assert monitor.samples == 8 * 10
        assert float(symbol.abs().max()) > 2, "the steps were too small to test anything"

    def test_it_learns_the_digits(self, float32):
        data = load("digits", 128)
        solver = PeacemanRachford(rtol=1e-2)
        model = MonotoneConvClassifier(
            1, 10, channels=8, m=0.5, halvings=0, cells=4, solver=solver, adjoint=ImplicitAdjoint(solver=solver)
        )
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        with Monitor() as monitor:
            for _ in range(3):
                for u, target in data.train_dl:
                    optimiser.zero_grad()
                    F.cross_entropy(model(u), target).backward()
                    optimiser.step()
        model.eval()
        with torch.no_grad():
            right = torch.cat([model(u).argmax(dim=1) == target for u, target in data.test_dl])
        assert float(right.float().mean()) > 0.9
        assert monitor.missed == 0

    def test_it_runs_under_autocast(self, float32):
        model, u = MonotoneConvClassifier(1, 3, channels=4, halvings=1, cells=2).eval(), torch.rand(2, 1, 8, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(u)
        y.float().sum().backward()
        assert model.deq.stats.converged.all()
        assert torch.allclose(y.float(), model(u), atol=0.05)
        assert torch.isfinite(model.deq.f.raw.grad).all()

    def test_it_is_saved_copied_and_pickled(self, tmp_path):
        model = MonotoneConvClassifier(1, 3, channels=4, m=0.3, halvings=1, cells=2).eval()
        u = torch.rand(2, 1, 8, 8)
        model.save_pretrained(tmp_path)
        for other in (
            MonotoneConvClassifier.from_pretrained(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
        ):  # fmt: skip
            other.eval()
            assert other.solver == model.solver == PeacemanRachford()
            assert other.deq.f.constraint.m == model.deq.f.constraint.m
            assert torch.equal(other(u), model(u))


STEEP = Activation("steep", lambda z: 2 * z, lambda z: torch.full_like(z, 2.0), (2.0, 2.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Monotone(m=0), "m strictly between 0 and 1, got 0"),
        (lambda: Monotone(m=1.0), "m strictly between 0 and 1, got 1.0"),
        (lambda: Monotone(kappa=1.0), "kappa strictly between 0 and 1, got 1.0"),
        (lambda: Monotone(0.9, m=0.1), "either kappa or m = 1 − kappa, got kappa=0.9 and m=0.1. Leave one out"),
        (lambda: Monotone(m=0.1, lipschitz=1.1), r"slopes in \[0, 1\], got max\|φ'\| = 1.1"),
        (lambda: Monotone(m=0.5).right_inverse(torch.eye(2)), r"\(I − A ⪰ mI, m=0.5\), got a smallest eigenvalue of 0"),
        (lambda: ImplicitModel(3, 2, 4, constraint=Monotone(m=0.1), activation=SILU), "silu, with slopes in .-0.09"),
        (lambda: ImplicitModel(3, 2, 4, constraint=Monotone, activation=STEEP), r"steep, with slopes in \[2, 2\]"),
        (lambda: ImplicitModel(3, 2, 4, constraint=Monotone(m=0.1), kappa=0.5), "κ of the constraint object, 0.9"),
        (lambda: MonotoneKernel(m=0.1, size=(0, 3)), "size to be a positive integer, got 0"),
        (lambda: MonotoneKernel(m=0.1)(torch.zeros(2, 3, 3, 2, 2)), r"\(2, C, C, k, k\) with an odd k, got"),
        (lambda: MonotoneKernel(m=0.1)(torch.zeros(3, 3, 3, 3)), r"\(2, C, C, k, k\) with an odd k, got \(3, 3, 3, 3\)"),
        (lambda: MonotoneKernel(m=0.1).right_inverse(torch.zeros(1, 1, 5, 5)), "start from raw = 0, which is A = 0"),
        (
            lambda: CircularEquilibrium(CircularConvolution.of(torch.zeros(2, 2, 3, 3), (4, 4)), torch.zeros(1, 2, 4, 5)),
            r"CircularEquilibrium: expected b of shape \(batch, \(C, height, width\)=\(2, 4, 4\)\), got \(1, 2, 4, 5\)",
        ),
        (lambda: MonotoneConvBlock(4)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)), r"=\(4, 4, 4\)\), got"),
        (lambda: MonotoneConvBlock(0), "channels to be a positive integer, got 0"),
        (lambda: MonotoneConvBlock(4, 2), "an odd kernel_size, got 2"),
        (lambda: MonotoneConvBlock(4, activation=SILU), "MonotoneConvBlock: expected an activation with slopes"),
        (lambda: MonotoneConvClassifier(1, 10)(torch.rand(2, 3, 8, 8)), r"images \(batch, 1, height, width\), got"),
    ],
)  # fmt: skip
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


@pytest.mark.parametrize("solver", [PeacemanRachford(), PeacemanRachford(alpha=0.5), ForwardBackward()])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda solver: ImplicitModel(3, 2, 4, constraint=Monotone, solver=solver), (2, 3)),
        (lambda solver: MonotoneConvClassifier(1, 10, channels=2, solver=solver), (2, 1, 8, 8)),
    ],
    ids=["dense", "convolution"],
)
def test_lost_weights_are_worded(solver, model, shape):
    model = model(solver)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(ArgumentError, match=r"expected finite (weights )?A, got .* Training has diverged"):
        model(torch.zeros(shape))


@pytest.mark.float64
def test_a_spectral_ball_trains_too():
    model = ImplicitModel(3, 2, 6, constraint=SpectralNorm(kappa=0.9), on_failure="raise")
    with torch.no_grad():
        model.A.mul_(100)
    (A,) = model.weights()
    assert abs(float(torch.linalg.matrix_norm(A.detach(), 2)) - 0.9) < 1e-12
    model(torch.randn(4, 3)).sum().backward()
    assert model.A.grad.abs().max() > 0


def test_recomputed_steps_are_refused_to_a_splitting_solver_in_words():
    model = ImplicitModel(4, 2, 6, constraint=Monotone(), adjoint=Unrolled(checkpoint=True))
    with pytest.raises(ArgumentError, match=r"Unrolled\(checkpoint=True\): .*PeacemanRachford.* Use checkpoint=False"):
        model(torch.randn(3, 4))


def test_the_rounding_of_a_large_matrix_is_named_where_splitting_stalls():
    torch.manual_seed(1)
    A = Monotone(m=0.1)(3 * torch.randn(8, 8, dtype=torch.float64)).float()
    f = Equilibrium(A, torch.randn(4, 8, dtype=torch.float64).float(), TANH)
    with pytest.warns(ImplicitFunctionWarning, match="rounding of a large A: raise rtol, compute in a wider dtype"):
        fixed_point(f, torch.zeros(4, 8, dtype=torch.float32), solver=PeacemanRachford(max_steps=2000))
