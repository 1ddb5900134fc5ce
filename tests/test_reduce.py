"""Equivalent and reduced models: the same outputs, the promised form, and loud refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from implicitdl import ArgumentError, StateSpace
from implicitdl.activations import ELU, HARDTANH, IDENTITY, LEAKY_RELU, RELU, SIGMOID, SILU, TANH
from implicitdl.constraints import norm_inf
from implicitdl.statespace import (
    drop_unobservable,
    eliminate_diagonal,
    eliminate_linear,
    embedding,
    fold_constant,
    loop_gain,
    merge_proportional,
    permute,
    perron_root,
    perron_weights,
    pre_activation_bounds,
    reduce,
    reduce_on_box,
    rescale,
    scale_states,
    spread,
)
from precision import digits
from spaces import HOMOGENEOUS, close, inputs, random_space, seeds, sizes, tight

layouts = st.sampled_from([StateSpace.to_dense, StateSpace.to_sparse])


# ---- Perron–Frobenius


def reducible(seed, n, blocks):
    """Block triangular |A|, its rows mixed up, whose root is that of the largest diagonal block."""
    g = torch.Generator().manual_seed(seed)
    A = torch.rand(n, n, generator=g) * (torch.rand(n, n, generator=g) < 0.5)
    level = torch.randint(blocks, (n,), generator=g)
    A[level.unsqueeze(1) > level] = 0
    # Between the blocks anything goes: it does not change the root.
    A = torch.where(level.unsqueeze(1) < level, 50 * A, A)
    return A * torch.randn(n, n, generator=g).sign()


def inverse_of_gap(A, t):
    """(I − |A|/t)⁻¹, which is non-negative exactly where t > λ_pf(|A|)."""
    return torch.linalg.inv(torch.eye(len(A), dtype=torch.float64) - A.double().abs() / t)


@given(seeds, st.integers(1, 9), st.integers(1, 4), layouts)
def test_the_root_is_where_the_gap_has_a_positive_inverse(seed, n, blocks, layout):
    A = reducible(seed, n, blocks)
    root = perron_root(layout(StateSpace(A, torch.zeros(n, 1), torch.zeros(1, n))).A)
    above = inverse_of_gap(A, 1.0001 * root + 1e-3)
    assert (above > -1e-9 * above.max()).all()
    assume(root > 0)
    assert (inverse_of_gap(A, 0.9999 * root) < -1).any()


@pytest.mark.parametrize(
    ("A", "root"),
    [
        (torch.zeros(0, 0), 0.0),
        (torch.zeros(3, 3), 0.0),
        (torch.ones(4, 4).triu(1) * 1e6, 0.0),
        (torch.eye(3), 1.0),
        (-torch.eye(2), 1.0),
        (torch.tensor([[0.0, 4.0], [1.0, 0.0]]), 2.0),
        (torch.ones(5, 5), 5.0),
        (torch.diag(torch.ones(49), 1) + torch.diag(torch.ones(1), -49), 1.0),
        (torch.tensor([[0.5, 1e8, 0.0], [0.0, 0.25, 1e8], [0.0, 0.0, 0.75]]), 0.75),
        (torch.tensor([[1.0, 1e-9], [1e-9, 1.0]]), 1.0 + 1e-9),
        (torch.tensor([[float("inf")]]), float("inf")),
    ],
)
def test_known_roots(A, root):
    assert perron_root(A.double()) == pytest.approx(root, rel=1e-12)


@given(seeds, st.integers(1, 9), st.integers(1, 4), st.floats(1e-4, 0.5), layouts)
def test_weights_make_the_matrix_a_contraction(seed, n, blocks, room, layout):
    A = reducible(seed, n, blocks)
    A = A / max(perron_root(A), 1.0)
    kappa = 1 / (1 + room)
    A = A * kappa**2  # so that λ_pf < κ by a factor of 1 + room
    v = perron_weights(layout(StateSpace(A, torch.zeros(n, 1), torch.zeros(1, n))).A, kappa)
    A = A.double()
    assert (v >= 1).all()
    assert (A.abs() @ v <= kappa * v).all()
    # They are the least: v = max(1, |A|v/κ), up to the slack for rounding, over the loop's own amplification.
    least = (A.abs() @ v / kappa).clamp(min=1)
    assert torch.allclose(least, v, rtol=1e-6)


def test_weights_of_a_long_chain_and_of_a_large_nilpotent_matrix_have_the_smallest_range():
    chain = torch.diag(torch.full((199,), 2.0), 1)
    v = perron_weights(chain, 0.9999)
    assert float(v[0]) == pytest.approx((2 / 0.9999) ** 199, rel=1e-5)
    assert torch.equal(perron_weights(0.25 * chain, 0.6), torch.ones(200))
    small = perron_weights(torch.ones(40, 40).triu(1) / 40, 0.99)
    assert float(small.max()) == 1.0


def test_no_weights_where_the_root_is_too_large():
    A = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    assert torch.equal(
        perron_weights(A * 0.9, 0.9), torch.ones(2, dtype=torch.float64)
    )  # ‖A‖∞ = κ exactly needs no rescaling
    for matrix in (A, 1e200 * A):
        with pytest.raises(ArgumentError, match=r"λ_pf\(\|A\|\) < κ = 0.9, got λ_pf\(\|A\|\) = 1"):
            perron_weights(matrix, 0.9)
    with pytest.raises(ArgumentError, match="kappa strictly between 0 and 1"):
        perron_weights(A, 1.0)


@given(seeds, st.floats(0.1, 0.999))
def test_spread_is_an_upper_bound_however_it_is_solved(seed, kappa):
    space = random_space(seed, 2, 2, kappa=kappa)
    r = torch.rand(3, space.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    slopes = torch.cat([torch.full((k,), kind.lipschitz, dtype=torch.float64) for kind, k in space.blocks])
    exact = torch.linalg.solve(torch.eye(space.n, dtype=torch.float64) - slopes.unsqueeze(1) * space.A.abs(), r.t()).t()
    found = spread(space, r)
    assert (found >= exact * (1 - 1e-14)).all()
    assert torch.allclose(found, exact, rtol=1e-5)


# ---- equivalences


@given(seeds, sizes, sizes, layouts)
def test_permutations(seed, p, q, layout):
    space, u = layout(random_space(seed, p, q)), inputs(seed, p)
    order = torch.randperm(space.n, generator=torch.Generator().manual_seed(seed))
    other = permute(space, order)
    assert close(tight(other, u), tight(space, u))
    assert close(other.solve(u).value, space.solve(u).value[:, order], atol=1e-8)
    back = permute(other, torch.argsort(order))
    # Two products on either side, there and back.
    rounding = 8 * torch.finfo(torch.float64).eps
    for M, N in zip(back.matrices, space.matrices, strict=True):
        assert torch.allclose(M.to_dense(), N.to_dense(), rtol=rounding, atol=0)


@given(seeds, sizes, sizes, layouts)
def test_positive_scaling(seed, p, q, layout):
    space, u = layout(random_space(seed, p, q, kinds=HOMOGENEOUS)), inputs(seed, p)
    v = torch.rand(space.n, generator=torch.Generator().manual_seed(seed)) * 10 + 0.1
    other = scale_states(space, v)
    assert close(tight(other, u), tight(space, u))
    assert close(other.solve(u).value * v, space.solve(u).value, atol=1e-7)


@given(seeds, sizes, layouts, st.floats(0.5, 0.999))
def test_rescaling_a_stack_to_the_ball(seed, p, layout, kappa):
    # Cascades have ‖A‖∞ well above 1 and λ_pf below that of their parts.
    parts = [random_space(seed + i, p, p, kinds=HOMOGENEOUS, kappa=0.45) for i in range(3)]
    space, u = layout(parts[2] @ (3 * parts[1]) @ (3 * parts[0])), inputs(seed, p)
    other = rescale(space, kappa)
    assert norm_inf(other.A.to_dense()) <= kappa * (1 + 1e-14)
    assert torch.allclose(tight(other, u), tight(space, u), rtol=1e-9, atol=1e-9)


def test_rescaling_in_float32_keeps_the_promise_to_its_rounding():
    parts = [random_space(i, 3, 3, kinds=(RELU,), kappa=0.5) for i in range(3)]
    space = ((3 * parts[2]) @ (3 * parts[1]) @ (3 * parts[0])).to(torch.float32)
    other = rescale(space, 0.7)
    assert other.dtype == torch.float32
    assert norm_inf(other.A) <= 0.7 * (1 + space.n * torch.finfo(torch.float32).eps)


@given(seeds, sizes, sizes, layouts)
def test_eliminating_the_diagonal(seed, p, q, layout):
    space, u = random_space(seed, p, q, kinds=(RELU, IDENTITY), kappa=0.8), inputs(seed, p)
    g = torch.Generator().manual_seed(seed)
    diagonal = 0.9 - 6 * torch.rand(space.n, generator=g)
    # Off the diagonal the rows leave room, so that the eliminated model is a contraction.
    A = 0.5 * space.A * (1 - diagonal).unsqueeze(1)
    A = A - torch.diag(A.diagonal()) + torch.diag(diagonal)
    other = eliminate_diagonal(layout(space.replace(A=A)))
    assert torch.equal(other.A.to_dense().diagonal(), torch.zeros(space.n))
    x, y = other.solve(u).value, tight(other, u)
    # The eliminated state solves the original equation, whose plain iteration would diverge.
    original = space.replace(A=A)
    assert close(original.activation.phi(original.pre_activation(x, u)), x, atol=1e-7)
    assert close(original.read_out(x, u), y, atol=1e-7)


@given(seeds, sizes, sizes, layouts)
def test_eliminating_linear_states(seed, p, q, layout):
    space, u = layout(random_space(seed, p, q, kinds=(RELU, IDENTITY, TANH), blocks=4)), inputs(seed, p)
    other = eliminate_linear(space)
    assert all(kind is not IDENTITY for kind, _ in other.blocks)
    assert other.is_sparse == space.is_sparse
    assert close(tight(other, u), tight(space, u))


def test_a_chain_of_linear_layers_collapses_and_stays_sparse():
    layers = [StateSpace.affine(torch.diag(torch.full((50,), 2.0 + i))).to_sparse() for i in range(3)]
    linear = StateSpace.elementwise(IDENTITY, 50, layers[0].D)
    whole = linear @ layers[2] @ linear @ layers[1] @ linear @ layers[0]
    other = eliminate_linear(whole)
    assert other.n == 0
    assert other.D.values().numel() == 50
    assert torch.equal(other.D.to_dense(), torch.diag(torch.full((50,), 24.0)))


# ---- reductions


def padded(seed, p, q, kinds=(RELU, TANH, IDENTITY)):
    """A model with useless states: some that no output sees, some that no input reaches, and copies."""
    core = random_space(seed, p, q, kinds=kinds)
    n = core.n
    g = torch.Generator().manual_seed(seed + 7)
    unseen, still = 3, 2
    N = n + unseen + still
    A, B, C = (torch.zeros(shape, dtype=core.dtype) for shape in ((N, N), (N, p), (q, N)))
    b_x = torch.randn(N, generator=g, dtype=core.dtype)
    A[:n, :n], B[:n], C[:, :n], b_x[:n] = core.A, core.B, core.C, core.b_x
    A[n : n + unseen] = 0.05 * torch.randn(
        unseen, N, generator=g, dtype=core.dtype
    )  # they see everything, nobody sees them
    B[n : n + unseen] = torch.randn(unseen, p, generator=g)
    A[n + unseen :, n + unseen :] = 0.3 * torch.randn(still, still, generator=g)
    A[:n, n + unseen :] = 0.05 * torch.randn(n, still, generator=g)  # constants that feed the core
    C[:, n + unseen :] = torch.randn(q, still, generator=g)
    blocks = [*core.blocks, (RELU, unseen), (TANH, still)]
    return core, StateSpace(A, B, C, core.D, b_x, core.b_y, blocks=blocks)


@given(seeds, sizes, sizes, layouts)
def test_useless_states_go(seed, p, q, layout):
    core, space = padded(seed, p, q)
    u = inputs(seed, p)
    seen = drop_unobservable(layout(space))
    assert seen.n <= core.n + 2
    assert close(tight(seen, u), tight(space, u))
    moving = fold_constant(layout(space))
    assert moving.n <= core.n + 3
    assert close(tight(moving, u), tight(space, u))
    least = reduce(layout(space))
    assert least.n <= core.n
    assert close(tight(least, u), tight(space, u))


@given(seeds, sizes, sizes, layouts)
def test_proportional_rows_are_merged(seed, p, q, layout):
    core, u = random_space(seed, p, q, kinds=(RELU, LEAKY_RELU, TANH), blocks=2, density=1.0), inputs(seed, p)
    g = torch.Generator().manual_seed(seed)
    n = core.n
    # Each state splits into two or three; under homogeneous φ a copy may be a multiple.
    copies = torch.randint(1, 4, (n,), generator=g)
    of = torch.arange(n).repeat_interleave(copies)
    scalable = torch.cat([torch.full((size,), kind.homogeneous) for kind, size in core.blocks])[of]
    t = torch.where(scalable, 0.2 + 3 * torch.rand(len(of), generator=g, dtype=core.dtype), 1.0)
    share = torch.rand(len(of), generator=g, dtype=core.dtype)
    share = share / torch.zeros(n, dtype=core.dtype).index_add(0, of, share)[of]  # of what the copies give together
    spread_out = (share / t).unsqueeze(0)
    A = t.unsqueeze(1) * core.A[of][:, of] * spread_out
    blocks = [(kind, int(part.sum())) for (kind, _), part in zip(core.blocks, copies.split(core.sizes), strict=True)]
    space = StateSpace(
        A, t.unsqueeze(1) * core.B[of], core.C[:, of] * spread_out, core.D, t * core.b_x[of], core.b_y, blocks=blocks
    )
    merged = merge_proportional(layout(space))
    assert merged.n == n
    assert close(tight(merged, u), tight(core, u), atol=1e-9)
    assert merge_proportional(merged) is merged


def test_different_rows_and_negative_multiples_are_not_merged():
    B = torch.tensor([[1.0], [-1.0], [2.0], [2.0]])
    space = StateSpace(torch.zeros(4, 4), B, torch.ones(1, 4), blocks=[(RELU, 3), (TANH, 1)])
    assert merge_proportional(space).n == 3  # 1 and 2 under ReLU; −1, and 2 under tanh, stay
    nearly = torch.tensor([[1.0, 1.0], [2.0, 2.0 + digits(1e-12, 1e-5)]])
    assert merge_proportional(StateSpace(torch.zeros(2, 2), nearly, torch.ones(1, 2))).n == 2


def test_a_constant_loop_is_folded_to_the_last_digits():
    # x = relu(0.5 y + 1), y = relu(0.5 x + 1) → 2, 2
    A = torch.tensor([[0.0, 0.5], [0.5, 0.0]])
    space = StateSpace(A, torch.zeros(2, 1), torch.ones(1, 2), b_x=torch.ones(2))
    folded = fold_constant(space)
    assert folded.n == 0
    assert abs(folded.b_y.item() - 4.0) < 1e-13


@given(seeds, sizes, sizes, layouts, st.floats(0.01, 1.0))
def test_reduction_on_a_box_is_exact_on_the_box(seed, p, q, layout, radius):
    space = random_space(seed, p, q, kinds=(RELU, LEAKY_RELU, HARDTANH, TANH), blocks=4)
    g = torch.Generator().manual_seed(seed)
    center = torch.randn(p, generator=g, dtype=space.dtype)
    low, high = center - radius, center + radius
    reduced = reduce_on_box(layout(space), low, high)
    u = low + (high - low) * torch.rand(20, p, generator=g, dtype=space.dtype)
    u = torch.cat((u, low.unsqueeze(0), high.unsqueeze(0)))
    assert close(tight(reduced, u), tight(space, u), atol=1e-9)


@given(seeds, sizes, st.floats(0.01, 1.0), layouts)
def test_bounds_hold_on_the_box(seed, p, radius, layout):
    space = layout(random_space(seed, p, 2))
    g = torch.Generator().manual_seed(seed)
    center = torch.randn(p, generator=g, dtype=space.dtype)
    lower, upper = pre_activation_bounds(space, center - radius, center + radius)
    u = center + radius * (2 * torch.rand(50, p, generator=g, dtype=space.dtype) - 1).sign()
    z = space.pre_activation(space.solve(u).value, u)
    assert (lower <= z + 1e-9).all()
    assert (z <= upper + 1e-9).all()
    assert loop_gain(embedding(space)) == pytest.approx(loop_gain(space), rel=1e-9)


def test_bounds_are_attained_where_the_model_is_monotone():
    A = torch.tensor([[0.0, 0.5], [0.25, 0.0]])
    space = StateSpace(A, torch.ones(2, 1), torch.ones(1, 2), b_x=torch.ones(2))
    lower, upper = pre_activation_bounds(space, torch.zeros(1), torch.ones(1))
    u = torch.tensor([[0.0], [1.0]])
    z = space.pre_activation(space.solve(u).value, u)
    assert torch.allclose(torch.stack((lower, upper)), z.double(), atol=digits(1e-8, 1e-4))


def test_a_small_box_leaves_nothing_but_an_affine_map():
    space = random_space(2, 3, 2, kinds=(RELU, LEAKY_RELU))
    center = torch.randn(3, dtype=space.dtype)
    reduced = reduce_on_box(space, center - 1e-6, center + 1e-6)
    assert reduced.n == 0
    J = torch.autograd.functional.jacobian(lambda u: tight(space, u.unsqueeze(0))[0], center)
    assert torch.allclose(reduced.D, J, atol=1e-8)


def test_a_large_box_leaves_everything():
    space = random_space(2, 3, 2, kinds=(RELU,), density=1.0)
    assert reduce_on_box(space, torch.full((3,), -100.0), torch.full((3,), 100.0)).n == space.n


def test_float32_models_are_reduced_too():
    _, space = padded(3, 2, 2)
    u = inputs(3, 2).float()
    half = space.to(torch.float32)
    for other in (reduce(half), reduce_on_box(half, u.amin(0), u.amax(0)), eliminate_linear(half)):
        assert other.dtype == torch.float32
        assert torch.allclose(other(u), half(u), rtol=1e-3, atol=1e-3)


def scalar(a=0.5, kind=RELU):
    return StateSpace(torch.tensor([[a]]), torch.eye(1), torch.eye(1), blocks=kind)


LOW, HIGH = torch.zeros(1), torch.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permute(scalar() + scalar(), [0, 0]), r"a permutation of 0 … 1, got \[0, 0\]"),
        (lambda: permute(scalar(), [0, 1]), "a permutation of 0 … 0"),
        (lambda: scale_states(scalar(), torch.tensor([-1.0])), r"positive v of shape \(n=1,\), got shape \(1,\) with \[-1.0\]"),
        (lambda: scale_states(scalar(), torch.ones(2)), r"positive v of shape \(n=1,\), got shape \(2,\)"),
        (lambda: scale_states(scalar(kind=TANH), torch.tensor([2.0])), "v = 1 where φ is not positively homogeneous, got tanh"),
        (lambda: rescale(scalar(0.95), 0.9), r"λ_pf\(\|A\|\) < κ = 0.9, got λ_pf\(\|A\|\) = 0.95"),
        (lambda: rescale(scalar(0.1, TANH) @ (9 * scalar(0.1, TANH)), 0.9), "positively homogeneous, got tanh"),
        (lambda: eliminate_diagonal(scalar(1.5)), "a_ii max φ' < 1, got 1.5 at i=0"),
        (lambda: eliminate_diagonal(scalar(kind=TANH)), "no multiple of ReLU or the identity, got 1 others under tanh"),
        (lambda: eliminate_diagonal(scalar(kind=LEAKY_RELU)), "got 1 others under leaky_relu"),
        (lambda: eliminate_linear(scalar(1.0, IDENTITY)), "I − A of the linear states to be invertible"),
        (lambda: embedding(scalar(kind=SILU)), "non-decreasing φ, got silu"),
        (lambda: reduce_on_box(scalar(), LOW, torch.ones(2)), r"high of shape \(p=1,\), got \(2,\)"),
        (lambda: reduce_on_box(scalar(), HIGH, LOW), "low ≤ high, got 1 entries where it is not"),
        (lambda: reduce_on_box(scalar(-1.5, ELU) @ scalar(), LOW, HIGH), r"λ_pf\(\|A\|\) max\|φ'\| < 1, got 1.5. Errors"),
    ],
)  # fmt: skip
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_tanh_and_its_like_allow_what_needs_no_homogeneity():
    space = scalar(0.0, TANH) @ scalar(0.3, SIGMOID)
    assert eliminate_diagonal(scalar(0.0, TANH)).n == 1
    assert torch.equal(scale_states(space, torch.ones(2)).A, space.A)
    assert torch.equal(rescale(0.1 * scalar(0.3, TANH), 0.9).A, torch.tensor([[0.3]]))
