"""What users of torchdeq and torchidl write, in the words of this library."""

from __future__ import annotations

from collections.abc import Iterable

_SOLVERS = "solver=Anderson(), Broyden(), Picard() or Newton()"
# Keyword: what to write instead.
_KEYWORDS = {
    "f_solver": f"torchdeq's f_solver='anderson' is {_SOLVERS} here.",
    "b_solver": "torchdeq's b_solver='anderson' is adjoint=ImplicitAdjoint(solver=Anderson()) here.",
    "z0": "torchdeq's z0 is x0 here; in a DEQ it is given to the layer, DEQ(f, x0=...).",
    "tol": "tol is the rtol of the solver here: solver=Anderson(rtol=1e-4).",
    "f_tol": "torchdeq's f_tol is the rtol of the solver here: solver=Anderson(rtol=1e-4).",
    "b_tol": "torchdeq's b_tol is ImplicitAdjoint(solver=Anderson(rtol=1e-4)) here.",
    "max_iter": "max_iter is the max_steps of the solver here: solver=Anderson(max_steps=40).",
    "f_max_iter": "torchdeq's f_max_iter is the max_steps of the solver here: solver=Anderson(max_steps=40).",
    "b_max_iter": "torchdeq's b_max_iter is ImplicitAdjoint(solver=Anderson(max_steps=40)) here.",
    "grad": "torchdeq's grad=1 is adjoint=PhantomGradient(steps=1) here.",
    "ift": "torchdeq's ift=True is the default here, adjoint=ImplicitAdjoint().",
    "mitr": "torchidl's mitr is the max_steps of the solver here: solver=Picard(max_steps=300).",
    "grad_tol": "torchidl's grad_tol is adjoint=ImplicitAdjoint(solver=Picard(rtol=1e-5)) here.",
    "grad_mitr": "torchidl's grad_mitr is adjoint=ImplicitAdjoint(solver=Picard(max_steps=300)) here.",
}
_NAMES = {
    "get_deq": "torchdeq's get_deq(f_solver='anderson') is DEQ(f, solver=Anderson()), called as deq(u).",
    "DEQSliced": "torchdeq's DEQSliced is DEQ(f), and deq.iterates(u, at=(2, 5)) gives states on the way.",
    "DEQIndexing": "torchdeq's DEQIndexing is DEQ(f), and deq.iterates(u, at=(2, 5)) gives states on the way.",
    "reset_deq": "torchdeq's reset_deq has nothing to do here: no solve leaves anything behind.",
}


def unknown_keywords(who: str, names: Iterable[str]) -> Exception:
    """The error for keywords that ``who`` does not have."""
    name = next(iter(names))
    return TypeError(f"{who}() got an unexpected keyword argument {name!r}. {_KEYWORDS.get(name, '')}".rstrip())


def unknown_name(name: str) -> AttributeError:
    """The error for a name that the library does not have."""
    return AttributeError(f"module 'implicitdl' has no attribute {name!r}. {_NAMES.get(name, '')}".rstrip())
