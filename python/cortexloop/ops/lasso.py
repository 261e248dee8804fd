"""Lasso along paths of penalties: a plain function, nothing differentiates or traces it."""

from __future__ import annotations

from torch import Tensor

from cortexloop import _device
from cortexloop.backends.lasso_sets import LassoSets
from cortexloop.backends.registry import Problem, select


def lasso_path(
    sets: LassoSets,
    set_of: Tensor,
    cross: Tensor,
    squares: Tensor,
    penalties: Tensor,
    responses: Tensor | None = None,
    *,
    tolerance: float,
    max_sweeps: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve N problems along A penalties each: weights [N, A, P], duality gap / y'y [N, A], int64 sweeps [N, A].

    What is minimised, and when a problem stops, is in csrc/include/cortexloop/lasso.h. All float64 but set_of, on one
    device.

    Args:
        sets: training sets of P features.
        set_of: int64 [N], the set of each problem.
        cross: X'y, [N, P]. squares: y'y, [N]. penalties: [N, A], positive.
        responses: y centred over the set, 0 outside of it, [N, images]; with columns only.
    """
    device = cross.device
    problem = Problem(
        op="lasso_path",
        device=device.type,
        index=_device.index(device),
        dtype=cross.dtype,
        batch=len(cross),
    )
    return select(problem, backend).lasso_path(
        sets, set_of, responses, cross, squares, penalties, tolerance, max_sweeps
    )
