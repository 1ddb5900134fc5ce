"""A StateSpace is one moment of a model: what happens to the model or to its tensors afterwards is seen or refused."""

from __future__ import annotations

import pickle
from itertools import product

import pytest
import torch

from implicitdl import ArgumentError, ImplicitModel, StateSpace, certify
from implicitdl.activations import RELU, TANH
from implicitdl.certify import Box
from implicitdl.constraints import Unconstrained
from implicitdl.statespace import from_module
from precision import digits
from spaces import random_space

FIELDS = ("A", "B", "C", "D", "b_x", "b_y")
LAYOUTS = [StateSpace.to_dense, StateSpace.to_sparse]


def trained(model, u, steps=60):
    opt = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        opt.zero_grad()
        model(u).pow(2).sum().backward()
        opt.step()


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"constraint": Unconstrained}, {"is_low_rank": True, "rank": 2}]
)
def test_a_snapshot_is_the_model_before_training(options):
    model = ImplicitModel(3, 2, 6, tol=digits(1e-12, 1e-6), grad_tol=digits(1e-9, 1e-6), **options)
    u = torch.randn(5, 3)
    snapshot, attached = model.statespace().detach(), model.statespace()
    held = {name: getattr(snapshot, name).to_dense().clone() for name in FIELDS}
    y = snapshot(u)
    trained(model, u)
    assert not torch.allclose(model(u), y, atol=1e-3)
    for space in (snapshot, attached):
        torch.testing.assert_close(space(u).detach(), y, rtol=0, atol=digits(1e-9, 1e-5))
        assert all(torch.equal(getattr(space, name), value) for name, value in held.items())


def test_a_snapshot_of_a_network_is_the_network_before_training():
    net, u = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)), torch.randn(5, 3)
    space = from_module(net, u).detach()
    y = space(u)
    trained(net, u)
    torch.testing.assert_close(space(u), y, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_given_may_change(layout):
    u = torch.randn(4, 3, dtype=torch.float64)
    for name in FIELDS:
        model = layout(random_space(3, 3, 2))
        given = {name: getattr(model, name).clone() for name in FIELDS}
        space = StateSpace(**given, blocks=TANH)
        replaced = space.replace(**{name: given[name]})
        y = space(u)
        given[name].zero_()
        torch.testing.assert_close(space(u), y, rtol=0, atol=1e-12)
        torch.testing.assert_close(replaced(u), y, rtol=0, atol=1e-12)


DOORS = {
    "call": lambda space, u: space(u),
    "solve": lambda space, u: space.solve(u),
    "certificate": lambda space, u: certify.output_bounds(space, Box.around(u, 0.1, domain=None)),
    "algebra": lambda space, u: space + space,
    "copy": lambda space, u: space.detach(),
    "layout": lambda space, u: space.to_sparse(),
    "replace": lambda space, u: space.replace(b_y=torch.ones_like(space.b_y)),
    "model": lambda space, u: ImplicitModel.from_statespace(space),
    "pickle": lambda space, u: pickle.dumps(space),
    "reading": lambda space, u: space.C,
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS.keys())
def test_a_matrix_written_to_in_place_is_refused_at_every_door(door):
    u = torch.randn(4, 3, dtype=torch.float64)
    for layout, name in product(LAYOUTS, FIELDS):
        space = layout(random_space(3, 3, 2, kinds=(RELU,)))
        space(u)  # so that the plan of the solve is there
        getattr(space, name).mul_(2)
        with pytest.raises(
            ArgumentError, match=rf"{name} as it was when the model was made, got one that was written to"
        ):
            door(space, u)


WRITES = {
    "a view": (StateSpace.to_dense, lambda space: space.A[0].zero_()),
    "a detached model": (StateSpace.to_dense, lambda space: space.detach().A.zero_()),
    "values": (StateSpace.to_sparse, lambda space: space.A.values().zero_()),
    "a model that shares it": (StateSpace.to_sparse, lambda space: space.replace(b_y=torch.ones_like(space.b_y)).A.mul_(2)),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "write"), WRITES.values(), ids=WRITES.keys())
def test_writing_by_another_way_is_seen(layout, write):
    space = layout(random_space(3, 3, 2))
    write(space)
    with pytest.raises(ArgumentError, match="A as it was"):
        space(torch.ones(1, 3))


def test_nothing_can_be_set():
    space = random_space(3, 3, 2)
    for name in (*FIELDS, "blocks", "n", "anything"):
        before = getattr(space, name, None)
        for error in (ArgumentError, AttributeError):
            with pytest.raises(error, match=f"a model to stay as it was made, got {name} to be set"):
                setattr(space, name, before)
            with pytest.raises(error, match=f"a model to stay as it was made, got {name} to be deleted"):
                delattr(space, name)
        assert getattr(space, name, None) is before or name == "n"


def test_an_unknown_change_is_refused():
    with pytest.raises(ArgumentError, match="changes of A, B, C, D, b_x, b_y and blocks, got E"):
        random_space(3, 3, 2).replace(E=torch.eye(3))


def test_gradients_pass_through_the_copy():
    model = random_space(3, 3, 2)
    given = [getattr(model, name).clone().requires_grad_() for name in FIELDS]
    u = torch.randn(4, 3, dtype=torch.float64)
    space = StateSpace(*given, blocks=TANH)
    through = torch.autograd.grad(space(u).pow(2).sum(), given)
    own = torch.autograd.grad(space(u).pow(2).sum(), [getattr(space, name) for name in FIELDS])
    for one, other in zip(through, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_plan_made_in_inference_mode_serves_training_afterwards():
    space, u = random_space(3, 3, 2).to_sparse(), torch.randn(4, 3, dtype=torch.float64)
    with torch.inference_mode():
        expected = space(u).clone()
    v = u.clone().requires_grad_()
    y = space(v)
    torch.testing.assert_close(y.detach(), expected.clone(), rtol=0, atol=1e-9)
    assert torch.isfinite(torch.autograd.grad(y.sum(), v)[0]).all()


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (torch.ones(0, 6), r"got \(0, 6\). Give at least one sample, batch first."),
        (torch.ones(2, 5, 6), r"got \(2, 5, 6\). Samples stand along one dimension: u.flatten\(0, 1\)."),
        (torch.ones(2, 2, 5, 6), r"u.flatten\(0, 2\)."),
        (torch.ones(6), r"got \(6,\). One sample is a batch of one: u.unsqueeze\(0\)."),
        (torch.ones(2, 5), r"got \(2, 5\). Pass 6 features a sample."),
    ],
)
def test_an_input_that_does_not_fit_is_told_how(u, message):
    with pytest.raises(ArgumentError, match=message):
        random_space(3, 6, 2)(u)
