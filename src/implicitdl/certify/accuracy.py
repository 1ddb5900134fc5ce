"""Robust accuracy: the share of samples that an attack leaves, and the share whose class is proved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._internal.errors import non_negative, positive_int, wrong
from ..statespace.space import Model
from .bounds import margins
from .contraction import Method, contractive, exact_space
from .crown import Crown
from .functionals import Box, check_labels, losing_by, right

# Step size in units of ε/steps: far enough to cross the ball, and to come back from a face (Madry et al. 2018).
_STRIDE = 2.5


@dataclass(frozen=True)
class AttackedAccuracy:
    """What an attack found of a model's accuracy when every component of the input may move by ε.

    Attributes:
        eps: ε.
        samples: how many were looked at.
        clean: share that is right without an attack.
        attacked: share that is right under the attack that was tried; the true robust accuracy is at most this.
    """

    eps: float
    samples: int
    clean: float
    attacked: float

    def __str__(self) -> str:
        return f"ε = {self.eps:g}: clean {self.clean:.2%}, attacked {self.attacked:.2%} of {self.samples:,} samples"


@dataclass(frozen=True)
class CertifiedAccuracy(AttackedAccuracy):
    """What is known of a model's accuracy when every component of the input may move by ε.

    The true robust accuracy lies between ``certified`` and ``attacked``.

    Attributes:
        eps, samples, clean, attacked: as of `AttackedAccuracy`.
        certified: share that is proved to be right for every input within ε.
        lost: share of the margins for which the raw adjoint bound was looser than the interval bound; None for methods
            without one.
    """

    certified: float
    lost: float | None

    def __str__(self) -> str:
        text = (
            f"ε = {self.eps:g}: clean {self.clean:.2%}, attacked {self.attacked:.2%}, certified {self.certified:.2%} "
            f"of {self.samples:,} samples"
        )
        lost = "" if self.lost is None else f" (raw adjoint bound above the interval bound: {self.lost:.2%} of margins)"
        return text + lost


def attacked_accuracy(
    model: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    eps: float,
    *,
    steps: int = 20,
    restarts: int = 1,
    domain: tuple[float, float] | None = (0.0, 1.0),
) -> AttackedAccuracy:
    """Clean and attacked accuracy of any classifier at radius ε, also where no bound applies.

    With one output y, the logit of class 1, the model says label 1 where y > 0, else 0.

    Arguments:
        model: maps inputs to class scores (batch, q), differentiably.
        loader: batches (inputs, labels), where the model is and in its dtype.
        eps, steps, restarts, domain: as for `pgd`.

    Returns:
        The `AttackedAccuracy`.

    Raises:
        ArgumentError: an empty loader, or as `pgd`.

    Example:
        >>> import torch
        >>> from implicitdl import certify
        >>> batch = torch.tensor([[0.4], [0.1]]), torch.tensor([1, 1])
        >>> print(certify.attacked_accuracy(lambda u: torch.cat([u, 1 - u], 1), [batch], 0.2))
        ε = 0.2: clean 100.00%, attacked 50.00% of 2 samples
    """
    samples = clean = attacked = 0
    for u, labels in loader:
        good, stands = _attacked(model, u, labels, eps, steps, restarts, domain)
        samples, clean, attacked = samples + len(u), clean + int(good.sum()), attacked + int(stands.sum())
    _some("attacked_accuracy", samples)
    return AttackedAccuracy(eps, samples, clean / samples, attacked / samples)


def certified_accuracy(
    model: Model,
    loader: Iterable[tuple[Tensor, Tensor]],
    eps: float,
    method: Method | None = None,
    *,
    steps: int = 20,
    restarts: int = 1,
    domain: tuple[float, float] | None = (0.0, 1.0),
) -> CertifiedAccuracy:
    """Clean, attacked and certified accuracy of a classifier at radius ε, all of the same weights in float64.

    A sample counts as attacked when `pgd` leaves it right, and as certified when `margins` are positive.  Both speak of
    the exact equilibrium; the attack solves it to 1e-10.  With several outputs, the largest is what the model says, and
    a tie counts as wrong.  With one output y, the logit of class 1, it says label 1 where y > 0, else 0.

    Arguments:
        model: an `ImplicitModel` or `StateSpace` whose equation contracts.
        loader: batches (inputs, labels).
        eps: ε ≥ 0, of every component of the input.
        method: of the bound; `Crown()` by default.
        steps, restarts: of the attack; see `pgd`.
        domain: the least and the greatest value of an input's component; None for any.

    Returns:
        The `CertifiedAccuracy`, in which certified ≤ attacked ≤ clean.

    Raises:
        ArgumentError: an empty loader, or as `margins`.

    Example:
        >>> import torch
        >>> from implicitdl import ImplicitModel, certify
        >>> model = ImplicitModel(input_dim=3, output_dim=2, hidden_dim=5)
        >>> u = torch.rand(8, 3)
        >>> found = certify.certified_accuracy(model, [(u, model(u).argmax(1))], 1e-6)
        >>> found.clean, found.samples
        (1.0, 8)
    """
    who = "certified_accuracy"
    non_negative(who, "eps", eps)
    positive_int(who, "steps", steps)
    positive_int(who, "restarts", restarts)
    method = Crown() if method is None else method
    space = exact_space(who, model)
    proved = contractive(who, space)
    samples = clean = attacked = certified = 0
    lost: list[float] = []
    for inputs, targets in loader:
        check_labels(who, targets, len(inputs), space.q)
        u, labels = inputs.flatten(1).to(space.b_x), targets.to(space.device)
        found = margins(proved, Box.around(u, eps, domain), labels, method)
        good, stands = _attacked(space, u, labels, eps, steps, restarts, domain)
        # A point inside the box that the model gets wrong, and a proof that there is none.
        assert not bool((found.certified & ~stands).any()), "certify: a bound was violated by the attack"
        samples, clean = samples + len(u), clean + int(good.sum())
        attacked, certified = attacked + int(stands.sum()), certified + int(found.certified.sum())
        lost += [] if found.lost is None else [found.lost * len(u)]
    _some(who, samples)
    share = sum(lost) / samples if lost else None
    return CertifiedAccuracy(eps, samples, clean / samples, attacked / samples, certified / samples, share)


def _attacked(
    model: Callable[[Tensor], Tensor],
    u: Tensor,
    labels: Tensor,
    eps: float,
    steps: int,
    restarts: int,
    domain: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """Samples that are right without an attack, and those still right under it, (batch,) bool each."""
    worst = pgd(model, u, labels, eps, steps=steps, restarts=restarts, domain=domain)
    with torch.no_grad():
        clean = right(model(u), labels)
        return clean, clean & right(model(worst), labels)


def _some(who: str, samples: int) -> None:
    if samples == 0:
        raise wrong(who, "a loader with samples", "none", "Check the data set.")


def pgd(
    model: Callable[[Tensor], Tensor],
    u: Tensor,
    labels: Tensor,
    eps: float,
    *,
    steps: int = 20,
    restarts: int = 1,
    domain: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The worst inputs that signed gradient steps find within ε of u.

    They ascend max_j≠label y_j − y_label, which is positive exactly where the model is wrong.  The first start is u
    itself, so that a sample that is wrong without an attack stays wrong; the other restarts begin at random points of
    the ball.  A model with one output says label 1 where y > 0, else 0.

    Arguments:
        model: maps inputs to class scores (batch, q); differentiable in its input, in the dtype of u.
        u: (batch, \\*any).
        labels: (batch,) int64, class numbers.
        eps: ε ≥ 0, of every component.
        steps: gradient steps of each restart.
        restarts: starts, of which the first is u.
        domain: the least and the greatest value of a component; None for any.
        generator: of the random starts; torch's global one by default.

    Returns:
        Inputs of the shape of u, each the worst point that was seen for its sample.

    Raises:
        ArgumentError: ε < 0, or labels that do not fit.

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks (2018).

    Example:
        >>> import torch
        >>> from implicitdl import certify
        >>> certify.pgd(lambda u: torch.cat([u, 1 - u], 1), torch.tensor([[0.6]]), torch.tensor([0]), 0.2)
        tensor([[0.4000]])
    """
    non_negative("pgd", "eps", eps)
    positive_int("pgd", "steps", steps)
    positive_int("pgd", "restarts", restarts)
    if not u.is_floating_point():
        raise wrong("pgd", "u of a floating-point dtype", u.dtype, "Cast it to the dtype of the weights.")
    check_labels("pgd", labels, len(u))
    u = u.detach()
    low, high = u - eps, u + eps
    if domain is not None:
        low, high = low.clamp(min=domain[0]), high.clamp(max=domain[1])
    worst, most = u, torch.full_like(labels, -torch.inf, dtype=u.dtype)
    for restart in range(restarts):
        at = u
        if restart:
            at = low + (high - low) * torch.rand(u.shape, generator=generator, dtype=u.dtype, device=u.device)
        for _ in range(steps + 1):  # the last one only looks
            with torch.enable_grad():
                at = at.detach().requires_grad_()
                lead = _lead(model, at, labels)
                (g,) = torch.autograd.grad(lead.sum(), at)
            at, lead = at.detach(), lead.detach()
            better = lead > most
            most = torch.where(better, lead, most)
            worst = torch.where(better.view(-1, *[1] * (u.dim() - 1)), at, worst)
            at = torch.clamp(at + _STRIDE * eps / steps * g.sign(), low, high)
    return worst


def _lead(model: Callable[[Tensor], Tensor], u: Tensor, labels: Tensor) -> Tensor:
    y = model(u)
    if y.dim() != 2 or len(y) != len(u):
        raise wrong("pgd", f"a model with scores of shape (batch={len(u)}, q)", tuple(y.shape))
    check_labels("pgd", labels, len(u), y.shape[1])
    return losing_by(y, labels)
