"""torchidl 0.0.4 at a tolerance that means the same as ours.

Its tolerance is absolute, in the largest entry of the whole batch; ours is relative, per sample.  Each side is given
the loosest tolerance with which every sample's relative residual is below the same bound, forward and backward.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

warnings.filterwarnings("ignore", category=SyntaxWarning)  # its docstrings
from torchidl.implicit_base_model import ImplicitModel as TorchidlModel  # noqa: E402


def torchidl_model(weights: dict[str, Tensor], u: Tensor, g: Tensor, rtol: float) -> tuple[TorchidlModel, float, float]:
    """The model, and the worst relative residuals that it reaches, forward and backward, on this batch."""
    n, p = weights["B"].shape
    model = TorchidlModel(p, weights["C"].shape[0], n)
    model.load_state_dict(weights)
    f, A = model.f, weights["A"]
    Z, zero = weights["B"] @ u.t(), torch.zeros(n, len(u))

    def forward(tol: float) -> tuple[Tensor, float]:
        X, _, _ = f.inn_pred(A, Z, zero, 3000, tol)
        return X, _relative(f.phi(A @ X + Z) - X, X)

    tol, (X, reached) = _loosest(forward, rtol)
    slope = f.dphi(A @ X + Z)
    G = slope * (weights["C"].t() @ g.t())

    def backward(tol: float) -> tuple[Tensor, float]:
        V, _, _ = f.inn_pred_grad(A.t(), G, slope, 3000, tol)
        return V, _relative(slope * (A.t() @ V) + G - V, V)

    grad_tol, (_, grad_reached) = _loosest(backward, rtol)
    f.set_parameters(mitr=3000, grad_mitr=3000, tol=tol, grad_tol=grad_tol)
    return model, reached, grad_reached


def _loosest(solve, rtol: float) -> tuple[float, tuple[Tensor, float]]:  # type: ignore[no-untyped-def]
    tol = 1.0
    while (result := solve(tol))[1] > rtol:
        tol /= 1.5
    return tol, result


def _relative(residual: Tensor, value: Tensor) -> float:
    """Worst sample; samples are columns here."""
    tiny = torch.finfo(value.dtype).tiny
    return float((residual.norm(dim=0) / value.norm(dim=0).clamp(min=tiny)).max())
