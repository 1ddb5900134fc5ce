"""The settings of an ImplicitModel: the constructor's argument, else the class attribute of f, else the default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from .._internal.errors import open_unit, positive_int, wrong
from ..activations import Activation
from ..adjoints import Adjoint, ImplicitAdjoint
from ..constraints import Constraint, LowRank, Monotone
from ..constraints.monotone import require_proximal
from ..solvers import Auto, PeacemanRachford, Solver
from .function import ImplicitFunction

T = TypeVar("T")
_WHO = "ImplicitModel"


def kappa(f: type[ImplicitFunction], given: float | None, constraint: type[Constraint] | Constraint | None) -> float:
    """κ; that of a constraint object when one was given, which ``given`` must not contradict."""
    if isinstance(constraint, Constraint):
        if given is not None and given != constraint.kappa:
            raise wrong(
                _WHO, f"the κ of the constraint object, {constraint.kappa}", f"kappa={given}",
                "Set it on the constraint alone, or pass the constraint's class.",
            )  # fmt: skip
        return constraint.kappa
    return open_unit(_WHO, "kappa", _first(given, f.kappa, 0.99))


def rank(is_low_rank: bool, given: int | None, n: int) -> int | None:
    if not is_low_rank:
        if given is not None:
            raise wrong(_WHO, "rank together with is_low_rank=True", f"rank={given}", "Pass is_low_rank=True.")
        return None
    if given is None:
        raise wrong(_WHO, "a rank with is_low_rank=True", None, "Pass rank=r, well below hidden_dim.")
    count = positive_int(_WHO, "rank", given)
    if count > n:
        raise wrong(_WHO, f"rank ≤ hidden_dim={n}", given)
    return count


def activation(f: type[ImplicitFunction], given: Activation | None) -> Activation:
    if given is None:
        return f.activation()
    if not isinstance(given, Activation):
        raise wrong(
            _WHO, "activation to be an Activation", repr(given),
            "Use one of implicitdl.activations, such as TANH, or activations.from_function(phi).",
        )  # fmt: skip
    return given


def constraint(
    f: type[ImplicitFunction],
    given: type[Constraint] | Constraint | None,
    kappa: float,
    activation: Activation,
    is_low_rank: bool,
) -> Constraint:
    slope = activation.lipschitz
    kind: Any = given if given is not None else LowRank if is_low_rank else f.constraint
    if isinstance(kind, Monotone) or (isinstance(kind, type) and issubclass(kind, Monotone)):
        require_proximal(_WHO, activation)
    if isinstance(given, Constraint):
        built = given
        if built.lipschitz < slope and not built.triangular:
            raise wrong(
                _WHO, f"a constraint for max|φ'| = {slope:.6g}", f"lipschitz={built.lipschitz}",
                f"Build it with lipschitz={slope!r}, or pass the class {type(built).__name__}.",
            )  # fmt: skip
    else:
        if given is None and is_low_rank and f.constraint.triangular:
            raise wrong(_WHO, "a dense A with a triangular f", f"is_low_rank=True and f={f.__name__}")
        if not (isinstance(kind, type) and issubclass(kind, Constraint)):
            raise wrong(_WHO, "constraint to be a Constraint, class or object", repr(given))
        # Only a ball of weights depends on the slope, and only it needs a finite one.
        built = kind(kappa=kappa) if kind.triangular else kind(kappa=kappa, lipschitz=slope)
    if isinstance(built, LowRank) != is_low_rank:
        raise wrong(
            _WHO, "is_low_rank=True together with the LowRank constraint",
            f"is_low_rank={is_low_rank} and {type(built).__name__}",
        )  # fmt: skip
    return built


def default_solver(constraint: Constraint) -> Solver:
    """Splitting solves every monotone model, which plain and accelerated iterations need not; `Auto` the others."""
    return PeacemanRachford() if isinstance(constraint, Monotone) else Auto()


def solver(
    f: type[ImplicitFunction], given: Solver | None, tol: float | None, mitr: int | None, default: Solver
) -> Solver:
    """``given`` with the tolerance and step limit of the constructor; f's attributes only where none is given."""
    if given is not None and not isinstance(given, Solver):
        raise wrong(_WHO, "solver to be a Solver", repr(given), "Pass an instance, such as Anderson().")
    base = given if given is not None else _with(default, f.tol, f.mitr)
    return _with(base, tol, mitr)


def adjoint(
    f: type[ImplicitFunction], given: Adjoint | None, grad_tol: float | None, grad_mitr: int | None, default: Solver
) -> Adjoint:
    if given is not None and not isinstance(given, Adjoint):
        raise wrong(_WHO, "adjoint to be an Adjoint", repr(given), "Pass an instance, such as ImplicitAdjoint().")
    base = given if given is not None else ImplicitAdjoint(solver=_with(default, f.grad_tol, f.grad_mitr))
    if grad_tol is None and grad_mitr is None:
        return base
    if not isinstance(base, ImplicitAdjoint):
        raise wrong(
            _WHO, "grad_tol and grad_mitr with an ImplicitAdjoint", type(base).__name__,
            "They set the adjoint solve, which this adjoint does not make.",
        )  # fmt: skip
    return replace(base, solver=_with(base.solver, grad_tol, grad_mitr))


def _with(solver: Solver, rtol: float | None, max_steps: int | None) -> Solver:
    if rtol is not None:
        solver = replace(solver, rtol=rtol)
    return solver if max_steps is None else replace(solver, max_steps=max_steps)


def _first(*values: T | None) -> T | None:
    return next((value for value in values if value is not None), None)
