"""One call from a dataset's name to its loaders."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .._internal.errors import choice, extra, fraction, non_negative_int, positive_int, wrong
from .images import Images, image_loader
from .sources import NAMES, data_root, digits, torchvision_split

_DIGITS_TEST = 0.2  # scikit-learn's digits come as one set

Loader = DataLoader[tuple[Tensor, int]]


@dataclass(frozen=True, eq=False)
class Data:
    """A dataset's three parts and their loaders; unpacks as ``train_ds, train_dl, valid_ds, valid_dl``.

    Attributes:
        train_ds, train_dl: what to train on; its loader shuffles.
        valid_ds, valid_dl: what to choose the epoch and the settings on: the part of the training data that
            ``holdout`` kept back, or the test set itself where nothing was held out.
        test_ds, test_dl: the test set: for the figure that is reported, once.

    Example:
        >>> from implicitdl.data import load
        >>> data = load("digits", batch_size=64, holdout=0.1)
        >>> len(data.train_ds), len(data.valid_ds), len(data.test_ds)
        (1293, 144, 360)
    """

    train_ds: Images
    train_dl: Loader
    valid_ds: Images
    valid_dl: Loader
    test_ds: Images
    test_dl: Loader

    def __iter__(self) -> Iterator[Any]:
        return iter((self.train_ds, self.train_dl, self.valid_ds, self.valid_dl))

    @property
    def input_dim(self) -> int:
        """p: the pixels of one image, flattened, channels included."""
        return math.prod(self.train_ds.shape)

    @property
    def output_dim(self) -> int:
        """q: the number of classes."""
        return len(self.train_ds.classes)


def load(
    name: str,
    batch_size: int,
    root: str | os.PathLike[str] | None = None,
    *,
    holdout: float = 0.0,
    seed: int = 0,
    download: bool = True,
) -> Data:
    """Load an image dataset by name, whole, into memory.

    Arguments:
        name: "digits" (1 × 8 × 8, ships inside scikit-learn; a stratified 20 % is its test set), or
            torchvision's "mnist", "fashion-mnist" (1 × 28 × 28) or "cifar10" (3 × 32 × 32) with their
            standard test sets.
        batch_size: samples per batch of all three loaders, ≥ 1.
        root: the folder that holds the datasets; else the environment's IMPLICITDL_DATA, else ``data``.
        holdout: the share of the training data, in [0, 1), to hold out for validation, stratified by class.
            Choose the epoch on it and keep the test set for the final figure. With 0 the validation set is
            the test set.
        seed: of the split of digits and of the held-out part; the order of batches follows the global torch
            seed instead.
        download: fetch, or unpack, missing files into root.

    Returns:
        ``Data``, which unpacks as ``train_ds, train_dl, valid_ds, valid_dl`` and has ``test_ds, test_dl``
        beside. Batches are (batch, channels, height, width) in [0, 1], in torch's default dtype, and (batch,)
        int64.

    Raises:
        DatasetNotFoundError: files are missing and could not be downloaded; the message says which to put
            where.
        ArgumentError: an unknown name, a bad batch_size, holdout or seed, a root that is a file, damaged
            files.
        MissingExtraError: torchvision or scikit-learn is not installed.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998 (mnist); Xiao et
        al., arXiv:1708.07747 (fashion-mnist); Krizhevsky, "Learning multiple layers of features from tiny
        images", 2009 (cifar10); Alpaydin and Kaynak, UCI optical recognition of handwritten digits, 1998
        (digits).

    Example:
        >>> from implicitdl.data import load
        >>> train_ds, train_dl, valid_ds, valid_dl = load("digits", batch_size=64)
        >>> images, labels = next(iter(train_dl))
        >>> images.shape, labels.dtype, len(valid_ds)
        (torch.Size([64, 1, 8, 8]), torch.int64, 360)
    """
    choice("load", "name", name, NAMES)
    batch_size = positive_int("load", "batch_size", batch_size)
    holdout = fraction("load", "holdout", holdout)
    seed = non_negative_int("load", "seed", seed)
    if name == "digits":
        train, test = _stratified(digits(), _DIGITS_TEST, seed)
    else:
        folder = data_root(root)
        train = torchvision_split(name, folder, train=True, download=download)
        test = torchvision_split(name, folder, train=False, download=download)
    valid = test
    if holdout:
        train, valid = _stratified(train, holdout, seed)
    return Data(
        train_ds=train,
        train_dl=image_loader(train, batch_size, shuffle=True),
        valid_ds=valid,
        valid_dl=image_loader(valid, batch_size),
        test_ds=test,
        test_dl=image_loader(test, batch_size),
    )


def _stratified(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """Split off a share of every class, as a user of scikit-learn would, to be compared with like figures."""
    split = extra("sklearn.model_selection", "data").train_test_split
    rows = torch.arange(len(images), device="cpu").numpy()
    try:
        kept, held = split(rows, test_size=share, stratify=images.labels.numpy(), random_state=seed % 2**32)
    except ValueError as error:
        every = "a holdout that leaves every class in both parts"
        raise wrong("load", every, share, f"Choose another share: {error}") from error
    return images.take(torch.from_numpy(kept)), images.take(torch.from_numpy(held))


def mnist_load(batch_size: int, root: str | os.PathLike[str] | None = None) -> tuple[Images, Loader, Images, Loader]:
    """MNIST as the implicit deep learning examples load it: validation is the standard test set.

    Arguments:
        batch_size: samples per batch, ≥ 1.
        root: as in ``load``.

    Returns:
        ``train_ds, train_dl, valid_ds, valid_dl``; images are (1, 28, 28) in [0, 1].

    Raises:
        As ``load``.

    Example:
        >>> from implicitdl.data import mnist_load
        >>> train_ds, train_dl, valid_ds, valid_dl = mnist_load(100)  # doctest: +SKIP
    """
    train_ds, train_dl, valid_ds, valid_dl = load("mnist", batch_size, root)
    return train_ds, train_dl, valid_ds, valid_dl


def cifar_load(batch_size: int, root: str | os.PathLike[str] | None = None) -> tuple[Images, Loader, Images, Loader]:
    """CIFAR-10 as the implicit deep learning examples load it: validation is the standard test set.

    Arguments:
        batch_size: samples per batch, ≥ 1.
        root: as in ``load``.

    Returns:
        ``train_ds, train_dl, valid_ds, valid_dl``; images are (3, 32, 32) in [0, 1].

    Raises:
        As ``load``.

    Example:
        >>> from implicitdl.data import cifar_load
        >>> train_ds, train_dl, valid_ds, valid_dl = cifar_load(100)  # doctest: +SKIP
    """
    train_ds, train_dl, valid_ds, valid_dl = load("cifar10", batch_size, root)
    return train_ds, train_dl, valid_ds, valid_dl
