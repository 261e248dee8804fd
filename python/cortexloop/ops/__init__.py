"""Torch operators: schema, fake implementation, autograd. One operator per model bank and direction.

`evolution.py` and `moments.py` hold plain functions, on populations of codes and on running moments: nothing
differentiates or traces them.

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
from cortexloop.ops.moments import feature_moments
from cortexloop.ops.nmf import nmf
from cortexloop.ops.pullback import bank_pullback
from cortexloop.ops.readout import (
    factorized_readout,
    factorized_readout_gradient,
    point_readout,
    point_readout_gradient,
)

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
    "bank_pullback",
    "bank_shape",
    "code_moments",
    "evaluate_forward",
    "evaluate_gradient",
    "explain",
    "factorized_readout",
    "factorized_readout_gradient",
    "feature_moments",
    "lasso_path",
    "low_rank_product",
    "nmf",
    "normals",
    "point_readout",
    "point_readout_gradient",
    "problem",
    "row_dots",
    "sample_codes",
    "select",
    "uniforms",
    "use_backend",
]
