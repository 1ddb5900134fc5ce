"""Where the images come from: scikit-learn's digits and torchvision's own datasets, with worded failures."""

from __future__ import annotations

import http.client
import os
import pickle
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .._internal.errors import ArgumentError, extra, wrong
from .images import Images

_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}

NAMES = ("digits", *_CLASSES)
"""The names `load` knows."""

# What torchvision lets through when a file is truncated or is not what its name says: the idx parser
# asserts, indexes a table and views; CIFAR's checks an md5 before it unpickles.
_DAMAGE = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
)


class DatasetNotFoundError(ArgumentError, FileNotFoundError):
    """The dataset's files are not there and could not be downloaded; the message says which to put where."""


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not load.

    Returns:
        The module ``torchvision``; a later ``import torchvision`` finds it.

    Raises:
        MissingExtraError: torchvision is not installed.

    Example:
        >>> from implicitdl.data import import_torchvision
        >>> import_torchvision().datasets.MNIST.__name__
        'MNIST'
    """
    try:
        return extra("torchvision", "data")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    # The package index's torchvision is built for CUDA. Beside a CPU build of torch its compiled operators
    # do not load, and its import fails where it describes two of them that nobody declared ("operator
    # torchvision::nms does not exist"). The datasets use none, so declaring the two without an
    # implementation is enough. The failed import left submodules behind, which would hide names from the
    # second one.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return extra("torchvision", "data")


def data_root(root: str | os.PathLike[str] | None) -> Path:
    """`root`, else the environment's IMPLICITDL_DATA, else ``data``."""
    chosen = (os.environ.get("IMPLICITDL_DATA") or "data") if root is None else root
    if not isinstance(chosen, (str, os.PathLike)):
        raise wrong("load", "root to be a path", repr(root))
    path = Path(chosen).expanduser()
    if path.exists() and not path.is_dir():
        raise wrong("load", "root to be a folder", f"the file {path}", "Name the folder that holds the datasets.")
    return path


def digits() -> Images:
    """The 1,797 digits of 8 × 8 pixels, 0 … 16, that ship inside scikit-learn."""
    source = extra("sklearn.datasets", "data").load_digits()
    pixels = torch.from_numpy(source.images).to(torch.uint8)[:, None]
    return Images(pixels, torch.from_numpy(source.target), [str(name) for name in source.target_names], white=16)


def torchvision_split(name: str, root: Path, *, train: bool, download: bool) -> Images:
    """The standard training or test split of a torchvision dataset, read whole."""
    dataset = getattr(import_torchvision().datasets, _CLASSES[name])
    folder, files = _layout(dataset, root)
    if not all((folder / file).is_file() for file in files):
        _provide(dataset, root, download=download)
    try:
        return _read(dataset, root, train=train)
    except _DAMAGE as error:
        raise wrong(
            "load",
            f"whole {name} files in {folder}",
            f"one that is truncated, damaged or unreadable ({_reason(error)})",
            "Delete the folder and load again, or put whole files there.",
        ) from error


def _layout(dataset: Any, root: Path) -> tuple[Path, list[str]]:
    """The folder and the files that torchvision's class reads."""
    if hasattr(dataset, "base_folder"):  # the CIFAR family
        listed = [*dataset.train_list, *dataset.test_list]
        return root / dataset.base_folder, [*(file for file, _ in listed), dataset.meta["filename"]]
    return root / dataset.__name__ / "raw", [file.removesuffix(".gz") for file, _ in dataset.resources]


def _provide(dataset: Any, root: Path, *, download: bool) -> None:
    """Let torchvision unpack or download what is missing; a failure leaves no empty folders behind."""
    folder, files = _layout(dataset, root)
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if not download:
            raise FileNotFoundError("download=False")
        dataset(root, download=True)
    except (*_DAMAGE, http.client.HTTPException) as error:
        for path in absent:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:  # else they are there now and damaged, which reading them words better
            raise DatasetNotFoundError(_not_found(dataset, folder, missing, _reason(error))) from error


def _not_found(dataset: Any, folder: Path, missing: list[str], reason: str) -> str:
    archive = getattr(dataset, "filename", None)
    packed = f"{archive} in {folder.parent}" if archive else "their original .gz archives"
    error = wrong(
        "load",
        f"the files {', '.join(missing)} in {folder}",
        f"none of them, and no download ({reason})",
        f"Put them there, or {packed}, or name another folder with root, --root or IMPLICITDL_DATA.",
    )
    return str(error)


def _reason(error: BaseException) -> str:
    """One line of an exception that may have many; torchvision's last one names the cause."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].partition(". ")[0].rstrip(".")


def _read(dataset: Any, root: Path, *, train: bool) -> Images:
    with warnings.catch_warnings():
        # CIFAR's pickles were written by Python 2, so their dtypes say align=0, of which some releases of
        # NumPy warn.
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        source = dataset(root, train=train, download=False)
    pixels, labels = (torch.as_tensor(part, device="cpu") for part in (source.data, source.targets))
    if len(pixels) != len(labels) or not 0 <= labels.min() <= labels.max() < len(source.classes):
        raise ValueError(f"{len(pixels)} images and {len(labels)} labels, {labels.min()} to {labels.max()}")
    channels_first = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return Images(channels_first, labels, source.classes)
