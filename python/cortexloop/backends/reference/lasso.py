"""Lasso in plain torch, on any device: cyclic coordinate descent, all problems in step.

Each penalty starts from the solution before it. A sweep takes the features that any problem uses or should use, one
after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop.backends.lasso_sets import LassoSets


class LassoOperators:
    """Coordinate descent for all problems at once."""

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
        n, a = penalties.shape
        problems = _Problems(sets, set_of, responses, cross, squares)
        weights = cross.new_empty(n, a, cross.shape[1])
        gaps, sweeps = torch.empty_like(penalties), torch.empty(n, a, dtype=torch.int64, device=penalties.device)
        for k in range(a):
            problems.solve(penalties[:, k], tolerance, max_sweeps)
            weights[:, k], gaps[:, k], sweeps[:, k] = problems.weights, problems.gaps, problems.sweeps
        return weights, gaps, sweeps


class _Problems:
    """N problems and their present weights [N, P]."""

    def __init__(
        self, sets: LassoSets, set_of: Tensor, responses: Tensor | None, cross: Tensor, squares: Tensor
    ) -> None:
        self.sets, self.set_of, self.cross, self.squares = sets, set_of, cross, squares
        self.diagonal = sets.diagonal[set_of]
        self.weights = torch.zeros_like(cross)
        # what the gradient follows from, kept up to date: the gradient itself, or the residual [N, images]
        self.state = cross.clone() if responses is None else responses.clone()
        self.gaps = torch.zeros_like(squares)
        self.sweeps = torch.zeros(len(squares), dtype=torch.int64, device=squares.device)

    def gradient(self) -> Tensor:
        """X'r, [N, P]; 0 for a feature that is constant in the set."""
        state = self.state if self.sets.columns is None else self.state @ self.sets.columns.T
        return torch.where(self.diagonal > 0, state, 0.0)

    def _column(self, j: int) -> tuple[Tensor, Tensor]:
        """The gradient of feature j, [N], and what a unit of its weight takes from the state."""
        if self.sets.gram is not None:
            return self.state[:, j], self.sets.gram[self.set_of, j]
        assert self.sets.columns is not None and self.sets.mask is not None and self.sets.means is not None  # noqa: PT018
        centred = (self.sets.columns[j] - self.sets.means[self.set_of, j, None]) * self.sets.mask[self.set_of]
        return self.state @ self.sets.columns[j], centred

    def solve(self, penalty: Tensor, tolerance: float, max_sweeps: int) -> None:
        """Sweep those problems whose gap is too large, until none is."""
        allowed = tolerance * self.squares
        self.sweeps.zero_()
        while True:
            gradient = self.gradient()
            gap = self._gap(gradient, penalty)
            self.gaps = torch.where(self.squares > 0, gap / self.squares.clamp(min=torch.finfo(gap.dtype).tiny), gap)
            todo = (gap > allowed) & (self.sweeps < max_sweeps)
            if not bool(todo.any()):
                return
            wanted = ((self.weights != 0) | (gradient.abs() > penalty[:, None])) & todo[:, None] & (self.diagonal > 0)
            before = self.weights.clone()
            for j in wanted.any(dim=0).nonzero()[:, 0].tolist():
                slope, column = self._column(j)
                square = self.diagonal[:, j]
                pull = slope + square * self.weights[:, j]
                moved = torch.where(
                    todo & (square > 0),
                    pull.sign() * (pull.abs() - penalty).clamp(min=0) / square.where(square > 0, 1.0),
                    self.weights[:, j],
                )
                self.state = self.state - (moved - self.weights[:, j])[:, None] * column
                self.weights[:, j] = moved
            self.sweeps += todo
            if torch.equal(before, self.weights):
                return

    def _gap(self, gradient: Tensor, penalty: Tensor) -> Tensor:
        """Primal less dual objective, the dual point being the residual scaled to be feasible, [N]."""
        residual = (self.squares - ((self.cross + gradient) * self.weights).sum(dim=1)).clamp(min=0)
        fitted = (self.cross * self.weights).sum(dim=1)
        scale = (penalty / gradient.abs().amax(dim=1).clamp(min=torch.finfo(penalty.dtype).tiny)).clamp(max=1)
        norm = self.weights.abs().sum(dim=1)
        return 0.5 * (1 + scale.square()) * residual + penalty * norm - scale * (self.squares - fitted)
