"""SIM: an implicit model that reproduces the states of a teacher."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._internal.errors import extra, non_negative, open_unit, positive_int, wrong
from ..activations import Activation, from_function
from ..nn import ImplicitModel
from .matching import SIMReport, StateMatching, check_states, scaled_states, teacher_weights
from .path import PathPoint, by_count, by_penalty
from .score import score
from .solvers import ADMMSolver, BaseSolver
from .solvers.base_solver import Progress, SIMWarning
from .states import FLOATS, States, get_states, load_states

Bar = contextlib.AbstractContextManager[Progress | None]


class SIM:
    """State-driven implicit model: x = φ(Ax + Bu + b_x), y = Cx + Du + b_y from a teacher's states, convexly.

    With the teacher's pre-activations Z, post-activations X, inputs U and outputs Y, one column a sample,

        min ½‖Z − AX − BU‖² + λ_z(‖A‖₁ + ‖B‖₁)  subject to  ‖A‖∞ ≤ κ,      min ½‖Y − CX − DU‖² + λ_y(‖C‖₁ + ‖D‖₁),

    sums of absolute entries in the penalties; every row is a problem of its own.  The teacher's weights violate the
    constraint as a rule.  So the states are measured in units v in which they do not, the least v ≥ 1 with |A|v ≤ κv
    for the teacher's A (`rescale`).

    A teacher that is linear between its activations has such matrices.  Of another one, with a softmax at its end, a
    max-pooling or a normalisation by the sample between two activations, the part that is not linear is approximated
    by a linear map, without a warning: it shows in the objective of its rows, ½ the squared distance that remains, in
    `report`.

    Arguments:
        activation_fn: φ of the teacher: an `Activation`, a function such as ``torch.relu`` or a module such as
            ``torch.nn.ReLU()``.
        kappa: κ in (0, 1).
        skip_layers: as for `get_states`.
        device: where it is solved, and of the model.
        dtype: of the states and of the model, float32 or float64.
        layers: as for `get_states`.
        rescale: measure the states in the teacher's units.  Without it the states keep theirs, and rows that the
            constraint does not let match are as near as they can be.
        bias: have b_x and b_y, which are not penalised; None has them where the teacher has biases.
        max_memory: as for `get_states`.

    Attributes:
        model: the `ImplicitModel` that `train` found; it trains further, saves and certifies like any other.
        report: the `SIMReport` of `train`.

    Source: Tsai et al., State-driven Implicit Modeling for Sparsity and Robustness in Neural Networks,
        arXiv:2209.09389.

    Example:
        >>> import torch
        >>> from implicitdl.sim import SIM
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> u = torch.randn(64, 4)
        >>> sim = SIM(activation_fn=torch.relu)
        >>> report = sim.train(model=teacher, dataloader=[u])
        >>> bool(report.hidden.converged.all()), bool((sim(u) - teacher(u)).abs().max() < 1e-2)
        (True, True)
    """

    def __init__(
        self,
        activation_fn: Activation | Callable[[Tensor], Tensor] = torch.relu,
        kappa: float = 0.99,
        skip_layers: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        layers: Sequence[str | int] | None = None,
        rescale: bool = True,
        bias: bool | None = None,
        max_memory: int = 1 << 32,
    ) -> None:
        who = "SIM"
        if isinstance(activation_fn, type) or not (isinstance(activation_fn, Activation) or callable(activation_fn)):
            raise wrong(who, "activation_fn to be an Activation or a function", activation_fn, "Pass torch.relu.")
        if dtype not in FLOATS:
            raise wrong(who, "dtype float32 or float64", dtype)
        self.kappa = open_unit(who, "kappa", kappa)
        self.skip_layers = None if skip_layers is None else positive_int(who, "skip_layers", skip_layers)
        self.max_memory = positive_int(who, "max_memory", max_memory)
        self.activation = activation_fn if isinstance(activation_fn, Activation) else from_function(activation_fn)
        self._radius = self.kappa / max(1.0, self.activation.lipschitz)
        self.layers, self.rescale, self.bias = layers, rescale, bias
        self.device, self.dtype = torch.device(device), dtype
        self._model: ImplicitModel | None = None
        self.report: SIMReport | None = None

    @property
    def model(self) -> ImplicitModel:
        if self._model is None:
            raise wrong("SIM", "a trained SIM", "one without a model", "Call train first.")
        return self._model

    def get_states(self, model: nn.Module, dataloader: Iterable[Any], path: str | Path | None = None) -> States:
        """The teacher's states in this SIM's dtype, with its layers: see `get_states`."""
        return get_states(
            model, dataloader, layers=self.layers, skip_layers=self.skip_layers, dtype=self.dtype, path=path,
            max_memory=self.max_memory,
        )  # fmt: skip

    def train(
        self,
        solver: BaseSolver | None = None,
        model: nn.Module | None = None,
        dataloader: Iterable[Any] | None = None,
        states_data_path: str | Path | None = None,
        save_states_path: str | Path | None = None,
        *,
        progress: bool = False,
    ) -> SIMReport:
        """Find A, B, C, D and the biases.

        Arguments:
            solver: how; `ADMMSolver()`.
            model: the teacher.
            dataloader: batches of its inputs, or (inputs, ...).
            states_data_path: a folder with its states, instead of the data.  With `model` beside it they are
                rescaled; alone they do not tell the teacher's weights, and keep their units.
            save_states_path: a new folder for the states.
            progress: show a bar over the rows on the terminal.

        Returns:
            The `SIMReport`, also at ``report``; the model is at ``model``.

        Raises:
            ArgumentError: no solver; neither a teacher with data nor states; states that φ did not make; whatever
                `get_states` and the solver refuse.
        """
        chosen = _solver("SIM.train", solver)
        states = self._states(model, dataloader, states_data_path, save_states_path)
        matching = self.matching(states, model)
        bar: Bar = progress_bar("rows") if progress else contextlib.nullcontext()
        with bar as on_progress:
            found = matching.fit(chosen, progress=on_progress)
        self._model, self.report = matching.model(found)
        return self.report

    def path(
        self,
        solver: BaseSolver | None = None,
        model: nn.Module | None = None,
        dataloader: Iterable[Any] | None = None,
        states_data_path: str | Path | None = None,
        *,
        lambdas: Sequence[float] | None = None,
        nonzeros: Sequence[int] | None = None,
        refit: bool = False,
        progress: bool = False,
    ) -> list[PathPoint]:
        """Models from sparse to dense, each solve started from the one before; ``model`` and ``report`` stay.

        Arguments:
            solver: as for `train`; its λ_y/λ_z is kept along the path.
            model, dataloader, states_data_path: as for `train`.
            lambdas: λ_z of each model; or
            nonzeros: how many nonzeros of A, B, C and D each may have.  λ is found by bisection, to within 2 % below
                the count.
            refit: fit the weights that are left once more by least squares, inside the ball, and C and D to the
                states of the model: the penalty has chosen which, and has made all of them smaller.
            progress: show a bar over the models on the terminal.

        Returns:
            A `PathPoint` for each, in the order asked for.

        Raises:
            ArgumentError: neither or both of lambdas and nonzeros, or an empty one; a solver without penalties; and as
                `train`.

        Example:
            >>> import torch
            >>> from implicitdl.sim import SIM
            >>> teacher = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> points = SIM().path(model=teacher, dataloader=[torch.randn(64, 4)], lambdas=[10.0, 1.0, 0.1])
            >>> counts = [point.report.nonzeros for point in points]
            >>> counts == sorted(counts)
            True
        """
        if (lambdas is None) == (nonzeros is None):
            got = "neither" if lambdas is None else "both"
            raise wrong("SIM.path", "lambdas or nonzeros", got, "Say what the models should be chosen by.")
        name, values = ("nonzeros", nonzeros) if lambdas is None else ("lambdas", lambdas)
        if len(values or ()) == 0:
            raise wrong("SIM.path", f"{name} with at least one value", values, "Name the models to find.")
        if lambdas is None:
            nonzeros = [positive_int("SIM.path", "nonzeros", count) for count in nonzeros or ()]
        else:
            lambdas = [non_negative("SIM.path", "lambdas", value) for value in lambdas]
        chosen = _solver("SIM.path", solver)
        states = self._states(model, dataloader, states_data_path, None)
        matching = self.matching(states, model)
        bar: Bar = progress_bar("models") if progress else contextlib.nullcontext()
        with bar as on_progress:
            if lambdas is not None:
                return by_penalty(matching, chosen, lambdas, refit, on_progress)
            assert nonzeros is not None
            return by_count(matching, chosen, nonzeros, refit, on_progress)

    def matching(self, states: States, model: nn.Module | None) -> StateMatching:
        """The problem that `train` solves, for states that are there."""
        check_states(states, self.activation)
        v = None
        if self.rescale and model is not None:
            v = teacher_weights(
                model, states.batch_shape, self._radius, layers=self.layers, skip_layers=self.skip_layers
            )
        if self.rescale and v is None:
            warnings.warn(
                "SIM.train: the teacher's weights are not known, so the states keep their units, and rows whose "
                "‖a‖₁ would exceed κ do not match. Pass model= beside states_data_path, or rescale=False.",
                SIMWarning, stacklevel=3,
            )  # fmt: skip
        return StateMatching(
            scaled_states(states, v, self.max_memory), self.activation, self.kappa, self._radius, v,
            states.affine if self.bias is None else self.bias, self.dtype, self.device, states.layers,
        )  # fmt: skip

    def __call__(self, U: Tensor) -> Tensor:
        """The prediction y (batch, q) for an input (batch, \\*any) that flattens to (batch, p), in any dtype."""
        return self.model(U.to(self.device, self.dtype))

    def evaluate(self, dataloader: Iterable[Any]) -> float:
        """The accuracy in [0, 1] where targets are classes, else the mean squared error: see `score`.

        Arguments:
            dataloader: batches (inputs, targets), as they come out of the loader.
        """
        return score(self.model, dataloader)

    def to(self, *where: Any, **how: Any) -> SIM:
        """The SIM itself, moved to a device, a dtype or both, with the arguments of `torch.Tensor.to`."""
        like = torch.empty(0, device=self.device, dtype=self.dtype).to(*where, **how)
        if like.dtype not in FLOATS:
            raise wrong("SIM", "dtype float32 or float64", like.dtype)
        self.device, self.dtype = like.device, like.dtype
        if self._model is not None:
            self._model.to(self.device, self.dtype)
        return self

    def _states(self, model: Any, dataloader: Any, stored: Any, save: Any) -> States:
        who = "SIM.train"
        if stored is not None:
            if dataloader is not None or save is not None:
                other = "dataloader" if dataloader is not None else "save_states_path"
                raise wrong(who, "states from one place", f"states_data_path and {other}", f"Leave out {other}.")
            return load_states(stored)
        if model is None or dataloader is None:
            got = "model alone" if model is not None else "no model"
            raise wrong(who, "model and dataloader, or states_data_path", got, "Pass what the states come from.")
        return self.get_states(model, dataloader, save)


def _solver(who: str, given: Any) -> BaseSolver:
    if given is None:
        return ADMMSolver()
    if not isinstance(given, BaseSolver):
        do = "Pass an object of one of implicitdl.sim.solvers, such as ADMMSolver()."
        raise wrong(who, "solver to be a BaseSolver", repr(given), do)
    return given


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A function of (done, all of them) that moves a bar on the terminal."""
    rich = extra("rich.progress", "train")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=20),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
    )
    # No thread of its own: it would run beside the solver's.
    with rich.Progress(*columns, auto_refresh=False, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total, refresh=True)
