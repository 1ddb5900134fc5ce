"""Every option of `train`, with its default; what a run's folder remembers of how it was made."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from typer import Option

from .._internal.errors import (
    choice,
    fraction,
    non_negative,
    non_negative_int,
    open_unit,
    positive,
    positive_int,
    wrong,
)
from ..activations import BUILTIN
from ..data import NAMES
from ..solvers.base import damping

WHO = "train"

# The models, and which options are theirs.  Another one's would have no effect.
MODELS = {
    "implicit": ("structure", "rank", "hidden_dim", "no_D", "bias", "kappa", "activation", "constraint"),
    "deq-dense": ("hidden_dim", "jac_reg", "start"),
    "deq-conv": ("channels", "inner_channels", "halvings", "cells", "jac_reg", "start"),
    "monotone-conv": ("channels", "halvings", "cells", "kappa"),
}
STRUCTURES = ("dense", "triangular", "low-rank")
CONSTRAINTS = ("row-scaling", "row-projection", "soft-row-scaling", "monotone")
SOLVERS = (
    "auto", "picard", "aitken", "anderson", "broyden", "newton", "peaceman-rachford", "forward-backward",
)  # fmt: skip
# Newton's step on the adjoint, which is linear, would be its solution: GMRES is the way without a matrix.
GRAD_SOLVERS = (*(name for name in SOLVERS if name != "newton"), "gmres")
ADJOINTS = ("exact", "phantom", "shine", "unrolled")
STARTS = ("zero", "random")
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cosine", "step", "constant")
PRECISIONS = ("no", "bf16", "fp16")
FAILURES = ("warn", "raise", "ignore")
_data, _model, _solving, _training = (
    functools.partial(Option, rich_help_panel=panel) for panel in ("Data", "Model", "Solving", "Training")
)


# What each number has to be; None is nothing to check where it is the default.
_NUMBERS: dict[Callable[[str, str, Any], float], tuple[str, ...]] = {
    positive_int: (
        "rank", "hidden_dim", "channels", "inner_channels", "cells", "memory", "period", "max_steps", "phantom_steps",
        "grad_max_steps", "epochs", "batch_size",
    ),
    non_negative_int: ("split_seed", "halvings", "seed"),
    open_unit: ("holdout", "kappa", "tol", "grad_tol"),
    fraction: ("momentum", "warmup", "label_smoothing"),
    damping: ("damping",),
    positive: ("lr", "clip", "jac_reg"),
    non_negative: ("weight_decay",),
}  # fmt: skip


def _one_of(names: Any) -> str:
    return " | ".join(names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the outcome of a run.  The defaults of training are those that did best on Fashion-MNIST."""

    data: Annotated[str, _data(help=_one_of(NAMES))] = "digits"
    root: Annotated[str | None, _data(help="Folder of the datasets; else IMPLICITDL_DATA, else 'data'.")] = None
    holdout: Annotated[float, _data(help="Share of the training data that chooses the epoch, in (0, 1).")] = 0.1
    split_seed: Annotated[int, _data(help="Seed of the split of digits and of the held-out part.")] = 0

    model: Annotated[str, _model(help=f"implicit is x = φ(Ax + Bu), y = Cx + Du: {_one_of(MODELS)}")] = "implicit"
    structure: Annotated[str, _model(help=f"of A: {_one_of(STRUCTURES)}")] = "dense"
    rank: Annotated[int | None, _model(help="r of a low-rank A = LRᵀ.")] = None
    hidden_dim: Annotated[int, _model(help="n, the size of the state.")] = 100
    no_D: Annotated[bool, _model("--no-D", help="Leave out Du.")] = False
    bias: Annotated[bool, _model("--bias/--no-bias", help="b_x and b_y.")] = True
    kappa: Annotated[
        float | None, _model(help="κ in (0, 1): ‖A‖∞ ≤ κ / max|φ'|; of a monotone A, I − A ⪰ (1 − κ)I.")
    ] = None
    activation: Annotated[str, _model(help=f"φ: {_one_of(BUILTIN)}")] = "relu"
    constraint: Annotated[str | None, _model(help=f"of a dense A: {_one_of(CONSTRAINTS)}")] = None
    channels: Annotated[int | None, _model(help="of a convolutional equilibrium.")] = None
    inner_channels: Annotated[int | None, _model(help="between the convolutions of deq-conv.")] = None
    halvings: Annotated[int | None, _model(help="of height and width, before the equilibrium.")] = None
    cells: Annotated[int | None, _model(help="a side, that the image is averaged to before the linear layer.")] = None

    solver: Annotated[str, _solving(help=f"auto splits where A is monotone: {_one_of(SOLVERS)}")] = "auto"
    start: Annotated[str, _solving(help=f"of a deq model, random in training only: {_one_of(STARTS)}")] = "zero"
    damping: Annotated[float | None, _solving(help="of picard and anderson, in (0, 2].")] = None
    memory: Annotated[int | None, _solving(help="of anderson and broyden.")] = None
    period: Annotated[int | None, _solving(help="of aitken.")] = None
    tol: Annotated[float | None, _solving(help="Relative tolerance; the precision's default.")] = None
    max_steps: Annotated[int, _solving(help="of the forward solve, per sample.")] = 300
    adjoint: Annotated[str, _solving(help=f"shine with --solver broyden: {_one_of(ADJOINTS)}")] = "exact"
    phantom_steps: Annotated[int | None, _solving(help="of the phantom gradient.")] = None
    grad_solver: Annotated[str, _solving(help=f"of the exact adjoint: {_one_of(GRAD_SOLVERS)}")] = "auto"
    grad_tol: Annotated[float | None, _solving(help="of the exact adjoint.")] = None
    grad_max_steps: Annotated[int | None, _solving(help="of the exact adjoint.")] = None
    on_failure: Annotated[str, _solving(help=f"What a missed tolerance causes: {_one_of(FAILURES)}")] = "warn"

    epochs: Annotated[int, _training(help="How many in all.")] = 10
    batch_size: Annotated[int, _training(help="Samples per step.")] = 64
    lr: Annotated[float, _training(help="The largest learning rate.")] = 3e-3
    optimizer: Annotated[str, _training(help=_one_of(OPTIMIZERS))] = "adam"
    weight_decay: Annotated[float, _training(help="≥ 0.")] = 0.0
    momentum: Annotated[float | None, _training(help="of sgd; 0.9.")] = None
    schedule: Annotated[str, _training(help=f"{_one_of(SCHEDULES)}; step divides by 10 at 1/2 and 3/4.")] = "cosine"
    warmup: Annotated[float, _training(help="Share of all steps over which the rate rises.")] = 0.05
    label_smoothing: Annotated[float, _training(help="In [0, 1).")] = 0.1
    jac_reg: Annotated[float | None, _training(help="Weight of a deq model's ‖∂f/∂x‖²_F / d in the loss.")] = None
    clip: Annotated[float | None, _training(help="Largest norm of the gradient.")] = None
    precision: Annotated[str | None, _training(help=f"{_one_of(PRECISIONS)}; else what launched it says.")] = None
    seed: Annotated[int, _training(help="of the weights and the batches.")] = 0

    def check(self) -> Options:
        """Itself, or an `ArgumentError` about what the library would not word in terms of options."""
        for name, known in (
            ("data", NAMES), ("model", tuple(MODELS)), ("structure", STRUCTURES), ("activation", tuple(BUILTIN)),
            ("constraint", CONSTRAINTS), ("solver", SOLVERS), ("grad_solver", GRAD_SOLVERS),
            ("adjoint", ADJOINTS), ("start", STARTS), ("on_failure", FAILURES), ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES), ("precision", PRECISIONS),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                choice(WHO, flag(name), getattr(self, name), known)
        for check, names in _NUMBERS.items():
            for name in names:
                if getattr(self, name) is not None or _DEFAULTS[name] is not None:
                    check(WHO, flag(name), getattr(self, name))
        if self.period == 1:
            raise wrong(WHO, "--period of at least 2", 1)
        self._check_together()
        return self

    def _check_together(self) -> None:
        """An option that would have no effect is a mistake."""
        for model, names in MODELS.items():
            for name in names:
                if name not in MODELS[self.model] and getattr(self, name) != _DEFAULTS[name]:
                    raise wrong(
                        WHO, f"{flag(name)} together with --model {model}", f"--model {self.model}",
                        f"Leave out {flag(name)}.",
                    )  # fmt: skip
        low_rank = self.structure == "low-rank"
        if low_rank and self.rank is None:
            raise wrong(WHO, "--rank with --structure low-rank", "none", "Pass --rank well below --hidden-dim.")
        for name, goes, partner in (
            ("rank", low_rank, "--structure low-rank"),
            ("constraint", self.structure == "dense", "--structure dense"),
            ("damping", self.solver in ("picard", "anderson"), "--solver picard or anderson"),
            ("memory", self.solver in ("anderson", "broyden"), "--solver anderson or broyden"),
            ("period", self.solver == "aitken", "--solver aitken"),
            ("phantom_steps", self.adjoint == "phantom", "--adjoint phantom"),
            ("momentum", self.optimizer == "sgd", "--optimizer sgd"),
            ("grad_solver", self.adjoint == "exact", "--adjoint exact"),
            ("grad_tol", self.adjoint == "exact", "--adjoint exact"),
            ("grad_max_steps", self.adjoint == "exact", "--adjoint exact"),
        ):
            if getattr(self, name) != _DEFAULTS[name] and not goes:
                raise wrong(WHO, f"{flag(name)} together with {partner}", "it alone", f"Leave out {flag(name)}.")
        if self.structure == "triangular" and self.adjoint in ("shine", "unrolled"):
            raise wrong(
                WHO, "--adjoint exact or phantom with --structure triangular", self.adjoint,
                "A triangular equilibrium is one substitution: there are no iterations to unroll or to learn from.",
            )  # fmt: skip
        if self.adjoint == "shine" and self.solver != "broyden":
            raise wrong(
                WHO, "--solver broyden with --adjoint shine", f"--solver {self.solver}",
                "SHINE takes the inverse that Broyden's method ends with.",
            )  # fmt: skip


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options)}


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of `Options` as its first options, so that each is written down once."""
    hints = get_type_hints(Options, include_extras=True)
    own = inspect.signature(function, eval_str=True).parameters
    parameters = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(Options)
    ]
    parameters += [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in own.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function
