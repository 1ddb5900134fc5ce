"""What a function of models takes: a StateSpace, or whatever can give one."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from .._internal.errors import wrong
from .space import StateSpace


class HasStateSpace(Protocol):
    """A model that can write itself as its matrices; `ImplicitModel` does."""

    def statespace(self) -> StateSpace: ...


Model: TypeAlias = StateSpace | HasStateSpace


def space_of(who: str, model: Model) -> StateSpace:
    """The model's matrices, in its own layout and dtype, without a graph."""
    if not isinstance(model, StateSpace):
        if not callable(getattr(model, "statespace", None)):
            raise wrong(
                who, "an ImplicitModel, a StateSpace, or a model with statespace()", type(model).__name__,
                "Convert a network with implicitdl.statespace.from_module.",
            )  # fmt: skip
        model = model.statespace()
    return model.detach()
