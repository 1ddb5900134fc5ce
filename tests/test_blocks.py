"""The blocks and the classifiers around them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from implicitdl import (
    DEQ,
    Anderson,
    ArgumentError,
    ImplicitAdjoint,
    Monitor,
    PhantomGradient,
    Picard,
    Solver,
    Unrolled,
    fixed_point,
)
from implicitdl._internal.store import CheckpointError
from implicitdl.nn import ConvEquilibriumClassifier, DenseEquilibriumClassifier, ResidualBlock, TanhBlock
from precision import digits

DENSE = {"input_dim": 12, "output_dim": 3, "hidden_dim": 6}
CONV = {"input_channels": 1, "output_dim": 3, "channels": 4, "inner_channels": 8, "num_groups": 2, "cells": 2}
CLASSIFIERS = [
    (DenseEquilibriumClassifier, DENSE, (5, 3, 4)),
    (ConvEquilibriumClassifier, CONV, (5, 1, 8, 8)),
]


class Patient(Picard):
    """A solver of the user's own."""


class TestResidualBlock:
    def test_formula(self):
        f = ResidualBlock(4, 6, num_groups=2)
        x, u = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
        y = F.group_norm(torch.relu(F.conv2d(x, f.conv1.weight, padding=1)), 2)
        z = F.group_norm(u + F.conv2d(y, f.conv2.weight, padding=1), 2)
        assert torch.allclose(f(x, u), F.group_norm(torch.relu(x + z), 2))

    @pytest.mark.parametrize("kernel_size", [1, 3, 5])
    def test_the_image_keeps_its_size(self, kernel_size):
        u = torch.randn(2, 8, 7, 6)
        assert DEQ(ResidualBlock(8, 8, kernel_size), solver=Anderson(rtol=1e-3))(u).shape == u.shape

    def test_sizes_are_checked(self):
        with pytest.raises(ArgumentError, match="an odd kernel_size, got 2"):
            ResidualBlock(8, 8, 2)
        with pytest.raises(ArgumentError, match="inner_channels to be a multiple of num_groups=8, got 12"):
            ResidualBlock(8, 12)
        with pytest.raises(ArgumentError, match="channels to be a positive integer, got 0"):
            ResidualBlock(0, 8)


class TestTanhBlock:
    def test_its_closed_form_is_the_same_map_and_has_the_same_solution_and_gradient(self):
        f, u = TanhBlock(6), torch.randn(4, 6, requires_grad=True)
        with torch.no_grad():
            f.linear.weight.mul_(0.8)
        x = torch.randn(4, 6)
        assert torch.allclose(f.equilibrium(u)(x), f(x, u), atol=digits(1e-8, 1e-6))
        closed, plain = DEQ(f)(u), fixed_point(f, torch.zeros(4, 6), u).value
        assert torch.allclose(closed, plain, atol=digits(1e-9, 1e-4))
        inputs = (u, f.linear.weight)
        for one, other in zip(
            *(torch.autograd.grad(value.pow(3).sum(), inputs) for value in (closed, plain)), strict=True
        ):
            assert torch.allclose(one, other, atol=digits(1e-8, 1e-3))


@pytest.mark.parametrize(("kind", "sizes", "shape"), CLASSIFIERS)
class TestClassifiers:
    def test_it_trains_and_reports(self, kind, sizes, shape):
        solver = Anderson(rtol=1e-3)
        model = kind(**sizes, solver=solver, adjoint=ImplicitAdjoint(solver=solver))
        u, target = torch.randn(shape), torch.arange(5) % 3
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        with Monitor() as monitor:
            for _ in range(12):
                loss = F.cross_entropy(model(u), target)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert monitor.missed == 0.0
        assert monitor.forward_steps > 1
        assert monitor.backward_steps > 1
        assert model.deq.stats.backward.converged.all()

    def test_every_parameter_gets_its_gradient(self, kind, sizes, shape):
        model = kind(**sizes)
        model(torch.randn(shape)).pow(2).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_settings_arrive_at_the_equilibrium(self, kind, sizes, shape):
        model = kind(**sizes, solver=Anderson(rtol=1e-3), adjoint=PhantomGradient(), on_failure="raise")
        assert model.deq.solver == model.solver == Anderson(rtol=1e-3)
        assert model.deq.adjoint == model.adjoint == PhantomGradient()
        assert model.deq.on_failure == model.on_failure == "raise"

    def test_deepcopy_pickle_and_dtype(self, kind, sizes, shape):
        model, u = kind(**sizes).eval(), torch.randn(shape)
        y = model(u)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(u), y)
        assert model.float()(u.float()).dtype == torch.float32

    def test_save_and_load_pretrained(self, kind, sizes, shape, tmp_path):
        adjoint = ImplicitAdjoint(order=2, solver=Anderson(memory=3))
        model, u = kind(**sizes, solver=Picard(rtol=1e-4), adjoint=adjoint, on_failure="ignore"), torch.randn(shape)
        model(u)  # moves the statistics of batch norm
        model.eval()
        model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
        read = kind.from_pretrained(tmp_path).eval()
        assert torch.equal(read(u), model(u))
        assert (read.solver, read.adjoint, read.on_failure) == (model.solver, model.adjoint, "ignore")
        assert repr(read) == repr(model)
        other = kind.from_pretrained(tmp_path, solver=Anderson(), adjoint=Unrolled())
        assert (other.solver, other.adjoint) == (Anderson(), Unrolled())

    def test_dtype_is_saved(self, kind, sizes, shape, tmp_path):
        kind(**sizes).float().save_pretrained(tmp_path)
        assert kind.from_pretrained(tmp_path)(torch.randn(shape, dtype=torch.float32)).dtype == torch.float32

    def test_a_solver_of_the_users_own_is_given_again(self, kind, sizes, shape, tmp_path):
        kind(**sizes, solver=Patient(max_steps=7)).save_pretrained(tmp_path)
        with pytest.raises(ArgumentError, match="Pass solver=Patient"):
            kind.from_pretrained(tmp_path)
        read: nn.Module = kind.from_pretrained(tmp_path, solver=Patient(max_steps=7))
        assert isinstance(read.solver, Solver)

    def test_another_kind_is_refused(self, kind, sizes, shape, tmp_path):
        kind(**sizes).save_pretrained(tmp_path)
        (other,) = {DenseEquilibriumClassifier, ConvEquilibriumClassifier} - {kind}
        with pytest.raises(CheckpointError, match=f"kind '{other.__name__}'"):
            other.from_pretrained(tmp_path)


@pytest.mark.parametrize(("halvings", "side"), [(0, 16), (1, 8), (2, 4), (3, 2)])
def test_the_stem_halves_the_image(halvings, side):
    model = ConvEquilibriumClassifier(3, 10, 16, 16, halvings=halvings, cells=2)
    assert model.stem(torch.randn(2, 3, 16, 16)).shape == (2, 16, side, side)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DenseEquilibriumClassifier(**DENSE)(torch.zeros(2, 13)), r"with 12 numbers a sample, got \(2, 13\)"),
        (lambda: DenseEquilibriumClassifier(**DENSE)(torch.zeros(12)), r"with 12 numbers a sample, got \(12,\)"),
        (lambda: DenseEquilibriumClassifier(12, 3, 0), "hidden_dim to be a positive integer, got 0"),
        (
            lambda: ConvEquilibriumClassifier(**CONV)(torch.zeros(2, 3, 8, 8)),
            r"images \(batch, 1, height, width\), got",
        ),
        (lambda: ConvEquilibriumClassifier(**CONV)(torch.zeros(2, 64)), r"height, width\), got \(2, 64\)"),
        (lambda: ConvEquilibriumClassifier(1, 10, halvings=-1), "halvings to be an integer ≥ 0, got -1"),
        (lambda: ConvEquilibriumClassifier(1, 10, cells=0), "cells to be a positive integer, got 0"),
    ],
)
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
