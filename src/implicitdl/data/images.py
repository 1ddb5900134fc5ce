"""Labelled images held in memory as bytes, fetched a whole batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .._internal.errors import positive_int


class Images(Dataset[tuple[Tensor, int]]):
    """Labelled images in memory: bytes at rest, numbers in [0, 1] when fetched.

    ``images[i]`` is ``(image, label)`` as torchvision's own datasets give it after ``ToTensor``, in torch's
    default dtype. A DataLoader fetches a batch by one indexing of the byte tensor instead of one Python call
    per sample, which would cost more than the training step of a small model.

    Arguments:
        pixels: (samples, channels, height, width) uint8.
        labels: (samples,) class numbers, 0 … len(classes) − 1.
        classes: the classes' names.
        white: the byte that stands for 1.0.

    Example:
        >>> import torch
        >>> from implicitdl.data import Images
        >>> pixels = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
        >>> images = Images(pixels, torch.tensor([0, 1]), ("cat", "dog"))
        >>> image, label = images[1]
        >>> image.shape, image.max().item(), images.classes[label]
        (torch.Size([1, 8, 8]), 1.0, 'dog')
    """

    def __init__(self, pixels: Tensor, labels: Tensor, classes: Sequence[str], white: int = 255) -> None:
        self.pixels = pixels.contiguous()
        self.labels = labels.long()
        self.classes = tuple(classes)
        self.white = positive_int("Images", "white", white)

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one image."""
        return tuple(self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._scaled(self.pixels[index]), int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> Fetched:
        """A batch at once; DataLoader and Subset call this where it exists."""
        rows = torch.as_tensor(indices, device=self.pixels.device)
        return Fetched(self._scaled(self.pixels.index_select(0, rows)), self.labels.index_select(0, rows))

    def take(self, rows: Tensor) -> Images:
        """The images at these indices, (count,) int64, as a dataset of their own."""
        return Images(self.pixels[rows], self.labels[rows], self.classes, self.white)

    def _scaled(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.get_default_dtype()).div_(self.white)


class Fetched:
    """A fetched batch, which behaves as the list of its samples.

    A user's own ``DataLoader(train_ds, batch_size)`` or ``DataLoader(Subset(train_ds, rows))`` comes with
    PyTorch's default collate, which expects that list; only ``image_loader``'s collate knows that the batch
    is stacked already.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return zip(self.images, self.labels.tolist(), strict=True)


def _whole(batch: Fetched | list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Collate without collating.  A plain function, so that loaders with worker processes can pickle it."""
    if isinstance(batch, Fetched):
        return batch.images, batch.labels
    images, labels = default_collate(batch)  # a dataset wrapped by one that fetches sample by sample
    return images, labels


def image_loader(
    dataset: Dataset[tuple[Tensor, int]], batch_size: int, *, shuffle: bool = False
) -> DataLoader[tuple[Tensor, int]]:
    """An ordinary ``DataLoader`` over ``Images`` (or a ``Subset`` of them) that fetches each batch at once.

    It holds no random generator: the order of an epoch is a function of the global torch seed when its
    iteration starts.

    Arguments:
        dataset: the images.
        batch_size: samples per batch, ≥ 1; the last batch may be smaller.
        shuffle: draw a new order in every epoch.

    Returns:
        A loader of (images, labels): (batch, channels, height, width) in [0, 1], in torch's default dtype,
        and (batch,) int64.

    Raises:
        ArgumentError: batch_size < 1.

    Example:
        >>> from implicitdl.data import image_loader, load
        >>> images, labels = next(iter(image_loader(load("digits", 64).test_ds, batch_size=5)))
        >>> images.shape, labels.shape
        (torch.Size([5, 1, 8, 8]), torch.Size([5]))
    """
    batch_size = positive_int("image_loader", "batch_size", batch_size)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, collate_fn=_whole)
