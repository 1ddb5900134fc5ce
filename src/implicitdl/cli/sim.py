"""The command `sim` and its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import torch
from typer import Option

from .._internal.errors import choice, non_negative, non_negative_int, open_unit, positive_int, wrong
from ..activations import BUILTIN
from ..data import NAMES
from ..sim.solvers import (
    ADMMMultiGPUSolver,
    ADMMSolver,
    BaseSolver,
    CVXSolver,
    LeastSquareSolver,
    OneSidedSolver,
    PenalisedSolver,
    ProjectedGDLowRankSolver,
)
from .options import flag
from .teacher import WHO

T = TypeVar("T")

SOLVERS: dict[str, type[BaseSolver]] = {
    "admm": ADMMSolver,
    "admm-multi-gpu": ADMMMultiGPUSolver,
    "cvx": CVXSolver,
    "one-sided": OneSidedSolver,
    "low-rank": ProjectedGDLowRankSolver,
    "least-squares": LeastSquareSolver,
}
_NUMBERS: dict[Callable[[str, str, Any], float], tuple[str, ...]] = {
    positive_int: ("samples", "rank"),
    non_negative_int: ("seed", "split_seed"),
    open_unit: ("holdout", "kappa"),
    non_negative: ("lambda_z", "lambda_y"),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimOptions:
    """What decides the outcome of `sim`."""

    teacher: str
    data: str
    root: str | None
    samples: int | None
    seed: int
    split_seed: int | None
    holdout: float
    layers: str | None
    activation: str
    solver: str
    lambda_z: float | None
    lambda_y: float | None
    rank: int | None
    regen_states: bool
    kappa: float
    rescale: bool
    dtype: str
    path: str | None
    nonzeros: str | None
    refit: bool

    def check(self) -> SimOptions:
        for name, known in (("data", NAMES), ("activation", BUILTIN), ("solver", SOLVERS), ("dtype", DTYPES)):
            choice(WHO, f"--{name}", getattr(self, name), known)
        for check, names in _NUMBERS.items():
            for name in names:
                if getattr(self, name) is not None:
                    check(WHO, flag(name), getattr(self, name))
        given = [values for values in (self.lambdas(), self.counts()) if values is not None]
        if self.refit and not given:
            raise wrong(WHO, "--refit together with --path or --nonzeros", "it alone", "Leave out --refit.")
        if len(given) > 1:
            raise wrong(WHO, "--path or --nonzeros", "both", "Leave out one of them.")
        solver = self.build_solver()
        if given and not isinstance(solver, PenalisedSolver):
            raise wrong(
                WHO, "a --solver with penalties for --path or --nonzeros", self.solver, "Take admm, or leave them out."
            )  # fmt: skip
        return self

    def lambdas(self) -> list[float] | None:
        """λ_z of the further models."""
        if self.path is None:
            return None
        return [non_negative(WHO, "--path", value) for value in _numbers("--path", self.path, float)]

    def counts(self) -> list[int] | None:
        """Nonzeros of the further models."""
        if self.nonzeros is None:
            return None
        return [positive_int(WHO, "--nonzeros", count) for count in _numbers("--nonzeros", self.nonzeros, int)]

    def build_solver(self) -> BaseSolver:
        """The solver with what was given; what it does not have would have no effect."""
        kind = SOLVERS[self.solver]
        given: dict[str, Any] = {
            "lambda_z": self.lambda_z, "lambda_y": self.lambda_y, "rank": self.rank,
            "regen_states": self.regen_states or None,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        for name in given.keys() - known:
            raise wrong(WHO, f"a --solver with {flag(name)}", self.solver, f"Leave out {flag(name)}.")
        return kind(**given)


def _numbers(option: str, text: str, kind: Callable[[str], T]) -> list[T]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError as error:
        raise wrong(WHO, f"{option} with numbers such as 100,10,1", repr(text)) from error


def sim(
    teacher: Annotated[
        str, Option(help="A run's folder, a .pt2 of torch.export.save from a source you trust, or a .safetensors file.")
    ],
    data: Annotated[str, Option(help=" | ".join(NAMES))] = "digits",
    root: Annotated[str | None, Option(help="Folder of the datasets; else IMPLICITDL_DATA, else 'data'.")] = None,
    samples: Annotated[
        int | None, Option(help="Training samples to match, drawn at random; 2000, or all where there are fewer.")
    ] = None,
    seed: Annotated[int, Option(help="of the draw.")] = 0,
    split_seed: Annotated[
        int | None,
        Option(help="Seed of the split of digits and of the held-out part; that of the teacher's run, or 0."),
    ] = None,
    holdout: Annotated[float, Option(help="Share of the training data kept for the accuracies of --path.")] = 0.1,
    layers: Annotated[str | None, Option(help="Sizes of the .safetensors network, such as 784-64-10.")] = None,
    activation: Annotated[str, Option(help=f"φ of the teacher: {' | '.join(BUILTIN)}")] = "relu",
    solver: Annotated[str, Option(help=" | ".join(SOLVERS))] = "admm",
    lambda_z: Annotated[float | None, Option(help="λ of the rows of (A, B).")] = None,
    lambda_y: Annotated[float | None, Option(help="λ of the rows of (C, D).")] = None,
    rank: Annotated[int | None, Option(help="of A, with --solver low-rank.")] = None,
    regen_states: Annotated[
        bool, Option("--regen-states", help="Fit C and D to the implicit model's own states.")
    ] = False,
    kappa: Annotated[float, Option(help="κ in (0, 1); ‖A‖∞ ≤ κ.")] = 0.99,
    rescale: Annotated[bool, Option(help="Measure states in units in which the teacher is feasible.")] = True,
    dtype: Annotated[str, Option(help=" | ".join(DTYPES))] = "float32",
    path: Annotated[str | None, Option(help="λ_z of further, sparser models, such as 100,30,10.")] = None,
    nonzeros: Annotated[
        str | None, Option(help="Of further models, how many nonzeros each may have, such as 500,2000.")
    ] = None,
    refit: Annotated[
        bool, Option("--refit", help="Refit the further models, and the pruned, by least squares.")
    ] = False,
    out: Annotated[str | None, Option(help="Folder of the result; a new one under runs/ by default.")] = None,
    device: Annotated[str | None, Option(help="Such as cpu or cuda:0.")] = None,
    threads: Annotated[int | None, Option(help="of PyTorch on the CPU.")] = None,
) -> None:
    """Match the states of a teacher by an implicit model: convex, with a certificate for every row."""
    from . import match

    options = SimOptions(
        teacher=teacher, data=data, root=root, samples=samples, seed=seed, split_seed=split_seed, holdout=holdout,
        layers=layers, activation=activation, solver=solver, lambda_z=lambda_z, lambda_y=lambda_y, rank=rank,
        regen_states=regen_states, kappa=kappa, rescale=rescale, dtype=dtype, path=path, nonzeros=nonzeros, refit=refit,
    )  # fmt: skip
    match.run(options.check(), out=out, device=device, threads=threads)
