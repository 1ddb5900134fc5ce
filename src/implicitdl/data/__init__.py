"""Data: image sets held in memory, with whole-batch loaders, and the generators of the papers' tasks."""

from .generators import Regression, arithmetic, spiky
from .images import Images, image_loader
from .loading import Data, cifar_load, load, mnist_load
from .sources import NAMES, DatasetNotFoundError, import_torchvision

__all__ = [
    "NAMES",
    "Data",
    "DatasetNotFoundError",
    "Images",
    "Regression",
    "arithmetic",
    "cifar_load",
    "image_loader",
    "import_torchvision",
    "load",
    "mnist_load",
    "spiky",
]
