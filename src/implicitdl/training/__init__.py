"""Training: the loop, its record, and what it keeps on disk."""

from .evaluate import NonFiniteLossError, get_valid_accuracy
from .logger import Logger, load_weights
from .loop import train

__all__ = ["Logger", "NonFiniteLossError", "get_valid_accuracy", "load_weights", "train"]
