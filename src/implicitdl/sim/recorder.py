"""What goes into every activation of a network and what comes out, however the network was written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .._internal.errors import wrong
from ..nn import ImplicitModel

# ATen's elementwise activations.  All spellings of one (nn.ReLU, F.relu, torch.relu, x.relu(), in place, in an exported
# or a scripted program) arrive here under one name.
_ELEMENTWISE = frozenset({
    "relu", "leaky_relu", "_prelu_kernel", "threshold", "hardtanh", "elu", "celu", "gelu", "silu", "mish", "softplus",
    "tanh", "sigmoid", "hardsigmoid", "hardswish", "hardshrink", "softshrink",
})  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of an activation: x = φ(z), rows are samples.

    Attributes:
        module: path of the innermost module it was called in; "" for the network itself.
        function: its name, such as "relu", or the class of a module that was taken as a whole.
    """

    module: str
    function: str
    z: Tensor
    x: Tensor

    def __str__(self) -> str:
        return f"'{self.module}' ({self.function})"


Replace = Callable[[Tensor], Tensor]


class Recorder(TorchDispatchMode):
    """Collects every activation that is called while it is open, in the order of the calls.

    It looks on from below autograd, where PyTorch's operations have one name each; the modules only tell where a call
    came from.  An `ImplicitModel` is one activation, whatever its solver does inside.

    Arguments:
        network: whose activations.
        layers: as for `get_states`.  Those of them that are modules without parameters and without children are taken
            as one activation each, from their input to their output: a φ that is composed of several operations.
        replace: z ↦ what the network goes on with instead of φ(z).
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str | int] | None = None, replace: Replace | None = None
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._network, self._layers, self._replace = network, layers, replace
        self._path: list[str] = []
        # The module that is taken as a whole and being run, with its input.
        self._closed: tuple[str, Tensor] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        known = name.rstrip("_") in _ELEMENTWISE
        if not known or self._closed is not None:
            return func(*args, **(kwargs or {}))
        # Copied before the call, which may be in place, and after it: what comes next may be in place too.
        z = args[0].clone()
        out = func(*args, **(kwargs or {}))
        self.calls.append(Call(self._path[-1] if self._path else "", name.rstrip("_"), z, out.clone()))
        return out if self._replace is None else out.copy_(self._replace(z))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Follow the modules of the network, and record, until the end of the block."""
        handles, network = [], self._network
        # A scripted network does not say where it is; its calls are recorded all the same.
        scripted = isinstance(network, torch.jit.ScriptModule)
        for path, module in [] if scripted else network.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(path)))
        # The fused encoder layer of torch.nn has its activation inside one operation.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with self:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for handle in handles:
                handle.remove()

    def chosen(self, skip_layers: int | None) -> list[Call]:
        """The calls to take, in their order."""
        calls, layers = self.calls, self._layers
        if not calls:
            raise wrong(
                "get_states", "a teacher with activations", "none in its forward pass",
                "If its activation is one of your own, write it as a module and name that: layers=['act'] of SIM "
                "or get_states.",
            )  # fmt: skip
        if skip_layers is not None:
            last = {id(call) for call in _last_of_blocks(self._network, "", calls, skip_layers)}
            return [call for call in calls if id(call) in last]
        if layers is None:
            return calls
        taken = set()
        for layer in layers:
            at = [i for i, call in enumerate(calls) if (i == layer if isinstance(layer, int) else _is_in(call, layer))]
            if not at:
                known = ", ".join(f"{i}: {call}" for i, call in enumerate(calls))
                raise wrong(
                    "get_states", f"layers among {known}", repr(layer), "Give names of modules, or numbers of calls."
                )
            taken |= set(at)
        return [calls[i] for i in sorted(taken)]

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._path.append(path)
            if self._closed is None and (isinstance(module, ImplicitModel) or self._named_whole(path, module)):
                (given, *_) = (*args, *kwargs.values())
                self._closed = path, given.clone()

        return enter

    def _named_whole(self, path: str, module: nn.Module) -> bool:
        return path in (self._layers or ()) and not [*module.parameters(), *module.children()]

    def _leaving(self, path: str) -> Callable[..., Tensor | None]:
        def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
            self._path.pop()
            if self._closed is None or self._closed[0] != path:
                return None
            z, x = self._closed[1], out
            if isinstance(module, ImplicitModel):
                z, x = _state(module, z)
            self._closed = None
            self.calls.append(Call(path, type(module).__name__, z, x.clone()))
            return None if self._replace is None else self._replace(z)

        return leave


def _state(model: ImplicitModel, U: Tensor) -> tuple[Tensor, Tensor]:
    """The equilibrium as z = Ax + Bu + b_x and x = φ(z)."""
    x = model.solve(U).value
    assert isinstance(x, Tensor)
    weights = model.weights()
    Ax = x @ weights[0].t() if len(weights) == 1 else (x @ weights[1]) @ weights[0].t()
    z = Ax + F.linear(U.flatten(1), model.B, model.b_x)
    return z, model.activation.phi(z)


def _is_in(call: Call, path: str) -> bool:
    return call.module == path or call.module.startswith(path + ".") or path == ""


def _last_of_blocks(module: nn.Module, path: str, calls: list[Call], size: int) -> list[Call]:
    """All activations of a module of at most `size` children; of each child of a larger one, the last."""
    children = {f"{path}.{name}".lstrip("."): child for name, child in module.named_children()}
    of_child = {name: [call for call in calls if _is_in(call, name)] for name in children}
    inside = {id(call) for found in of_child.values() for call in found}
    own = [call for call in calls if id(call) not in inside]
    if len(children) > size:
        return own + [found[-1] for found in of_child.values() if found]
    return own + [
        call for name, child in children.items() for call in _last_of_blocks(child, name, of_child[name], size)
    ]
