"""Least squares of many small problems at once: damped Newton steps (Levenberg, Marquardt) within bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Residuals = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Parameters [k, P] and which problems they belong to [k] -> residuals [k, M] and their Jacobian [k, M, P]."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Where the least squares ended."""

    parameters: Tensor
    """float64 [N, P]"""
    cost: Tensor
    """[N] sum of squared residuals."""
    iterations: Tensor
    """[N] int64"""
    converged: Tensor
    """[N] bool: the last step changed cost or parameters by a negligible amount."""


def least_squares(
    residuals: Residuals,
    start: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    iterations: int = 100,
    tolerance: float = 1e-10,
) -> Fit:
    """Minimise the sum of squares of every problem from its start, low <= parameters <= high.

    A parameter at a bound whose gradient points outwards is held for the step; steps are clipped to the bounds, and
    taken only if the cost falls, else the damping grows tenfold. Every problem has its own damping and its own end, so
    its result does not depend on the others.

    Args:
        start: float64 [N, P]; low, high: the same shape.
        tolerance: relative fall of the cost below which a problem is finished, after two such steps in a row.
    """
    x = torch.minimum(torch.maximum(start, low), high).clone()
    count, size = x.shape
    everyone = torch.arange(count, device=x.device)
    r, jacobian = residuals(x, everyone)
    cost = r.square().sum(1)
    damping = torch.full_like(cost, 1e-3)
    taken = torch.zeros(count, dtype=torch.int64, device=x.device)
    small = torch.zeros_like(taken)
    active = everyone[torch.isfinite(cost)]
    r, jacobian = r[active], jacobian[active]
    eye = torch.eye(size, dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        if len(active) == 0:
            break
        here = x[active]
        gradient = (jacobian.mT @ r[..., None])[..., 0]
        held = ((here <= low[active]) & (gradient > 0)) | ((here >= high[active]) & (gradient < 0))
        free = (~held).to(x.dtype)
        hessian = (jacobian.mT @ jacobian) * free[:, :, None] * free[:, None, :]
        scale = torch.diagonal(hessian, dim1=1, dim2=2)
        largest = scale.amax(1, keepdim=True).clamp(min=1e-300)
        ridge = damping[active, None] * scale.clamp(min=1e-12 * largest) + (1.0 - free) * largest
        step = torch.linalg.solve(hessian + ridge[..., None] * eye, -(gradient * free)[..., None])[..., 0]
        moved = torch.minimum(torch.maximum(here + step, low[active]), high[active])
        new_r, new_jacobian = residuals(moved, active)
        new_cost = new_r.square().sum(1)
        better = new_cost < cost[active]  # False for NaN
        gain = torch.where(better, cost[active] - new_cost, 0.0)
        negligible = gain <= tolerance * cost[active]
        still = (moved - here).abs().amax(1) <= 1e-14 * here.abs().amax(1)
        small[active] = torch.where(better & ~negligible, 0, small[active] + (better | still).long())
        taken[active] += 1
        damping[active] = torch.where(better, damping[active] / 5, damping[active] * 10).clamp(1e-12, 1e16)
        x[active] = torch.where(better[:, None], moved, here)
        cost[active] = torch.where(better, new_cost, cost[active])
        r = torch.where(better[:, None], new_r, r)
        jacobian = torch.where(better[:, None, None], new_jacobian, jacobian)
        going = (small[active] < 2) & (cost[active] > 0) & (damping[active] < 1e14)
        if not bool(going.all()):
            active, r, jacobian = active[going], r[going], jacobian[going]
    converged = torch.ones(count, dtype=torch.bool, device=x.device)
    converged[active] = False
    converged &= torch.isfinite(cost)
    return Fit(x, cost, taken, converged)
