"""Torch operators: schema, fake implementation, autograd. One operator per model bank and direction.

The backend is an argument, so that a traced graph shows it. May import: `backends`, `packing`, torch.
"""

from __future__ import annotations

from cortexloop.backends.registry import (
    OPS,
    BackendError,
    BackendWarning,
    Explanation,
    Problem,
    bank_shape,
    explain,
    select,
    use_backend,
)
from cortexloop.ops.bank import (
    bank_activations,
    bank_forward,
    bank_input_gradient,
    evaluate_forward,
    evaluate_gradient,
    problem,
)

__all__ = [
    "OPS",
    "BackendError",
    "BackendWarning",
    "Explanation",
    "Problem",
    "bank_activations",
    "bank_forward",
    "bank_input_gradient",
    "bank_shape",
    "evaluate_forward",
    "evaluate_gradient",
    "explain",
    "problem",
    "select",
    "use_backend",
]
