"""The names that code written for earlier libraries imports from ``utils``."""

from .data import cifar_load, mnist_load
from .training import Logger, get_valid_accuracy, train

__all__ = ["Logger", "cifar_load", "get_valid_accuracy", "mnist_load", "train"]
