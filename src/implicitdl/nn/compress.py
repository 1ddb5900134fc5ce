"""A stack of implicit models as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .._internal.errors import wrong
from ..constraints import RowScaling, Unconstrained
from ..statespace import StateSpace, from_module, loop_gain, rescale
from .function import ImplicitFunctionInf, ImplicitFunctionTriu
from .model import ImplicitModel

# κ of the compressed model, unless its loops are closer to 1: ImplicitModel's own default.
_KAPPA = 0.99


def compress(stack: nn.Sequential, **options: Any) -> ImplicitModel:
    """One implicit model that computes what a stack of them computes.

    Its A is block upper triangular, the last model's states first.  It takes the constraint that it satisfies: strictly
    upper triangular where all parts are; the ball ‖A‖∞ ≤ κ where λ_pf(|A|) < 1 and the states can be measured in other
    units (`rescale`), which positively homogeneous φ allow; none otherwise.  All zeros of A are free to be trained:
    see `zeros_held`.

    Arguments:
        stack: modules that have `statespace()`, and ordinary ones that `from_module` takes, each taking the flat output
            of the one before; the first is an implicit model or a `torch.nn.Linear`.
        options: solver, adjoint and on_failure of the new model; what the parts had is not taken over.

    Raises:
        ArgumentError: a module that has no implicit form, sizes that do not fit, or a stack without states.

    Source: El Ghaoui et al., Implicit Deep Learning (2021), the section on composition.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel, compress
        >>> first = ImplicitModel(input_dim=3, output_dim=4, hidden_dim=5, dtype=torch.float64)
        >>> second = ImplicitModel(input_dim=4, output_dim=2, hidden_dim=6, dtype=torch.float64)
        >>> stack = torch.nn.Sequential(first, second)
        >>> one, u = compress(stack), torch.randn(7, 3, dtype=torch.float64)
        >>> one.hidden_dim, bool((one(u) - stack(u)).abs().max() < 1e-9)
        (11, True)
    """
    if not isinstance(stack, nn.Sequential) or len(stack) == 0:
        raise wrong("compress", "a torch.nn.Sequential of implicit models", type(stack).__name__)
    whole: StateSpace | None = None
    for name, module in stack.named_children():
        part = _space(name, module, whole)
        whole = part if whole is None else part @ whole
    assert whole is not None
    if not bool((whole.A.tril() != 0).any()):
        return ImplicitModel.from_statespace(whole, ImplicitFunctionTriu, **options)
    gain = loop_gain(whole)
    if gain < 1:
        # Halfway to 1 where the parts use up the default.
        kappa = max(_KAPPA, (1 + gain) / 2)
        if whole.activation.homogeneous:
            whole = rescale(whole, kappa / whole.activation.lipschitz)
        if RowScaling(kappa, whole.activation.lipschitz).contains(whole.A):
            return ImplicitModel.from_statespace(whole, ImplicitFunctionInf, kappa=kappa, **options)
    return ImplicitModel.from_statespace(whole, constraint=Unconstrained, **options)


def _space(name: str, module: nn.Module, before: StateSpace | None) -> StateSpace:
    statespace: Callable[[], StateSpace] | None = getattr(module, "statespace", None)
    if statespace is not None:
        space = statespace()
    elif isinstance(module, nn.Linear):
        space = StateSpace.affine(module.weight, module.bias)
    elif before is not None:
        space = from_module(module, before.b_y.new_zeros(1, before.q))
    else:
        raise wrong(
            "compress", "a stack that begins with an implicit model or a Linear",
            f"{type(module).__name__} at '{name}'",
            "Convert other networks with implicitdl.statespace.from_module.",
        )  # fmt: skip
    return space.detach().to_dense()
