"""from_module: a network, traced with torch.fx, as a StateSpace."""

from __future__ import annotations

import operator
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ..._internal.errors import ArgumentError, takes, wrong
from ..space import StateSpace
from . import rules
from .affine import ROUNDING, Network, NoFormError
from .read_off import samples
from .traced import Traced, apply

WHO = "from_module"


def from_module(module: nn.Module, example_input: Tensor) -> StateSpace:
    """The StateSpace that computes what a network computes, for inputs of the example's shape.

    Every activation is a block of states, the last one first, so that A is block upper triangular and one pass in the
    order of the blocks solves it; everything between activations is composed into sparse matrices.  Max-pooling is
    exact, max(a, b) = b + relu(a − b), a window of k entries by k − 1 ReLU states.  Modules with a ``statespace()``,
    such as `ImplicitModel`, join with their own blocks.  `torch.nn.RNN` is unrolled over the example's length.  What
    torch writes in place is seen through every view of it.

    The network is run beside on inputs of both signs and several sizes: every operation must give what its rule says
    there, an operation without a rule is refused, and in the end the model must give the module's outputs for the
    example, for other such inputs, and for one sample alone.

    The matrices are sparse; see `StateSpace.to_dense`.  They are copies that keep the graph to the module's parameters,
    as those of `ImplicitModel.statespace` do; `StateSpace.detach`, or `torch.no_grad` around the call, drops it, and a
    model without it keeps the plan of its solve from call to call.

    Arguments:
        module: takes one tensor (batch, \\*any) and returns one, (batch, \\*any).  Everything in it whose training mode
            differs from evaluation must be in the latter.
        example_input: (batch, \\*any), of the module's dtype, float32 or float64, and device.

    Returns:
        A model of the flattened input, (batch, p), and the flattened output, (batch, q).

    Raises:
        ArgumentError: an example that the module does not take; an operation without an implicit form, named with its
            place in the module and the reason; or a module whose outputs are others than those of its operations, one
            by one.

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
    if u.dtype not in (torch.float32, torch.float64):
        raise wrong(
            WHO, "example_input of dtype torch.float32 or torch.float64", u.dtype,
            "Convert module.float() with example_input.float().",
        )  # fmt: skip
    module = _unwrapped(module)
    _evaluating(module)
    u = u.detach()
    outputs = _outputs(module, u, "Pass an example_input of its shape, dtype and device.")
    space = _converted(module, u)
    count = 6 if len(u) == 5 else 5
    for inputs in (u, samples(tuple(u.shape[1:]), count, u, seed=1), samples(tuple(u.shape[1:]), 1, u, seed=3)):
        if inputs is not u:
            outputs = _outputs(module, inputs, "It is tried on inputs of both signs, and on batches of other sizes.")
        _same(module, space, inputs, outputs)
    return space


def _unwrapped(module: nn.Module) -> nn.Module:
    """What torch has wrapped for several devices or for its compiler."""
    while isinstance(module, (nn.DataParallel, DistributedDataParallel)) or hasattr(module, "_orig_mod"):
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module  # type: ignore[assignment]
    return module


def _evaluating(module: nn.Module) -> None:
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise _no_form(path, part, "TorchScript has compiled its operations away. Pass the module it was made of")
        random = isinstance(part, (_NormBase, _DropoutNd, nn.RReLU, _SpectralNorm))
        if part.training and (random or any(isinstance(h, SpectralNorm) for h in part._forward_pre_hooks.values())):
            raise _no_form(path, part, "it is in training mode. Call eval() on the module first")


def _outputs(module: nn.Module, u: Tensor, do: str) -> Tensor:
    with torch.no_grad(), takes(WHO, "a module", u, do):
        y = module(u.clone())  # which may work in place
    if not isinstance(y, Tensor) or y.dim() < 1 or len(y) != len(u):
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise wrong(WHO, f"a module that returns one tensor of shape (batch={len(u)}, *any)", got)
    return y.reshape(len(u), -1)


def _same(module: nn.Module, space: StateSpace, u: Tensor, y: Tensor) -> None:
    """Sample by sample relative to its own size."""
    with torch.no_grad():
        found = space(u.flatten(1))
    if found.shape != y.shape:
        raise wrong(WHO, f"{space.q} outputs a sample as for the example", f"{y.shape[1]} for {len(u)} samples")
    gap = (found - y).abs().amax(1)
    size = torch.maximum(u.flatten(1).abs().amax(1), y.abs().amax(1)).clamp(min=1)
    if not bool((gap <= _tolerance(module, u.dtype) * size).all()):
        raise wrong(
            WHO, "a module that its operations, taken one by one, describe",
            f"outputs that differ by {float(gap.max()):.3g}",
            "Look for a hook, randomness, or a branch that depends on the data or on the number of samples.",
        )  # fmt: skip


def _tolerance(module: nn.Module, dtype: torch.dtype) -> float:
    """Relative to inputs and outputs: round-off of a deep network is far below, another function far above."""
    eps = torch.finfo(dtype).eps
    # A module with a state space solves its equation to a tolerance of its own.
    return eps**0.5 if any(hasattr(part, "statespace") for part in module.modules()) else ROUNDING * eps


def _converted(module: nn.Module, u: Tensor) -> StateSpace:
    # In a shell of its own, where fx puts what it wants to keep, and so that a module may itself be a leaf.
    shell = nn.Sequential(module)
    graph = _Tracer().trace(shell)
    # The number of samples is another than the example's, so that a module in whose results it counts is found out.
    inputs = samples(tuple(u.shape[1:]), 8 if len(u) == 7 else 7, u, seed=0)
    net = Network(inputs.clone())
    y = _Walk(shell, graph).run(Traced.new(net.input(u.shape[1:]), inputs))
    if not isinstance(y, Traced):
        raise wrong(WHO, "an output that depends on the input", type(y).__name__)
    return net.model(y.value)


class _Proxy(fx.Proxy):
    """With Python's operators in place, which fx takes for those that return another tensor."""

    def _in_place(self, operation: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    __iadd__ = partialmethod(_in_place, operator.iadd)
    __isub__ = partialmethod(_in_place, operator.isub)
    __imul__ = partialmethod(_in_place, operator.imul)
    __itruediv__ = partialmethod(_in_place, operator.itruediv)


class _Tracer(fx.Tracer):
    """Leaves are torch's own modules and those with a state space."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return hasattr(m, "statespace") or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (inner := _unwrapped(m)) is not m:
            return inner(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except ArgumentError:
            raise  # a module further inside, already named
        except Exception as error:
            # The module has just run on the example: what fails is its tracing.
            reason = f"its control flow or its numbers depend on the data ({error}). Write it without"
            raise _no_form(_inside(self.path_of_module(m)), m, reason) from error


class _Walk(fx.Interpreter):
    """The traced network, run on a `Traced` in the place of its input."""

    def __init__(self, shell: nn.Module, graph: fx.Graph) -> None:
        super().__init__(shell, graph=graph)
        self.extra_traceback = False  # else fx writes into the messages

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except Exception as error:
            stack = list((n.meta.get("nn_module_stack") or {}).values())
            path = str(n.target) if n.op == "call_module" else stack[-1][0] if stack else ""
            # The module has just run on the example: what fails is doing the same to what is traced.
            reason = str(error) if isinstance(error, NoFormError) else f"it cannot be followed ({error})"
            raise _no_form(_inside(path), self.module.get_submodule(path), reason) from error

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if hasattr(module, "statespace"):
            try:
                space = module.statespace()
            except ArgumentError as error:
                raise NoFormError(str(error).removesuffix(".")) from error
            value = args[0].value.modelled(space)
            return Traced.new(value, value.net.evaluated(value))
        if any(isinstance(part, nn.MultiheadAttention) for part in module.modules()):
            raise rules.no_rule("multi_head_attention_forward")
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Python's operators do not ask __torch_function__; everything else finds its rule by it.
        if target.__module__ == "_operator" and any(isinstance(arg, Traced) for arg in args):
            return apply(target.__name__, target, *args, **kwargs)
        return super().call_function(target, args, kwargs)


def _inside(path: str) -> str:
    """The path in the module of what has this path in the shell."""
    return path.partition(".")[2]


def _no_form(path: str, part: nn.Module, reason: str) -> ArgumentError:
    where = f"'{path}'" if path else "the module itself"
    why, _, advice = reason.partition(". ")
    found = f"{type(part).__name__} at {where}: {why}"
    return wrong(WHO, "operations with an implicit form", found, f"{advice}." if advice else "")
