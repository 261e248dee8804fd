"""Public stateless functions on model banks: they check arguments, convert kinds, and call the operators.

May import: `ops`, `bank`, `images`, `weights`, `_device`, and `_native` for the number of threads.
"""

from __future__ import annotations

from cortexloop.functional.ascent import Climb, gaussian_blur, gradient_ascent
from cortexloop.functional.bank import activations, input_gradient, responses
from cortexloop.functional.settings import explain, get_num_threads, set_num_threads
from cortexloop.functional.stream import stream_responses
from cortexloop.ops import use_backend

__all__ = [
    "Climb",
    "activations",
    "explain",
    "gaussian_blur",
    "get_num_threads",
    "gradient_ascent",
    "input_gradient",
    "responses",
    "set_num_threads",
    "stream_responses",
    "use_backend",
]
