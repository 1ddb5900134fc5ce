"""Units v of the states in which a teacher's matrix is in the ball: Σⱼ|aᵢⱼ|vⱼ ≤ κ vᵢ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..constraints import RowScaling
from ..nn import ImplicitModel
from ..statespace import perron_root, perron_weights
from ..training.evaluate import evaluating
from .choice import chosen, whole_modules
from .record import Recorder
from .states import place_of


def teacher_weights(
    model: nn.Module,
    batch_shape: Sequence[int],
    kappa: float,
    *,
    layers: Sequence[str | int] | None = None,
    skip_layers: int | None = None,
) -> Tensor | None:
    """The least v ≥ 1 with |A|v ≤ κv for the A that a teacher is, without forming it.

    A network that is linear between its activations has a strictly block triangular A, and v = max(1, |A|v/κ) is
    found by one pass through it: with the absolute values of its parameters, with activations that are z ↦ max(1, z/κ),
    and with a zero input.  Biases do not belong to A: what they add is what a second sample shows, whose activations
    are zero.

    Arguments:
        model: the teacher.
        batch_shape: of a batch of its inputs.
        kappa: κ.
        layers, skip_layers: as for `get_states`.

    Returns:
        (n,) float64 in the order of the states; None where a pass does not tell: a scripted network, one with an
        implicit model inside or with states that are not finite, an implicit model with λ_pf(|A|) ≥ κ.

    Source: THEORY §1.2; `perron_weights` for a matrix.

    Example:
        >>> import torch
        >>> from implicitdl.sim.rescale import teacher_weights
        >>> teacher = torch.nn.Sequential(
        ...     torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False), torch.nn.ReLU()
        ... )
        >>> _ = teacher[1].weight.data.copy_(torch.tensor([[3.0, -1.0]]))
        >>> teacher_weights(teacher, (1, 2), kappa=0.5)
        tensor([8., 1., 1.], dtype=torch.float64)
    """
    if isinstance(model, ImplicitModel):
        A = model.statespace().A.detach().double().cpu()
        if RowScaling(kappa).contains(A.to(model.B.dtype)):
            return torch.ones(len(A), dtype=A.dtype, device=A.device)
        return perron_weights(A, kappa) if perron_root(A) < kappa else None
    if isinstance(model, torch.jit.ScriptModule) or any(isinstance(part, ImplicitModel) for part in model.modules()):
        return None

    def replaced(z: Tensor) -> Tensor:
        x = torch.zeros_like(z)
        x[0] = ((z[0] - z[-1]).abs() / kappa).clamp(min=1.0)
        return x

    device, dtype = place_of(model)
    zeros = torch.zeros(max(2, batch_shape[0]), *batch_shape[1:], device=device, dtype=dtype)
    absolute = {name: parameter.abs() for name, parameter in model.named_parameters()}
    recorder = Recorder(whole_modules(model, layers), replaced)
    with evaluating(model), recorder.inside(model):
        functional_call(model, absolute, (zeros,))
    calls = chosen("teacher_weights", model, recorder.calls, layers, skip_layers)
    v = torch.cat([replaced(call.z)[0].flatten() for call in calls[::-1]]).to("cpu", torch.float64)
    return v if bool(torch.isfinite(v).all()) else None
