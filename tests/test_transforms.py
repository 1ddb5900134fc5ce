"""torch.func, forward mode, batched backward, autocast: what works is exact, and what does not says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves

from implicitdl import (
    DEQ,
    Anderson,
    ArgumentError,
    Auto,
    ConvergenceError,
    Equilibrium,
    ImplicitAdjoint,
    ImplicitFunctionInf,
    ImplicitFunctionTriu,
    ImplicitFunctionWarning,
    ImplicitModel,
    ImplicitRNN,
    LowRankEquilibrium,
    Monitor,
    PhantomGradient,
    Picard,
    Solver,
    Unrolled,
    fixed_point,
    root,
)
from implicitdl.activations import RELU, TANH, Activation
from implicitdl.constraints import RowProjection, RowScaling, SoftRowScaling
from implicitdl.equations.circular import CircularConvolution, CircularEquilibrium
from implicitdl.nn.monotone import MonotoneConvBlock
from implicitdl.solvers.broyden import Broyden
from implicitdl.solvers.newton import Newton
from implicitdl.solvers.splitting import PeacemanRachford
from precision import digits


@dataclass(frozen=True)
class Case:
    """An equilibrium as a function of its tensors, the last of which has a row for each sample."""

    build: Callable[..., Equilibrium]
    affine: Callable[..., Tensor]  # its pre-activation in ordinary operations
    shapes: tuple[tuple[int, ...], ...]
    solver: Solver = field(default_factory=Auto)  # of the adjoint

    def tensors(self) -> tuple[Tensor, ...]:
        return (*(0.1 * torch.randn(shape) for shape in self.shapes[:-1]), torch.randn(self.shapes[-1]))

    def solve(self, *tensors: Tensor, order: int = 2) -> Tensor:
        adjoint = ImplicitAdjoint(order=order, solver=self.solver)
        return fixed_point(self.build(*tensors), torch.zeros_like(tensors[-1]), adjoint=adjoint).value

    def exact(self, *tensors: Tensor) -> Tensor:
        """By iterating a strong contraction until nothing moves, through which every transform goes."""
        x = torch.zeros_like(tensors[-1])
        for _ in range(30):
            x = torch.tanh(self.affine(x, *tensors))
        return x


def circular(K: Tensor, b: Tensor) -> CircularEquilibrium:
    return CircularEquilibrium(CircularConvolution.of(K, size=(2, 3)), b, TANH)


def convolution(x: Tensor, K: Tensor, b: Tensor) -> Tensor:
    return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), K) + b


DENSE = Case(lambda A, b: Equilibrium(A, b, TANH), lambda x, A, b: x @ A.mT + b, ((4, 4), (3, 4)))
CIRCULAR = Case(circular, convolution, ((1, 1, 3, 3), (2, 1, 2, 3)))
CASES = {
    "dense": DENSE,
    "low rank": Case(
        lambda L, R, b: LowRankEquilibrium(4 * L, R, b, TANH), lambda x, L, R, b: x @ R @ (4 * L).mT + b,
        ((4, 2), (4, 2), (3, 4)),
    ),
    "triangular": Case(
        lambda A, b: Equilibrium(10 * A.triu(1), b, TANH, triangular=True),
        lambda x, A, b: x @ (10 * A.triu(1)).mT + b, ((4, 4), (3, 4)),
    ),
    "circular": CIRCULAR,
    "adjoint by splitting": replace(DENSE, solver=PeacemanRachford()),
    "circular adjoint by splitting": replace(CIRCULAR, solver=PeacemanRachford()),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def loss(f):
    return lambda *tensors: f(*tensors).pow(3).sum()


def everything(tensors):
    return tuple(range(len(tensors)))


def models(tensors):
    """A batch of two models, each with its own data."""
    return tuple(torch.stack([t, -0.5 * t]) for t in tensors)


def rows(f):
    """One sample at a time, as `vmap` over inputs sees it."""
    return lambda *tensors: f(*tensors[:-1], tensors[-1].unsqueeze(0)).squeeze(0)


def over_rows(tensors):
    return (*[None] * (len(tensors) - 1), 0)


FIRST = {
    "grad": lambda f, *t: grad(loss(f), everything(t))(*t),
    "vjp": lambda f, *t: vjp(f, *t)[1](torch.cos(t[-1])),
    "jvp": lambda f, *t: jvp(f, t, tuple(torch.sin(part) for part in t)),
    "jacrev": lambda f, *t: jacrev(f, everything(t))(*t),
    "jacfwd": lambda f, *t: jacfwd(f, everything(t))(*t),
    "vmap over inputs": lambda f, *t: vmap(rows(f), over_rows(t))(*t),
    "vmap over one tensor, last dimension": lambda f, *t: vmap(f, (-1, *[None] * (len(t) - 1)))(
        torch.stack([t[0], -t[0]], -1), *t[1:]
    ),
    "vmap over models": lambda f, *t: vmap(f)(*models(t)),
    "vmap over models and their inputs": lambda f, *t: vmap(vmap(rows(f), over_rows(t)))(*models(t)),
    "gradient of each sample": lambda f, *t: vmap(grad(loss(rows(f)), everything(t)), over_rows(t))(*t),
    "gradient of each model": lambda f, *t: vmap(grad(loss(f), everything(t)))(*models(t)),
    "gradient of a batch of models": lambda f, *t: grad(loss(vmap(f)), everything(t))(*models(t)),
    "tangent of a batch of models": lambda f, *t: jvp(vmap(f), models(t), models(t)),
}
SECOND = {
    "reverse over reverse": lambda f, *t: grad(
        lambda *t: sum(g.pow(2).sum() for g in grad(loss(f), everything(t))(*t)), everything(t)
    )(*t),
    "forward over reverse": lambda f, *t: jvp(grad(loss(f), everything(t)), t, t),
    "reverse over forward": lambda f, *t: grad(lambda *t: jvp(loss(f), t, t)[1], everything(t))(*t),
    "forward over forward": lambda f, *t: jvp(lambda *t: jvp(f, t, t), t, t),
    "reverse over a product": lambda f, *t: grad(lambda g: sum(p.pow(3).sum() for p in vjp(f, *t)[1](g)))(t[-1]),
    "of each sample": lambda f, *t: vmap(
        lambda *t: jvp(grad(loss(rows(f)), everything(t)), t, t)[1], over_rows(t)
    )(*t),
}  # fmt: skip


def agree(ours, exact, double, single=1e-4):
    """Float64 to an absolute tolerance, float32 to one relative to parts above one."""
    ours, exact = ([part.detach().double() for part in tree_leaves(tree)] for tree in (ours, exact))
    assert [part.shape for part in ours] == [part.shape for part in exact]
    for one, other in zip(ours, exact, strict=True):
        size = digits(1.0, max(1.0, float(other.abs().max())))
        assert float((one - other).abs().max()) < digits(double, single) * size


def pairs(transforms, often):
    """Every transform of the dense equilibrium, and of each other one some that take every one of its rules."""
    named = [("dense", name) for name in transforms] + [
        (case, name) for case in CASES if case != "dense" for name in often
    ]
    return [pytest.param(transforms[name], CASES[case], id=f"{name}, {case}") for case, name in named]


@pytest.mark.parametrize(
    ("transform", "case"), pairs(FIRST, ("vjp", "jacfwd", "vmap over inputs", "gradient of a batch of models"))
)
def test_every_transform_of_every_equilibrium(transform, case):
    t = case.tensors()
    agree(transform(case.solve, *t), transform(case.exact, *t), 1e-7)


@pytest.mark.parametrize(("transform", "case"), pairs(SECOND, ("forward over reverse", "of each sample")))
def test_transforms_of_transforms(transform, case):
    t = case.tensors()
    agree(transform(case.solve, *t), transform(case.exact, *t), 1e-6)


@pytest.mark.float64
@every_case
@pytest.mark.parametrize("order", [1, 2])
def test_dual_numbers_and_batched_cotangents(case, order):
    t = tuple(part.requires_grad_() for part in case.tensors())
    solve = partial(case.solve, order=order)
    assert torch.autograd.gradcheck(solve, t, check_forward_ad=True, check_batched_grad=True, fast_mode=True)


def test_hessians():
    t = DENSE.tensors()
    for transform in (hessian, lambda f, n: jacrev(jacrev(f, n), n), lambda f, n: jacfwd(jacfwd(f, n), n)):
        agree(transform(loss(DENSE.solve), 1)(*t), transform(loss(DENSE.exact), 1)(*t), 1e-7)


@pytest.mark.float64
@pytest.mark.parametrize("name", ["dense", "low rank"])
def test_second_derivatives_by_dual_numbers_and_batched(name):
    case = CASES[name]
    t = tuple(part.requires_grad_() for part in case.tensors())
    assert torch.autograd.gradgradcheck(case.solve, t, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


@pytest.mark.float64
@pytest.mark.parametrize("order", [1, 2])
def test_batched_cotangents_of_a_function(order):
    A, b = DENSE.tensors()
    A.requires_grad_(), b.requires_grad_()

    def solve(A, b):
        f = lambda x, b: torch.tanh(x @ A.t() + b)  # noqa: E731
        return fixed_point(f, torch.zeros_like(b), b, adjoint=ImplicitAdjoint(order=order)).value

    assert torch.autograd.gradcheck(solve, (A, b), check_batched_grad=True, fast_mode=True)
    plain, vectorized = (
        torch.autograd.functional.jacobian(solve, (A, b), vectorize=vectorize) for vectorize in (False, True)
    )
    agree(vectorized, plain, 1e-9)


@pytest.mark.parametrize("closed_form", [False, True])
def test_vmap_over_the_backward_pass_of_a_solution_made_before(closed_form):
    A, b = (part.requires_grad_() for part in DENSE.tensors())
    f = Equilibrium(A, b, TANH) if closed_form else (lambda x: torch.tanh(x @ A.t() + b))
    x = fixed_point(f, torch.zeros(3, 4)).value
    g = torch.randn(5, 3, 4)
    pull = lambda g: torch.autograd.grad(x, (A, b), g, retain_graph=True)  # noqa: E731
    one_by_one = zip(*map(pull, g), strict=True)
    agree(vmap(pull)(g), tuple(map(torch.stack, one_by_one)), 1e-12, 1e-6)


def test_a_batched_backward_can_be_batched_once_by_autograd():
    A, b = (part.requires_grad_() for part in DENSE.tensors())
    x = fixed_point(Equilibrium(A, b, TANH), torch.zeros(3, 4)).value
    inner = lambda g: torch.autograd.grad(x, b, g, retain_graph=True, is_grads_batched=True)[0]  # noqa: E731
    with pytest.raises(ArgumentError, match="is_grads_batched once, got one inside another"):
        torch._vmap_internals._vmap(inner)(torch.randn(2, 5, 3, 4))


def test_tangents_of_a_cotangent_need_the_solve_inside():
    A, b = (part.requires_grad_() for part in DENSE.tensors())
    x = fixed_point(Equilibrium(A, b, TANH), torch.zeros(3, 4)).value
    with forward_ad.dual_level(), pytest.raises(ArgumentError, match="Make the solve inside"):
        torch.autograd.grad(x, b, forward_ad.make_dual(torch.ones(3, 4), torch.ones(3, 4)))


TWICE = {
    "reverse over reverse": lambda f, b: grad(lambda b: grad(f)(b).sum())(b),
    "forward over reverse": lambda f, b: jvp(grad(f), (b,), (b,)),
    "forward over forward": lambda f, b: jvp(lambda b: jvp(f, (b,), (b,))[1], (b,), (b,)),
    "reverse over forward": lambda f, b: grad(lambda b: jvp(f, (b,), (b,))[1])(b),
    "of each sample": lambda f, b: vmap(grad(lambda b: grad(f)(b).sum()))(b.unsqueeze(1)),
    "of a cotangent": lambda f, b: grad(lambda g: vjp(lambda b: f(b, reduce=False), b)[1](g)[0].sum())(b),
}


@pytest.mark.parametrize("twice", TWICE.values(), ids=TWICE)
def test_order_1_raises_at_the_second_derivative(twice):
    A, b = DENSE.tensors()

    def f(b, reduce=True):
        x = fixed_point(Equilibrium(A, b, TANH), torch.zeros_like(b)).value
        return x.sum() if reduce else x

    with pytest.raises(RuntimeError, match=r"Pass adjoint=ImplicitAdjoint\(order=2\)"):
        twice(f, b)


def test_order_2_raises_at_the_third_derivative():
    A, b = DENSE.tensors()
    f = loss(DENSE.solve)
    with pytest.raises(RuntimeError, match="got a request for the next one"):
        jacrev(hessian(f, 1), 1)(A, b)


def test_a_second_derivative_in_A_alone_is_not_lost():
    # The cotangent is constant and b is not differentiated: only J carries A into the adjoint.
    A, b = DENSE.tensors()
    f = lambda A, b: DENSE.solve(A, b).sum()  # noqa: E731
    exact = lambda A, b: DENSE.exact(A, b).sum()  # noqa: E731
    agree(jacrev(grad(f, 1), 0)(A, b), jacrev(grad(exact, 1), 0)(A, b), 1e-7)


UNDER = {
    "grad": lambda f, b: grad(lambda b: f(b).sum())(b),
    "vmap": lambda f, b: vmap(f)(b.unsqueeze(0)),
    "jvp": lambda f, b: jvp(f, (b,), (b,)),
}


def dual(f, b):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(b, b))


@pytest.mark.parametrize(
    "solve",
    [
        lambda b: fixed_point(lambda x: 0.5 * x + b, torch.zeros_like(b)).value,
        lambda b: fixed_point(lambda x, b: 0.5 * x + b, torch.zeros_like(b), b).value,
        lambda b: root(lambda x, b: x - b, torch.zeros_like(b), b).value,
        lambda b: DEQ(lambda x, u: 0.5 * x + u)(b),
    ],
    ids=["closure", "argument", "root", "DEQ"],
)
def test_a_function_is_refused(solve):
    for under in (*UNDER.values(), dual):
        with pytest.raises(
            ArgumentError, match=r"expected an Equilibrium under torch\.func's.*got a function.*closes over"
        ):
            under(solve, torch.ones(2, 3))


@pytest.mark.parametrize("adjoint", [PhantomGradient(), Unrolled()], ids=repr)
def test_other_adjoints_are_refused(adjoint):
    def solve(b):
        return fixed_point(Equilibrium(torch.zeros(3, 3), b), torch.zeros_like(b), adjoint=adjoint).value

    with pytest.raises(ArgumentError, match=rf"ImplicitAdjoint\(\) under.*got {type(adjoint).__name__}"):
        vmap(solve)(torch.ones(1, 2, 3))


def learnable(slope):
    return Activation("prelu", lambda z: torch.where(z > 0, z, slope * z), lambda z: (z > 0).to(z.dtype), (0.0, 1.0))


@pytest.mark.parametrize(
    "under",
    [
        lambda f, s: grad(lambda s: f(s).sum())(s),
        lambda f, s: vmap(f)(torch.stack([s, s])),
        lambda f, s: jvp(f, (s,), (s,)),
        lambda f, s: jvp(lambda s: grad(lambda b: f(s))(s), (s,), (s,)),
        lambda f, s: (lambda leaf: vmap(lambda b: f(leaf))(torch.zeros(2)))(s.requires_grad_()),
        dual,
    ],
    ids=["grad", "vmap", "jvp", "grad inside jvp", "a leaf under vmap", "dual numbers"],
)
def test_an_activation_with_parameters_is_refused(under):
    def solve(slope):
        f = Equilibrium(0.1 * torch.eye(3), torch.ones(2, 3), learnable(slope))
        return fixed_point(f, torch.zeros(2, 3)).value.sum()

    with pytest.raises(ArgumentError, match=r"an activation without parameters.*closes over a tensor they act on"):
        under(solve, torch.tensor(0.3))


def test_an_activation_without_a_derivative_and_one_with_the_seeds_masks():
    class Masked(ImplicitFunctionInf):
        @staticmethod
        def phi(X):
            return torch.clip(X, min=0)

        @staticmethod
        def dphi(X):  # as in the seeds' library: detached, and filled by a mask
            slope = X.clone().detach()
            slope[X <= 0] = 0
            slope[X > 0] = 1
            return slope

    class Alone(ImplicitFunctionInf):
        phi = staticmethod(lambda X: torch.tanh(X) / 2)

    for f in (Masked, Alone):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImplicitFunctionWarning)  # the slope is bounded on a grid
            model = ImplicitModel(3, 2, 4, f=f, adjoint=ImplicitAdjoint(order=2))
        u = torch.randn(5, 3)
        inside = vmap(grad(lambda u, m=model: m(u.unsqueeze(0)).sum()))(u)
        u.requires_grad_()
        agree(inside, torch.autograd.grad(model(u).sum(), u), 1e-8)
        plain = torch.autograd.functional.hessian(lambda u, m=model: m(u).pow(2).sum(), u.detach())
        agree(hessian(lambda u, m=model: m(u).pow(2).sum())(u.detach()), plain, 1e-7)


MODELS = {
    "RowScaling": {},
    "RowProjection": {"constraint": RowProjection},
    "SoftRowScaling": {"constraint": SoftRowScaling},
    "triangular": {"f": ImplicitFunctionTriu},
    "low rank": {"is_low_rank": True, "rank": 3},
}
every_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


def ensemble(options, size=3):
    """Models well outside the ball that their constraints project onto, except the last.

    Their values reach 1e4 and are compared to 1e-6, so the solves must know more than ten digits.
    """
    tol = digits(1e-12, 1e-6)
    several = [ImplicitModel(5, 2, 6, bias=True, tol=tol, grad_tol=tol, **options) for _ in range(size)]
    with torch.no_grad():
        for model in several[:-1]:
            for weight in model.parameters():
                weight.mul_(20.0)
    return several, torch.randn(4, 5)


def gradients(model, u):
    return dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(model(u).pow(2).sum(), [*model.parameters()]),
            strict=True,
        )
    )


@every_model
def test_a_batch_of_models(options):
    several, u = ensemble(options)
    weights, _ = stack_module_state(several)
    call = lambda w: functional_call(several[0], w, (u,))  # noqa: E731
    y = vmap(call)(weights)
    agree(y, torch.stack([model(u) for model in several]), 1e-9)
    # torch.autograd through vmap, and a gradient inside of it.
    y.pow(2).sum().backward()
    each = vmap(grad(lambda w: call(w).pow(2).sum()))({name: w.detach() for name, w in weights.items()})
    for i, model in enumerate(several):
        exact = gradients(model, u)
        agree({name: w.grad[i] for name, w in weights.items()}, exact, 1e-7)
        agree({name: g[i] for name, g in each.items()}, exact, 1e-7)


@every_model
def test_the_gradient_of_each_sample(options):
    (model, *_), u = ensemble(options)
    weights = {name: w.detach() for name, w in model.named_parameters()}
    each = vmap(grad(lambda w, u: functional_call(model, w, (u.unsqueeze(0),)).pow(2).sum()), (None, 0))(weights, u)
    for i in range(len(u)):
        agree({name: g[i] for name, g in each.items()}, gradients(model, u[i : i + 1]), 1e-7)


@every_model
def test_forward_mode_through_a_model_and_its_weights(options):
    (model, *_), u = ensemble(options)
    weights = {name: w.detach() for name, w in model.named_parameters()}
    along = {name: torch.randn_like(w) for name, w in weights.items()}
    _, tangent = jvp(lambda w: functional_call(model, w, (u,)).pow(2).sum(), (weights,), (along,))
    g = gradients(model, u)
    agree(tangent, sum((g[name] * along[name]).sum() for name in g), 1e-6)


def test_a_recurrent_model_under_transforms():
    rnn = ImplicitRNN(input_dim=2, output_dim=2, hidden_dim=3, implicit_hidden_dim=4)
    x, lengths = torch.randn(5, 6, 2), torch.tensor([6, 1, 3, 2, 6])
    run = lambda x, n: rnn(x.unsqueeze(0), lengths=n.unsqueeze(0)).squeeze(0)  # noqa: E731
    agree(vmap(run)(x, lengths), rnn(x, lengths=lengths), 1e-9)
    x.requires_grad_()
    exact = torch.autograd.grad(rnn(x, lengths=lengths).pow(2).sum(), x)[0]
    agree(vmap(grad(lambda x, n: run(x, n).pow(2).sum()))(x.detach(), lengths), exact, 1e-8)
    mask = torch.arange(6) < lengths.unsqueeze(1)
    agree(vmap(run)(x, mask), rnn(x, lengths=lengths), 1e-9)


def test_the_constraints_are_the_same_maps_under_transforms():
    raw = torch.randn(6, 6) * torch.tensor([0.0, 0.01, 0.1, 1.0, 10.0, 100.0]).unsqueeze(1)
    g = torch.randn(6, 6)
    for constraint in (RowScaling(0.9), RowProjection(0.9), SoftRowScaling(0.9)):
        free = raw.clone().requires_grad_()
        A = constraint(free)
        inside, pull = vjp(constraint, raw)
        agree(inside, A.detach(), 1e-15, 1e-6)
        agree(pull(g)[0], torch.autograd.grad(A, free, g)[0], 1e-13, 1e-6)
        agree(vmap(constraint)(torch.stack([raw, -raw], dim=0))[1], constraint(-raw), 1e-15, 1e-6)
        agree(jvp(constraint, (raw,), (g,))[1], torch.autograd.functional.jvp(constraint, raw, g)[1], 1e-13, 1e-6)


def test_figures_of_each_sample_and_of_each_model():
    A = torch.stack([0.1 * torch.eye(3), 0.9 * torch.eye(3)])
    b = torch.randn(4, 3)

    def solve(A, b):
        s = fixed_point(Equilibrium(A, b), torch.zeros_like(b), solver=Picard(max_steps=400), trace=True)
        return s.value, s.residual, s.steps, s.converged, s.trace

    for k, parts in enumerate(zip(*vmap(solve, (0, None))(A, b), strict=True)):
        value, residual, steps, converged, trace = solve(A[k], b)
        agree(parts[:4], (value, residual, steps, converged), 1e-12, 1e-6)
        assert torch.allclose(parts[4][: len(trace)], trace, equal_nan=True)
        assert parts[4].shape == (400, 4)
        assert parts[4][len(trace) :].isnan().all()
    rows = vmap(lambda b: solve(A[1], b.unsqueeze(0))[2])(b)
    assert rows.flatten().tolist() == solve(A[1], b)[2].tolist()


def test_misses_are_as_loud_inside_and_monitors_see_every_solve():
    A, b = 0.99 * torch.eye(2), torch.ones(3, 1, 2)
    slow = partial(fixed_point, solver=Picard(max_steps=5))
    solve = lambda b, **options: slow(Equilibrium(A, b), torch.zeros_like(b), **options).value.sum()  # noqa: E731
    with pytest.warns(ImplicitFunctionWarning, match=r"fixed_point\(Picard\): 3 of 3 samples did not reach"):
        vmap(solve)(b)
    with pytest.raises(ConvergenceError, match="3 of 3"):
        vmap(partial(solve, on_failure="raise"))(b)
    short = ImplicitAdjoint(solver=Picard(max_steps=5))
    well = lambda b: fixed_point(Equilibrium(A, b), torch.zeros_like(b), adjoint=short).value.sum()  # noqa: E731
    with pytest.warns(ImplicitFunctionWarning, match=r"backward\(Picard\): 3 of 3"):
        vmap(grad(well))(b)
    with pytest.warns(ImplicitFunctionWarning, match=r"tangent\(Picard\): 1 of 1"):
        jvp(well, (b[0],), (b[0],))
    with Monitor() as monitor:
        vmap(grad(lambda b: fixed_point(Equilibrium(A, b), torch.zeros_like(b)).value.sum()))(b)
    assert monitor.samples == 3
    assert [len(figures.steps) for figures in monitor.backward] == [3]


def test_a_sample_that_is_not_finite_is_reported_where_it_cannot_be_checked():
    model = ImplicitModel(2, 1, 3)
    u = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])
    with pytest.raises(ArgumentError, match="finite u"):
        model(u)
    with pytest.warns(ImplicitFunctionWarning, match="1 of 2 samples"):
        y = vmap(lambda u: model(u.unsqueeze(0)))(u)
    agree(y[0], model(u[:1]), 1e-9)


def test_an_input_of_the_wrong_size_is_worded_inside_too():
    model = ImplicitModel(2, 1, 3)
    with pytest.raises(ArgumentError, match=r"u of shape \(batch, p=2\), got \(2,\)"):
        vmap(model)(torch.zeros(4, 2))


def test_a_start_is_no_variable_and_may_be_the_solution():
    b = torch.randn(3, 4)
    solve = lambda x0: fixed_point(Equilibrium(torch.zeros(4, 4), b, TANH), x0).value  # noqa: E731
    assert (jacrev(solve)(torch.tanh(b)) == 0).all()
    agree(vmap(solve)(torch.tanh(b).expand(2, 3, 4)), torch.tanh(b).expand(2, 3, 4), 1e-12, 1e-6)


def test_float32_under_transforms():
    t = tuple(part.float() for part in DENSE.tensors())
    case = DENSE
    agree(FIRST["gradient of each model"](case.solve, *t), FIRST["gradient of each model"](case.exact, *t), 1e-4)
    assert vmap(case.solve)(*models(t)).dtype == torch.float32


def test_functional_call_without_a_transform():
    model, other = ImplicitModel(3, 2, 4), ImplicitModel(3, 2, 4)
    u = torch.randn(5, 3)
    agree(functional_call(model, dict(other.named_parameters()), (u,)), other(u), 1e-15, 1e-6)


def test_export_is_refused():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ImplicitModel(3, 2, 4)

        def forward(self, u):
            return self.model(u)

    with pytest.raises(ArgumentError, match=r"to run on numbers, got torch\.export"):
        torch.export.export(Layer(), (torch.randn(5, 3),), strict=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*MODELS, "recurrent"])
def test_autocast(name, dtype, float32):
    module = (
        ImplicitRNN(input_dim=5, output_dim=2, hidden_dim=4, implicit_hidden_dim=6)
        if name == "recurrent"
        else ImplicitModel(5, 2, 6, bias=True, **MODELS[name])
    )
    u = torch.randn(*((4, 3, 5) if name == "recurrent" else (4, 5)))

    def forward(weights, low):
        with torch.autocast("cpu", dtype=dtype, enabled=low):
            y = functional_call(module, weights, (u,))
        assert y.dtype == (dtype if low else torch.float32)
        return y.float().pow(2).sum()

    free = dict(module.named_parameters())
    exact = torch.autograd.grad(forward(free, False), [*free.values()])
    plain = torch.autograd.grad(forward(free, True), [*free.values()])
    inside = grad(forward)({name: w.detach() for name, w in free.items()}, True)
    # Two bits of bfloat16 are 3 %, and float16 has three more.
    tolerance = 0.03 if dtype == torch.bfloat16 else 0.005
    for low in (plain, inside.values()):
        for one, other in zip(low, exact, strict=True):
            assert one.dtype == torch.float32
            assert (one - other).norm() <= tolerance * other.norm()


def test_relu_and_its_kink_do_not_disturb_the_derivative():
    A, b = 0.3 * torch.randn(4, 4), torch.randn(3, 4)
    solve = lambda A, b: fixed_point(Equilibrium(A, b, RELU), torch.zeros_like(b)).value  # noqa: E731
    free = A.clone().requires_grad_()
    exact = torch.autograd.grad(solve(free, b).pow(2).sum(), free)[0]
    agree(grad(lambda A: solve(A, b).pow(2).sum())(A), exact, 1e-8)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Newton(), PeacemanRachford()], ids=repr)
def test_every_solver_serves_inside(solver):
    A, b = DENSE.tensors()
    solve = lambda A, b: fixed_point(Equilibrium(A, b, TANH), torch.zeros_like(b), solver=solver).value  # noqa: E731
    agree(vmap(jacrev(solve, (0, 1)))(*models((A, b))), vmap(jacrev(DENSE.exact, (0, 1)))(*models((A, b))), 1e-7)


def test_a_deq_whose_block_has_a_closed_form():
    split = PeacemanRachford()
    deq = DEQ(MonotoneConvBlock(2), solver=split, adjoint=ImplicitAdjoint(solver=split))
    u = torch.randn(3, 2, 3, 3)
    weights = {name: w.detach() for name, w in deq.named_parameters()}
    each = vmap(grad(lambda w, u: functional_call(deq, w, (u.unsqueeze(0),)).pow(2).sum()), (None, 0))(weights, u)
    exact = gradients(deq, u)
    agree({name: g.sum(0) for name, g in each.items()}, exact, 1e-7)
    _, tangent = jvp(lambda w: functional_call(deq, w, (u,)).pow(2).sum(), (weights,), (weights,))
    agree(tangent, sum((exact[name] * w).sum() for name, w in weights.items()), 1e-7)
