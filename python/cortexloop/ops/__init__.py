"""Torch operators: schema, fake implementation, autograd. One operator per model bank and direction.

`evolution.py` holds plain functions on populations of codes: nothing differentiates or traces them.

The backend is an argument, so that a traced graph shows it. May import: `backends`, `packing`, torch.
"""

from __future__ import annotations

from cortexloop.backends.lasso_sets import LassoSets
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
from cortexloop.ops.evolution import (
    code_moments,
    low_rank_product,
    normals,
    row_dots,
    sample_codes,
    uniforms,
)
from cortexloop.ops.lasso import lasso_path

__all__ = [
    "OPS",
    "BackendError",
    "BackendWarning",
    "Explanation",
    "LassoSets",
    "Problem",
    "bank_activations",
    "bank_forward",
    "bank_input_gradient",
    "bank_shape",
    "code_moments",
    "evaluate_forward",
    "evaluate_gradient",
    "explain",
    "lasso_path",
    "low_rank_product",
    "normals",
    "problem",
    "row_dots",
    "sample_codes",
    "select",
    "uniforms",
    "use_backend",
]
