"""Labels of classes, and what they are compared with: scores, of which the label's own should be the largest.

A model with one output says which of two classes it sees by that output's sign: label 1 where y > 0, label 0 elsewhere.
That is what the scores (0, y) say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._internal.errors import wrong


def classes(q: int) -> int:
    """How many classes a model of q outputs knows."""
    return max(q, 2)


def scores(y: Tensor) -> Tensor:
    """The scores (batch, classes) that outputs (batch, q) are."""
    return torch.cat([torch.zeros_like(y), y], 1) if y.shape[1] == 1 else y


def score_rows(M: Tensor) -> Tensor:
    """The rows of C, D or b_y, of which every output has one, for the scores."""
    return torch.cat([torch.zeros_like(M), M]) if len(M) == 1 else M


def right(y: Tensor, labels: Tensor) -> Tensor:
    """(batch,) whether the label is what the outputs say; with several, a tie counts as wrong."""
    return (y[:, 0] > 0) == (labels > 0) if y.shape[1] == 1 else losing_by(y, labels) < 0


def losing_by(y: Tensor, labels: Tensor) -> Tensor:
    """max_j≠label s_j − s_label of the scores, (batch,)."""
    s, own = scores(y), labels.unsqueeze(1)
    return s.scatter(1, own, -torch.inf).amax(1) - s.gather(1, own).squeeze(1)


def check_labels(who: str, labels: Tensor, batch: int, q: int | None = None) -> None:
    """Refuse what is no vector of class numbers; q is the number of outputs, where it is known yet."""
    if not isinstance(labels, Tensor):
        raise wrong(who, f"labels of shape (batch={batch},) int64", type(labels).__name__, "Make a tensor of them.")
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        one_hot = labels.dim() == 2 and len(labels) == batch and labels.shape[1] > 1
        do = "Pass class numbers: labels.argmax(1)." if one_hot else "Pass one class number for every sample."
        raise wrong(who, f"labels of shape (batch={batch},) int64", (tuple(labels.shape), labels.dtype), do)
    if q is not None and bool(((labels < 0) | (labels >= classes(q))).any()):
        raise wrong(
            who, f"labels from 0 to {classes(q) - 1}", f"{int(labels.min())} to {int(labels.max())}",
            "With one output they are 0 and 1: it says 1 where y > 0." if q == 1 else "",
        )  # fmt: skip
