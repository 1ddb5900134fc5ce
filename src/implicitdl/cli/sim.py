"""The command `sim` and its options."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import torch
from typer import Option

from .._checks import choice, non_negative, non_negative_int, open_unit, positive_int, wrong
from ..activations import BUILTIN
from ..data import NAMES
from ..sim.solvers import ADMMSolver, BaseSolver, CVXSolver, LeastSquareSolver, OneSidedSolver, ProjectedGDLowRankSolver
from .teacher import WHO

SOLVERS: dict[str, type[BaseSolver]] = {
    "admm": ADMMSolver,
    "cvx": CVXSolver,
    "one-sided": OneSidedSolver,
    "low-rank": ProjectedGDLowRankSolver,
    "least-squares": LeastSquareSolver,
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimOptions:
    """What decides the outcome of `sim`."""

    teacher: str
    data: str
    samples: int
    seed: int
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
    refit: bool

    def check(self) -> SimOptions:
        for name, known in (("data", NAMES), ("activation", BUILTIN), ("solver", SOLVERS), ("dtype", DTYPES)):
            choice(WHO, f"--{name}", getattr(self, name), known)
        positive_int(WHO, "--samples", self.samples)
        non_negative_int(WHO, "--seed", self.seed)
        open_unit(WHO, "--holdout", self.holdout)
        open_unit(WHO, "--kappa", self.kappa)
        if self.lambdas() is None and self.refit:
            raise wrong(WHO, "--refit together with --path", "it alone", "Leave out --refit.")
        self.build_solver()
        return self

    def lambdas(self) -> list[float] | None:
        if self.path is None:
            return None
        try:
            return [non_negative(WHO, "--path", float(word)) for word in self.path.split(",")]
        except ValueError as error:
            raise wrong(WHO, "--path with numbers such as 10,1,0.1", repr(self.path)) from error

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
            flag = "--" + name.replace("_", "-")
            raise wrong(WHO, f"a --solver with {flag}", self.solver, f"Leave out {flag}.")
        return kind(**given)


def sim(
    teacher: Annotated[
        str, Option(help="A run's folder, a .pt2 of torch.export.save from a source you trust, or a .safetensors file.")
    ],
    data: Annotated[str, Option(help=" | ".join(NAMES))] = "digits",
    root: Annotated[str | None, Option(help="Folder of the datasets; else IMPLICITDL_DATA, else 'data'.")] = None,
    samples: Annotated[int, Option(help="Training samples to match, drawn at random.")] = 2000,
    seed: Annotated[int, Option(help="of the draw.")] = 0,
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
    refit: Annotated[
        bool, Option("--refit", help="Fit what is left of the models of --path by least squares.")
    ] = False,
    out: Annotated[str | None, Option(help="Folder of the result; a new one under runs/ by default.")] = None,
    device: Annotated[str | None, Option(help="Such as cpu or cuda:0.")] = None,
    threads: Annotated[int | None, Option(help="of PyTorch on the CPU.")] = None,
) -> None:
    """Match the states of a teacher by an implicit model: convex, with a certificate for every row."""
    from . import match

    options = SimOptions(
        teacher=teacher, data=data, samples=samples, seed=seed, holdout=holdout, layers=layers, activation=activation,
        solver=solver, lambda_z=lambda_z, lambda_y=lambda_y, rank=rank, regen_states=regen_states, kappa=kappa,
        rescale=rescale, dtype=dtype, path=path, refit=refit,
    )  # fmt: skip
    match.run(options.check(), root=root, out=out, device=device, threads=threads)
