"""Images certified per second: margins of a batch of Fashion-MNIST images at ε = 0.05, n = 100, by every method."""

from __future__ import annotations

import fashion
import torch
from timing import alternate, header

from implicitdl import ImplicitModel, certify

N, BATCH, EPS = 100, 256, 0.05


def run() -> None:
    print(f"\nCertified images per second, n = {N}, batch {BATCH}, ε = {EPS}, float64, the contraction proved once")
    header("bound", "images/s", "certified %", "raw adjoint above interval %")
    u, labels = fashion.images()
    model = ImplicitModel(784, 10, N)
    model.load_state_dict(fashion.trained(N, u, labels, steps=400))
    proved = certify.contractive("benchmark", model)
    box = certify.Box.around(u[:BATCH], EPS)
    methods = {
        "sensitivity": certify.Sensitivity(),
        "interval": certify.Interval(),
        "adjoint": certify.Crown(),
        "adjoint, slopes in 5 steps": certify.Crown(steps=5),
        "adjoint, one round of refinement": certify.Crown(rounds=1),
    }
    for name, method in methods.items():
        seconds = alternate({name: lambda m=method: certify.margins(proved, box, labels[:BATCH], m)}, rounds=5)[name]
        found = certify.margins(proved, box, labels[:BATCH], method)
        share = 100 * found.certified.double().mean()
        lost = "" if found.lost is None else f"{100 * found.lost:.1f}"
        print(f"| {name} | {BATCH / seconds:.0f} | {share:.1f} | {lost} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    run()
