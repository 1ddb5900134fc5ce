"""Pictures show the model's own numbers, and never touch a program's plots."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread

from implicitdl import ArgumentError, ImplicitFunctionTriu, ImplicitModel, PhantomGradient, fixed_point, viz
from implicitdl._internal.errors import MissingExtraError
from implicitdl._internal.store import CheckpointError
from implicitdl.activations import SILU
from implicitdl.constraints import RowProjection, Unconstrained
from implicitdl.statespace import StateSpace, from_module
from implicitdl.viz.canvas import BLUE

SIZES = {"input_dim": 5, "output_dim": 2, "hidden_dim": 7}


def scaled(model: ImplicitModel, factor: float) -> ImplicitModel:
    """With weights large enough that the constraint has something to do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


MODELS = {
    "dense": lambda: scaled(ImplicitModel(**SIZES, bias=True), 20),
    "projected": lambda: scaled(ImplicitModel(**SIZES, constraint=RowProjection), 20),
    "triangular": lambda: ImplicitModel(**SIZES, f=ImplicitFunctionTriu),
    "low rank": lambda: scaled(ImplicitModel(**SIZES, is_low_rank=True, rank=2), 20),
    "no D": lambda: ImplicitModel(**SIZES, no_D=True),
}


def system_matrix(model: ImplicitModel) -> np.ndarray:
    weights = model.weights()
    A = weights[0] if len(weights) == 1 else weights[0] @ weights[1].T
    D = torch.zeros(model.output_dim, model.input_dim) if model.D is None else model.D
    return torch.cat([torch.cat([model.C, D], 1), torch.cat([A, model.B], 1)]).detach().numpy()


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


class TestSpy:
    def test_shows_the_nonzero_pattern_of_the_constrained_system(self, model):
        (image,) = viz.spy(model).axes[0].images
        np.testing.assert_array_equal(image.get_array(), system_matrix(model) != 0)

    def test_threshold_leaves_small_entries_white(self, model):
        M = np.abs(system_matrix(model))
        (image,) = viz.spy(model, threshold=float(np.median(M))).axes[0].images
        np.testing.assert_array_equal(image.get_array(), np.median(M) < M)

    def test_magnitudes_are_those_of_the_entries_and_zeros_are_masked(self, model):
        M = np.abs(system_matrix(model))
        (image,) = viz.spy(model, magnitude=True).axes[0].images
        np.testing.assert_allclose(image.get_array().filled(0.0), M)
        np.testing.assert_array_equal(np.ma.getmaskarray(image.get_array()), M == 0)

    def test_lines_and_labels_are_at_the_blocks(self):
        ax = viz.spy(MODELS["no D"]()).axes[0]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["state x\nn = 7", "input u\np = 5"]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["y\nq = 2", "x\nn = 7"]
        across, down = ax.lines
        assert list(across.get_ydata()) == [2, 2]
        assert list(down.get_xdata()) == [7, 7]
        assert [text.get_text().split("  ") for text in ax.texts] == [
            ["C", "100% nonzero"], ["D", "none"], ["A", "100% nonzero"], ["B", "100% nonzero"],
        ]  # fmt: skip

    def test_a_model_of_zeros_is_white(self):
        for magnitude in (False, True):
            (image,) = viz.spy(scaled(MODELS["dense"](), 0.0), magnitude=magnitude).axes[0].images
            assert not np.ma.filled(image.get_array(), 0).any()

    @pytest.mark.parametrize("sparse", [False, True])
    def test_a_converted_network_shows_its_blocks(self, sparse):
        network = torch.nn.Sequential(
            torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(18, 6), torch.nn.Tanh(),
            torch.nn.Linear(6, 4),
        )  # fmt: skip
        space = from_module(network.eval(), torch.rand(1, 1, 5, 5))
        space = space.to_sparse() if sparse else space.to_dense()
        ax = viz.spy(space).axes[0]
        M = torch.cat([torch.cat(row, 1) for row in ((space.C, space.D), (space.A, space.B))]).to_dense()
        np.testing.assert_array_equal(ax.images[0].get_array(), (M != 0).numpy())
        across, down = ([tuple(map(tuple, line)) for line in lines.get_segments()] for lines in ax.collections)
        assert across == [((0, 10), (49, 10))]
        assert down == [((6, 0), (6, 28))]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["y  4", "tanh  6", "relu  18"]

    def test_a_matrix_finer_than_the_picture_loses_no_entry(self):
        weights = torch.zeros(3, 4000)
        weights[[0, 1, 2], [0, 1777, 3999]] = torch.tensor([1.0, -2.0, 3.0])
        (image,) = viz.spy(StateSpace.affine(weights.to_sparse()), magnitude=True).axes[0].images
        cells = image.get_array().filled(0.0)
        assert cells.shape == (3, 1000)
        np.testing.assert_array_equal(cells[cells > 0], [1, 2, 3])

    @pytest.mark.parametrize("sizes", [(40, 3, 30), (5, 2, 30), (300, 2, 10)])
    def test_the_bar_is_as_high_as_the_matrix_and_the_sheet_is_filled(self, sizes):
        p, q, n = sizes
        figure = viz.spy(ImplicitModel(p, q, n), magnitude=True)
        figure.draw_without_rendering()
        (ax,) = figure.axes
        (bar,) = ax.child_axes
        # The tip that stands for what is smaller takes 5 % of the bar.
        assert bar.get_position().height == pytest.approx(ax.get_position().height, rel=0.06)
        height = figure.get_figheight()
        assert ax.get_position().height * height > height - 2

    def test_refuses_what_is_no_model(self):
        with pytest.raises(ArgumentError, match=r"spy: expected an ImplicitModel, a StateSpace.*got Linear\. Convert"):
            viz.spy(torch.nn.Linear(2, 2))

    def test_refuses_a_negative_threshold(self):
        with pytest.raises(ArgumentError, match="spy: expected threshold ≥ 0, got -1"):
            viz.spy(MODELS["dense"](), threshold=-1)


class TestSpectrum:
    def test_points_are_the_eigenvalues_of_the_constrained_A(self, model):
        (points,) = viz.spectrum(model).axes[0].collections
        expected = np.linalg.eigvals(system_matrix(model)[2:, :7])
        found = points.get_offsets() @ [1, 1j]
        np.testing.assert_allclose(np.sort_complex(found), np.sort_complex(expected), atol=1e-12)

    def test_circles_are_the_unit_circle_and_the_bound(self):
        ax = viz.spectrum(ImplicitModel(**SIZES, activation=SILU, kappa=0.9)).axes[0]
        circles = {line.get_label(): line.get_xydata() for line in ax.lines if len(line.get_xdata()) > 2}
        radii = {name: np.linalg.norm(points, axis=1) for name, points in circles.items()}
        np.testing.assert_allclose(radii["unit circle"], 1)
        np.testing.assert_allclose(radii["κ / max|φ'| = 0.8183"], 0.9 / SILU.lipschitz)

    @pytest.mark.parametrize("options", [{"f": ImplicitFunctionTriu}, {"constraint": Unconstrained}])
    def test_where_nothing_is_bounded_no_bound_is_drawn(self, options):
        ax = viz.spectrum(ImplicitModel(**SIZES, **options)).axes[0]
        assert not [line for line in ax.lines if "κ" in line.get_label()]

    def test_the_legend_has_the_three_figures(self, model):
        found = viz.spectral_figures(viz.constrained(model))
        legend = " ".join(text.get_text() for text in viz.spectrum(model).axes[0].get_legend().get_texts())
        for words in (f"ρ(A) = {found.radius:.4f}", f"(|A|)$ = {found.perron:.4f}", f"infty$ = {found.norm:.4f}"):
            assert words in legend


class TestSpectralFigures:
    def test_they_are_in_order_and_the_bounds_hold(self, model):
        found = viz.spectral_figures(viz.constrained(model))
        perron = np.abs(np.linalg.eigvals(np.abs(viz.constrained(model)))).max()
        assert found.perron_low - 1e-9 <= perron <= found.perron_high + 1e-9
        assert found.radius <= found.perron_high + 1e-9
        assert found.perron_low <= found.norm + 1e-12

    @pytest.mark.parametrize(
        ("A", "perron"),
        [
            ([[0.0, 1.0], [1.0, 0.0]], 1.0),  # periodic: plain power iteration cycles
            ([[0.0, 0.0], [0.0, 0.0]], 0.0),
            ([[0.0, 5.0], [0.0, 0.0]], 0.0),  # nilpotent
            ([[0.3, -0.4], [0.2, 0.1]], 0.5),
        ],
    )
    def test_perron_of_known_matrices(self, A, perron):
        found = viz.spectral_figures(np.array(A))
        np.testing.assert_allclose([found.perron_low, found.perron_high], perron, atol=1e-5)

    def test_a_reducible_matrix_is_bounded_from_above(self):
        found = viz.spectral_figures(np.diag([0.9, 0.5, 0.1]) + np.diag([0.1, 0.1], 1))
        assert found.perron_low <= 0.9 <= found.perron_high <= 0.9 + 1e-3


class TestSparsity:
    @pytest.mark.parametrize("share", [0.13, 0.33, 0.5])
    def test_one_point_has_a_tick(self, share):
        ax = viz.sparsity({"SIM": [(share, 0.8)]}, of="held-out").axes[0]
        assert [label.get_text() for label in ax.get_xticklabels()] == [f"{100 * share:g}"]
        assert ax.get_ylabel() == "held-out accuracy (%)"

    def test_many_points_have_round_ticks(self):
        ax = viz.sparsity({"SIM": [(0.013, 0.7), (0.3, 0.8)], "pruned": [(0.02, 0.6)]}).axes[0]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "5", "10", "20"]
        assert ax.get_ylabel() == "accuracy (%)"


class TestResiduals:
    def test_lines_are_the_medians_and_ended_samples_keep_their_last_residual(self):
        nan = float("nan")
        trace = torch.tensor([[1.0, 0.5, 0.8], [0.1, nan, 0.3], [0.01, nan, nan]])
        figure = viz.residuals((trace, None), rtol=0.05)
        forward, backward = figure.axes
        median, tolerance = forward.lines
        np.testing.assert_allclose(median.get_xydata(), [[1, 0.8], [2, 0.3], [3, 0.3]])
        assert list(tolerance.get_ydata()) == [0.05, 0.05]
        (band,) = forward.collections
        assert band.get_datalim(forward.transData).y1 == pytest.approx(
            0.96
        )  # 90 % of 0.5, 0.8, 1.0, between neighbours
        assert [text.get_text() for text in backward.texts] == ["no trace of this solve"]
        assert not backward.lines

    def test_steps_without_a_look_and_infinite_residuals_do_not_show(self):
        nan, inf = float("nan"), float("inf")
        steps, low, median, high = viz.quantiles(torch.tensor([[nan, nan], [0.5, 0.5], [inf, 0.0]]))
        assert list(steps) == [2, 3]
        assert np.isfinite([low, median, high]).all()
        assert median[1] == pytest.approx(0.25)

    @pytest.mark.float64
    def test_histories_of_a_real_solve_end_below_the_tolerance(self, model):
        u, y = torch.randn(20, 5), torch.randint(2, (20,))
        solution = model.solve(u, trace=True)
        F.cross_entropy(model.read_out(solution.value, u), y).backward()
        for ax, name in zip(viz.residuals(solution, rtol=1e-10).axes, ("forward", "backward"), strict=True):
            assert name in ax.get_title()
            assert ax.get_yscale() == "log"
            assert ax.get_xlabel() == "step"
            assert ax.lines[0].get_ydata()[-1] <= 1e-10

    def test_an_adjoint_without_a_solve_has_no_history(self):
        model = ImplicitModel(**SIZES, adjoint=PhantomGradient())
        solution = model.solve(torch.randn(3, 5), trace=True)
        solution.value.sum().backward()
        assert not viz.residuals(solution).axes[1].lines

    def test_refuses_a_solve_without_a_trace(self):
        with pytest.raises(ArgumentError, match=r"residuals: expected a trace, got none\. Solve with trace=True"):
            viz.residuals(fixed_point(torch.cos, torch.zeros(1, 1)))


ROWS = [
    {
        "epoch": epoch, "loss": 1 / epoch, "valid_loss": 1.5 / epoch, "acc": 0.5 + 0.1 * epoch, "valid_acc": accuracy,
        "forward_steps": 10.0 + epoch, "backward_steps": None, "valid_steps": 12.0, "missed": 0.01 * epoch,
        "valid_missed": 0.0, "lr": 0.1,
    }
    for epoch, accuracy in enumerate([0.4, 0.7, 0.7], start=1)
]  # fmt: skip


class TestTrainingCurves:
    def test_lines_are_the_rows(self):
        loss, accuracy, steps, missed = viz.training_curves(ROWS).axes
        expected = {
            loss: {"training": "loss", "validation": "valid_loss"},
            accuracy: {"training": "acc", "validation": "valid_acc"},
            steps: {"forward": "forward_steps", "backward": "backward_steps", "forward, validation": "valid_steps"},
            missed: {"training, both solves": "missed", "validation": "valid_missed"},
        }
        for ax, names in expected.items():
            unit = 100 if "%" in ax.get_ylabel() else 1
            lines = {line.get_label(): line for line in ax.lines if line.get_label() in names}
            assert lines.keys() == names.keys()
            for label, name in names.items():
                values = [np.nan if row[name] is None else unit * row[name] for row in ROWS]
                np.testing.assert_allclose(lines[label].get_ydata(), values)
                np.testing.assert_array_equal(lines[label].get_xdata(), [1, 2, 3])

    def test_the_first_of_the_best_epochs_is_marked(self):
        accuracy = viz.training_curves(ROWS).axes[1]
        assert [text.get_text() for text in accuracy.texts] == ["best epoch 2"]
        assert list(accuracy.lines[-1].get_xdata()) == [2, 2]

    def test_or_the_one_that_was_chosen(self):
        accuracy = viz.training_curves(ROWS, chosen=3).axes[1]
        assert [text.get_text() for text in accuracy.texts] == ["epoch 3"]
        assert list(accuracy.lines[-1].get_xdata()) == [3, 3]

    def test_without_classes_the_smallest_loss_decides(self):
        rows = [{**row, "acc": None, "valid_acc": None} for row in ROWS]
        assert list(viz.training_curves(rows).axes[1].lines[-1].get_xdata()) == [3, 3]

    def test_no_misses_are_said_in_words(self):
        missed = viz.training_curves([{**row, "missed": 0.0} for row in ROWS]).axes[3]
        assert [text.get_text() for text in missed.texts] == ["none in any epoch"]

    def test_refuses_no_rows(self):
        with pytest.raises(ArgumentError, match="training_curves: expected a row per epoch, got none"):
            viz.training_curves([])


DRAW = {
    "spy": lambda path: viz.spy(MODELS["dense"](), path=path),
    "magnitude": lambda path: viz.spy(MODELS["no D"](), magnitude=True, path=path),
    "spectrum": lambda path: viz.spectrum(MODELS["dense"](), path=path),
    "residuals": lambda path: viz.residuals((torch.rand(5, 4), torch.rand(3, 4)), path=path),
    "training": lambda path: viz.training_curves(ROWS, path=path),
}


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
class TestFiles:
    def test_a_picture_is_written_and_not_blank(self, draw, tmp_path):
        path = tmp_path / "made" / "picture.png"
        assert isinstance(draw(path), Figure)
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 500
        assert pixels[..., :3].std() > 0.05
        assert [file.name for file in path.parent.iterdir()] == ["picture.png"]

    def test_a_suffix_that_is_no_format_writes_nothing(self, draw, tmp_path):
        with pytest.raises(ArgumentError, match=r"a path that ends in one of .*png.*, got '.*picture\.doc'"):
            draw(tmp_path / "picture.doc")
        assert not list(tmp_path.iterdir())

    def test_a_file_in_the_way_is_worded(self, draw, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="A file is in the way"):
            draw(tmp_path / "file" / "picture.png")


@pytest.mark.parametrize("draw", [viz.spy, viz.spectrum])
def test_draws_into_axes_of_the_caller(draw):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert draw(MODELS["dense"](), ax=right) is figure
    assert right.get_title()
    assert not left.get_title()


def test_the_same_colours_everywhere():
    forward = viz.residuals((torch.rand(5, 4), torch.rand(5, 4))).axes[0].lines[0]
    training = viz.training_curves(ROWS).axes[0].lines[0]
    assert to_rgba(forward.get_color()) == to_rgba(training.get_color()) == to_rgba(BLUE)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'implicitdl\[plots\]'"):
        viz.spectrum(MODELS["dense"]())
