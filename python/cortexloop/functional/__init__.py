"""Public stateless functions on model banks and feature maps: they check arguments, convert kinds, call the operators.

May import: `ops`, `bank`, `images`, `weights`, `_device`, and `_native` for the number of threads.
"""

from __future__ import annotations

from cortexloop.functional.ascent import Climb, gradient_ascent
from cortexloop.functional.bank import activations, input_gradient, responses
from cortexloop.functional.lasso import lasso_path
from cortexloop.functional.moments import MomentState, feature_moments_update
from cortexloop.functional.nmf import nmf
from cortexloop.functional.pullback import pullback
from cortexloop.functional.readout import factorized_readout, point_readout
from cortexloop.functional.settings import explain, get_num_threads, set_num_threads
from cortexloop.functional.stream import stream_responses
from cortexloop.ops import LassoSets, use_backend

__all__ = [
    "Climb",
    "LassoSets",
    "MomentState",
    "activations",
    "explain",
    "factorized_readout",
    "feature_moments_update",
    "get_num_threads",
    "gradient_ascent",
    "input_gradient",
    "lasso_path",
    "nmf",
    "point_readout",
    "pullback",
    "responses",
    "set_num_threads",
    "stream_responses",
    "use_backend",
]
