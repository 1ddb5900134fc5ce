"""Recurrence whose cell is an implicit model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .._internal import errors
from .._internal.context import plain
from .._internal.errors import wrong
from .model import ImplicitModel


class ImplicitRNNCell(nn.Module):
    """h_t = the output of an implicit model for the input [u_t; h_{t−1}], over a whole sequence, batch first.

    The state of the previous step is where the next solve starts.

    Arguments:
        input_dim: features of one step of the input.
        implicit_hidden_dim: n, size of the implicit model's state.
        hidden_dim: size of the recurrent state h.
        options: everything else that `ImplicitModel` takes.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitRNNCell
        >>> outputs, h = ImplicitRNNCell(input_dim=3, implicit_hidden_dim=8, hidden_dim=5)(torch.randn(2, 7, 3))
        >>> outputs.shape, h.shape
        (torch.Size([2, 7, 5]), torch.Size([2, 5]))
    """

    def __init__(self, *, input_dim: int, implicit_hidden_dim: int, hidden_dim: int, **options: Any) -> None:
        super().__init__()
        self.input_dim = errors.positive_int("ImplicitRNNCell", "input_dim", input_dim)
        self.hidden_dim = errors.positive_int("ImplicitRNNCell", "hidden_dim", hidden_dim)
        self.layer = ImplicitModel(
            input_dim=input_dim + hidden_dim, output_dim=hidden_dim, hidden_dim=implicit_hidden_dim, **options
        )

    def forward(
        self, x: Tensor | PackedSequence, h0: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run over a sequence.

        Arguments:
            x: (batch, steps, input_dim), or a `PackedSequence` of such.
            h0: (batch, hidden_dim); zeros when left out.
            lengths: (batch,) how many steps of each sample count; all when left out.  A boolean mask (batch, steps)
                of leading True is also taken.

        Returns:
            The state after every step, (batch, steps, hidden_dim), zero beyond a sample's length as torch's own
            recurrences have it, and the last state of each sample, (batch, hidden_dim).
        """
        if isinstance(x, PackedSequence):
            if lengths is not None:
                raise wrong("ImplicitRNNCell", "lengths or a PackedSequence", "both", "The pack has its lengths.")
            x, lengths = pad_packed_sequence(x, batch_first=True)
        self._check(x, h0)
        counts = None if lengths is None else _counts(lengths, x)
        h = x.new_zeros(x.shape[0], self.hidden_dim) if h0 is None else h0
        layer = self.layer
        weights = layer.weights()
        # The input's share of Bu and Du is one product over all steps; a step adds only that of h.
        B_u, B_h = layer.B.split([self.input_dim, self.hidden_dim], dim=1)
        from_input = F.linear(x, B_u, layer.b_x)
        for name, weight in (("B", layer.B), ("b_x", layer.b_x)):
            if weight is not None:
                errors.finite("ImplicitRNNCell", name, weight, errors.DIVERGED)
        state: Tensor | None = None
        outputs = []
        for t in range(x.shape[1]):
            b = from_input[:, t] + F.linear(h, B_h)
            solution = layer._solve(layer._equilibrium(b, weights), state)
            state = solution.value.detach()  # type: ignore[union-attr]
            new = layer.read_out(solution.value, torch.cat((x[:, t], h), dim=1))  # type: ignore[arg-type]
            if counts is None:
                h = new
                outputs.append(new)
            else:
                counted = (t < counts).unsqueeze(1)
                h = torch.where(counted, new, h)
                outputs.append(torch.where(counted, new, 0.0))
        return torch.stack(outputs, dim=1), h

    def _check(self, x: Tensor, h0: Tensor | None) -> None:
        who = "ImplicitRNNCell"
        if x.dim() != 3 or x.shape[2] != self.input_dim or 0 in x.shape:
            raise wrong(
                who, f"x of shape (batch, steps, input_dim={self.input_dim})", tuple(x.shape),
                "Batches come first, and every sequence has at least one step.",
            )  # fmt: skip
        errors.same_place(who, "x", x, self.layer.B)
        errors.finite(who, "x", x)
        if h0 is not None and h0.shape != (x.shape[0], self.hidden_dim):
            raise wrong(who, f"h0 of shape (batch={x.shape[0]}, hidden_dim={self.hidden_dim})", tuple(h0.shape))


class ImplicitRNN(nn.Module):
    """An implicit recurrence and a linear read-out of its last state.

    Arguments:
        input_dim: features of one step of the input.
        output_dim: features of the prediction.
        implicit_hidden_dim: n, size of the implicit model's state.
        hidden_dim: size of the recurrent state.
        options: everything else that `ImplicitModel` takes.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitRNN
        >>> rnn = ImplicitRNN(input_dim=1, output_dim=2, hidden_dim=10, implicit_hidden_dim=10)
        >>> rnn(torch.randn(4, 20, 1)).shape
        torch.Size([4, 2])
        >>> y, h = rnn(torch.randn(4, 20, 1), every_step=True, return_state=True)
        >>> y.shape, h.shape
        (torch.Size([4, 20, 2]), torch.Size([4, 10]))
    """

    def __init__(
        self, *, input_dim: int, output_dim: int, implicit_hidden_dim: int, hidden_dim: int, **options: Any
    ) -> None:
        super().__init__()
        self.recurrent = ImplicitRNNCell(
            input_dim=input_dim, implicit_hidden_dim=implicit_hidden_dim, hidden_dim=hidden_dim, **options
        )
        device, dtype = options.get("device"), options.get("dtype")
        self.linear = nn.Linear(hidden_dim, output_dim, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor | PackedSequence,
        h0: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        every_step: bool = False,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction from the last state of each sample.

        Arguments:
            x, h0, lengths: as for `ImplicitRNNCell`.
            every_step: predict after every step, (batch, steps, output_dim), instead of the last one.
            return_state: also return the last recurrent state, (batch, hidden_dim), to go on from.

        Returns:
            (batch, output_dim), or as asked for above.
        """
        outputs, h = self.recurrent(x, h0, lengths=lengths)
        y = self.linear(outputs if every_step else h)
        if plain() and not torch.isfinite(y.detach().sum()):
            for name, weight in self.linear.named_parameters():
                errors.finite("ImplicitRNN", name, weight, errors.DIVERGED)
        return (y, h) if return_state else y


def _counts(lengths: Tensor, x: Tensor) -> Tensor:
    """Lengths from lengths or from a mask."""
    batch, steps = x.shape[:2]
    if lengths.dtype == torch.bool:
        fits = lengths.shape == (batch, steps)
        if not fits or (plain() and bool((lengths[:, 1:] & ~lengths[:, :-1]).any())):
            raise wrong(
                "ImplicitRNNCell", f"a mask of shape (batch={batch}, steps={steps}) that starts with its True",
                f"shape {tuple(lengths.shape)}" + (", True after False" if fits else ""),
            )  # fmt: skip
        counts = lengths.sum(dim=1)
    else:
        counts = lengths
    fits = counts.shape == (batch,)
    if not fits or (plain() and not 1 <= int(counts.min()) <= int(counts.max()) <= steps):
        raise wrong(
            "ImplicitRNNCell", f"lengths of shape (batch={batch},) between 1 and {steps}",
            f"{tuple(counts.shape)}" + (f" with values {counts.tolist()[:8]}" if fits else ""),
        )  # fmt: skip
    return counts.to(x.device)
