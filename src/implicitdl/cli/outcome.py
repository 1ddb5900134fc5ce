"""What `sim` leaves: sim.json, the model, the pictures, and a table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import viz
from .._internal.errors import extra
from ..constraints import Unconstrained
from ..data import Data
from ..nn import ImplicitModel
from ..sim import PathPoint, SIMReport, score
from ..statespace import StateSpace, prune, refit
from . import folder
from .report import say
from .sim import SimOptions
from .teacher import statespace, weights_of


class Outcome:
    """The figures of a `sim`, as they come in.

    Arguments:
        where: its folder.
        options: how it was made.
        report: of the rows.
        accuracy: on the test set, of the "teacher" and of the "sim".
    """

    def __init__(self, where: Path, options: SimOptions, report: SIMReport, accuracy: dict[str, float]) -> None:
        self._where, self._options, self._report, self._accuracy = where, options, report, accuracy
        self._curve: list[dict[str, Any]] = []

    def save(self, model: ImplicitModel) -> None:
        model.save_pretrained(self._where / folder.MODEL)
        viz.spy(model, magnitude=True, path=self._where / "plots" / "spy.png")
        viz.row_gaps(self._report, path=self._where / "plots" / "gaps.png")
        self._write()

    def follow(self, points: Sequence[PathPoint], teacher: nn.Module, loader: Any, data: Data) -> None:
        """Held-out accuracy along a path, and of the teacher pruned by magnitude to as many weights.

        Both are refitted, or neither.
        """
        u = torch.cat([images for images, _ in loader])
        space, total = statespace(teacher, u[:2]), weights_of(teacher)
        for point in points:
            count = point.report.nonzeros
            row = {"lambda_z": point.lambda_z, "nonzeros": count, "accuracy": score(point.model, data.valid_dl)}
            if space is not None and 0 < count < total:
                row["pruned"] = score(self._pruned(space, u.to(space.A), count / total), data.valid_dl)
            self._curve.append(row)
        self._draw(score(teacher, data.valid_dl), total)
        self._write()

    def tell(self) -> None:
        facts = _table(show_header=False)
        for name, value in self._facts().items():
            facts.add_row(name, value)
        _print(facts)
        if self._curve:
            table = _table("λ_z", "nonzeros", *(f"{name}, held-out accuracy" for name in self._names.values()))
            for row in self._curve:
                pruned = f"{row['pruned']:.2%}" if "pruned" in row else "—"
                table.add_row(f"{row['lambda_z']:g}", f"{row['nonzeros']:,}", f"{row['accuracy']:.2%}", pruned)
            _print(table)
        say(f"model, figures and plots: {self._where}")
        say(f"test accuracy: {100 * self._accuracy['sim']:.2f} %")

    def _facts(self) -> dict[str, str]:
        return {
            "data": f"{self._options.data}, {self._report.samples:,} samples matched",
            "teacher, test accuracy": f"{self._accuracy['teacher']:.2%}",
            "implicit model, test accuracy": f"{self._accuracy['sim']:.2%}",
            **dict(self._report.facts()),
        }

    def _write(self) -> None:
        report = self._report
        rows = {
            name: {
                "objective": _known(part.objective), "relative_gap": _known(part.relative_gap),
                "norm": part.norm.tolist(), "support": part.support.tolist(),
            }
            for name, part in (("hidden", report.hidden), ("output", report.output))
        }  # fmt: skip
        folder.write(
            self._where / folder.SIM, self._options, facts=self._facts(), accuracy=self._accuracy, norm=report.norm,
            nonzeros=report.nonzeros, path=self._curve, rows=rows,
        )  # fmt: skip

    @property
    def _names(self) -> dict[str, str]:
        also = ", refitted" if self._options.refit else ""
        return {"accuracy": f"SIM{also}", "pruned": f"pruned by magnitude{also}"}

    def _pruned(self, space: StateSpace, u: Tensor, keep: float) -> ImplicitModel:
        left = prune(space, u, keep=keep).space
        fitted = refit(left, space, u) if self._options.refit else left
        return ImplicitModel.from_statespace(fitted, constraint=Unconstrained)

    def _draw(self, reference: float, total: int) -> None:
        curves = {
            name: [(row["nonzeros"] / total, row[key]) for row in self._curve if row["nonzeros"] and key in row]
            for key, name in self._names.items()
        }
        curves = {name: points for name, points in curves.items() if points}
        if not curves:  # λ was so large that nothing is left
            return
        viz.sparsity(curves, reference=reference, of="held-out", path=self._where / "plots" / "sparsity.png")


def _known(values: Tensor) -> list[float | None]:
    """What is not known is infinite, which JSON has no word for."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _table(*names: str, **how: Any) -> Any:
    return extra("rich.table", "cli").Table(*names, **how)


def _print(table: Any) -> None:
    extra("rich.console", "cli").Console(highlight=False, soft_wrap=True).print(table)
