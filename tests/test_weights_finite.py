"""Weights that are not finite are an error at the next solve, as an input is; of one form wherever it is met."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch

from implicitdl import ArgumentError, Equilibrium, ImplicitModel, ImplicitRNN, StateSpace, certify, fixed_point
from implicitdl.activations import RELU, TANH
from implicitdl.constraints import Monotone, RowProjection, SoftRowScaling, StrictlyUpper, Unconstrained
from implicitdl.equations.lowrank import LowRankEquilibrium

BAD = [torch.nan, torch.inf, -torch.inf]
MODELS = {
    "rows scaled": {},
    "no D": {"no_D": True},
    "tanh": {"activation": TANH},
    "low rank": {"is_low_rank": True, "rank": 2},
    "projected": {"constraint": RowProjection},
    "softly scaled": {"constraint": SoftRowScaling},
    "triangular": {"constraint": StrictlyUpper},
    "free": {"constraint": Unconstrained, "activation": TANH},
    "monotone": {"constraint": Monotone, "activation": RELU},
}


def spoilt(module: torch.nn.Module, name: str, bad: float) -> torch.nn.Module:
    """A copy in which one entry of one parameter is not finite."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        module.get_parameter(name).view(-1)[1] = bad
    return module


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_of_a_model(options):
    model, u = ImplicitModel(4, 3, 6, bias=True, on_failure="ignore", **options), torch.rand(5, 4)
    for (name, weight), bad in product(model.named_parameters(), BAD):
        expected = rf"expected finite {name}, got 1 NaN or infinite entries of {weight.numel()}\. Training has diverged"
        with pytest.raises(ArgumentError, match=expected):
            spoilt(model, name, bad)(u)


def test_of_a_recurrence():
    rnn, u = ImplicitRNN(input_dim=2, output_dim=3, hidden_dim=4, implicit_hidden_dim=5, bias=True), torch.rand(2, 3, 2)
    for (name, _), bad in product(rnn.named_parameters(), BAD):
        with pytest.raises(ArgumentError, match=rf"expected finite {name.split('.')[-1]}, got 1 NaN"):
            spoilt(rnn, name, bad)(u)


@pytest.mark.parametrize("layout", [StateSpace.to_dense, StateSpace.to_sparse])
def test_of_matrices(layout):
    space, u = ImplicitModel(4, 3, 6, bias=True).statespace().detach(), torch.rand(5, 4)
    for name, bad in zip(("A", "B", "C", "D", "b_x", "b_y"), 2 * BAD, strict=True):
        matrix = getattr(space, name).clone()
        matrix.view(-1)[1] = bad
        broken = layout(space.replace(**{name: matrix}))
        for who, use in (
            ("StateSpace", lambda space: space(u)),
            ("well_posed", certify.well_posed),
            ("sensitivity", certify.sensitivity),
            ("lipschitz_two", certify.lipschitz_two),
            ("output_bounds", lambda space: certify.output_bounds(space, certify.Box.around(u, 0.1))),
            ("certified_accuracy", lambda space: certify.certified_accuracy(space, [], 0.1)),
        ):
            with pytest.raises(ArgumentError, match=f"^{who}: expected finite {name}, got 1 NaN or infinite entries"):
                use(broken)


def test_of_an_equilibrium():
    A, b = torch.eye(3) / 2, torch.ones(2, 3)
    A[0, 1] = torch.nan
    L = torch.full((3, 1), torch.nan)
    for f, name in ((Equilibrium(A, b), "A"), (LowRankEquilibrium(L, torch.ones(3, 1), b), "L")):
        with pytest.raises(ArgumentError, match=f"expected finite {name}, got"):
            fixed_point(f, None, on_failure="ignore")


def test_the_forward_after_a_step_that_diverged_says_so():
    model, u = ImplicitModel(4, 3, 6), torch.rand(5, 4)
    optimiser = torch.optim.SGD(model.parameters(), lr=torch.inf)
    model(u).sum().backward()
    optimiser.step()
    with pytest.raises(ArgumentError, match=r"ImplicitModel: expected finite [ABCD], got .* Training has diverged"):
        model(u)


def test_numbers_too_large_for_a_product_are_not_blamed_on_the_weights():
    """The sum of C's row overflows; each of its entries is finite."""
    model = ImplicitModel(4, 3, 6, dtype=torch.float32)
    with torch.no_grad():
        model.C.fill_(3e38)
        model.B.fill_(1.0)
    assert torch.isinf(model(torch.ones(1, 4, dtype=torch.float32))).all()
