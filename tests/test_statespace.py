"""StateSpace: what it is given, how it is solved, its gradients, and the way from and to ImplicitModel."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from torch import nn

from implicitdl import (
    ArgumentError,
    Auto,
    ConvergenceError,
    ImplicitFunction,
    ImplicitFunctionTriu,
    ImplicitModel,
    Monitor,
    Picard,
    StateSpace,
    compress,
)
from implicitdl.activations import RELU, SIGMOID, TANH, Activation
from implicitdl.constraints import LowRank, RowProjection, SoftRowScaling, Unconstrained
from implicitdl.statespace import Block
from implicitdl.statespace.block_solve import components
from implicitdl.statespace.matrices import assemble, partition, sparse
from precision import digits
from spaces import KINDS, close, inputs, random_space, seeds, sizes, tight

SIZES = {"input_dim": 3, "output_dim": 2, "hidden_dim": 5}
MODELS = {
    "dense": {},
    "bias": {"bias": True},
    "no-D": {"no_D": True},
    "projection": {"constraint": RowProjection},
    "soft": {"constraint": SoftRowScaling},
    "triangular": {"f": ImplicitFunctionTriu},
    "low-rank": {"is_low_rank": True, "rank": 2},
    "tanh": {"activation": TANH, "bias": True},
}


def built(scale=20.0, **options):
    torch.manual_seed(3)
    model = ImplicitModel(**SIZES, **options)
    with torch.no_grad():
        for weight in (model.L, model.R) if model.is_low_rank else (model.A,):
            weight.mul_(scale)
    return model


def network(seed=0, widths=(3, 6, 5, 4), kinds=(TANH, RELU, SIGMOID), batch=7):
    """A feed-forward network as a StateSpace, beside the same network written out."""
    torch.manual_seed(seed)
    layers = [torch.randn(after, before) for before, after in pairwise(widths)]
    biases = [torch.randn(width) for width in widths[1:]]
    n, top = sum(widths[1:]), list(reversed(widths[1:]))
    grid = [[None] * len(top) for _ in top]
    for depth in range(1, len(layers)):
        grid[len(top) - 1 - depth][len(top) - depth] = layers[depth]
    A = assemble(grid, top, top)
    B = torch.cat((torch.zeros(n - widths[1], widths[0]), layers[0]))
    C = torch.cat((torch.eye(widths[-1]), torch.zeros(widths[-1], n - widths[-1])), 1)
    blocks = list(zip(reversed(kinds), top, strict=True))
    space = StateSpace(A, B, C, b_x=torch.cat(biases[::-1]), blocks=blocks)

    def forward(u):
        for W, b, kind in zip(layers, biases, kinds, strict=True):
            u = kind.phi(u @ W.t() + b)
        return u

    return space, forward, torch.randn(batch, widths[0])


# ---- the equation


@given(seeds, sizes, sizes)
def test_the_solution_satisfies_the_equation(seed, p, q):
    space, u = random_space(seed, p, q), inputs(seed, p)
    solution = space.solve(u)
    assert solution.converged.all()
    z = solution.value @ space.A.t() + u @ space.B.t() + space.b_x
    x = torch.cat([kind.phi(part) for (kind, _), part in zip(space.blocks, z.split(space.sizes, 1), strict=True)], 1)
    assert ((x - solution.value).norm(dim=1) <= 1.01e-10 * x.norm(dim=1)).all()
    assert close(space.pre_activation(solution.value, u), z)
    assert close(space(u), solution.value @ space.C.t() + u @ space.D.t() + space.b_y, atol=1e-9)


@given(seeds, sizes, sizes)
def test_sparse_is_dense(seed, p, q):
    space, u = random_space(seed, p, q), inputs(seed, p)
    other = space.to_sparse()
    assert other.is_sparse
    assert close(tight(other, u), tight(space, u))
    again = other.to_dense()
    assert not again.is_sparse
    assert all(torch.equal(M, N) for M, N in zip(again.matrices, space.matrices, strict=True))


@given(seeds)
def test_a_large_sparse_loop_is_iterated_sparse(seed):
    # Few enough nonzeros that the loop's own matrix stays sparse.
    space, u = random_space(seed, 2, 2, blocks=30, density=0.05), inputs(seed, 2)
    assert close(tight(space.to_sparse(), u), tight(space, u))


@given(seeds)
def test_a_sample_does_not_depend_on_its_batch(seed):
    space, u = random_space(seed, 3, 2), inputs(seed, 3)
    whole = space.solve(u)
    for i in range(len(u)):
        alone = space.solve(u[i : i + 1])
        assert torch.allclose(alone.value[0], whole.value[i], rtol=1e-12, atol=1e-14)


@pytest.mark.float64
@pytest.mark.parametrize("layout", [StateSpace.to_dense, StateSpace.to_sparse])
def test_a_network_is_one_pass_in_any_order_of_its_blocks(layout):
    space, forward, u = network()
    with Monitor() as monitor:
        solution = layout(space).solve(u)
    assert monitor.samples == 0  # nothing was iterated
    assert torch.equal(solution.steps, torch.ones(len(u), dtype=torch.int64))
    assert torch.equal(solution.residual, torch.zeros(len(u)))
    assert close(layout(space)(u), forward(u))
    # The same blocks upside down: A is block lower triangular.
    order = torch.cat(list(torch.arange(space.n).split(space.sizes))[::-1])
    turned = StateSpace(
        space.A[order][:, order], space.B[order], space.C[:, order], b_x=space.b_x[order], blocks=space.blocks[::-1]
    )
    with Monitor() as monitor:
        assert close(layout(turned)(u), forward(u))
    assert monitor.samples == 0


def test_a_network_needs_no_bound_on_its_weights_nor_on_its_slopes():
    cube = Activation("cube", lambda z: z**3, lambda z: 3 * z**2, (0.0, float("inf")))
    space, forward, u = network(kinds=(cube, RELU, TANH))
    assert close(space(u), forward(u))


def test_only_what_loops_is_iterated():
    # Layer, loop of two blocks, layer: one solve, and its steps are reported.
    space = random_space(1, 3, 2, kinds=(RELU,), density=1.0)
    layer = StateSpace.elementwise(TANH, 3, space.A)
    whole = StateSpace.elementwise(TANH, 2, space.A) @ space @ layer
    u = inputs(1, 3)
    with Monitor() as monitor:
        solution = whole.solve(u, solver=Picard())
    inner = space.solve(torch.tanh(u), solver=Picard())
    assert monitor.samples == len(u)
    # Products of other sizes round otherwise, which may move the end by a step; the condition is 1/(1 − κ) = 3.4.
    assert ((solution.steps - inner.steps).abs() <= 1).all()
    assert solution.converged.all()
    assert torch.allclose(
        solution.value[:, 2:-3], inner.value, rtol=0, atol=2 * 3.4e-10 * float(inner.value.norm(dim=1).max())
    )


def test_two_loops_report_the_worse():
    slow = StateSpace(torch.tensor([[0.95]]), torch.eye(1), torch.eye(1))
    fast = StateSpace(torch.tensor([[0.1]]), torch.eye(1), torch.eye(1))
    solution = (fast @ slow).solve(torch.rand(4, 1), solver=Picard(max_steps=40), on_failure="ignore")
    alone = slow.solve(torch.rand(4, 1), solver=Picard(max_steps=40), on_failure="ignore")
    assert not solution.converged.any()
    assert torch.equal(solution.steps, alone.steps)
    f = (fast @ slow).activation.phi((fast @ slow).pre_activation(solution.value, torch.zeros(4, 1)))
    assert f.shape == solution.value.shape


@given(seeds)
def test_the_reported_residual_bounds_that_of_the_whole_state(seed):
    space = random_space(seed, 2, 2, kappa=0.95) @ random_space(seed + 1, 2, 2, kappa=0.9)
    u = inputs(seed, 2)
    solution = space.solve(u, solver=Picard(max_steps=4), on_failure="ignore")
    x = solution.value
    fx = space.activation.phi(space.pre_activation(x, u))
    measured = (fx - x).norm(dim=1) / fx.norm(dim=1).clamp(min=1e-300)
    assert (measured <= solution.residual * (1 + 1e-9) + 1e-14).all()


@pytest.mark.float64
def test_an_overflow_in_a_network_is_reported():
    square = Activation("square", lambda z: z * z, lambda z: 2 * z, (-float("inf"), float("inf")))
    space, _, u = network(kinds=(square, square, square))
    solution = space.solve(u * 1e300)
    assert not solution.converged.any()
    assert torch.isinf(solution.residual).all()


def test_a_miss_is_as_loud_as_asked():
    space = StateSpace(torch.tensor([[2.0]]), torch.eye(1), torch.eye(1))
    with pytest.raises(ConvergenceError, match="4 of 4 samples"):
        space.solve(torch.ones(4, 1), on_failure="raise")


def test_a_start_is_taken_where_something_loops():
    space, u = random_space(5, 3, 2), inputs(5, 3)
    x = space.solve(u).value
    assert space.solve(u, x, solver=Picard(max_steps=1)).converged.all()
    assert not space.solve(u, solver=Picard(max_steps=1), on_failure="ignore").converged.any()


# ---- gradients


SMOOTH = {
    "loop": random_space(3, 2, 2, kinds=(TANH, SIGMOID), blocks=2).to(torch.float64),
    "network": network(widths=(2, 3, 2, 2), kinds=(TANH, SIGMOID, TANH))[0].to(torch.float64),
}


@pytest.mark.parametrize("layout", [StateSpace.to_dense, StateSpace.to_sparse])
@pytest.mark.parametrize("kind", SMOOTH)
def test_gradcheck_for_the_input_and_every_matrix(layout, kind):
    space = SMOOTH[kind]
    names = ("A", "B", "C", "D", "b_x", "b_y")
    given = [getattr(space, name).clone().requires_grad_() for name in names]

    masks = [(t.detach() != 0).to(t.dtype) for t in given]

    def call(u, *tensors):
        # What is zero stays out of a sparse matrix, and out of the dense one with it.
        on_the_pattern = (t * mask for t, mask in zip(tensors, masks, strict=True))
        return layout(StateSpace(*on_the_pattern, blocks=space.blocks))(u)

    u = inputs(0, space.p, batch=2).requires_grad_()
    assert torch.autograd.gradcheck(call, (u, *given), fast_mode=True)


@pytest.mark.parametrize("layout", [StateSpace.to_dense, StateSpace.to_sparse])
def test_a_second_backward_through_the_same_model(layout):
    space, _, u = network()
    free = layout(space.replace(A=space.A.clone().requires_grad_()))
    first, second = (torch.autograd.grad(free(u).sum(), free.A)[0] for _ in range(2))
    assert torch.equal(first.to_dense(), second.to_dense())


# ---- ImplicitModel


@pytest.mark.parametrize("variant", MODELS)
def test_a_model_and_its_matrices_agree(variant):
    model, u = built(**MODELS[variant]), torch.randn(6, 3)
    space = model.statespace()
    assert close(space(u), model(u), atol=digits(1e-9, 1e-4))
    assert close(space.to_sparse()(u), model(u), atol=digits(1e-9, 1e-4))
    assert isinstance(space.blocks[0], Block)


@pytest.mark.parametrize("variant", ["dense", "bias", "no-D", "tanh"])
def test_gradients_reach_the_free_parameters(variant):
    model, u = built(**MODELS[variant]), torch.randn(6, 3)
    direct = torch.autograd.grad(model(u).pow(2).sum(), list(model.parameters()))
    through = torch.autograd.grad(model.statespace()(u).pow(2).sum(), list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(direct, through, strict=True))


@pytest.mark.parametrize("variant", MODELS)
def test_round_trip_through_the_matrices(variant):
    model, u = built(**MODELS[variant]), torch.randn(6, 3)
    rank = {"constraint": LowRank(rank=2)} if variant == "low-rank" else {}
    kept = {name: value for name, value in MODELS[variant].items() if name in ("f", "constraint")}
    again = ImplicitModel.from_statespace(model.statespace(), **(kept | rank))
    assert close(again(u), model(u), atol=digits(1e-8, 1e-4))
    assert again.bias == model.bias
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_a_model_takes_over_blocks_of_several_activations_and_can_be_pickled():
    space, u = random_space(4, 3, 2, kinds=KINDS), inputs(4, 3)
    model = ImplicitModel.from_statespace(space)
    assert close(model(u), space(u), atol=1e-9)
    assert torch.equal(pickle.loads(pickle.dumps(model))(u), model(u))


def test_matrices_outside_the_constraint_are_refused():
    space = StateSpace(torch.tensor([[3.0]]), torch.eye(1), torch.eye(1))
    with pytest.raises(ArgumentError, match=r"RowScaling.*‖A‖∞ = 3"):
        ImplicitModel.from_statespace(space)
    assert ImplicitModel.from_statespace(space, constraint=Unconstrained).A.item() == 3.0
    assert ImplicitModel.from_statespace(space, ImplicitFunction).A.item() == 3.0


# ---- compress


def stack(**options):
    torch.manual_seed(5)
    sizes = [(3, 4, 5), (4, 4, 3), (4, 2, 6)]
    return nn.Sequential(*(ImplicitModel(p, q, n, bias=True, **options) for p, q, n in sizes))


@pytest.mark.parametrize(
    ("options", "constraint"),
    [({}, "RowScaling"), ({"f": ImplicitFunctionTriu}, "StrictlyUpper"), ({"activation": SIGMOID}, "RowScaling")],
)
def test_compressing_a_stack(options, constraint):
    models, u = stack(**options), torch.randn(6, 3)
    with torch.no_grad():
        for model in models:
            model.B.mul_(3)
    one = compress(models)
    assert type(one.constraint).__name__ == constraint
    assert one.hidden_dim == 14
    assert close(one(u), models(u), atol=digits(1e-8, 1e-3))


@pytest.mark.float64
def test_compressing_on_the_boundary_of_the_ball_and_without_homogeneity():
    models, u = stack(activation=TANH), torch.randn(6, 3)
    with torch.no_grad():
        for model in models:
            model.A.mul_(1e3)
            model.B.mul_(30)
    assert isinstance(compress(models).constraint, Unconstrained)
    assert close(compress(models)(u), models(u), atol=1e-7)
    relu = stack(tol=1e-13)
    with torch.no_grad():
        for model in relu:
            model.A.abs_().mul_(1e3)
    one = compress(relu, solver=Auto(rtol=1e-13))
    assert 0.99 < one.kappa < 1
    assert close(one(u), relu(u), atol=1e-8)


# ---- the object


def test_copies_devices_dtypes_and_pickles():
    space, u = random_space(2, 3, 2), inputs(2, 3)
    for other in (copy.deepcopy(space), pickle.loads(pickle.dumps(space)), space.detach(), space.to("cpu")):
        assert torch.equal(other(u), space(u))
        assert other.blocks == space.blocks
    half = space.to(torch.float32)
    assert half.dtype == torch.float32
    assert half(u.float()).dtype == torch.float32
    assert torch.allclose(half(u.float()).double(), space(u), rtol=1e-4, atol=1e-4)
    assert space.replace(b_y=space.b_y + 1)(u).sub(space(u)).sub(1).abs().max() < 1e-12


def test_csr_is_taken_and_images_are_flattened():
    space, u = random_space(2, 4, 2), inputs(2, 4)
    rows = {name: sparse(getattr(space, name)).to_sparse_csr() for name in "ABCD"}
    other = StateSpace(**rows, b_x=space.b_x, b_y=space.b_y, blocks=space.blocks)
    assert close(other(u.view(5, 1, 2, 2)), space(u), atol=1e-9)


def test_a_long_chain_of_blocks():
    # Longer than Python's recursion limit: one state a block.
    n = 1500
    A = torch.diag(torch.full((n - 1,), 0.5, dtype=torch.float64), 1)
    B, C = torch.zeros(n, 1, dtype=torch.float64), torch.zeros(1, n, dtype=torch.float64)
    B[-1], C[0, 0] = 2.0 ** (n / 2), 1.0
    space = StateSpace(A, B, C, blocks=[(RELU, 1)] * n)
    expected = 2.0 ** (n / 2 - n + 1)
    # A rounding or two for each of the n products.
    assert space(torch.ones(1, 1, dtype=torch.float64)).item() == pytest.approx(expected, rel=4e-16 * n, abs=0.0)


@given(seeds)
def test_components_against_the_closure(seed):
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 9, (), generator=g))
    arcs = torch.rand(n, n, generator=g) < 0.25
    closure = torch.linalg.matrix_power(torch.eye(n) + arcs.double(), n) > 0
    found = components([(k, m) for k, m in arcs.nonzero().tolist()], n)
    assert sorted(node for group in found for node in group) == list(range(n))
    seen = set()
    for group in found:
        for node in group:
            mutual = (closure[node] & closure[:, node]).nonzero().flatten().tolist()
            assert mutual == group
        seen |= set(group)
        assert {int(t) for node in group for t in arcs[node].nonzero()} <= seen


@given(seeds)
def test_partition_undoes_assemble(seed):
    g = torch.Generator().manual_seed(seed)
    heights, widths = ([int(k) for k in torch.randint(1, 4, (3,), generator=g)] for _ in range(2))
    M = torch.randn(sum(heights), sum(widths), generator=g) * (torch.rand(sum(heights), sum(widths), generator=g) < 0.2)
    for matrix in (M, sparse(M)):
        parts = partition(matrix, heights, widths)
        assert all(bool((part.to_dense() != 0).any()) for part in parts.values())
        grid = [[parts.get((k, m)) for m in range(3)] for k in range(3)]
        grid[0][0] = torch.zeros(heights[0], widths[0]) if grid[0][0] is None else grid[0][0]
        assert torch.equal(assemble(grid, heights, widths).to_dense(), M)


EYE = torch.eye(2, dtype=torch.float64)


@pytest.mark.float64
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StateSpace(torch.ones(2), EYE, EYE), r"A to be a floating-point matrix, got \(\(2,\), torch.float64\)"),
        (lambda: StateSpace(EYE, [[1.0]], EYE), "B to be a floating-point matrix, got list"),
        (lambda: StateSpace(EYE, EYE, EYE.int()), "C to be a floating-point matrix"),
        (lambda: StateSpace(torch.ones(2, 3), EYE, EYE), r"A of shape \(2, 2\) with n=2, p=2, q=2, got \(2, 3\)"),
        (lambda: StateSpace(EYE, torch.ones(3, 2), EYE), r"B of shape \(2, 2\).*got \(3, 2\)"),
        (lambda: StateSpace(EYE, EYE, EYE, torch.ones(1, 2)), r"D of shape \(2, 2\)"),
        (lambda: StateSpace(EYE, EYE, EYE, 0.0), "D to be a floating-point matrix, got float"),
        (lambda: StateSpace(EYE, EYE, EYE, b_x=torch.ones(3)), r"b_x of shape \(2,\)"),
        (lambda: StateSpace(EYE, EYE, EYE, b_y=[0.0, 0.0]), r"b_y of shape \(2,\) with n=2, p=2, q=2, got list"),
        (lambda: StateSpace(EYE, EYE, EYE, b_y=torch.ones(2, 1)), r"b_y of shape \(2,\)"),
        (lambda: StateSpace(EYE, EYE.float(), EYE), "B like A, torch.float64 on cpu, got torch.float32 on cpu"),
        (lambda: StateSpace(EYE, sparse(EYE), EYE), "all sparse beside dense biases, got B sparse"),
        (lambda: StateSpace(EYE, EYE, EYE, blocks=[(RELU, 1)]), r"sizes add up to n=2, got \[1\], 1 in all"),
        (lambda: StateSpace(EYE, EYE, EYE, blocks=[(RELU, 2), (RELU, 0)]), "the size of a block to be a positive"),
        (lambda: StateSpace(EYE, EYE, EYE, blocks=[(torch.relu, 2)]), r"pairs \(Activation, size\)"),
        (lambda: StateSpace(EYE / 2, EYE, EYE)(torch.ones(2, 3)), r"u of shape \(batch ≥ 1, p=2\), got \(2, 3\)"),
        (lambda: StateSpace(EYE / 2, EYE, EYE)(torch.ones(0, 2)), r"got \(0, 2\)"),
        (lambda: StateSpace(EYE / 2, EYE, EYE)([[1.0, 2.0]]), "u to be a tensor.*got list"),
        (lambda: StateSpace(EYE / 2, EYE, EYE)(torch.ones(1, 2).float()), "u of dtype torch.float64, got torch.float32"),
        (lambda: StateSpace(EYE / 2, EYE, EYE)(torch.tensor([[1.0, float("nan")]])), "finite u, got 1 NaN"),
        (lambda: StateSpace(EYE / 2, EYE, EYE).solve(EYE, torch.ones(2, 1)), r"x0 of shape \(batch=2, n=2\)"),
        (lambda: ImplicitModel.from_statespace(StateSpace.affine(EYE)), "a model with states, got n=0"),
        (lambda: compress(nn.Sequential(nn.Conv1d(1, 1, 1))), "begins with an implicit model or a Linear, got Conv1d at '0'"),
        (lambda: compress(nn.Linear(2, 2)), "a torch.nn.Sequential of implicit models, got Linear"),
        (lambda: compress(nn.Sequential()), "a torch.nn.Sequential of implicit models"),
    ],
)  # fmt: skip
def test_bad_arguments_are_worded(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
