"""State space: models as matrices, their algebra, equivalent and reduced forms, and pruning."""

from .algebra import activate, add, cascade, concatenate, direct_sum, feedback, residual, scale, self_feedback
from .block_solve import Block
from .box import embedding, pre_activation_bounds, reduce_on_box
from .convert import from_module
from .equivalence import eliminate_diagonal, eliminate_linear, permute, rescale, scale_states
from .perron import loop_gain, perron_root, perron_weights, spread
from .prune import Pruning, error_bound, magnitude, prune, sensitivity, within_each
from .reduce import drop_unobservable, fold_constant, merge_proportional, reduce
from .refit import refit, zeros_held
from .space import StateSpace

__all__ = [
    "Block",
    "Pruning",
    "StateSpace",
    "activate",
    "add",
    "cascade",
    "concatenate",
    "direct_sum",
    "drop_unobservable",
    "eliminate_diagonal",
    "eliminate_linear",
    "embedding",
    "error_bound",
    "feedback",
    "fold_constant",
    "from_module",
    "loop_gain",
    "magnitude",
    "merge_proportional",
    "permute",
    "perron_root",
    "perron_weights",
    "pre_activation_bounds",
    "prune",
    "reduce",
    "reduce_on_box",
    "refit",
    "rescale",
    "residual",
    "scale",
    "scale_states",
    "self_feedback",
    "sensitivity",
    "spread",
    "within_each",
    "zeros_held",
]
