"""ImplicitModel: gradients, settings, inputs, saving, and what torchidl's users bring along."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from implicitdl import (
    Anderson,
    ArgumentError,
    ImplicitAdjoint,
    ImplicitFunction,
    ImplicitFunctionInf,
    ImplicitFunctionTriu,
    ImplicitFunctionWarning,
    ImplicitModel,
    PhantomGradient,
    Picard,
    Unrolled,
)
from implicitdl._internal.store import CheckpointError
from implicitdl.activations import BUILTIN, MODULES, RELU, TANH, Activation, from_function
from implicitdl.constraints import RowProjection, RowScaling, SoftRowScaling, Unconstrained, norm_inf
from precision import digits

SIZES = {"input_dim": 3, "output_dim": 2, "hidden_dim": 5}
VARIANTS = {
    "dense": {},
    "projection": {"constraint": RowProjection},
    "soft": {"constraint": SoftRowScaling},
    "triangular": {"f": ImplicitFunctionTriu},
    "low-rank": {"is_low_rank": True, "rank": 2},
    "no-D": {"no_D": True},
    "tanh": {"activation": TANH},
}


class Swish(ImplicitFunctionInf):
    """A user's own φ, with its own φ'."""

    @staticmethod
    def phi(X):
        return X * torch.sigmoid(X)

    @staticmethod
    def dphi(X):
        s = torch.sigmoid(X)
        return s * (1 + X * (1 - s))


class Softsign(ImplicitFunctionInf):
    """A user's own φ, without φ'."""

    @staticmethod
    def phi(X):
        return X / (1 + X.abs())


def model(scale=1.0, **options):
    torch.manual_seed(3)
    built = ImplicitModel(**SIZES, bias=True, **options)
    with torch.no_grad():
        for weight in (built.L, built.R) if built.is_low_rank else (built.A,):
            weight.mul_(scale)
    return built


def functional(built, adjoint_inputs):
    """The model as a function of u and of all its parameters."""
    names = [name for name, _ in built.named_parameters()]

    def call(u, *weights):
        return torch.func.functional_call(built, dict(zip(names, weights, strict=True)), (u,))

    u = torch.randn(2, 3, requires_grad=True)
    return call, (u, *built.parameters())


@pytest.mark.float64
@pytest.mark.parametrize("scale", [0.5, 20.0], ids=["inside", "outside"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_for_the_input_and_every_parameter(variant, scale):
    built = model(scale, **VARIANTS[variant])
    assert torch.autograd.gradcheck(*functional(built, built), fast_mode=True)


@pytest.mark.float64
@pytest.mark.parametrize("variant", ["dense", "projection", "triangular", "low-rank", "tanh"])
def test_gradgradcheck_at_order_2(variant):
    built = model(5.0, adjoint=ImplicitAdjoint(order=2), **VARIANTS[variant])
    assert torch.autograd.gradgradcheck(*functional(built, built), fast_mode=True)


def test_projected_gradient_differs_from_the_straight_through_one():
    # The defect of torchidl: the gradient of the scaled A handed on as that of the free one.
    built = model(50.0)
    u = torch.randn(4, 3)
    built(u).pow(2).sum().backward()
    (A,) = (weight.detach().requires_grad_() for weight in built.weights())
    frozen = model(50.0, f=ImplicitFunction)
    with torch.no_grad():
        frozen.A.copy_(A)
    frozen(u).pow(2).sum().backward()
    assert not torch.allclose(built.A.grad, frozen.A.grad, rtol=0.1)


def test_the_result_and_gradient_do_not_depend_on_the_start():
    built, u = model(), torch.randn(4, 3)

    def both(X0):
        y = built(u, X0)
        return y, *torch.autograd.grad(y.pow(2).sum(), list(built.parameters()))

    for one, other in zip(both(None), both(torch.randn(4, 5) * 3), strict=True):
        assert torch.allclose(one, other, atol=digits(1e-8, 1e-3))


def test_jacobian_against_a_dense_solve():
    built, u = model(), torch.randn(1, 3)
    J = torch.autograd.functional.jacobian(built, u)[0, :, 0]
    (A,) = built.weights()
    x = built.solve(u).value[0]
    D = torch.diag((x > 0).to(x.dtype))
    expected = built.C @ torch.linalg.solve(torch.eye(5) - D @ A, D @ built.B) + built.D
    assert (J - expected).abs().max() < digits(1e-8, 1e-4)


def test_eval_changes_nothing_about_differentiability():
    built, u = model().eval(), torch.randn(2, 3, requires_grad=True)
    built(u).sum().backward()
    assert u.grad.abs().sum() > 0


def test_solve_returns_the_full_solution():
    built, u = model(), torch.randn(4, 3)
    solution = built.solve(u, trace=True)
    assert solution.value.shape == (4, 5)
    assert solution.converged.all()
    assert solution.trace.shape[1] == 4
    assert torch.allclose(built.read_out(solution.value, u), built(u))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_sample_equals_its_row_of_the_batch(variant):
    built, u = model(3.0, **VARIANTS[variant]), torch.randn(6, 3)
    y = built(u)
    for i in range(6):
        assert torch.allclose(built(u[i : i + 1])[0], y[i], rtol=digits(1e-9, 1e-4), atol=digits(1e-12, 1e-5))


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 4), (2, 3, 2, 2)])
def test_inputs_of_any_trailing_shape(shape):
    built = ImplicitModel(input_dim=12, output_dim=1, hidden_dim=4)
    u = torch.randn(shape)
    assert torch.equal(built(u), built(u.reshape(2, 12)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype):
    built = model().to(dtype)
    y = built(torch.randn(2, 3, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert all(weight.grad.dtype == dtype for weight in built.parameters())


@pytest.mark.parametrize("of", ["input", "weights"])
def test_autocast_leaves_double_precision_alone(of):
    model = ImplicitModel(
        input_dim=5, output_dim=3, hidden_dim=4, dtype=torch.float64 if of == "weights" else torch.float32
    )
    u = torch.randn(2, 5, dtype=torch.float64 if of == "input" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ArgumentError, match="of dtype"):
        model(u)


@pytest.mark.parametrize("variant", ["dense", "low-rank", "triangular"])
def test_bfloat16_autocast_trains(variant):
    built = model(**VARIANTS[variant]).float()
    u = torch.randn(8, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = built(u)
    exact = built(u)
    assert (y.float() - exact).norm() < 0.05 * exact.norm()
    y.float().pow(2).sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in built.parameters())


def test_settings_precedence_argument_then_f_then_default():
    class Tight(ImplicitFunctionInf):
        mitr = grad_mitr = 500
        tol = grad_tol = 1e-6
        kappa = 0.8

    by_f = ImplicitModel(**SIZES, f=Tight)
    assert (by_f.solver.rtol, by_f.solver.max_steps, by_f.kappa) == (1e-6, 500, 0.8)
    assert (by_f.adjoint.solver.rtol, by_f.adjoint.solver.max_steps) == (1e-6, 500)
    by_argument = ImplicitModel(**SIZES, f=Tight, tol=1e-3, grad_mitr=7, kappa=0.5)
    assert (by_argument.solver.rtol, by_argument.solver.max_steps, by_argument.kappa) == (1e-3, 500, 0.5)
    assert (by_argument.adjoint.solver.rtol, by_argument.adjoint.solver.max_steps) == (1e-6, 7)
    default = ImplicitModel(**SIZES)
    assert (default.solver.rtol, default.solver.max_steps, default.kappa) == (None, 300, 0.99)
    own = ImplicitModel(**SIZES, f=Tight, solver=Anderson(memory=3), tol=1e-4)
    assert own.solver == Anderson(memory=3, rtol=1e-4)


def test_the_settings_of_one_model_do_not_touch_another():
    first = ImplicitModel(**SIZES, kappa=0.5, tol=1e-3)
    ImplicitModel(**SIZES, kappa=0.9, tol=1e-7)
    assert (first.kappa, first.solver.rtol) == (0.5, 1e-3)


@pytest.mark.float64
def test_a_users_phi_keeps_its_slope_and_a_missing_dphi_comes_from_autograd():
    with pytest.warns(ImplicitFunctionWarning, match=r"Swish: the slope of φ is not known.*\[-0\.09984, 1\.1\]"):
        swish = ImplicitModel(**SIZES, f=Swish, kappa=0.9)
    assert swish.constraint.radius == pytest.approx(0.9 / 1.0998393, rel=1e-6)
    with pytest.warns(ImplicitFunctionWarning):
        softsign = ImplicitModel(**SIZES, f=Softsign)
    for built in (swish, softsign):
        assert torch.autograd.gradcheck(*functional(built, built), fast_mode=True)


def test_torchs_own_functions_are_recognised(recwarn):
    class Tanh(ImplicitFunctionInf):
        phi = staticmethod(torch.tanh)

    assert Tanh.activation() is TANH
    assert ImplicitFunctionTriu.activation() is RELU
    assert not list(recwarn)


@pytest.mark.float64
@pytest.mark.parametrize("activation", BUILTIN.values(), ids=lambda a: a.name)
def test_builtin_slopes_are_right(activation):
    z = torch.linspace(-12, 12, 240_001, requires_grad=True)
    (slope,) = torch.autograd.grad(activation.phi(z).sum(), z)
    smooth = z.abs() > 1e-6
    smooth &= (z.abs() - 1).abs() > 1e-6
    assert torch.allclose(activation.dphi(z.detach())[smooth], slope[smooth], atol=1e-8)
    low, high = activation.slope
    assert low - 1e-9 <= slope.min()
    assert slope.max() <= high + 1e-9
    if activation.name in ("silu", "gelu"):  # attained, so the bound is no larger than it must be
        assert slope.max() == pytest.approx(high, abs=1e-8)
        assert slope.min() == pytest.approx(low, abs=1e-8)
    if activation.homogeneous:
        assert torch.allclose(activation.phi(3.0 * z), 3.0 * activation.phi(z))


@pytest.mark.float64  # the weights grow until the squares of a state overflow in float32
def test_the_promise_holds_after_optimiser_steps():
    built = model(5.0)
    optimiser = torch.optim.SGD(built.parameters(), lr=10.0)
    for _ in range(5):
        optimiser.zero_grad()
        built(torch.randn(8, 3)).pow(2).mean().neg().backward()
        optimiser.step()
        (A,) = built.weights()
        assert norm_inf(A) <= built.kappa * (1 + 1e-12)
        assert built.solve(torch.randn(8, 3)).converged.all()


def test_an_unconstrained_model_that_has_no_equilibrium_says_so():
    built = model(f=ImplicitFunction, on_failure="warn")
    with torch.no_grad():
        built.A.copy_(2 * torch.eye(5))
        built.b_x.fill_(1.0)
    with pytest.warns(ImplicitFunctionWarning, match="2 of 2 samples did not reach"):
        built(torch.zeros(2, 3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_deepcopy_pickle_state_dict_and_to(variant):
    built, u = model(**VARIANTS[variant]), torch.randn(3, 3)
    y = built(u)
    for other in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert torch.equal(other(u), y)
    fresh = ImplicitModel(**SIZES, bias=True, **VARIANTS[variant])
    fresh.load_state_dict(built.state_dict())
    assert torch.equal(fresh(u), y)
    assert built.float().double()(u.double()).dtype == torch.float64


@pytest.mark.parametrize("no_D", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_torchidl_state_dicts_load_as_they_are(bias, no_D):
    # torchidl appends a constant 1 to u, and a column to B and D; without D it has no output bias either.
    theirs = {"A": torch.randn(5, 5) / 9, "B": torch.randn(5, 3 + bias), "C": torch.randn(2, 5)}
    if not no_D:
        theirs["D"] = torch.randn(2, 3 + bias)
    kept = dict(theirs)
    built = ImplicitModel(**SIZES, bias=bias, no_D=no_D)
    built.load_state_dict(theirs)
    assert theirs.keys() == kept.keys(), "the caller's state_dict was changed"
    u = torch.randn(4, 3)
    extended = torch.cat((u, torch.ones(4, 1)), dim=1) if bias else u
    x = torch.zeros(4, 5)
    for _ in range(200):
        x = torch.relu(x @ theirs["A"].t() + extended @ theirs["B"].t())
    expected = x @ theirs["C"].t()
    if not no_D:
        expected = expected + extended @ theirs["D"].t()
    assert torch.allclose(built(u), expected, atol=digits(1e-8, 1e-4))


def test_save_and_load_pretrained(tmp_path):
    for name, options in VARIANTS.items():
        built, u = model(2.0, tol=1e-9, kappa=0.7, **options), torch.randn(3, 3)
        built.save_pretrained(tmp_path / name)
        read = ImplicitModel.from_pretrained(tmp_path / name)
        assert torch.equal(read(u), built(u))
        assert read.solver == built.solver
        assert read.adjoint == built.adjoint
        assert repr(read) == repr(built)
    files = sorted(path.name for path in (tmp_path / "dense").iterdir())
    assert files == ["config.json", "model.safetensors"]


@pytest.mark.filterwarnings("ignore::implicitdl.ImplicitFunctionWarning")
def test_a_model_with_its_own_phi_is_loaded_with_it(tmp_path):
    built, u = ImplicitModel(**SIZES, f=Swish), torch.randn(3, 3)
    built.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"expected f=… beside the folder.*Pass f=Swish"):
        ImplicitModel.from_pretrained(tmp_path)
    assert torch.equal(ImplicitModel.from_pretrained(tmp_path, f=Swish)(u), built(u))
    own = ImplicitModel(**SIZES, activation=from_function(lambda z: z / (1 + z.abs()), name="softsign"))
    own.save_pretrained(tmp_path / "own")
    with pytest.raises(ArgumentError, match="Pass activation=softsign"):
        ImplicitModel.from_pretrained(tmp_path / "own")
    read = ImplicitModel.from_pretrained(tmp_path / "own", activation=own.activation)
    assert torch.equal(read(u), own(u))


def test_bad_checkpoints_are_worded(tmp_path):
    with pytest.raises(CheckpointError):
        ImplicitModel.from_pretrained(tmp_path / "missing")
    torch.save({"A": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        ImplicitModel.from_pretrained(tmp_path)
    good = tmp_path / "good"
    model().save_pretrained(good)
    data = (good / "model.safetensors").read_bytes()
    (good / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError):
        ImplicitModel.from_pretrained(good)


def test_a_poisoned_input_is_an_error_and_so_is_an_infinite_one():
    for value, no_D in ((torch.nan, False), (torch.inf, True)):
        u = torch.randn(4, 3)
        u[2, 1] = value
        with pytest.raises(ArgumentError, match="expected finite u, got 1 NaN or infinite entries of 12"):
            ImplicitModel(**SIZES, no_D=no_D, activation=TANH)(u)


def swapped():
    ImplicitModel(300, 3072, 10)(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: model()(torch.zeros(2, 7)), r"u of shape \(batch, p=3\), got \(2, 7\). Build the model with input_dim=7"),
        (lambda: model()(torch.zeros(0, 3)), r"\(batch, p=3\), got \(0, 3\)"),
        (lambda: model()(torch.zeros(3)), r"\(batch, p=3\), got \(3,\). Give at least one sample"),
        (lambda: model()([1.0]), "u to be a tensor of shape .*, got list"),
        (lambda: model().double()(torch.zeros(2, 3, dtype=torch.float32)), "u of dtype torch.float64, got torch.float32"),
        (lambda: model().double()(torch.zeros(2, 3, dtype=torch.int64)), "u of dtype torch.float64, got torch.int64"),
        (lambda: model()(torch.zeros(2, 3, device="meta")), "u on cpu, got meta"),
        (lambda: model()(torch.zeros(2, 3), torch.zeros(2, 4)), r"X0 of shape \(batch=2, n=5\), got \(2, 4\)"),
        (swapped, r"if that was meant as \(n, p, q\), write hidden_dim=300, input_dim=3072, output_dim=10"),
        (lambda: ImplicitModel(**SIZES, kappa=1.0), "kappa strictly between 0 and 1, got 1.0"),
        (lambda: ImplicitModel(**SIZES, kappa=-0.1), "kappa strictly between 0 and 1, got -0.1"),
        (lambda: ImplicitModel(3, 2, 0), "hidden_dim to be a positive integer, got 0"),
        (lambda: ImplicitModel(3, 2, 4, is_low_rank=True), "a rank with is_low_rank=True, got None"),
        (lambda: ImplicitModel(3, 2, 4, is_low_rank=True, rank=9), "rank ≤ hidden_dim=4, got 9"),
        (lambda: ImplicitModel(3, 2, 4, rank=2), "rank together with is_low_rank=True"),
        (lambda: ImplicitModel(**SIZES, f=torch.relu), "f to be a subclass of ImplicitFunction"),
        (lambda: ImplicitModel(**SIZES, activation=torch.tanh), "activation to be an Activation"),
        (lambda: ImplicitModel(**SIZES, solver=Picard), "solver to be a Solver"),
        (lambda: ImplicitModel(**SIZES, adjoint=Unrolled), "adjoint to be an Adjoint"),
        (lambda: ImplicitModel(**SIZES, adjoint=PhantomGradient(), grad_tol=1e-3), "grad_tol and grad_mitr with an ImplicitAdjoint"),
        (lambda: ImplicitModel(**SIZES, constraint="ball"), "constraint to be a Constraint"),
        (lambda: ImplicitModel(**SIZES, activation=BUILTIN["silu"], constraint=RowScaling()), r"a constraint for max\|φ'\| = 1.09984"),
        (lambda: ImplicitModel(**SIZES, is_low_rank=True, rank=2, constraint=RowScaling), "together with the LowRank constraint"),
        (lambda: ImplicitModel(**SIZES, kappa=0.5, constraint=RowScaling(kappa=0.9)), "the κ of the constraint object, 0.9, got kappa=0.5"),
        (lambda: ImplicitModel(**SIZES, f=ImplicitFunctionTriu, is_low_rank=True, rank=2), "a dense A with a triangular f"),
        (lambda: ImplicitModel(**SIZES, on_failure="shout"), "on_failure to be one of"),
        (lambda: ImplicitModel(**SIZES, activation=Activation("steep", torch.exp, torch.exp, (0.0, float("inf")))), "finite, nonzero"),
    ],
)  # fmt: skip
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_an_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="kapa"):
        ImplicitModel(**SIZES, kapa=0.9)


def test_unconstrained_slope_needs_no_ball():
    steep = Activation("steep", lambda z: 0.1 * z**3, lambda z: 0.3 * z**2, (0.0, float("inf")))
    built = ImplicitModel(**SIZES, activation=steep, f=ImplicitFunctionTriu)
    assert built.solve(torch.randn(2, 3)).converged.all()
    assert isinstance(ImplicitModel(**SIZES, f=ImplicitFunction).constraint, Unconstrained)


def test_every_builtin_activation_is_known_by_torchs_module_too():
    # Teachers are made of modules, by the names of records.
    assert {phi.name for phi in MODULES.values()} == set(BUILTIN)
    assert all(from_function(kind()) is phi for kind, phi in MODULES.items())
