"""from_module: a network, traced with torch.fx, as a StateSpace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..._checks import ArgumentError, takes, wrong
from ..matrices import coo
from ..space import StateSpace
from . import rules
from .affine import Affine, Network, NoFormError

WHO = "from_module"
# Of eps: a ResNet-18 is off by 10, and the rest is room for values that cancel.
_ROUNDING = 4096


def from_module(module: nn.Module, example_input: Tensor) -> StateSpace:
    """The StateSpace that computes what a network computes, for inputs of the example's shape.

    Every activation is a block of states, the last one first, so that A is block upper triangular and one pass in the
    order of the blocks solves it; everything between activations is composed into sparse matrices.  Max-pooling is
    exact, max(a, b) = b + relu(a − b), a window of k entries by k − 1 ReLU states.  Modules with a ``statespace()``,
    such as `ImplicitModel`, join with their own blocks.  `torch.nn.RNN` is unrolled over the example's length.

    The matrices are sparse; see `StateSpace.to_dense`.  They are copies that keep the graph to the module's parameters,
    as those of `ImplicitModel.statespace` do; `StateSpace.detach`, or `torch.no_grad` around the call, drops it, and a
    model without it keeps the plan of its solve from call to call.

    Arguments:
        module: takes one tensor (batch, \\*any) and returns one, (batch, \\*any).  Everything in it whose training mode
            differs from evaluation must be in the latter.
        example_input: (batch, \\*any), of the module's dtype and device.  Its values are used for a last check only:
            the converted model must give the module's outputs for it.

    Returns:
        A model of the flattened input, (batch, p), and the flattened output, (batch, q).

    Raises:
        ArgumentError: an example that the module does not take; an operation without an implicit form, named with its
            place in the module and the reason; or a module whose outputs on the example are others than those of its
            operations, one by one.

    Source: El Ghaoui, Gu, Travacca, Askari & Tsai, Implicit Deep Learning, SIAM J. Math. Data Sci. 3 (2021), where
    feed-forward networks are written as implicit models.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from implicitdl.statespace import from_module
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)).double()
        >>> u = torch.randn(5, 1, 6, 6, dtype=torch.float64)
        >>> space = from_module(net, u).detach()
        >>> [(block.activation.name, block.size) for block in space.blocks]
        [('relu', 8), ('relu', 16), ('relu', 32)]
        >>> bool((space(u) - net(u)).abs().max() < 1e-12)
        True
    """
    if not isinstance(module, nn.Module):
        raise wrong(WHO, "a torch.nn.Module", type(module).__name__)
    u = example_input
    if not isinstance(u, Tensor) or not u.is_floating_point() or u.dim() < 2 or u.numel() == 0:
        got: object = (tuple(u.shape), u.dtype) if isinstance(u, Tensor) else type(u).__name__
        raise wrong(WHO, "example_input to be a floating-point tensor of shape (batch ≥ 1, *any)", got)
    for path, part in module.named_modules():
        if part.training and isinstance(part, (_BatchNorm, _DropoutNd)):
            raise _no_form(path, part, "it is in training mode. Call eval() on the module first")
    with torch.no_grad(), takes(WHO, "a module", u, "Pass an example_input of its shape, dtype and device."):
        y = module(u.clone())  # which may work in place
    if not isinstance(y, Tensor) or y.dim() < 1 or len(y) != len(u):
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise wrong(WHO, f"a module that returns one tensor of shape (batch={len(u)}, *any)", got)
    space = _converted(module, u)
    with torch.no_grad():
        gap = float((space(u) - y.flatten(1).reshape(len(u), -1)).abs().max())
    if not gap <= _tolerance(module, u.dtype) * max(1.0, float(u.detach().abs().max()), float(y.abs().max())):
        raise wrong(
            WHO, "a module that its operations, taken one by one, describe", f"outputs that differ by {gap:.3g}",
            "Look for a hook, randomness, or a change in place of a tensor that is also seen through a view.",
        )  # fmt: skip
    return space


def _tolerance(module: nn.Module, dtype: torch.dtype) -> float:
    """Relative to inputs and outputs: round-off of a deep network is far below, another function far above."""
    eps = torch.finfo(dtype).eps
    # A module with a state space solves its equation to a tolerance of its own.
    return eps**0.5 if any(hasattr(part, "statespace") for part in module.modules()) else _ROUNDING * eps


def _converted(module: nn.Module, u: Tensor) -> StateSpace:
    # In a shell of its own, where fx puts what it wants to keep, and so that a module may itself be a leaf.
    shell = nn.Sequential(module)
    # The number of samples is another than the example's, so that a module in whose results it counts is found out.
    net = Network(u[0].numel(), u.new_empty(0), batch=3 if len(u) == 2 else 2)
    places = torch.arange(net.p, device=u.device)
    identity = coo(places, places, u.new_ones(net.p), (net.p, net.p))
    y = _Walk(shell, _Tracer().trace(shell)).run(Affine(net, identity, u.new_zeros(net.p), tuple(u.shape[1:])))
    if not isinstance(y, Affine):
        raise wrong(WHO, "an output that depends on the input", type(y).__name__)
    return net.model(y)


class _Tracer(fx.Tracer):
    """Leaves are torch's own modules and those with a state space."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return hasattr(m, "statespace") or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except ArgumentError:
            raise  # a module further inside, already named
        except Exception as error:
            # The module has just run on the example: what fails is its tracing.
            reason = f"its control flow or its numbers depend on the data ({error}). Write it without"
            raise _no_form(_inside(self.path_of_module(m)), m, reason) from error


class _Walk(fx.Interpreter):
    """The traced network, run on an `Affine` in the place of its input."""

    def __init__(self, shell: nn.Module, graph: fx.Graph) -> None:
        super().__init__(shell, graph=graph)
        self.extra_traceback = False  # else fx writes into the messages

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except Exception as error:
            stack = list((n.meta.get("nn_module_stack") or {}).values())
            path = str(n.target) if n.op == "call_module" else stack[-1][0] if stack else ""
            # The module has just run on the example: what fails is doing the same to an affine function.
            reason = str(error) if isinstance(error, NoFormError) else f"it cannot be followed ({error})"
            raise _no_form(_inside(path), self.module.get_submodule(path), reason) from error

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if hasattr(module, "statespace"):
            try:
                space = module.statespace()
            except ArgumentError as error:
                raise NoFormError(str(error).removesuffix(".")) from error
            return args[0].modelled(space)
        if any(isinstance(part, nn.MultiheadAttention) for part in module.modules()):
            raise rules.no_rule("multi_head_attention_forward")
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Python's operators do not ask __torch_function__; everything else finds its rule by it.
        if target.__module__ == "_operator" and any(isinstance(arg, Affine) for arg in args):
            return rules.apply(target.__name__, *args, **kwargs)
        return super().call_function(target, args, kwargs)


def _inside(path: str) -> str:
    """The path in the module of what has this path in the shell."""
    return path.partition(".")[2]


def _no_form(path: str, part: nn.Module, reason: str) -> ArgumentError:
    where = f"'{path}'" if path else "the module itself"
    why, _, advice = reason.partition(". ")
    found = f"{type(part).__name__} at {where}: {why}"
    return wrong(WHO, "operations with an implicit form", found, f"{advice}." if advice else "")
