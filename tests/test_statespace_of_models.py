"""statespace() of models whose weights torch makes by hooks and parametrizations, and from_statespace of any A."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from implicitdl import ArgumentError, ImplicitModel, StateSpace
from implicitdl.activations import RELU, TANH
from implicitdl.constraints import RowProjection, SoftRowScaling, StrictlyUpper, Unconstrained, WeightedRowScaling
from implicitdl.statespace import rescale
from spaces import tight


class Halved(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


WAYS = {
    "pruned": lambda model, name: prune.random_unstructured(model, name, 0.5),
    "pruned twice": lambda model, name: prune.l1_unstructured(prune.random_unstructured(model, name, 0.3), name, 0.3),
    "parametrized": lambda model, name: parametrize.register_parametrization(model, name, Halved()),
    "weight norm": lambda model, name: parametrizations.weight_norm(model, name),
    "older weight norm": pytest.param(
        lambda model, name: weight_norm(model, name), marks=pytest.mark.filterwarnings("ignore:.*weight_norm")
    ),
    "spectral norm": lambda model, name: parametrizations.spectral_norm(model, name),
    "older spectral norm": lambda model, name: spectral_norm(model, name),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_the_matrices_are_those_that_the_model_uses(way):
    u = torch.randn(6, 3, dtype=torch.float64)
    for name in ("A", "B", "C", "D"):
        model = ImplicitModel(3, 4, 5, bias=True, tol=1e-13, dtype=torch.float64)
        way(model, name)
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():  # so that what was made by a hook is made of other numbers
                parameter.mul_(1.5)
        torch.testing.assert_close(tight(model.statespace(), u), model(u), rtol=1e-9, atol=1e-9)
        model.statespace()(u).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad), name


# ---- an A outside of the set

OUTSIDE = StateSpace(
    torch.tensor([[0.0, 7.0], [0.0, 0.2]], dtype=torch.float64), *[torch.eye(2, dtype=torch.float64)] * 2
)


@pytest.mark.parametrize("constraint", [None, RowProjection, SoftRowScaling])
def test_an_a_outside_of_the_ball_names_the_rescaling(constraint):
    with pytest.raises(ArgumentError, match=r"‖A‖∞ = 7\)\. .*implicitdl\.statespace\.rescale\(space, kappa=0\.99\)"):
        ImplicitModel.from_statespace(OUTSIDE, constraint=constraint)
    u = torch.randn(4, 2, dtype=torch.float64)
    again = ImplicitModel.from_statespace(rescale(OUTSIDE, kappa=0.99), constraint=constraint, solver=None)
    torch.testing.assert_close(again(u), OUTSIDE(u), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("space", "constraint"),
    [
        (OUTSIDE.replace(blocks=TANH), None),
        (OUTSIDE.replace(A=3 * torch.eye(2, dtype=torch.float64), blocks=RELU), None),
        (OUTSIDE, StrictlyUpper),
        (OUTSIDE, WeightedRowScaling),
    ],
)
def test_where_no_rescaling_helps_the_constraint_is_dropped(space, constraint):
    with pytest.raises(ArgumentError, match=r"outside of it \(.*\)\. Keep it with constraint=Unconstrained\."):
        ImplicitModel.from_statespace(space, constraint=constraint)
    kept = ImplicitModel.from_statespace(space, constraint=Unconstrained)
    torch.testing.assert_close(kept.A.detach(), space.A, rtol=0, atol=0)
