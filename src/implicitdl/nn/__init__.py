"""Modules: the implicit model, its recurrent form, and the declarative classes that set them up."""

from .function import ImplicitFunction, ImplicitFunctionInf, ImplicitFunctionTriu
from .model import ImplicitModel
from .rnn import ImplicitRNN, ImplicitRNNCell

__all__ = [
    "ImplicitFunction",
    "ImplicitFunctionInf",
    "ImplicitFunctionTriu",
    "ImplicitModel",
    "ImplicitRNN",
    "ImplicitRNNCell",
]
