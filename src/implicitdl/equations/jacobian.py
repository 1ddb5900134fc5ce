"""The Jacobian of f at a point, from products alone: its Frobenius norm, to train with, and its spectral radius."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._internal.errors import open_unit, positive_int, wrong
from ..solution import ImplicitFunctionWarning
from .function import State, function_map
from .map import vjp


def jacobian_regularization(
    f: Callable[..., State], x: State, *args: Tensor, samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """The mean square of the singular values of J = ∂f/∂x, estimated: a loss term that keeps an equilibrium easy.

    ‖J‖²_F / d = E ‖Jᵀε‖² / d, averaged over the batch, with ε of independent signs ±1.

    It is differentiable, in all that f closes over, in args, and in x where x carries a gradient.  A solution's value
    carries one; pass ``x.detach()`` to leave out how the equilibrium moves, as the paper does.

    Arguments:
        f: maps a state, and args, to a state of the same shape, each sample on its own.
        x: where, (batch, \\*state), or a tuple of such; a solution.
        args: tensors (batch, ...) that go with the samples.
        samples: vectors ε per sample.  The estimate is unbiased for every number of them.
        generator: of the signs; torch's own by default.

    Returns:
        A scalar ≥ 0.  At 1 the average singular value is 1 in the mean square.

    Raises:
        ArgumentError: args that are not batch-first like x, or an f of another shape.

    Source: Bai, Koltun & Kolter, Stabilizing Equilibrium Models by Jacobian Regularization (2021); signs
    in place of its normal numbers have a smaller variance (Hutchinson 1990).

    Example:
        >>> import torch
        >>> from implicitdl import jacobian_regularization
        >>> round(float(jacobian_regularization(lambda x: 0.5 * x, torch.ones(3, 4))), 6)
        0.25
    """
    samples = positive_int("jacobian_regularization", "samples", samples)
    at = _Transposed("jacobian_regularization", f, x, args)
    total = at.rows.new_zeros(())
    for _ in range(samples):
        signs = torch.randint(2, at.rows.shape, generator=generator, device=at.rows.device)
        product = at.product((2 * signs - 1).to(at.rows.dtype), create_graph=True)
        total = total + product.square().sum()
    return total / (samples * at.rows.numel())


@dataclass(frozen=True)
class SpectralRadius:
    """ρ(J) per sample, and how far it can be trusted.

    Attributes:
        value: (batch,) the largest |λ| found; NaN where J is not finite.
        residual: (batch,) ‖Jᵀy − λy‖₂ / |λ| of its unit eigenvector y; 0 where J itself was formed.  λ is an exact
            eigenvalue of a matrix this close to J, relative to |λ|.
        converged: (batch,) residual ≤ rtol.
        products: products with Jᵀ that were made, for the whole batch at once.
    """

    value: Tensor
    residual: Tensor
    converged: Tensor
    products: int


def spectral_radius(
    f: Callable[..., State], x: State, *args: Tensor, rtol: float = 1e-3, dimension: int = 128
) -> SpectralRadius:
    """ρ(J), the largest |λ| over the eigenvalues of J = ∂f/∂x, per sample, from products with Jᵀ.

    Near a fixed point x, plain iteration converges at the rate ρ(J) where that is below 1, and not where it is above.
    A complex pair, a zero Jacobian and a non-normal one are ordinary cases: a state of up to ``dimension`` numbers has
    its J formed; for a larger one Arnoldi's method builds a basis of the Krylov space of one random vector, the same
    for every sample, until the eigenvalue of largest modulus has settled.

    Arguments:
        f: maps a state, and args, to a state of the same shape, each sample on its own.
        x: where, (batch, \\*state), or a tuple of such; a solution.
        args: tensors (batch, ...) that go with the samples.
        rtol: the relative residual of an eigenvalue that has settled.
        dimension: the largest basis, ``batch · dimension · d`` numbers, and the most products made.

    Returns:
        The `SpectralRadius`; a sample that has not converged within ``dimension`` products is also warned of.

    Source: Arnoldi (1951); Saad, Numerical Methods for Large Eigenvalue Problems (2011), algorithm 6.1.

    Example:
        >>> import torch
        >>> from implicitdl import spectral_radius
        >>> turn = torch.tensor([[0.0, -0.9], [0.9, 0.0]])
        >>> round(float(spectral_radius(lambda x: x @ turn.t(), torch.zeros(1, 2)).value), 4)
        0.9
    """
    rtol = open_unit("spectral_radius", "rtol", rtol)
    dimension = positive_int("spectral_radius", "dimension", dimension)
    at = _Transposed("spectral_radius", f, x, args)
    with torch.no_grad():
        found = _dense(at) if at.rows.shape[1] <= dimension else _arnoldi(at, rtol, dimension)
    missed = int((~found.converged).sum())
    if missed:
        warnings.warn(
            f"spectral_radius: {missed} of {len(found.value)} samples did not reach rtol={rtol:.0e} in "
            f"{found.products} products (worst residual {float(found.residual.max()):.1e}). Raise dimension.",
            ImplicitFunctionWarning,
            stacklevel=2,
        )
    return found


def _check(who: str, f: object, x: object) -> None:
    if not callable(f):
        raise wrong(who, "f to be a function", repr(f), "Pass f first, then x.")
    for part in x if isinstance(x, tuple) else (x,):
        if not isinstance(part, Tensor) or part.dim() == 0 or part.numel() == 0 or not part.is_floating_point():
            got = f"{tuple(part.shape)} of {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
            raise wrong(who, "x to be a floating tensor (batch ≥ 1, *state), or a tuple of such", got)
    if torch.is_inference_mode_enabled():
        raise wrong(who, "derivatives to be possible", "torch.inference_mode()", "Use torch.no_grad() around it.")


class _Transposed:
    """f at x, and products with Jᵀ, on states flattened to rows."""

    def __init__(self, who: str, f: Callable[..., State], x: State, args: tuple[Tensor, ...]) -> None:
        _check(who, f, x)
        batch = len(x[0] if isinstance(x, tuple) else x)
        for arg in args:
            if not isinstance(arg, Tensor) or arg.dim() == 0 or len(arg) != batch:
                got = tuple(arg.shape) if isinstance(arg, Tensor) else type(arg).__name__
                do = "Give those that the solve had; let f close over weights."
                raise wrong(who, f"args to be tensors of shape (batch={batch}, ...), as x has it", got, do)
        problem = function_map(who, f, x, args)
        rows = problem.rows(x)
        self._rows = rows if rows.requires_grad else rows.detach().clone().requires_grad_()
        with torch.enable_grad():
            self._value = problem(self._rows.clone())  # on a leaf, autograd itself would stop an f in place
        self.rows = self._rows.detach()
        if not self._value.requires_grad and self._moves(problem):
            do = "Leave out no_grad, detach and NumPy inside f."
            raise wrong(who, "an f that autograd can differentiate", "one whose result has no graph", do)

    def _moves(self, problem: Callable[[Tensor], Tensor]) -> bool:
        """Whether f depends on x after all: a constant f has no graph either."""
        with torch.no_grad():
            return not torch.equal(problem(self.rows + 1 + self.rows.abs()), self._value)

    def product(self, v: Tensor, *, create_graph: bool = False) -> Tensor:
        """Jᵀv, (batch, d)."""
        return vjp(self._value, self._rows, v, create_graph=create_graph)


def _dense(at: _Transposed) -> SpectralRadius:
    """Every eigenvalue of J, formed row by row.  LAPACK finds those of a permuted triangular J without rounding."""
    d = at.rows.shape[1]
    unit = torch.eye(d, dtype=at.rows.dtype, device=at.rows.device)
    J = torch.stack([at.product(row.expand_as(at.rows)) for row in unit], dim=1)
    J, finite = _finite(J.to(torch.promote_types(J.dtype, torch.float32)))
    value = torch.where(finite, torch.linalg.eigvals(J).abs().amax(dim=1), torch.nan)
    residual = torch.where(finite, 0.0, torch.inf).to(value.dtype)
    return SpectralRadius(value, residual, finite, d)


def _arnoldi(at: _Transposed, rtol: float, dimension: int) -> SpectralRadius:
    """JᵀV_k = V_k H_k + h v_{k+1} e_kᵀ with V_k orthonormal; the eigenvalues of H_k approach the outer ones of J."""
    batch, d = at.rows.shape
    kept = torch.promote_types(at.rows.dtype, torch.float32)
    # One start for all samples, so that a sample's answer does not depend on its batch.
    start = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    start = start.to(at.rows.device, kept)
    V = torch.zeros(batch, dimension + 1, d, dtype=kept, device=at.rows.device)
    H = torch.zeros(batch, dimension + 1, dimension, dtype=kept, device=at.rows.device)
    V[:, 0] = start / start.norm()
    value, residual = V.new_full((batch,), torch.nan), V.new_full((batch,), torch.inf)
    for k in range(1, dimension + 1):
        w = at.product(V[:, k - 1].to(at.rows.dtype)).to(kept)
        size = w.norm(dim=1, keepdim=True)
        basis = V[:, :k]
        for _ in range(2):  # one pass leaves the rounding of a cancellation, two do not
            along = torch.bmm(basis, w.unsqueeze(2)).squeeze(2)
            w = w - torch.bmm(along.unsqueeze(1), basis).squeeze(1)
            H[:, :k, k - 1] += along
        rest = w.norm(dim=1, keepdim=True)
        # Nothing but rounding is left of Jᵀv: the space is invariant, and zeros from here on keep it as it is.
        rest = torch.where(rest > 10 * torch.finfo(kept).eps * size, rest, 0.0)
        V[:, k] = torch.where(rest > 0, w / rest, 0.0)
        H[:, k, k - 1] = rest.squeeze(1)
        # The eigenproblem of H costs as much as many products; looking whenever k has doubled costs as much again.
        if k == dimension or (k >= 8 and k & (k - 1) == 0):
            open_ = ~(residual <= rtol)
            latest, its_residual = _ritz(H[:, :k, :k], rest.squeeze(1))
            value, residual = torch.where(open_, latest, value), torch.where(open_, its_residual, residual)
            if bool((residual <= rtol).all()):
                break
    return SpectralRadius(value, residual, residual <= rtol, k)


def _ritz(H: Tensor, beyond: Tensor) -> tuple[Tensor, Tensor]:
    """The largest |θ| over the eigenvalues θ of H, and the residual |h_{k+1,k}| |e_kᵀy| of its eigenvector."""
    H, finite = _finite(H)
    theta, y = torch.linalg.eig(H)
    value, at = theta.abs().max(dim=1)
    last = y[:, -1].gather(1, at.unsqueeze(1)).squeeze(1).abs()
    residual = beyond * last / value.clamp(min=torch.finfo(value.dtype).tiny)
    return torch.where(finite, value, torch.nan), torch.where(finite, residual, torch.inf)


def _finite(M: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices, zero in place of those that are not finite, which LAPACK refuses; and which are."""
    finite = torch.isfinite(M).flatten(1).all(dim=1)
    return torch.where(finite.view(-1, 1, 1), M, 0.0), finite
