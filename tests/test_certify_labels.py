"""Labels that fit no class are refused in words; one output says label 1 where y > 0, else 0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from implicitdl import ArgumentError, ImplicitModel, StateSpace, certify
from implicitdl.certify import Box, CertifiedLoss

U = torch.tensor([[0.2], [0.5], [0.9]], dtype=torch.float64)
# y = u − 0.5: below, on and above the threshold.
ONE = StateSpace.affine(torch.ones(1, 1, dtype=torch.float64), torch.tensor([-0.5], dtype=torch.float64))


def loss(model, labels):
    return CertifiedLoss(eps=0.1, ramp=1)(model, torch.rand(2, 4), labels, 1)


USES = {
    "margins": lambda model, labels: certify.margins(model, Box.around(torch.rand(2, 4), 0.1), labels),
    "pgd": lambda model, labels: certify.pgd(model, torch.rand(2, 4), labels, 0.1),
    "certified_accuracy": lambda model, labels: certify.certified_accuracy(model, [(torch.rand(2, 4), labels)], 0.1),
    "CertifiedLoss": loss,
}
WRONG = {
    "negative": (torch.tensor([0, -1]), "labels from 0 to 2, got -1 to 0"),
    "too large": (torch.tensor([1, 3]), "labels from 0 to 2, got 1 to 3"),
    "one-hot": (torch.eye(2, 3), r"int64, got \(\(2, 3\), torch.float32\). Pass class numbers: labels.argmax"),
    "floating": (torch.tensor([0.0, 1.0]), r"labels of shape \(batch=2,\) int64, got \(\(2,\), torch.float32\)"),
    "int32": (torch.tensor([0, 1], dtype=torch.int32), r"int64, got \(\(2,\), torch.int32\)"),
    "a list": ([0, 1], "int64, got list. Make a tensor of them"),
    "of another batch": (torch.tensor([0]), r"labels of shape \(batch=2,\) int64, got \(\(1,\)"),
}


@pytest.mark.parametrize(("labels", "words"), WRONG.values(), ids=WRONG)
def test_labels_that_do_not_fit(labels, words):
    for who, use in USES.items():
        with pytest.raises(ArgumentError, match=f"^{who}: expected .*{words}"):
            use(ImplicitModel(4, 3, 5), labels)


def test_labels_of_one_output_are_two():
    with pytest.raises(ArgumentError, match=r"labels from 0 to 1, got 0 to 2\. With one output they are 0 and 1"):
        certify.margins(ONE, Box.around(U, 0.1), torch.tensor([0, 1, 2]))


def test_an_attack_needs_scores_and_floating_inputs():
    labels = torch.tensor([0, 1, 0])
    with pytest.raises(ArgumentError, match=r"pgd: expected a model with scores of shape \(batch=3, q\), got \(3,\)"):
        certify.pgd(lambda u: u.sum(1), U, labels, 0.1)
    with pytest.raises(ArgumentError, match=r"pgd: expected u of a floating-point dtype, got torch.int64"):
        certify.pgd(ONE, U.long(), labels, 0.1)


@pytest.mark.parametrize("label", [0, 1])
def test_margins_of_one_output(label):
    """The scores are (0, y): class 1 leads by y, class 0 by −y."""
    found = certify.margins(ONE, Box.around(U, 0.1), torch.full((3,), label))
    lead = (2 * label - 1) * (U[:, 0] - 0.5) - 0.1
    assert torch.equal(found.lower[:, label], torch.full((3,), torch.inf, dtype=torch.float64))
    assert torch.allclose(found.lower[:, 1 - label], lead, rtol=0, atol=1e-12)
    assert found.certified.tolist() == (lead > 0).tolist()


def test_accuracy_of_one_output():
    """At y = 0 the label is 0."""
    for labels, clean, certified in (([0, 0, 1], 1.0, 2 / 3), ([0, 1, 1], 2 / 3, 2 / 3), ([0, 0, 0], 2 / 3, 1 / 3)):
        found = certify.certified_accuracy(ONE, [(U, torch.tensor(labels))], 0.1)
        assert (found.clean, found.certified) == (clean, certified)
        assert certify.attacked_accuracy(ONE, [(U, torch.tensor(labels))], 0.1).clean == clean


def test_the_loss_of_one_output_is_the_logistic_one():
    model, u, labels = ImplicitModel(4, 1, 5), torch.rand(6, 4), torch.tensor([0, 1, 1, 0, 1, 0])
    clean = CertifiedLoss(eps=0.1, ramp=1, clean=(1.0, 1.0))(model, u, labels, 1)
    at_a_point = CertifiedLoss(eps=0.0, ramp=1)(model, u, labels, 1)
    expected = F.binary_cross_entropy_with_logits(model(u)[:, 0], labels.to(u))
    assert torch.allclose(clean, expected)
    assert torch.allclose(at_a_point, expected, rtol=1e-6)
