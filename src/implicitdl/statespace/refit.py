"""Making up for lost weights: least squares on those that are left, and training that keeps the zeros."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._internal.errors import wrong
from ..constraints import norm_inf
from ..constraints.norm import project_l1
from .space import Model, StateSpace, space_of

# Ridge relative to the mean square of the regressors: neighbouring pixels are nearly collinear, and without it their
# weights grow large against each other.
_RIDGE = 1e-3
_CHUNK = 4096  # samples whose regressors are formed at a time


def refit(pruned: Model, original: Model, u: Tensor) -> StateSpace:
    """The pruned model with the weights that are left fitted to the states and outputs of the original.

    Every row of (A, B, b_x) is the least-squares fit of the original's z_i on its x and u, over the weights that are
    left; a row of A that would exceed the original's ‖A‖∞ is projected onto that ball, and the rest of the row fitted
    once more.  Then (C, D, b_y) are fitted to the original's y on the refitted model's own states.  Biases are fitted
    where the original has any.

    Arguments:
        pruned: an `ImplicitModel` or a `StateSpace`, what `prune` made of the original; its zeros stay.
        original: the model before, likewise.
        u: inputs (batch, \\*any).

    Raises:
        ArgumentError: no models, models of different sizes, or an input that does not fit.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel, prune
        >>> from implicitdl.statespace import refit
        >>> model = ImplicitModel(input_dim=8, output_dim=2, hidden_dim=16)
        >>> u = torch.randn(128, 8)
        >>> pruned = prune(model, u, keep=0.3).space
        >>> bool((refit(pruned, model, u)(u) - model(u)).norm() < (pruned(u) - model(u)).norm())
        True
    """
    pruned, original = space_of("refit", pruned), space_of("refit", original)
    if (pruned.n, pruned.p, pruned.q) != (original.n, original.p, original.q):
        raise wrong("refit", f"models of one size, n, p, q = {original.n, original.p, original.q}",
                    f"{pruned.n, pruned.p, pruned.q}")  # fmt: skip
    sparse_wanted = pruned.is_sparse
    pruned, original = pruned.to_dense(), original.to_dense()
    u = original.flat(u).detach()
    x = original.state(u)
    biased = bool((original.b_x != 0).any() | (original.b_y != 0).any())
    inner = RowFit(pruned.A, pruned.B, biased, norm_inf(original.A))
    A, B, b_x = inner.to(original.pre_activation(x, u), x, u)
    middle = pruned.holding(A=A, B=B, b_x=b_x)
    outer = RowFit(pruned.C, pruned.D, biased, torch.inf)
    C, D, b_y = outer.to(original.read_out(x, u), middle.state(u), u)
    fitted = middle.holding(C=C, D=D, b_y=b_y)
    return fitted.to_sparse() if sparse_wanted else fitted


@contextmanager
def zeros_held(module: nn.Module) -> Iterator[None]:
    """While this is open, the weights of a module that are zero stay zero, whatever trains it.

    Matrices are multiplied by their mask where the module reads them, so gradients of the zeros vanish, and a
    constraint that scales or projects rows keeps them.  Biases stay free.  At the end the module is as it was, with
    the same parameters.

    Raises:
        ArgumentError: a part whose weights are computed by a parametrization already.

    Example:
        >>> import torch
        >>> from implicitdl.statespace import zeros_held
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
        >>> optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
        >>> with zeros_held(layer):
        ...     layer(torch.ones(1, 2)).sum().backward()
        ...     optimiser.step()
        >>> layer.weight.tolist()[0][1]
        0.0
    """
    for place, part in module.named_modules():
        if parametrize.is_parametrized(part):
            raise wrong("zeros_held", "weights that are parameters themselves", f"a parametrized module at '{place}'")
    held = [
        (part, name)
        for part in list(module.modules())
        for name, weight in list(part.named_parameters(recurse=False))
        if weight.dim() >= 2
    ]
    for part, name in held:
        parametrize.register_parametrization(part, name, _Mask(getattr(part, name).detach() != 0))
    try:
        yield
    finally:
        for part, name in held:
            parametrize.remove_parametrizations(part, name, leave_parametrized=True)


class _Mask(nn.Module):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class RowFit:
    """Rows (first, second, bias) fitted to targets, each over the entries that are not zero."""

    def __init__(self, first: Tensor, second: Tensor, biased: bool, radius: float) -> None:
        column = torch.full((len(first), 1), biased, dtype=torch.bool, device=first.device)
        self.support = torch.cat((first != 0, second != 0, column), 1)
        self.width, self.radius, self.dtype = first.shape[1], radius, first.dtype

    def to(self, targets: Tensor, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gram, moments = _moments(x, u, targets)
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        rows = torch.stack([self._row(gram, moments[:, i], mask) for i, mask in enumerate(self.support)])
        first, second, bias = rows.to(self.dtype).tensor_split([self.width, rows.shape[1] - 1], 1)
        return first, second, bias.squeeze(1)

    def _row(self, gram: Tensor, moment: Tensor, mask: Tensor) -> Tensor:
        row = _solved(gram, moment, mask)
        if float(row[: self.width].abs().sum()) > self.radius:
            fixed = torch.zeros_like(row)
            fixed[: self.width] = project_l1(row[: self.width].unsqueeze(0), self.radius).squeeze(0)
            rest = mask.clone()
            rest[: self.width] = False
            row = fixed + _solved(gram, moment - gram @ fixed, rest)
        return row


def _solved(gram: Tensor, moment: Tensor, mask: Tensor) -> Tensor:
    row = torch.zeros_like(moment)
    kept = mask.nonzero().flatten()
    row[kept] = torch.linalg.solve(gram[kept][:, kept], moment[kept])
    return row


def _moments(x: Tensor, u: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """ΦᵀΦ and Φᵀz in float64, Φ = [x, u, 1]."""
    d = x.shape[1] + u.shape[1] + 1
    gram = torch.zeros(d, d, dtype=torch.float64, device=x.device)
    moments = torch.zeros(d, targets.shape[1], dtype=torch.float64, device=x.device)
    for part in torch.arange(len(x), device=x.device).split(_CHUNK):
        ones = torch.ones(len(part), 1, dtype=torch.float64, device=x.device)
        features = torch.cat((x[part].double(), u[part].double(), ones), 1)
        gram += features.t() @ features
        moments += features.t() @ targets[part].double()
    return gram, moments
