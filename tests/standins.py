"""Tiny data sets in the formats of the real ones, for tests without a network."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from implicitdl.data import import_torchvision

CHANNELS = {"mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
FOLDERS = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py"}


def bytes_of(count: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    """The idx format: two zero bytes, 8 for uint8, the rank, the sizes as big-endian int32, the entries."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    path.write_bytes(header + array.tobytes())


def write_mnist(folder: Path) -> None:
    folder.mkdir(parents=True)
    for part, count, seed in (("train", 60, 0), ("t10k", 20, 1)):
        write_idx(folder / f"{part}-images-idx3-ubyte", bytes_of(count, (28, 28), seed))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)


def python2_pickle(value: object) -> bytes:
    """Protocol 0 with integers for booleans, as Python 2 wrote CIFAR's files."""
    return pickle.dumps(value, protocol=0).replace(b"I00\n", b"I0\n").replace(b"I01\n", b"I1\n")


def write_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny CIFAR files; torchvision is told their checksums, so that its own check stays on."""
    folder.mkdir(parents=True)
    cifar = import_torchvision().datasets.CIFAR10
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files: dict[str, object] = {
        name: {"data": bytes_of(20, (3072,), seed), "labels": [i % 10 for i in range(20)]}
        for seed, name in enumerate(batches)
    }
    files["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)]}
    sums = {}
    for name, content in files.items():
        data = python2_pickle(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(cifar, "train_list", [[name, sums[name]] for name in batches[:5]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]})
