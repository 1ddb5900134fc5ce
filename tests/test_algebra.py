"""The laws of the algebra: every combination of models computes what its name says, dense and sparse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicitdl import ArgumentError, StateSpace
from implicitdl.activations import RELU, TANH, Activation
from implicitdl.statespace import (
    activate,
    concatenate,
    direct_sum,
    feedback,
    loop_gain,
    residual,
    self_feedback,
)
from spaces import close, inputs, random_space, seeds, sizes, tight

layouts = st.sampled_from([StateSpace.to_dense, StateSpace.to_sparse])


@given(seeds, sizes, sizes, sizes, layouts, layouts)
def test_cascade(seed, p, middle, q, outer, inner):
    m2, m1, u = outer(random_space(seed, middle, q)), inner(random_space(seed + 1, p, middle)), inputs(seed, p)
    whole = m2 @ m1
    assert close(tight(whole, u), tight(m2, tight(m1, u)))
    assert whole.is_sparse == (m1.is_sparse or m2.is_sparse)
    assert whole.blocks == m2.blocks + m1.blocks


@given(seeds, sizes, sizes, sizes, sizes)
def test_cascade_is_associative(seed, p, r, s, q):
    m3, m2, m1 = random_space(seed, s, q), random_space(seed + 1, r, s), random_space(seed + 2, p, r)
    left, right = (m3 @ m2) @ m1, m3 @ (m2 @ m1)
    assert all(close(M, N) for M, N in zip(left.matrices, right.matrices, strict=True))
    assert close(left.b_x, right.b_x)
    assert close(left.b_y, right.b_y)
    assert left.blocks == right.blocks


@given(seeds, sizes, sizes, layouts, layouts)
def test_sum_difference_and_multiples(seed, p, q, one, other):
    a, b, u = one(random_space(seed, p, q)), other(random_space(seed + 1, p, q)), inputs(seed, p)
    ya, yb = tight(a, u), tight(b, u)
    assert close(tight(a + b, u), ya + yb)
    assert close(tight(a - b, u), ya - yb)
    assert close(tight(-a, u), -ya)
    assert close(tight(2.5 * a, u), 2.5 * ya)
    assert close(tight(a * 3, u), 3 * ya)


@given(seeds, sizes, st.lists(sizes, min_size=1, max_size=3), layouts)
def test_concatenation(seed, p, outputs, layout):
    models, u = [random_space(seed + i, p, q) for i, q in enumerate(outputs)], inputs(seed, p)
    models[0] = layout(models[0])
    assert close(tight(concatenate(*models), u), torch.cat([tight(m, u) for m in models], 1))


@given(seeds, st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3), layouts)
def test_direct_sum(seed, shapes, layout):
    models = [random_space(seed + i, p, q) for i, (p, q) in enumerate(shapes)]
    models[-1] = layout(models[-1])
    parts = [inputs(seed + i, p) for i, (p, _) in enumerate(shapes)]
    expected = torch.cat([tight(m, u) for m, u in zip(models, parts, strict=True)], 1)
    assert close(tight(direct_sum(*models), torch.cat(parts, 1)), expected)


@given(seeds, sizes, sizes, sizes, sizes, layouts)
def test_affine_maps_before_and_after(seed, outside, p, q, result, layout):
    g = torch.Generator().manual_seed(seed)
    Q, shift, P, offset = (
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((p, outside), (p,), (result, q), (result,))
    )
    model, u = layout(random_space(seed, p, q)), inputs(seed, outside)
    whole = StateSpace.affine(P, offset) @ model @ StateSpace.affine(Q, shift)
    assert whole.n == model.n
    assert close(tight(whole, u), tight(model, u @ Q.t() + shift) @ P.t() + offset)


@given(seeds, sizes, sizes, layouts)
def test_an_output_activation(seed, p, q, layout):
    model, u = layout(random_space(seed, p, q)), inputs(seed, p)
    assert close(tight(activate(model, TANH), u), torch.tanh(tight(model, u)))


@given(seeds, sizes, sizes, layouts)
def test_residual_connections(seed, p, q, layout):
    model, u = layout(random_space(seed, p, p)), inputs(seed, p)
    assert close(tight(residual(model), u), u + tight(model, u))
    S = torch.randn(q, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other = layout(random_space(seed, p, q))
    assert close(tight(residual(other, S), u), u @ S.t() + tight(other, u))


def outer_fixed_point(step, batch, q):
    """y = step(y) by plain iteration from zero, to the last digits."""
    y = torch.zeros(batch, q, dtype=torch.float64)
    for _ in range(20):  # the gain around the loop is below ⅛
        y = step(y)
    return y


@settings(max_examples=6, deadline=None)
@given(seeds, sizes, sizes, layouts)
def test_self_feedback_is_the_outer_fixed_point(seed, p, q, layout):
    model, u = small(random_space(seed, p + q, q), p), inputs(seed, p)
    expected = outer_fixed_point(lambda y: tight(model, torch.cat((u, y), 1)), len(u), q)
    closed = self_feedback(layout(model))
    assert closed.n == model.n
    assert close(tight(closed, u), expected)


@settings(max_examples=6, deadline=None)
@given(seeds, sizes, sizes, layouts, layouts)
def test_feedback_is_the_outer_fixed_point(seed, p, q, one, other):
    forward, backward = 0.2 * random_space(seed, p, q), 0.2 * random_space(seed + 1, q, p)
    forward, backward = small(forward), small(backward)
    u = inputs(seed, p)
    expected = outer_fixed_point(lambda y: tight(forward, u + tight(backward, y)), len(u), q)
    closed = feedback(one(forward), other(backward))
    assert loop_gain(closed) < 1
    assert close(tight(closed, u), expected)


@given(seeds, sizes, sizes)
def test_feedback_by_the_formula(seed, p, q):
    m1, m2 = small(random_space(seed, p, q)), small(random_space(seed + 1, q, p))
    closed = feedback(m1, m2)
    E = torch.linalg.inv(torch.eye(q) - m1.D @ m2.D)
    A = torch.cat(
        (
            torch.cat((m1.A + m1.B @ m2.D @ E @ m1.C, m1.B @ (m2.C + m2.D @ E @ m1.D @ m2.C)), 1),
            torch.cat((m2.B @ E @ m1.C, m2.A + m2.B @ E @ m1.D @ m2.C), 1),
        )
    )
    B = torch.cat((m1.B @ (torch.eye(p) + m2.D @ E @ m1.D), m2.B @ E @ m1.D))
    assert close(closed.A, A)
    assert close(closed.B, B)
    assert close(closed.C, torch.cat((E @ m1.C, E @ m1.D @ m2.C), 1))
    assert close(closed.D, E @ m1.D)


def small(model, kept=0):
    """With a gain around the loop below 1: B and D of the inputs that are fed back, and C, are shrunk."""
    B, D = model.B.clone(), model.D.clone()
    B[:, kept:] /= 1 + B[:, kept:].abs().sum(1, keepdim=True)
    D[:, kept:] /= 4 * (1 + D[:, kept:].abs().sum(1, keepdim=True))
    C = model.C / (8 * (1 + model.C.abs().sum(1, keepdim=True)))
    return model.replace(B=B, C=C, D=D)


@pytest.mark.parametrize("layout", [StateSpace.to_dense, StateSpace.to_sparse])
def test_gradients_go_through_the_algebra(layout):
    inner, outer = random_space(1, 2, 3, kinds=(TANH,)), random_space(2, 3, 2, kinds=(TANH,))
    u = inputs(1, 2)
    free = inner.replace(D=inner.D.clone().requires_grad_())
    composed = layout(outer) @ layout(free)
    (through,) = torch.autograd.grad(composed(u).pow(2).sum(), free.D)
    (direct,) = torch.autograd.grad(outer(free(u)).pow(2).sum(), free.D)
    on = inner.D != 0  # a sparse matrix has no gradient for what it does not hold
    assert torch.allclose(through[on], direct[on], atol=1e-7)


def test_feedback_of_a_linear_loop_is_the_geometric_series():
    once, half = StateSpace.affine(torch.eye(2)), StateSpace.affine(torch.diag(torch.tensor([0.5, -1.0])))
    assert close(feedback(once, half)(torch.ones(1, 2)), torch.tensor([[2.0, 0.5]]))


def scalar(a=0.0, b=1.0, c=1.0, d=0.0, kind=RELU):
    return StateSpace(*(torch.tensor([[value]], dtype=torch.float64) for value in (a, b, c, d)), blocks=kind)


def test_a_loop_that_is_not_known_to_be_well_posed_is_refused_with_its_number():
    forward, backward = scalar(0.5), scalar(0.0, 1.0, 0.7)
    # A = [[0.5, 0.7], [1, 0]]: λ = (0.5 + √(0.25 + 2.8)) / 2
    with pytest.raises(ArgumentError, match=r"λ_pf\(\|A\|\) max\|φ'\| < 1, got 1.12321. Scale one"):
        feedback(forward, backward)
    assert feedback(forward, backward, check=False).n == 2
    # The other way round the loop is a negative one, well posed for another reason: x = relu(u + (-5)x).
    one = torch.ones(1, 1, dtype=torch.float64)
    negative = self_feedback(StateSpace(0 * one, torch.tensor([[1.0, -5.0]], dtype=torch.float64), one), check=False)
    assert close(tight(negative, one), one / 6)


def test_a_steep_activation_counts_with_its_slope():
    triple = Activation("triple", lambda z: 3 * z.clamp(min=0), lambda z: 3.0 * (z > 0), (0.0, 3.0), homogeneous=True)
    with pytest.raises(ArgumentError, match=r"got 1\.22474"):
        feedback(scalar(kind=triple), scalar(0.0, 1.0, 0.5))
    unbounded = Activation("cube", lambda z: z**3, lambda z: 3 * z**2, (0.0, float("inf")))
    with pytest.raises(ArgumentError, match="got inf"):
        feedback(scalar(kind=unbounded), scalar(0.0, 1.0, 1e-9))
    assert loop_gain(scalar(kind=unbounded) @ scalar()) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scalar() @ random_space(0, 2, 3), "an outer model whose p is q=3 of the inner one, got p=1"),
        (lambda: scalar() + random_space(0, 2, 1), r"models of the same p, got \[1, 2\]"),
        (lambda: scalar() + random_space(0, 1, 2), r"models of the same q, got \[1, 2\]"),
        (lambda: concatenate(scalar(), random_space(0, 2, 1)), "concatenate: expected models of the same p"),
        (lambda: concatenate(), "at least one model, got none"),
        (lambda: direct_sum(), "at least one model, got none"),
        (lambda: scalar() @ scalar().to(torch.float32), "models of one dtype and device, torch.float64 on cpu"),
        (lambda: scalar() * float("nan"), "factor to be a finite number, got nan"),
        (lambda: True * scalar(), "factor to be a finite number, got True"),
        (lambda: residual(random_space(0, 2, 3)), r"a shortcut of shape \(q=3, p=2\), got None"),
        (lambda: residual(scalar(), torch.ones(1, 2, dtype=torch.float64)), r"models of the same p, got \[1, 2\]"),
        (lambda: self_feedback(scalar()), "p > q=1, the input to end with the output, got p=1"),
        (lambda: feedback(scalar(), random_space(0, 2, 1)), "a backward model from q=1 to p=1, got p=2, q=1"),
        (lambda: feedback(scalar(d=2.0), scalar(d=0.5)), "I − D around the loop to be invertible, got a smallest singular value of 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


@pytest.mark.parametrize("call", [lambda s: s + 1, lambda s: s - 1.0, lambda s: s @ torch.eye(1), lambda s: 1 + s])
def test_a_model_and_what_is_none_are_a_type_error(call):
    with pytest.raises(TypeError, match="unsupported operand"):
        call(scalar())
