"""The sensitivity matrix: how far inputs that move by σ can move the outputs, whatever the input is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solvers import Solver
from .domain import Box
from .normal import Contractive, Model, contractive


def sensitivity(model: Model | Contractive) -> Tensor:
    """S = |C|(I − M)⁻¹G|B| + |D|, with G = diag(max|φ'|) and M = G|A|: |u' − u| ≤ σ gives |y' − y| ≤ Sσ.

    Self-loops of ReLU states are eliminated first, which is the same as keeping the sign of A's diagonal.

    Arguments:
        model: an `ImplicitModel` or `StateSpace` whose equation contracts, λ_pf(M) < 1; any φ of bounded slope.

    Returns:
        (q, p) float64, nonnegative, rounded upwards.

    Raises:
        ArgumentError: the equation is not known to contract.

    Source: El Ghaoui et al., Implicit Deep Learning (2021), §5, for slopes in [−1, 1].

    Example:
        >>> import torch
        >>> from implicitdl import StateSpace, certify
        >>> A, B, C = (torch.tensor([[value]], dtype=torch.float64) for value in (-0.5, 3.0, -2.0))
        >>> round(certify.sensitivity(StateSpace(A, B, C)).item(), 6)  # 2 · 3 / 1.5
        4.0
    """
    model = contractive("sensitivity", model)
    space = model.space
    moved = contained(model, (model.slopes.unsqueeze(1) * space.B.abs()).t())
    S = moved @ space.C.abs().t() + space.D.abs().t()
    return S.t() * (1 + model.rounding)


def contained(model: Contractive, w: Tensor) -> Tensor:
    """e ≥ (I − M)⁻¹w, (batch, n), for disturbances w ≥ 0 in rows.

    Every e ≥ 0 with Me + w ≤ e is one, since (I − M)⁻¹ ≥ 0; the solution of the linear system is widened until that is
    seen to hold with its rounding.
    """
    system = torch.eye(len(model.M), dtype=w.dtype, device=w.device) - model.M
    e = torch.linalg.solve(system, w.t()).t().clamp(min=0)

    def outside(wider: Tensor) -> Tensor:
        whole = e + wider
        return (whole @ model.M.t() + w) * (1 + model.rounding) - whole

    return e + model.widening(outside, len(w))


def around_center(model: Contractive, u: Box, solver: Solver | None) -> Box:
    """A box of states around that of the box's centre, of radius (I − M)⁻¹(G|B|ρ + the centre's own residual)."""
    space = model.space
    center = u.center
    x = space.solve(center, solver=solver, on_failure="ignore").value
    assert isinstance(x, Tensor)
    fx = space.activation.phi(space.pre_activation(x, center))
    gain = model.slopes
    size = x.abs() @ space.A.abs().t() + u.magnitude @ space.B.abs().t() + space.b_x.abs()
    disturbance = gain * (u.radius @ space.B.abs().t()) + (fx - x).abs()
    e = contained(model, disturbance + model.slack(gain * size + fx.abs() + x.abs()))
    return Box(x - e, x + e)
