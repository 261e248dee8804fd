"""Gradient ascent on gradients that are estimated from pairs of codes on opposite sides of the centre."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cortexloop import ops
from cortexloop.evolve import streams
from cortexloop.evolve.optimiser import Optimiser, Selection, keep, positive
from cortexloop.evolve.sums import running_sum


class _AntitheticPairs(Optimiser):
    """Codes centre +- radius z: the first half of a generation is the + side, in the same order as the second half.

    A pair counts if both of its codes have a score and neither was injected: the difference is what the gradient is
    made of, and one score says nothing without the zero of the scale. Means are over the pairs that count; without any
    the problem keeps its state.

    After a `first_generation` the centre is the best of its codes.
    """

    STREAM: ClassVar[int]
    STATE: ClassVar[tuple[str, ...]] = ("_centre", "_radius")

    def __init__(
        self,
        dim: int,
        *,
        population: int | None,
        radius: float,
        learning_rate: float,
        start: ArrayLike | Tensor | None,
        **common: Any,
    ) -> None:
        super().__init__(dim, population=20 if population is None else population, **common)
        if self.population % 2:
            raise ValueError(f"population should be even, for pairs of codes, got {self.population}")
        self.radius = positive("radius", radius)
        self.learning_rate = positive("learning_rate", learning_rate)
        self._centre = self.code_per_problem("start", start)
        self._radius = torch.full((self.n,), self.radius, dtype=torch.float64, device=self.device)

    def _settings(self) -> dict[str, Any]:
        return {"radius": self.radius, "learning_rate": self.learning_rate}

    @property
    def centre(self) -> Tensor:
        """What the codes are drawn around, [n, dim]."""
        return self._centre

    def _directions(self) -> Tensor:
        """z, [n, population / 2, dim]."""
        z = ops.normals(self.seed, self.STREAM, self.generation, self._ids, self.population // 2, self.dim)
        return z.to(self.dtype)

    def _sample(self) -> Tensor:
        steps = self._radius.to(self.dtype)[:, None, None] * self._directions()
        centre, half = self._centre[:, None], steps.shape[1]
        codes = steps.new_empty(self.n, 2 * half, self.dim) if self._room is None else self._room
        torch.add(centre, steps, out=codes[:, :half])
        torch.sub(centre, steps, out=codes[:, half:])
        return codes

    def _update(self, selection: Selection) -> None:
        if selection.first:
            best = selection.order[:, :1, None].expand(-1, -1, self.dim)
            self._centre = keep(selection.active, selection.codes.gather(1, best)[:, 0], self._centre)
            return
        up, down = selection.scores.chunk(2, dim=1)
        counts = ~(up.isnan() | down.isnan())
        if self._injected is not None:
            sampled = torch.arange(self.population, device=self.device) >= self._injected.shape[1]
            counts = counts & sampled[: self.population // 2] & sampled[self.population // 2 :]
        pairs = counts.sum(1)
        share = counts.double() / pairs.clamp(min=1)[:, None]
        up, down = torch.where(counts, up, 0.0), torch.where(counts, down, 0.0)
        self._ascend(self._directions(), up, down, share, pairs > 0)

    def _move(self, z: Tensor, weights: Tensor, active: Tensor) -> None:
        """centre <- centre + sum of weights (float64 [n, pairs]) times z."""
        step, _ = ops.code_moments(z, weights.to(self.dtype))
        self._centre = keep(active, self._centre + step, self._centre)

    @abc.abstractmethod
    def _ascend(self, z: Tensor, up: Tensor, down: Tensor, share: Tensor, active: Tensor) -> None:
        """Learn from pairs with the scores up and down, float64 [n, pairs]; each counts by its share."""


class FDGD(_AntitheticPairs):
    """Finite-difference gradient ascent of XDREAM (Xiao & Kreiman 2020).

        centre <- centre + learning_rate * mean over pairs of  d_i step_i / a_i^2
        step_i = radius z_i,  d_i = (score+ - score-) / 2,  a_i = mean over genes of |step_i|

    A pair counts if both of its codes have a score and neither was injected; without such a pair the centre stays.
    After a `first_generation` the centre is the best of its codes.

    Args:
        population: codes per generation, even; 20 if None.
        radius: standard deviation of the steps, above 0. learning_rate: above 0.
        start: first centre, [dim] or [n, dim]; zeros if None.
        dim, problems, seed, minimise, first_generation, device, dtype: see `Optimiser`.

    Raises:
        ValueError, TypeError: bad arguments.
    """

    STREAM: ClassVar[int] = streams.FDGD

    def __init__(
        self,
        dim: int,
        *,
        population: int | None = 20,
        radius: float = 1.25,
        learning_rate: float = 1.25,
        start: ArrayLike | Tensor | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dim, population=population, radius=radius, learning_rate=learning_rate, start=start, **common)

    def _ascend(self, z: Tensor, up: Tensor, down: Tensor, share: Tensor, active: Tensor) -> None:
        magnitude = z.abs().flatten(0, 1)
        mean = ops.row_dots(magnitude, torch.ones_like(magnitude)).double().view(up.shape) / self.dim
        self._move(z, self.learning_rate * share * ((up - down) / 2) / (self.radius * mean * mean), active)


class NES(_AntitheticPairs):
    """Natural evolution strategy of XDREAM (Xiao & Kreiman 2020, after Ilyas et al. 2018).

        centre <- centre + learning_rate / r * mean of score z
        r <- r + radius_learning_rate / r * mean of score (z^2 - 1),  at least minimum_radius

    Means are over all codes, for r also over all genes; z of the second half is minus that of the first. For the centre
    only differences within pairs matter. For the radius the scores themselves do, so as published it depends on where
    their zero is; `baseline` takes the mean of the scores that count for zero, and then it does not.

    A pair counts if both of its codes have a score and neither was injected; without such a pair nothing changes.
    After a `first_generation` the centre is the best of its codes.

    Args:
        population: codes per generation, even; 20 if None.
        radius: standard deviation of the first steps, above 0. learning_rate: above 0.
        radius_learning_rate: at least 0. minimum_radius: above 0, at most `radius`.
        baseline: whether the mean score is subtracted before the radius is learnt.
        start: first centre, [dim] or [n, dim]; zeros if None.
        dim, problems, seed, minimise, first_generation, device, dtype: see `Optimiser`.

    Raises:
        ValueError, TypeError: bad arguments.
    """

    STREAM: ClassVar[int] = streams.NES

    def __init__(
        self,
        dim: int,
        *,
        population: int | None = 20,
        radius: float = 1.25,
        learning_rate: float = 1.75,
        radius_learning_rate: float = 0.05,
        minimum_radius: float = 0.01,
        baseline: bool = False,
        start: ArrayLike | Tensor | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dim, population=population, radius=radius, learning_rate=learning_rate, start=start, **common)
        self.radius_learning_rate = positive("radius_learning_rate", radius_learning_rate, zero=True)
        self.minimum_radius = positive("minimum_radius", minimum_radius)
        if self.minimum_radius > self.radius:
            raise ValueError(f"minimum_radius should be at most the radius {self.radius}, got {self.minimum_radius}")
        self.baseline = bool(baseline)

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "radius_learning_rate": self.radius_learning_rate,
            "minimum_radius": self.minimum_radius,
            "baseline": self.baseline,
        }

    @property
    def search_radius(self) -> Tensor:
        """r, float64 [n]."""
        return self._radius.clone()

    def _ascend(self, z: Tensor, up: Tensor, down: Tensor, share: Tensor, active: Tensor) -> None:
        radius = self._radius[:, None]
        self._move(z, self.learning_rate * share * ((up - down) / 2) / radius, active)
        if self.radius_learning_rate == 0:
            return
        level = (up + down) / 2
        if self.baseline:
            level = level - _weighted_sum(level, share)
        rows = z.flatten(0, 1)
        spread = ops.row_dots(rows, rows).double().view(up.shape) / self.dim - 1
        gradient = _weighted_sum(level * spread, share) / radius
        learnt = (radius + self.radius_learning_rate * gradient)[:, 0].clamp(min=self.minimum_radius)
        self._radius = keep(active, learnt, self._radius)


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """[n, 1], in the order of the columns."""
    return running_sum(values * weights)[:, -1:]
