"""Pruning: what stays, the bound that is never violated, refitting, and training that keeps the zeros."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from implicitdl import ArgumentError, ImplicitModel, StateSpace, prune
from implicitdl.activations import RELU, TANH, Activation
from implicitdl.constraints import RowProjection, RowScaling, SoftRowScaling, norm_inf
from implicitdl.statespace import error_bound, magnitude, reduce, refit, sensitivity, zeros_held
from spaces import close, inputs, random_space, seeds, sizes, tight

RULES = [magnitude, sensitivity, error_bound]
rules = st.sampled_from(RULES)
layouts = st.sampled_from([StateSpace.to_dense, StateSpace.to_sparse])


def weights(space):
    return torch.cat([M.to_dense().flatten() for M in space.matrices])


@given(seeds, sizes, sizes, st.floats(0.05, 0.95), rules, layouts)
def test_the_bound_is_never_violated(seed, p, q, keep, rule, layout):
    space, u = random_space(seed, p, q, kappa=0.9), inputs(seed, p)
    pruning = prune(layout(space), u, keep=keep, by=rule)
    x, pruned = space.solve(u).value, pruning.space.to_dense()
    assert ((x - pruned.solve(u).value).abs() <= pruning.state_bound + 1e-8).all()
    assert ((tight(space, u) - tight(pruned, u)).abs() <= pruning.output_bound + 1e-8).all()
    assert pruning.space.is_sparse == layout(space).is_sparse


@given(seeds, sizes, sizes, st.floats(0.05, 0.95), rules)
def test_what_stays_is_as_it_was_and_as_much_as_asked(seed, p, q, keep, rule):
    space, u = random_space(seed, p, q), inputs(seed, p)
    pruning = prune(space, u, keep=keep, by=rule)
    before, after = weights(space), weights(pruning.space)
    assert pruning.total == int((before != 0).sum())
    assert pruning.kept == int((after != 0).sum()) == max(1, round(keep * pruning.total))
    assert torch.equal(after[after != 0], before[after != 0])
    assert torch.equal(pruning.space.b_x, space.b_x)
    assert torch.equal(pruning.space.b_y, space.b_y)


def test_magnitude_keeps_the_largest():
    space, u = random_space(3, 3, 2), inputs(3, 3)
    after = weights(prune(space, u, keep=0.3).space)
    lost = weights(space)[(after == 0)].abs()
    assert lost.max() <= after[after != 0].abs().min()


def without(space, index):
    """The model without one weight, counted through A, B, C and D."""
    flat = weights(space)
    flat[index] = 0
    parts = flat.split([M.numel() for M in space.matrices])
    return space.replace(**{name: part.view_as(M) for name, M, part in zip("ABCD", space.matrices, parts, strict=True)})


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_sensitivity_is_the_first_order_change_of_the_outputs(seed):
    # Weights of size 1e-5 at every place: their loss is a small change, and the score predicts it.
    space, u = random_space(seed, 2, 2, kinds=(TANH,), blocks=2, density=1.0), inputs(seed, 2)
    tiny = space.replace(A=space.A + 0.0)
    scores = torch.cat([score.flatten() for score in sensitivity(space, u)])
    y = tight(tiny, u)
    for index in torch.randint(len(scores), (8,), generator=torch.Generator().manual_seed(seed)).tolist():
        flat = weights(space)
        parts = torch.zeros_like(flat)
        parts[index] = 1e-6 * flat[index]
        moved = space.replace(
            **{
                name: M - part.view_as(M)
                for name, M, part in zip("ABCD", space.matrices, parts.split([M.numel() for M in space.matrices]), strict=True)
            }
        )  # fmt: skip
        change = (tight(moved, u) - y).pow(2).sum(1).mean().sqrt() / 1e-6
        assert float(change) == pytest.approx(float(scores[index]), rel=1e-3, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(seeds, sizes, sizes, st.floats(0.1, 0.9))
def test_the_shares_of_the_error_bound_add_up_to_a_bound(seed, p, q, keep):
    space, u = random_space(seed, p, q, kappa=0.9), inputs(seed, p)
    scores = torch.cat([score.flatten() for score in error_bound(space, u)])
    for rule in RULES:
        pruned = prune(space, u, keep=keep, by=rule).space
        lost = scores[(weights(pruned) == 0)].sum()
        distance = (tight(space, u) - tight(pruned, u)).abs().sum(1).mean()
        assert distance <= lost * (1 + 1e-9) + 1e-9
    least = scores[(weights(prune(space, u, keep=keep, by=error_bound).space) == 0)].sum()
    assert least <= scores[(weights(prune(space, u, keep=keep).space) == 0)].sum() * (1 + 1e-12)


def test_a_rule_of_ones_own():
    space, u = random_space(3, 3, 2), inputs(3, 3)
    only_D = prune(space, u, keep=0.5, by=lambda s, u: tuple(torch.full_like(M, float(M is s.D)) for M in s.matrices))
    assert torch.equal(only_D.space.D, space.D)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_reduced_model_gives_the_outputs_of_the_masked_one(rule):
    space, u = random_space(8, 6, 3, kinds=(RELU, TANH), blocks=12), inputs(8, 6, batch=50)
    masked = prune(space, u, keep=0.1, by=rule).space
    small = reduce(masked)
    assert small.n < space.n
    assert close(tight(small, u), tight(masked, u))
    assert close(tight(small.to_sparse(), u), tight(masked, u))


def test_a_model_that_is_not_contractive_has_an_infinite_bound():
    space = StateSpace(torch.tensor([[-3.0]]), torch.eye(1), torch.eye(1), torch.eye(1))
    pruning = prune(space.replace(A=space.A), torch.ones(1, 1), keep=0.75)
    assert torch.isinf(pruning.state_bound).all()
    assert torch.isinf(pruning.output_bound).all()


def test_an_implicit_model_is_taken_and_left_alone():
    model, u = ImplicitModel(6, 3, 20, bias=True), torch.randn(30, 2, 3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    pruning = prune(model, u, keep=0.5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not pruning.space.A.requires_grad
    assert ((model(u) - pruning.space(u)).abs() <= pruning.output_bound + 1e-8).all()


def test_float32():
    space, u = random_space(3, 3, 2), inputs(3, 3)
    exact = tight(space.to(torch.float32).to(torch.float64), u.float().double())
    pruning = prune(space.to(torch.float32), u.float(), keep=0.4)
    assert pruning.space.dtype == torch.float32
    assert pruning.output_bound.dtype == torch.float64
    assert (
        (exact - tight(pruning.space.to(torch.float64), u.float().double())).abs() <= pruning.output_bound + 1e-9
    ).all()


# ---- refit


@given(seeds, sizes, sizes, layouts)
def test_refitting_recovers_lost_weights_that_others_can_replace(seed, p, q, layout):
    # Inputs on a line: one weight a row can do the work of all of B's and D's.
    space = random_space(seed, p, q, kinds=(RELU, TANH), density=1.0)
    space = space.replace(A=torch.zeros_like(space.A), C=space.C)
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(40, 1, generator=g, dtype=torch.float64) * torch.arange(1, p + 1)
    B, D = torch.zeros_like(space.B), torch.zeros_like(space.D)
    B[:, -1], D[:, -1] = 1e-3, 1e-3
    pruned = layout(space.replace(B=B, D=D))
    fitted = refit(pruned, layout(space), u)
    assert fitted.is_sparse == pruned.is_sparse
    assert (fitted(u) - space(u)).norm() < 0.05 * space(u).norm()
    assert (pruned(u) - space(u)).norm() > 0.05 * space(u).norm()
    assert all(bool((M.to_dense()[N == 0] == 0).all()) for M, N in ((fitted.B, B), (fitted.D, D)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_refitting_brings_the_outputs_closer_and_keeps_the_set(rule):
    torch.manual_seed(1)
    model, u = ImplicitModel(10, 4, 40), torch.randn(2000, 2) @ torch.randn(2, 10)
    with torch.no_grad():
        model.A.mul_(0.5)
        model.B.mul_(10)
    space = model.statespace().detach()
    pruned = prune(model, u, keep=0.2, by=rule).space
    fitted = refit(pruned, space, u)

    def distance(other):
        return float((other(u) - space(u)).norm())

    assert distance(fitted) < 0.8 * distance(pruned)
    assert norm_inf(fitted.A) <= norm_inf(space.A) * (1 + 1e-12)
    assert bool((weights(fitted)[weights(pruned) == 0] == 0).all())
    assert torch.equal(fitted.b_x, torch.zeros(40))  # a model without biases gets none


def test_a_row_that_outgrows_the_ball_is_projected_and_its_rest_fitted_again():
    # z = 0.9 x₂ where x₂ is a copy of 3 u: without u, the row wants more of x than the ball allows.
    A = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    space = StateSpace(A, torch.tensor([[4.0], [3.0]]), torch.eye(2))
    pruned = space.replace(B=torch.tensor([[0.0], [3.0]]))
    u = torch.rand(50, 1)
    fitted = refit(pruned, space, u)
    assert norm_inf(fitted.A) == pytest.approx(0.5)
    assert fitted.B[0, 0] == 0.0


# ---- training with the zeros


@pytest.mark.parametrize("constraint", [RowScaling, RowProjection, SoftRowScaling])
def test_zeros_stay_through_training_and_the_constraint(constraint):
    torch.manual_seed(2)
    model = ImplicitModel(6, 3, 20, bias=True, constraint=constraint)
    with torch.no_grad():
        model.A.mul_(30)
    u, y = torch.randn(64, 6), torch.randint(3, (64,))
    sparse = ImplicitModel.from_statespace(prune(model, u, keep=0.2).space, constraint=constraint)
    ids = {id(p) for p in sparse.parameters()}
    before = weights(sparse.statespace()).detach()
    optimiser = torch.optim.Adam(sparse.parameters(), lr=0.05, weight_decay=0.1)
    with zeros_held(sparse):
        for _ in range(20):
            optimiser.zero_grad()
            nn.functional.cross_entropy(sparse(u), y).backward()
            optimiser.step()
            assert sparse.constraint.contains(sparse.weights()[0].detach())
    after = weights(sparse.statespace()).detach()
    assert bool((after[before == 0] == 0).all())
    assert not torch.equal(after, before)
    assert {id(p) for p in sparse.parameters()} == ids
    assert type(sparse) is ImplicitModel
    assert bool((sparse.b_x != 0).any())


def test_zeros_are_released_when_training_fails():
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="stop"), zeros_held(layer):
        raise RuntimeError("stop")
    assert type(layer) is nn.Linear


def test_weights_that_are_computed_are_refused():
    layer = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with (
        pytest.raises(ArgumentError, match="parameters themselves, got a parametrized module at '0'"),
        zeros_held(layer),
    ):
        pass


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, u: prune(s, u, keep=0.0), "prune: expected keep strictly between 0 and 1, got 0.0"),
        (lambda s, u: prune(s, u, keep=1.5), "keep strictly between 0 and 1, got 1.5"),
        (lambda s, u: prune(s, u[:, :1], keep=0.5), r"u of shape \(batch ≥ 1, p=3\), got \(5, 1\)"),
        (lambda s, u: prune(3 * s.replace(A=3 * s.A), u, keep=0.5, by=error_bound), r"error_bound: expected λ_pf\(\|A\|\) max\|φ'\| < 1, got"),
        (lambda s, u: prune(torch.nn.Linear(3, 2), u, keep=0.5), r"prune: expected an ImplicitModel, a StateSpace, .*got Linear\. Convert"),
        (lambda s, u: prune(s, u, keep=0.5, by="magnitude"), r"by to be a rule, \(space, u\) → scores, got 'magnitude'\. Pass"),
        (lambda s, u: refit(prune(s, u, keep=0.5), s, u), r"refit: expected an ImplicitModel, a StateSpace, .*got Pruning"),
        (lambda s, u: refit(s + s, s, u), r"models of one size, n, p, q = \(8, 3, 2\), got \(16, 3, 2\)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_worded(call, message):
    space = random_space(5, 3, 2, kappa=0.9, density=1.0)
    with pytest.raises(ArgumentError, match=message):
        call(space, inputs(5, 3))


def test_refit_takes_models_as_prune_does():
    model, u = ImplicitModel(3, 2, 8, dtype=torch.float64), inputs(8, 3)
    pruned = prune(model, u, keep=0.5).space
    expected = refit(pruned, model.statespace().detach(), u)
    found = refit(ImplicitModel.from_statespace(pruned), model, u)
    for M, N in zip(found.matrices, expected.matrices, strict=True):
        torch.testing.assert_close(M, N)


def test_steep_activations_count_in_the_bound():
    steep = Activation("steep", lambda z: 2 * torch.tanh(z), lambda z: 2 - 2 * torch.tanh(z) ** 2, (0.0, 2.0))
    space = random_space(4, 3, 2, kinds=(steep,), kappa=0.45, density=1.0)
    u = inputs(4, 3)
    for rule in RULES:
        pruning = prune(space, 0.1 * u, keep=0.6, by=rule)
        assert ((tight(space, 0.1 * u) - tight(pruning.space, 0.1 * u)).abs() <= pruning.output_bound + 1e-9).all()
