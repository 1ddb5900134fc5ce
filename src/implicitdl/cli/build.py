"""From options to objects: the data, the model, the optimizer, the schedule, the loss, the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .. import constraints, solvers
from .._internal.errors import positive_int, wrong
from ..activations import BUILTIN
from ..adjoints import SHINE, Adjoint, ImplicitAdjoint, PhantomGradient, Unrolled
from ..data import Data, load
from ..nn import (
    ConvEquilibriumClassifier,
    DenseEquilibriumClassifier,
    ImplicitFunctionInf,
    ImplicitFunctionTriu,
    ImplicitModel,
    JacobianPenalty,
    MonotoneConvClassifier,
    RandomStart,
)
from .options import Options

Model: TypeAlias = ImplicitModel | DenseEquilibriumClassifier | ConvEquilibriumClassifier | MonotoneConvClassifier

CLASSES: dict[str, type[Model]] = {
    "implicit": ImplicitModel,
    "deq-dense": DenseEquilibriumClassifier,
    "deq-conv": ConvEquilibriumClassifier,
    "monotone-conv": MonotoneConvClassifier,
}
_CONSTRAINTS: dict[str | None, Any] = {
    None: None,
    "row-scaling": constraints.RowScaling,
    "row-projection": constraints.RowProjection,
    "soft-row-scaling": constraints.SoftRowScaling,
    "monotone": constraints.Monotone,
}
_SOLVERS: dict[str, type[solvers.Solver]] = {
    "auto": solvers.Auto,
    "picard": solvers.Picard,
    "momentum": solvers.Momentum,
    "aitken": solvers.Aitken,
    "anderson": solvers.Anderson,
    "broyden": solvers.Broyden,
    "newton": solvers.Newton,
    "peaceman-rachford": solvers.PeacemanRachford,
    "forward-backward": solvers.ForwardBackward,
    "gmres": solvers.GMRES,
}
# More threads do not help, and a hundred thousand end the process when the first of them is started.
_MOST_THREADS = 1024


def place(who: str, name: str | None, threads: int | None = None) -> torch.device:
    """The device of a name, which must be there; and PyTorch's number of threads, set where it is given."""
    try:
        probe = torch.zeros(1, dtype=torch.float32, device="cpu" if name is None else name)
        probe.item()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise wrong(who, "--device to be one that is here, such as cpu", f"{name!r} ({reason})") from error
    if threads is not None:
        if positive_int(who, "--threads", threads) > _MOST_THREADS:
            raise wrong(who, f"--threads of at most {_MOST_THREADS}", threads)
        torch.set_num_threads(threads)
    return probe.device


def data(options: Options, root: str | None = None) -> Data:
    """The data set in its three parts; `root` replaces that of the options."""
    where = options.root if root is None else root
    return load(options.data, options.batch_size, where, holdout=options.holdout, seed=options.split_seed)


def model(options: Options, shape: Sequence[int], output_dim: int) -> Model:
    """The model of the options, float32, with weights drawn from the global stream.

    Arguments:
        options: checked.
        shape: (channels, height, width) of an image.
        output_dim: number of classes.
    """
    common: dict[str, Any] = {"output_dim": output_dim, "adjoint": _adjoint(options), "on_failure": options.on_failure}
    given = _given(options, "damping", "memory", "period")
    common["solver"] = _solver(options.solver, options)(rtol=options.tol, max_steps=options.max_steps, **given)
    convolutional = _given(options, "channels", "inner_channels", "halvings", "cells")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # that of the loaders
    try:
        if options.model == "implicit":
            return ImplicitModel(
                input_dim=math.prod(shape),
                hidden_dim=options.hidden_dim,
                f=ImplicitFunctionTriu if options.structure == "triangular" else ImplicitFunctionInf,
                no_D=options.no_D,
                bias=options.bias,
                kappa=options.kappa,
                is_low_rank=options.structure == "low-rank",
                rank=options.rank,
                activation=BUILTIN[options.activation],
                constraint=_CONSTRAINTS[options.constraint],
                **common,
            )
        if options.model == "monotone-conv":
            monotonicity: dict[str, Any] = {} if options.kappa is None else {"m": 1.0 - options.kappa}
            return MonotoneConvClassifier(input_channels=shape[0], **convolutional, **monotonicity, **common)
        deq: DenseEquilibriumClassifier | ConvEquilibriumClassifier
        if options.model == "deq-dense":
            deq = DenseEquilibriumClassifier(input_dim=math.prod(shape), hidden_dim=options.hidden_dim, **common)
        else:
            deq = ConvEquilibriumClassifier(input_channels=shape[0], **convolutional, **common)
        if options.start == "random":  # not an argument: evaluation does without, and so does the saved model
            deq.deq.start = RandomStart()
        return deq
    finally:
        torch.set_default_dtype(before)


def count(model: Model) -> str:
    """The number of parameters, in words."""
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"


def sizes(model: Model) -> str:
    """The sizes of a model, in words."""
    if isinstance(model, (ImplicitModel, DenseEquilibriumClassifier)):
        return f"n = {model.hidden_dim}, p = {model.input_dim}, q = {model.output_dim}"
    return ", ".join(f"{name} = {getattr(model, name)}" for name in model.saved_arguments if name != "on_failure")


def _solver(name: str, options: Options) -> type[solvers.Solver]:
    """The class of a solver. With a monotone A the equilibrium exists, but iteration need not find it."""
    monotone = options.model == "monotone-conv" or options.constraint == "monotone"
    return solvers.PeacemanRachford if monotone and name == "auto" else _SOLVERS[name]


def _adjoint(options: Options) -> Adjoint:
    if options.adjoint == "exact":
        steps = {} if options.grad_max_steps is None else {"max_steps": options.grad_max_steps}
        return ImplicitAdjoint(solver=_solver(options.grad_solver, options)(rtol=options.grad_tol, **steps))
    if options.adjoint == "phantom":
        return PhantomGradient(steps=options.phantom_steps or 1)
    return SHINE() if options.adjoint == "shine" else Unrolled()


def _given(options: Options, *names: str) -> dict[str, Any]:
    """The options that were given; for the others the defaults of the constructor hold."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def optimizer(options: Options, parameters: Any) -> torch.optim.Optimizer:
    # fused: one kernel for all parameters, where a small model would spend most of a step in the calls.
    rest: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay, "fused": True}
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9 if options.momentum is None else options.momentum, **rest)
    return (torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam)(parameters, **rest)


def loss(options: Options, model: Model) -> Callable[[Any, Any], torch.Tensor]:
    """Cross-entropy, in training plus the penalty of the Jacobian where it was asked for."""
    cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    if options.jac_reg is None:
        return cross_entropy
    assert not isinstance(model, ImplicitModel)
    penalty = JacobianPenalty(model.deq, options.jac_reg)
    return lambda pred, target: cross_entropy(pred, target) + penalty()


class Schedule:
    """The factor of the learning rate at a step: a linear rise, then the named schedule over the rest.

    A class and not a closure, because LambdaLR keeps the attributes of an object in its state_dict: the plan of a run
    holds after a resume.
    """

    def __init__(self, name: str, steps: int, warmup: float) -> None:
        self.name, self.steps, self.rise = name, steps, max(1, round(warmup * steps))

    def __call__(self, step: int) -> float:
        if step < self.rise:
            return (step + 1) / self.rise
        done = min(1.0, (step - self.rise) / max(1, self.steps - self.rise))
        if self.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.name == "step":
            return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
        return 1.0
