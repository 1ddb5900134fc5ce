"""The options of the commands.

The options of a command are a frozen dataclass. Each field declares one option: its type, its default, its help, the
values it may have, and the options it belongs to. The parser (`with_options`) and the checks (`check_each`) both come
from this declaration.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

from typer import Option

from .._internal.errors import (
    ArgumentError,
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

T = TypeVar("T")

MODELS = ("implicit", "deq-dense", "deq-conv", "monotone-conv")
CONSTRAINTS = ("row-scaling", "row-projection", "soft-row-scaling", "monotone")
SOLVERS = (
    "auto", "picard", "momentum", "aitken", "anderson", "broyden", "newton", "peaceman-rachford", "forward-backward",
)  # fmt: skip
# Newton's method on the adjoint, which is linear, needs the inverse that is asked for. GMRES needs no matrix.
GRAD_SOLVERS = (*(name for name in SOLVERS if name != "newton"), "gmres")
SIM_SOLVERS = ("admm", "admm-multi-gpu", "cvx", "one-sided", "low-rank", "least-squares")
_IMPLICIT, _DENSE = {"model": ("implicit",)}, {"model": ("implicit", "deq-dense")}
_DEQ, _DEQ_CONV, _CONV = {"model": MODELS[1:3]}, {"model": ("deq-conv",)}, {"model": MODELS[2:]}
_LOW_RANK, _CONSTRAINED = _IMPLICIT | {"structure": ("low-rank",)}, _IMPLICIT | {"structure": ("dense",)}
_EXACT = {"adjoint": ("exact",)}
_ACTIVATIONS = tuple(BUILTIN)


class RunInterruptedError(Exception):
    """Ctrl-C during a run, with the command that continues it."""


def option(
    panel: str,
    default: Any,
    text: str,
    rule: tuple[str, ...] | Callable[[str, str, Any], Any] = (),
    *flags: str,
    needs: Mapping[str, tuple[str, ...]] | None = None,
) -> Any:
    """Declare an option, as a field of a dataclass.

    Arguments:
        panel: heading in the help under which it stands.
        default: value without the option; `dataclasses.MISSING` for an option that must be given.
        text: its help, in whole sentences; the choices are appended.
        rule: the values that are allowed, or ``rule(who, flag, value)``, which raises `ArgumentError` for a value that
            is not; any value by default.
        flags: its spelling on the command line; by default that of the field.
        needs: other options by name, and their values with which this option has an effect. A value other than the
            default is refused beside other values.
    """
    words = f"{text} One of: {', '.join(rule)}." if isinstance(rule, tuple) and rule else text
    given = Option(*flags, help=words, rich_help_panel=panel)
    return dataclasses.field(default=default, metadata={"option": given, "rule": rule, "needs": needs or {}})


_data, _model, _solving, _training, _matching, _sparsity, _proof, _attack = (
    functools.partial(option, panel)
    for panel in ("Data", "Model", "Solving", "Training", "Matching", "Sparser models", "Proof", "Attack")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `train` that decide the outcome of a run. The defaults of training did best on Fashion-MNIST."""

    WHO: ClassVar = "train"

    data: str = _data("digits", "Data set.", NAMES)
    root: str | None = _data(None, "Folder of the data sets. Default: $IMPLICITDL_DATA, or else 'data'.")
    holdout: float = _data(0.1, "Share of the training data, in (0, 1), that selects the epoch.", open_unit)
    split_seed: int = _data(0, "Seed of the split of digits and of the held-out part.", non_negative_int)

    model: str = _model("implicit", "Model; implicit is x = φ(Ax + Bu), y = Cx + Du.", MODELS)
    structure: str = _model("dense", "Structure of A.", ("dense", "triangular", "low-rank"), needs=_IMPLICIT)
    rank: int | None = _model(None, "Rank r of a low-rank A = LRᵀ.", positive_int, needs=_LOW_RANK)
    hidden_dim: int = _model(100, "Size n of the state x.", positive_int, needs=_DENSE)
    no_D: bool = _model(False, "Leave out the term Du.", (), "--no-D", needs=_IMPLICIT)
    bias: bool = _model(True, "Add the biases b_x and b_y.", (), "--bias/--no-bias", needs=_IMPLICIT)
    kappa: float | None = _model(
        None,
        "Bound κ in (0, 1): ‖A‖∞ ≤ κ / max|φ'|; with a monotone A, I − A ⪰ (1 − κ)I.",
        open_unit,
        needs={"model": ("implicit", "monotone-conv")},
    )
    activation: str = _model("relu", "Activation φ.", _ACTIVATIONS, needs=_IMPLICIT)
    constraint: str | None = _model(None, "Constraint on a dense A.", CONSTRAINTS, needs=_CONSTRAINED)
    channels: int | None = _model(None, "Channels of a convolutional state.", positive_int, needs=_CONV)
    inner_channels: int | None = _model(
        None, "Channels between the convolutions of deq-conv.", positive_int, needs=_DEQ_CONV
    )
    halvings: int | None = _model(
        None, "Halvings of height and width before the equilibrium.", non_negative_int, needs=_CONV
    )
    cells: int | None = _model(
        None, "Side (in cells) of the average pooling before the classifier.", positive_int, needs=_CONV
    )

    solver: str = _solving("auto", "Solver; auto is peaceman-rachford with a monotone A.", SOLVERS)
    start: str = _solving("zero", "Start of a deq model in training.", ("zero", "random"), needs=_DEQ)
    damping: float | None = _solving(
        None, "Damping in (0, 2].", damping, needs={"solver": ("picard", "momentum", "anderson")}
    )
    memory: int | None = _solving(
        None, "Number of previous steps in memory.", positive_int, needs={"solver": ("anderson", "broyden")}
    )
    period: int | None = _solving(
        None, "Steps between two extrapolations.", positive_int, needs={"solver": ("aitken",)}
    )
    tol: float | None = _solving(None, "Relative tolerance of the solve. Default: by precision.", open_unit)
    max_steps: int = _solving(300, "Most steps of the forward solve, per sample.", positive_int)
    adjoint: str = _solving(
        "exact", "Way to the gradient; shine needs --solver broyden.", ("exact", "phantom", "shine", "unrolled")
    )
    phantom_steps: int | None = _solving(
        None, "Steps of the phantom gradient.", positive_int, needs={"adjoint": ("phantom",)}
    )
    grad_solver: str = _solving("auto", "Solver of the exact adjoint.", GRAD_SOLVERS, needs=_EXACT)
    grad_tol: float | None = _solving(None, "Relative tolerance of the exact adjoint.", open_unit, needs=_EXACT)
    grad_max_steps: int | None = _solving(None, "Most steps of the exact adjoint.", positive_int, needs=_EXACT)
    on_failure: str = _solving("warn", "Reaction to a solve that missed its tolerance.", ("warn", "raise", "ignore"))

    epochs: int = _training(10, "Number of epochs in all.", positive_int)
    batch_size: int = _training(64, "Samples per step.", positive_int)
    lr: float = _training(3e-3, "Largest learning rate.", positive)
    optimizer: str = _training("adam", "Optimizer.", ("adam", "adamw", "sgd"))
    weight_decay: float = _training(0.0, "Weight decay, ≥ 0.", non_negative)
    momentum: float | None = _training(
        None, "Momentum of sgd in [0, 1). Default: 0.9.", fraction, needs={"optimizer": ("sgd",)}
    )
    schedule: str = _training(
        "cosine", "Learning rate schedule; step divides by 10 at 1/2 and 3/4.", ("cosine", "step", "constant")
    )
    warmup: float = _training(0.05, "Share of all steps over which the rate rises.", fraction)
    label_smoothing: float = _training(0.1, "Label smoothing in [0, 1).", fraction)
    jac_reg: float | None = _training(
        None, "Weight of the penalty ‖∂f/∂x‖²_F / d of a deq model in the loss.", positive, needs=_DEQ
    )
    clip: float | None = _training(None, "Largest 2-norm of the gradient.", positive)
    precision: str | None = _training(None, "Mixed precision. Default: that of the launcher.", ("no", "bf16", "fp16"))
    seed: int = _training(0, "Seed of the weights and the order of the batches.", non_negative_int)

    def check(self) -> Options:
        """Return the options, or raise an `ArgumentError` in terms of the command line."""
        check_each(self)
        if self.period == 1:
            raise wrong(self.WHO, "--period of at least 2", 1)
        if self.structure == "low-rank" and self.rank is None:
            do = "Pass --rank well below --hidden-dim."
            raise wrong(self.WHO, "--rank with --structure low-rank", "none", do)
        if self.structure == "triangular" and self.adjoint in ("shine", "unrolled"):
            do = "A triangular equilibrium is one substitution: there are no iterations to unroll or to learn from."
            raise wrong(self.WHO, "--adjoint exact or phantom with --structure triangular", self.adjoint, do)
        if self.adjoint == "shine" and self.solver != "broyden":
            do = "SHINE takes the inverse that Broyden's method ends with."
            raise wrong(self.WHO, "--solver broyden with --adjoint shine", f"--solver {self.solver}", do)
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimOptions:
    """Options of `sim` that decide its outcome."""

    WHO: ClassVar = "sim"

    teacher: str = _data(
        dataclasses.MISSING,
        "Teacher: a run's folder, a .pt2 file of torch.export.save from a source you trust, or a .safetensors file.",
    )
    data: str = _data("digits", "Data set.", NAMES)
    root: str | None = _data(None, "Folder of the data sets. Default: $IMPLICITDL_DATA, or else 'data'.")
    samples: int | None = _data(
        None, "Number of training samples, drawn at random. Default: 2000, or all.", positive_int
    )
    seed: int = _data(0, "Seed of the draw of the samples.", non_negative_int)
    split_seed: int | None = _data(
        None, "Seed of the split. Default: that of the teacher's run, or 0.", non_negative_int
    )
    holdout: float = _data(0.1, "Share of the training data held out for the curve of --path or --nonzeros.", open_unit)
    layers: str | None = _data(None, "Layer sizes of a .safetensors network, such as 784-64-10.")
    activation: str = _data("relu", "Activation φ of the teacher.", _ACTIVATIONS)
    solver: str = _matching("admm", "Solver of the convex problem.", SIM_SOLVERS)
    lambda_z: float | None = _matching(None, "Penalty λ_z on the rows of (A, B).", non_negative)
    lambda_y: float | None = _matching(None, "Penalty λ_y on the rows of (C, D).", non_negative)
    rank: int | None = _matching(None, "Rank of A, with --solver low-rank.", positive_int)
    regen_states: bool = _matching(False, "Fit C and D to the implicit model's own states.", (), "--regen-states")
    kappa: float = _matching(0.99, "Bound κ in (0, 1): ‖A‖∞ ≤ κ.", open_unit)
    rescale: bool = _matching(True, "Scale the states so that the teacher is feasible.")
    dtype: str = _matching("float32", "Precision of the computation.", ("float32", "float64"))
    path: str | None = _sparsity(None, "Penalties λ_z of further, sparser models, such as 100,30,10.")
    nonzeros: str | None = _sparsity(None, "Maximum numbers of nonzeros of further models, such as 500,2000.")
    refit: bool = _sparsity(False, "Refit the further and the pruned models by least squares.", (), "--refit")

    def check(self) -> SimOptions:
        """Return the options, or raise an `ArgumentError` in terms of the command line."""
        check_each(self)
        given = [values for values in (self.lambdas(), self.counts()) if values is not None]
        if self.refit and not given:
            raise wrong(self.WHO, "--refit together with --path or --nonzeros", "it alone", "Leave out --refit.")
        if len(given) > 1:
            raise wrong(self.WHO, "--path or --nonzeros", "both", "Leave out one of them.")
        return self

    def lambdas(self) -> list[float] | None:
        """λ_z of the further models; None without --path."""
        return _numbers("--path", self.path, float, non_negative)

    def counts(self) -> list[int] | None:
        """Nonzeros of the further models; None without --nonzeros."""
        return _numbers("--nonzeros", self.nonzeros, int, positive_int)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertifyOptions:
    """Options of `certify`."""

    WHO: ClassVar = "certify"

    eps: list[float] | None = _proof(None, "Radius; may be repeated. Default: 0.01, 0.05, 0.1.", non_negative)  # noqa: RUF009
    samples: int = _proof(1000, "Number of test samples.", positive_int)
    method: str = _proof("crown", "Method of the proof.", ("crown", "interval", "sensitivity"))
    slope_steps: int = _proof(0, "Optimisation steps of the slopes of crown's lines.", non_negative_int)
    rounds: int = _proof(0, "Number of times that crown refines its initial bounds.", non_negative_int)
    attack_steps: int = _attack(20, "Steps of the PGD attack.", positive_int)
    restarts: int = _attack(1, "Random starts of the attack.", positive_int)

    def check(self) -> CertifyOptions:
        """Return the options, or raise an `ArgumentError` in terms of the command line."""
        check_each(self)
        for name in ("slope_steps", "rounds"):
            if getattr(self, name) and self.method != "crown":
                expected = f"{flag(name)} with --method crown alone"
                raise wrong(self.WHO, expected, f"--method {self.method}", "Leave it out.")
        return self


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def check_each(options: Any) -> None:
    """Raise an `ArgumentError` for the first option with a value that is not allowed, or that has no effect."""
    fields = dataclasses.fields(options)
    for field in fields:
        value, rule = getattr(options, field.name), field.metadata["rule"]
        if not rule or (value is None and field.default is None):
            continue
        if isinstance(rule, tuple):
            choice(options.WHO, flag(field.name), value, rule)
        else:
            for number in value if isinstance(value, list) else [value]:
                rule(options.WHO, flag(field.name), number)
    for field in fields:
        for other, values in field.metadata["needs"].items():
            if getattr(options, other) not in values and getattr(options, field.name) != field.default:
                model = other == "model"  # the models share options, and one of them is always given
                expected = f"{flag(field.name)} together with --{other} {values[0] if model else ' or '.join(values)}"
                got = f"--model {options.model}" if model else "it alone"
                raise wrong(options.WHO, expected, got, f"Leave out {flag(field.name)}.")


def _numbers(
    name: str, text: str | None, kind: Callable[[str], T], check: Callable[[str, str, Any], T]
) -> list[T] | None:
    if text is None:
        return None
    try:
        return [check(SimOptions.WHO, name, kind(word)) for word in text.split(",")]
    except ArgumentError:
        raise
    except ValueError as error:
        raise wrong(SimOptions.WHO, f"{name} with numbers such as 100,10,1", repr(text)) from error


def with_options(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: add the fields of a dataclass of options to the parameters of a command, as keyword arguments."""
    hints = get_type_hints(kind)
    declared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=Annotated[hints[field.name], field.metadata["option"]],
        )
        for field in dataclasses.fields(kind)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        command.__signature__ = inspect.Signature([*own, *declared])  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *declared)}
        return command

    return decorate
