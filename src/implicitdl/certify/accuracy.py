"""Certified accuracy: the share of samples whose class is proved, beside what an attack leaves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .._checks import non_negative, wrong
from .attack import losing_by, pgd
from .bounds import margins
from .domain import Box
from .methods import Crown, Method
from .normal import Model, contractive, exact_space


@dataclass(frozen=True)
class CertifiedAccuracy:
    """What is known of a model's accuracy when every component of the input may move by ε.

    The true robust accuracy lies between ``certified`` and ``attacked``.

    Attributes:
        eps: ε.
        samples: how many were looked at.
        clean: share that is right without an attack.
        attacked: share that is right under the attack that was tried.
        certified: share that is proved to be right for every input within ε.
        lost: share of the margins for which the raw adjoint bound was looser than the interval bound; None for methods
            without one.
    """

    eps: float
    samples: int
    clean: float
    attacked: float
    certified: float
    lost: float | None

    def __str__(self) -> str:
        text = (
            f"ε = {self.eps:g}: clean {self.clean:.2%}, attacked {self.attacked:.2%}, certified {self.certified:.2%} "
            f"of {self.samples:,} samples"
        )
        lost = "" if self.lost is None else f" (raw adjoint bound above the interval bound: {self.lost:.2%} of margins)"
        return text + lost


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
    the exact equilibrium; the attack solves it to 1e-10.

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
    method = Crown() if method is None else method
    space, proved = exact_space(who, model), contractive(who, model)
    samples = clean = attacked = certified = 0
    lost: list[float] = []
    for inputs, targets in loader:
        u, labels = inputs.flatten(1).to(space.b_x), targets.to(space.device)
        found = margins(proved, Box.around(u, eps, domain), labels, method)
        right = losing_by(space(u), labels) < 0
        worst = pgd(space, u, labels, eps, steps=steps, restarts=restarts, domain=domain)
        stands = right & (losing_by(space(worst), labels) < 0)
        # A point inside the box that the model gets wrong, and a proof that there is none.
        assert not bool((found.certified & ~stands).any()), "certify: a bound was violated by the attack"
        samples, clean = samples + len(u), clean + int(right.sum())
        attacked, certified = attacked + int(stands.sum()), certified + int(found.certified.sum())
        lost += [] if found.lost is None else [found.lost * len(u)]
    if samples == 0:
        raise wrong(who, "a loader with samples", "none", "Check the data set.")
    share = sum(lost) / samples if lost else None
    return CertifiedAccuracy(eps, samples, clean / samples, attacked / samples, certified / samples, share)
