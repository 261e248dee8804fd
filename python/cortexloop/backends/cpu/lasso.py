"""Lasso on the CPU: allocate the outputs, hand the addresses to C++."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop._native import lasso
from cortexloop.backends.lasso_sets import LassoSets
from cortexloop.backends.registry import Problem


class LassoOperators:
    """Coordinate descent in host memory, float64."""

    def lasso_unsupported(self, problem: Problem) -> str | None:
        """None = can run; else one sentence for people."""
        if problem.device != "cpu":
            return f"the C++ kernels work in host memory, the Gram matrices are on {problem.device}"
        if problem.dtype != torch.float64:
            return f"the C++ kernels take float64, these are {str(problem.dtype).removeprefix('torch.')}"
        return None

    def lasso_path(
        self,
        sets: LassoSets,
        set_of: Tensor,
        responses: Tensor | None,
        cross: Tensor,
        squares: Tensor,
        penalties: Tensor,
        tolerance: float,
        max_sweeps: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = torch.empty(*penalties.shape, cross.shape[1], dtype=torch.float64)
        gaps, sweeps = torch.empty_like(penalties), torch.empty(penalties.shape, dtype=torch.int64)
        lasso.lasso_path(
            sets.images,
            sets.gram,
            sets.columns,
            sets.mask,
            sets.means,
            sets.diagonal,
            set_of,
            responses,
            cross,
            squares,
            penalties,
            tolerance,
            max_sweeps,
            weights,
            gaps,
            sweeps,
        )
        return weights, gaps, sweeps
