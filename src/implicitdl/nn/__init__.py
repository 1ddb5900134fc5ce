"""Modules: the implicit model, its recurrent form, any map as an equilibrium layer, and classifiers around one."""

from .blocks import ResidualBlock, TanhBlock
from .classifier import ConvEquilibriumClassifier, DenseEquilibriumClassifier, MonotoneConvClassifier
from .compress import compress
from .deq import DEQ
from .function import ImplicitFunction, ImplicitFunctionInf, ImplicitFunctionTriu
from .model import ImplicitModel
from .monotone import MonotoneConvBlock
from .penalty import JacobianPenalty
from .rnn import ImplicitRNN, ImplicitRNNCell
from .starts import RandomStart, Start, WarmStart, ZeroStart

__all__ = [
    "DEQ",
    "ConvEquilibriumClassifier",
    "DenseEquilibriumClassifier",
    "ImplicitFunction",
    "ImplicitFunctionInf",
    "ImplicitFunctionTriu",
    "ImplicitModel",
    "ImplicitRNN",
    "ImplicitRNNCell",
    "JacobianPenalty",
    "MonotoneConvBlock",
    "MonotoneConvClassifier",
    "RandomStart",
    "ResidualBlock",
    "Start",
    "TanhBlock",
    "WarmStart",
    "ZeroStart",
    "compress",
]
