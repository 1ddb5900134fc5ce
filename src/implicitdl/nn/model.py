"""ImplicitModel: x = φ(Ax + Bu + b_x), y = Cx + Du + b_y, as a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .._internal import errors
from .._internal.context import plain
from .._internal.errors import ArgumentError, wrong
from ..activations import Activation
from ..adjoints import Adjoint
from ..constraints import Constraint, LowRank, RowProjection, RowScaling, SoftRowScaling
from ..equations.equilibrium import Equilibrium
from ..equations.lowrank import LowRankEquilibrium
from ..fixed_point import fixed_point, solve
from ..kernels.loops import all_finite
from ..solution import OnFailure, Solution
from ..solvers import Solver
from ..statespace import StateSpace, loop_gain
from . import pretrained, settings
from .function import ImplicitFunction, ImplicitFunctionInf
from .pretrained import Pretrained

# What the free parameters become once a forward pass: A itself, or its factors.
Weights = tuple[Tensor] | tuple[Tensor, Tensor]


class ImplicitModel(Pretrained):
    """The implicit model x = φ(Ax + Bu + b_x), y = Cx + Du + b_y.

    Rows are samples everywhere.  The parameters A, B, C, D are free; the constraint turns A (or L and R) into a
    well-posed one once a forward pass, and gradients go through it to the free parameters.

    Arguments:
        input_dim: p, features of the input.
        output_dim: q, features of the output.
        hidden_dim: n, size of the state.
        f: an `ImplicitFunction` subclass, which gives φ, the constraint and defaults of the settings below.
        no_D: leave out the direct term Du.
        bias: have b_x and b_y.
        mitr, grad_mitr: most steps of the forward and of the gradient solve; 300.
        tol, grad_tol: their relative tolerances; 1e-5 in float32, 1e-10 in float64.
        kappa: κ in (0, 1): ‖A‖∞ ≤ κ / max|φ'|; 0.99.
        is_low_rank: A = LRᵀ, never formed, with L and R of shape (n, rank).
        rank: r.
        activation: φ as an `Activation`; instead of ``f``'s.
        constraint: a `Constraint` class or object; instead of ``f``'s.
        solver: forward solver; `Auto()`, and `PeacemanRachford()` with a `Monotone` constraint.
        adjoint: how to differentiate; exact, `ImplicitAdjoint()`, with the same default for its solver.
        on_failure: what an unconverged sample causes: "warn", "raise" or "ignore".
        device, dtype: of the parameters.

    A setting given here comes before the class attribute of ``f``, and that before the default.

    Raises:
        ArgumentError: a size, κ, rank or setting that does not fit; at forward, an input that does not.

    Source: El Ghaoui, Gu, Travacca, Askari & Tsai, Implicit Deep Learning, SIAM J. Math. Data Sci. 3 (2021).

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel
        >>> model = ImplicitModel(input_dim=64, output_dim=10, hidden_dim=128)
        >>> model(torch.randn(5, 64)).shape
        torch.Size([5, 10])
        >>> bool(model.solve(torch.randn(5, 64)).converged.all())
        True
    """

    # κ is that of the constraint object where one was given.
    saved_arguments: ClassVar = (
        "input_dim", "output_dim", "hidden_dim", "no_D", "bias", "kappa", "is_low_rank", "rank", "on_failure",
    )  # fmt: skip

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int,
        f: type[ImplicitFunction] = ImplicitFunctionInf,
        no_D: bool = False,
        bias: bool = False,
        mitr: int | None = None,
        grad_mitr: int | None = None,
        tol: float | None = None,
        grad_tol: float | None = None,
        kappa: float | None = None,
        is_low_rank: bool = False,
        rank: int | None = None,
        *,
        activation: Activation | None = None,
        constraint: type[Constraint] | Constraint | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "warn",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        who = "ImplicitModel"
        if not (isinstance(f, type) and issubclass(f, ImplicitFunction)):
            raise wrong(who, "f to be a subclass of ImplicitFunction", repr(f))
        self.input_dim = errors.positive_int(who, "input_dim", input_dim)
        self.output_dim = errors.positive_int(who, "output_dim", output_dim)
        self.hidden_dim = errors.positive_int(who, "hidden_dim", hidden_dim)
        self.no_D, self.bias, self.is_low_rank = bool(no_D), bool(bias), bool(is_low_rank)
        self.rank = settings.rank(is_low_rank, rank, hidden_dim)
        self.f = f
        self.activation = settings.activation(f, activation)
        self.kappa = settings.kappa(f, kappa, constraint)
        self.constraint = settings.constraint(f, constraint, self.kappa, self.activation, is_low_rank)
        default = settings.default_solver(self.constraint)
        self.solver = settings.solver(f, solver, tol, mitr, default)
        self.adjoint = settings.adjoint(f, adjoint, grad_tol, grad_mitr, default)
        errors.choice(who, "on_failure", on_failure, ("raise", "warn", "ignore"))
        self.on_failure = on_failure
        self._create_parameters(device, dtype)

    def _create_parameters(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Normal / n, in the order A (or L, R), B, C, D; the last columns of B and D are the biases."""
        n, p, q = self.hidden_dim, self.input_dim, self.output_dim

        def draw(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=dtype) / n

        if self.rank is not None:
            self.L, self.R = nn.Parameter(draw(n, self.rank)), nn.Parameter(draw(n, self.rank))
        else:
            self.A = nn.Parameter(draw(n, n))
        B = draw(n, p + self.bias)
        self.B, self.C = nn.Parameter(B[:, :p].contiguous()), nn.Parameter(draw(q, n))
        b_y = torch.zeros(q, device=device, dtype=dtype)
        self.D: nn.Parameter | None = None
        if not self.no_D:
            D = draw(q, p + self.bias)
            self.D = nn.Parameter(D[:, :p].contiguous())
            b_y = D[:, -1].clone()
        self.b_x = nn.Parameter(B[:, -1].clone()) if self.bias else None
        self.b_y = nn.Parameter(b_y) if self.bias else None
        self.register_load_state_dict_pre_hook(_split_bias_columns)

    def forward(self, U: Tensor, X0: Tensor | None = None) -> Tensor:
        """The prediction y.

        Arguments:
            U: input (batch, \\*any) that flattens to (batch, p).
            X0: where the solve starts, (batch, n); zeros when left out.  The result does not depend on it.

        Returns:
            (batch, q).
        """
        u = self._input(U)
        f = self._equilibrium(self._input_term(u))
        if X0 is None and type(f) is Equilibrium and plain():  # the door has nothing to check
            who = f"fixed_point({type(self.solver).__name__})"
            x = solve(who, f, None, self.solver, self.adjoint, self.on_failure).x
        else:
            x = self._solve(f, X0).value  # type: ignore[assignment]
        return self.read_out(x, u)

    def solve(self, U: Tensor, X0: Tensor | None = None, *, trace: bool = False) -> Solution:
        """The equilibrium state x, (batch, n), with residual, steps and convergence per sample."""
        u = self._input(U)
        return self._solve(self._equilibrium(self._input_term(u)), X0, trace=trace)

    def read_out(self, x: Tensor, u: Tensor) -> Tensor:
        """y = Cx + Du + b_y."""
        y, D = F.linear(x, self.C, self.b_y), self.D
        y = y if D is None else torch.addmm(y, u, D.t())
        if plain() and not all_finite(y):
            self._check_weights()
        return y

    def weights(self) -> Weights:
        """The well-posed A, or its factors (L, R), that belong to the free parameters."""
        constraint = self.constraint
        if isinstance(constraint, LowRank):
            return self._checked(*constraint.factors(self.L, self.R))
        return self._checked(constraint(self.A))

    def _equilibrium(self, b: Tensor, weights: Weights | None = None) -> Equilibrium:
        """x ↦ φ(xAᵀ + b), of `weights` that have been made, or else of the free parameters."""
        constraint = self.constraint
        if weights is None:
            radius = constraint.row_radius if plain() else None
            if radius is not None:  # a compiled solve scales the rows on its way, and y tells whether A is finite
                return Equilibrium(self.A, b, self.activation, radius=radius)
            weights = self.weights()
        if len(weights) == 2:
            return LowRankEquilibrium(*weights, b, self.activation)
        return Equilibrium(weights[0], b, self.activation, triangular=constraint.triangular)

    def _checked(self, *made: Tensor) -> Any:
        if plain() and not all(map(all_finite, made)):
            self._check_weights()
        return made

    def _check_weights(self) -> None:
        """An error if a parameter is not finite, which shows in what is computed with it."""
        for name, weight in self.named_parameters():
            errors.finite("ImplicitModel", name, weight, errors.DIVERGED)

    def _solve(self, f: Equilibrium, X0: Tensor | None, *, trace: bool = False) -> Solution:
        x0 = None if X0 is None else self._state(X0, f.b)
        return fixed_point(f, x0, solver=self.solver, adjoint=self.adjoint, on_failure=self.on_failure, trace=trace)

    def _input(self, U: Tensor) -> Tensor:
        p = self.input_dim
        if not isinstance(U, Tensor):
            raise wrong("ImplicitModel", f"u to be a tensor of shape (batch, p={p})", type(U).__name__)
        u = U.flatten(1) if U.dim() > 2 else U
        if u.dim() != 2 or u.shape[1] != p or u.shape[0] == 0:
            features = u.shape[1] if u.dim() == 2 and u.shape[0] else 0
            advice = self._advice(features)
            if U.dim() > 2 and U.shape[-1] == p and u.shape[0]:
                advice = f"Pass u.flatten(0, {U.dim() - 2}) where every vector is a sample, or use ImplicitRNN."
            raise wrong("ImplicitModel", f"u of shape (batch, p={p})", tuple(U.shape), advice)
        if u.dtype is not self.B.dtype or u.device != self.B.device:
            errors.same_place("ImplicitModel", "u", u, self.B)
        return u

    def _input_term(self, u: Tensor) -> Tensor:
        """b = uBᵀ + b_x, which is finite only where u is, and shorter to look through."""
        b = F.linear(u, self.B, self.b_x)
        if plain() and not all_finite(b):
            errors.finite("ImplicitModel", "u", u)
            self._check_weights()
        return b

    def _advice(self, features: int) -> str:
        if features == 0:
            return "Give at least one sample, batch first."
        if features == self.output_dim:
            return (
                f"The order is (input_dim, output_dim, hidden_dim), and this model was built with input_dim="
                f"{self.input_dim}, output_dim={self.output_dim}, hidden_dim={self.hidden_dim}; if that was meant as "
                f"(n, p, q), write hidden_dim={self.input_dim}, input_dim={self.output_dim}, "
                f"output_dim={self.hidden_dim}."
            )
        return f"Build the model with input_dim={features}, or pass {self.input_dim} features."

    def _state(self, X0: Tensor, b: Tensor) -> Tensor:
        if X0.shape != b.shape:
            raise wrong("ImplicitModel", f"X0 of shape (batch={b.shape[0]}, n={b.shape[1]})", tuple(X0.shape))
        errors.same_place("ImplicitModel", "X0", X0, self.B)
        return X0.to(b.dtype)

    def extra_repr(self) -> str:
        sizes = f"input_dim={self.input_dim}, output_dim={self.output_dim}, hidden_dim={self.hidden_dim}"
        return sizes + f", f={self.f.__name__}, activation={self.activation.name}, bias={self.bias}"

    def statespace(self) -> StateSpace:
        """The model as its matrices, with the well-posed A; they keep the graph to the free parameters."""
        for hook in self._forward_pre_hooks.values():
            # Torch's pruning and its older normalizations make the weights in a hook before forward.
            if isinstance(hook, (BasePruningMethod, WeightNorm, SpectralNorm)):
                hook(self, ())
        weights = self.weights()
        A = weights[0] if len(weights) == 1 else weights[0] @ weights[1].t()
        return StateSpace(A, self.B, self.C, self.D, self.b_x, self.b_y, blocks=self.activation)

    @classmethod
    def from_statespace(
        cls,
        space: StateSpace,
        f: type[ImplicitFunction] = ImplicitFunctionInf,
        *,
        kappa: float | None = None,
        constraint: type[Constraint] | Constraint | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> ImplicitModel:
        """A trainable model with these matrices; it has biases where the matrices have.

        Arguments:
            space: its A must be in the constraint's set.  `implicitdl.statespace.rescale` writes the same model with an
                A inside of the ball; ``constraint=Unconstrained`` takes any A.
            f, kappa, constraint, solver, adjoint, on_failure: as for the constructor.

        Raises:
            ArgumentError: an A outside the constraint's set, with what can be done about it.
        """
        if space.n == 0:
            raise wrong("from_statespace", "a model with states", "n=0", "Take torch.nn.Linear for an affine map.")
        space = space.detach().to_dense()
        low_rank = isinstance(constraint, LowRank)
        model = cls(
            space.p, space.q, space.n, f, bias=bool((space.b_x != 0).any() | (space.b_y != 0).any()), kappa=kappa,
            is_low_rank=low_rank, rank=constraint.rank if isinstance(constraint, LowRank) else None,
            activation=space.activation, constraint=constraint, solver=solver, adjoint=adjoint,
            on_failure=on_failure, device=space.device, dtype=space.dtype,
        )  # fmt: skip
        free = _free_parameters(model.constraint, space)
        state = dict(zip(("L", "R"), free, strict=True)) if low_rank else {"A": free}
        state |= {"B": space.B, "C": space.C, "D": space.D}
        if model.bias:
            state |= {"b_x": space.b_x, "b_y": space.b_y}
        with torch.no_grad():
            for name, value in state.items():
                getattr(model, name).copy_(value)
        return model

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        f: type[ImplicitFunction] | None = None,
        *,
        activation: Activation | None = None,
        constraint: type[Constraint] | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
    ) -> ImplicitModel:
        """Read a model that `save_pretrained` wrote.

        Arguments:
            folder: where it lies.
            f: the model's own `ImplicitFunction` subclass, when it is not one of the library's; and likewise
            activation, constraint, solver, adjoint: the user's own.  Given for a library class, they replace it.

        Raises:
            CheckpointError: nothing there, truncated, of another kind, or a pickle.
            ArgumentError: the model was saved with a class of the user's that was not given.
        """
        return pretrained.load(
            cls, folder, f=f, activation=activation, constraint=constraint, solver=solver, adjoint=adjoint
        )


def _split_bias_columns(module: ImplicitModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load torchidl's layout, in which the bias is the last column of B and D, fed with a constant 1."""
    B = state_dict.get(prefix + "B")
    if not module.bias or prefix + "b_x" in state_dict or B is None or B.shape[1] != module.input_dim + 1:
        return
    state_dict[prefix + "B"], state_dict[prefix + "b_x"] = B[:, :-1], B[:, -1]
    D = state_dict.get(prefix + "D")
    state_dict[prefix + "b_y"] = B.new_zeros(module.output_dim) if D is None else D[:, -1]
    if D is not None:
        state_dict[prefix + "D"] = D[:, :-1]


def _free_parameters(constraint: Constraint, space: StateSpace) -> Any:
    """The parameters of which the constraint makes the space's A: one matrix, or (L, R)."""
    try:
        return constraint.right_inverse(space.A)
    except ArgumentError as error:
        do = "Keep it with constraint=Unconstrained."
        ball = isinstance(constraint, (RowScaling, RowProjection, SoftRowScaling))
        if ball and space.activation.homogeneous and loop_gain(space) < constraint.kappa:
            do = (
                "The same model with an A inside is implicitdl.statespace.rescale(space, kappa="
                f"{constraint.radius:.6g}); or keep this one with constraint=Unconstrained."
            )
        reason = str(error).partition(". ")[0]
        raise wrong("from_statespace", "an A of the constraint's set", f"one outside of it ({reason})", do) from error
