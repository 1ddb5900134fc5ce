"""ImplicitRNN: equal to the loop it stands for, over padded, packed and masked sequences."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from implicitdl import ArgumentError, ImplicitRNN, ImplicitRNNCell, Monitor, Picard
from implicitdl.activations import TANH
from precision import digits

SIZES = {"input_dim": 2, "implicit_hidden_dim": 6, "hidden_dim": 3}


def by_hand(cell, x, h):
    outputs = []
    for t in range(x.shape[1]):
        h = cell.layer(torch.cat((x[:, t], h), dim=1))
        outputs.append(h)
    return torch.stack(outputs, dim=1), h


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"no_D": True}, {"is_low_rank": True, "rank": 2}, {"activation": TANH}],
    ids=["plain", "bias", "no-D", "low-rank", "tanh"],
)
def test_equals_the_loop_over_the_model(options):
    cell = ImplicitRNNCell(**SIZES, **options)
    x, h0 = torch.randn(4, 7, 2), torch.randn(4, 3)
    for start in (None, h0):
        outputs, h = cell(x, start)
        expected, last = by_hand(cell, x, torch.zeros(4, 3) if start is None else start)
        assert torch.allclose(outputs, expected, atol=digits(1e-8, 1e-4))
        assert torch.allclose(h, last, atol=digits(1e-8, 1e-4))


@pytest.mark.float64
def test_gradcheck_through_time():
    rnn = ImplicitRNN(**SIZES, output_dim=2, bias=True)
    names = [name for name, _ in rnn.named_parameters()]

    def call(x, h0, *weights):
        return torch.func.functional_call(rnn, dict(zip(names, weights, strict=True)), (x, h0))

    inputs = (torch.randn(2, 3, 2, requires_grad=True), torch.randn(2, 3, requires_grad=True))
    assert torch.autograd.gradcheck(call, (*inputs, *rnn.parameters()), fast_mode=True)


def test_variable_lengths_packed_masked_and_alone():
    cell = ImplicitRNNCell(**SIZES, bias=True)
    x, lengths = torch.randn(3, 6, 2), torch.tensor([4, 6, 1])
    outputs, h = cell(x, lengths=lengths)
    mask = torch.arange(6) < lengths.unsqueeze(1)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    for other_outputs, other_h in (cell(x, lengths=mask), cell(packed)):
        assert torch.allclose(other_h, h)
        assert torch.allclose(other_outputs, outputs)
    for i, length in enumerate(lengths.tolist()):
        alone, last = cell(x[i : i + 1, :length])
        assert torch.allclose(last[0], h[i], atol=1e-9)
        assert torch.allclose(alone[0], outputs[i, :length], atol=1e-9)
        assert (outputs[i, length:] == 0).all()


def test_going_on_from_a_state_equals_one_run():
    rnn = ImplicitRNN(**SIZES, output_dim=1)
    x = torch.randn(2, 8, 2)
    whole, h = rnn(x, every_step=True, return_state=True)
    first, middle = rnn(x[:, :5], every_step=True, return_state=True)
    second, last = rnn(x[:, 5:], middle, every_step=True, return_state=True)
    assert torch.allclose(torch.cat((first, second), dim=1), whole, atol=1e-9)
    assert torch.allclose(last, h, atol=1e-9)
    assert torch.allclose(rnn(x), whole[:, -1])


@pytest.mark.float64
def test_the_previous_step_warm_starts_the_next():
    cell = ImplicitRNNCell(**SIZES, activation=TANH, solver=Picard(rtol=1e-6))
    with torch.no_grad():
        cell.layer.A.copy_(0.9 * torch.eye(6))
    x = torch.ones(4, 30, 2)  # a constant input: the state settles
    with Monitor() as warm, torch.no_grad():
        cell(x)
    with Monitor() as cold, torch.no_grad():
        by_hand(cell, x, torch.zeros(4, 3))
    assert warm.forward_steps < 0.7 * cold.forward_steps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c(torch.zeros(2, 3)), r"\(batch, steps, input_dim=2\), got \(2, 3\)"),
        (lambda c: c(torch.zeros(2, 0, 2)), "every sequence has at least one step"),
        (lambda c: c(torch.zeros(2, 3, 2), torch.zeros(2, 4)), r"h0 of shape \(batch=2, hidden_dim=3\), got \(2, 4\)"),
        (lambda c: c(torch.full((2, 3, 2), torch.nan)), "finite x"),
        (lambda c: c(torch.zeros(2, 3, 2), lengths=torch.tensor([1, 4])), r"between 1 and 3, got \(2,\) with values \[1, 4\]"),
        (lambda c: c(torch.zeros(2, 3, 2), lengths=torch.tensor([[False, True, True]] * 2)), "starts with its True"),
        (lambda c: ImplicitRNNCell(**SIZES, kapa=1), "kapa"),
    ],
)  # fmt: skip
def test_bad_arguments_are_worded(call, message):
    with pytest.raises((ArgumentError, TypeError), match=message):
        call(ImplicitRNNCell(**SIZES))


def test_dimensions_are_keyword_only():
    with pytest.raises(TypeError):
        ImplicitRNN(1, 1, 10, 10)
