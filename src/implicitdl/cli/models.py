"""From the names in the options to a model with its constraint, its solvers and its adjoint."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias, TypeVar

import torch

from .. import activations, constraints
from ..adjoints import SHINE, Adjoint, ImplicitAdjoint, PhantomGradient, Unrolled
from ..nn import (
    ConvEquilibriumClassifier,
    DenseEquilibriumClassifier,
    ImplicitFunctionInf,
    ImplicitFunctionTriu,
    ImplicitModel,
    MonotoneConvClassifier,
    RandomStart,
)
from ..solvers import (
    GMRES,
    Aitken,
    Anderson,
    Auto,
    Broyden,
    ForwardBackward,
    Newton,
    PeacemanRachford,
    Picard,
    Solver,
)
from .options import Options

_Deq = TypeVar("_Deq", DenseEquilibriumClassifier, ConvEquilibriumClassifier)
Model: TypeAlias = ImplicitModel | DenseEquilibriumClassifier | ConvEquilibriumClassifier | MonotoneConvClassifier

CLASSES: dict[str, type[Model]] = {
    "implicit": ImplicitModel,
    "deq-dense": DenseEquilibriumClassifier,
    "deq-conv": ConvEquilibriumClassifier,
    "monotone-conv": MonotoneConvClassifier,
}
_CONSTRAINTS = {
    "row-scaling": constraints.RowScaling,
    "row-projection": constraints.RowProjection,
    "soft-row-scaling": constraints.SoftRowScaling,
    "monotone": constraints.Monotone,
}
_SOLVERS: dict[str, type[Solver]] = {
    "auto": Auto,
    "picard": Picard,
    "aitken": Aitken,
    "anderson": Anderson,
    "broyden": Broyden,
    "newton": Newton,
    "peaceman-rachford": PeacemanRachford,
    "forward-backward": ForwardBackward,
    "gmres": GMRES,
}


def model(options: Options, shape: Sequence[int], output_dim: int) -> Model:
    """The model of the options, float32, with weights drawn from the global stream.

    Arguments:
        options: checked.
        shape: (channels, height, width) of an image.
        output_dim: classes.
    """
    common: dict[str, Any] = {
        "output_dim": output_dim,
        "solver": _solver(options),
        "adjoint": _adjoint(options),
        "on_failure": options.on_failure,
    }
    with _Float32():  # what the loaders give
        if options.model == "implicit":
            return ImplicitModel(input_dim=prod(shape), **_implicit(options), **common)
        if options.model == "deq-dense":
            dense = DenseEquilibriumClassifier(input_dim=prod(shape), hidden_dim=options.hidden_dim, **common)
            return _started(dense, options)
        convolutional = _given(options, "channels", "inner_channels", "halvings", "cells")
        if options.model == "deq-conv":
            return _started(ConvEquilibriumClassifier(input_channels=shape[0], **convolutional, **common), options)
        monotonicity: dict[str, Any] = {} if options.kappa is None else {"m": 1.0 - options.kappa}
        return MonotoneConvClassifier(input_channels=shape[0], **convolutional, **monotonicity, **common)


def _started(model: _Deq, options: Options) -> _Deq:
    """Of a start that evaluation does without, the saved model need know nothing."""
    if options.start == "random":
        model.deq.start = RandomStart()
    return model


class _Float32:
    """torch's default dtype is float32 inside, whatever it is outside."""

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._before)


def _implicit(options: Options) -> dict[str, Any]:
    return {
        "hidden_dim": options.hidden_dim,
        "f": ImplicitFunctionTriu if options.structure == "triangular" else ImplicitFunctionInf,
        "no_D": options.no_D,
        "bias": options.bias,
        "kappa": options.kappa,
        "is_low_rank": options.structure == "low-rank",
        "rank": options.rank,
        "activation": activations.BUILTIN[options.activation],
        "constraint": None if options.constraint is None else _CONSTRAINTS[options.constraint],
    }


def _solver(options: Options) -> Solver:
    given = _given(options, "damping", "memory", "period")
    return _kind(options.solver, options)(rtol=options.tol, max_steps=options.max_steps, **given)


def _kind(name: str, options: Options) -> type[Solver]:
    """What "auto" stands for where A is monotone: there the equilibrium exists, but iteration need not find it."""
    monotone = options.model == "monotone-conv" or options.constraint == "monotone"
    return PeacemanRachford if monotone and name == "auto" else _SOLVERS[name]


def _adjoint(options: Options) -> Adjoint:
    if options.adjoint == "exact":
        steps = {} if options.grad_max_steps is None else {"max_steps": options.grad_max_steps}
        return ImplicitAdjoint(solver=_kind(options.grad_solver, options)(rtol=options.grad_tol, **steps))
    if options.adjoint == "phantom":
        return PhantomGradient(steps=1 if options.phantom_steps is None else options.phantom_steps)
    return SHINE() if options.adjoint == "shine" else Unrolled()


def _given(options: Options, *names: str) -> dict[str, Any]:
    """The options that were given; for the others a constructor's default holds."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}
