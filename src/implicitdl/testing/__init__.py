"""Problems with known answers, and what every solver, adjoint and constraint must do on them."""

from .checks import (
    APPROXIMATE_ADJOINTS,
    CONSTRAINTS,
    EXACT_ADJOINTS,
    EXPANDING_SOLVERS,
    MONOTONE_SOLVERS,
    SOLVERS,
    check_adjoint,
    check_constraint,
    check_solver,
)
from .problems import Problem, expanding_problems, monotone_problems, problems

__all__ = [
    "APPROXIMATE_ADJOINTS",
    "CONSTRAINTS",
    "EXACT_ADJOINTS",
    "EXPANDING_SOLVERS",
    "MONOTONE_SOLVERS",
    "SOLVERS",
    "Problem",
    "check_adjoint",
    "check_constraint",
    "check_solver",
    "expanding_problems",
    "monotone_problems",
    "problems",
]
