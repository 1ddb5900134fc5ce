"""An ordinary network as a StateSpace: `from_module`."""

from .module import from_module

__all__ = ["from_module"]
