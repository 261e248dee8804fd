"""The output non-linearity of an encoding model, y = a softplus(s x - theta) + b, for all neurons at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cortexloop.factor._checks import Array, floats, listed
from cortexloop.factor.lm import least_squares

_GRID = 17  # thresholds tried before the descent


@dataclass(frozen=True, eq=False)
class Softplus:
    """y = a softplus(s x - theta) + b of T neurons (Wang & Ponce). All float64 [T]."""

    amplitude: Tensor
    """a >= 0, in the unit of responses."""
    threshold: Tensor
    """theta, in the unit of s x."""
    offset: Tensor
    """b, in the unit of responses."""
    scale: Tensor
    """s = sd(responses) / sd(scores), fixed before the fit."""
    converged: Tensor
    """bool [T]; False where the fit reached its number of iterations."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores [B, T] -> responses [B, T], in the dtype of the scores."""
        x = scores.double() * self.scale - self.threshold
        return (self.amplitude * softplus(x) + self.offset).to(scores.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        names = ("amplitude", "threshold", "offset", "scale", "converged")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> Softplus:
        """On another device."""
        return Softplus(**{name: value.to(device) for name, value in self.tensors().items()})


def fit_softplus(scores: Array, responses: Array, *, iterations: int = 200) -> Softplus:
    """Fit the non-linearity of every neuron by least squares, within the published bounds.

    a in [0, inf), b in [min y - 10, max y], theta in [min(s x) - 10, max(s x)], s = sd(y) / sd(x). The published fit
    starts at (1, min y, median(s x)) only; here a and b are solved for on a grid of thresholds first, and descent
    starts from the best of these and from the published point, so that it is at least as good.

    Args:
        scores: [B, T] linear scores of the training images.
        responses: [B, T] their responses, finite.

    Raises:
        TypeError, ValueError: not finite arrays of one shape with at least 4 images, or scores or responses of a
            neuron that are constant.
    """
    x = floats(scores, "scores", 2).double().T
    y = floats(responses, "responses", 2).double().T.to(x.device)
    if x.shape != y.shape or x.shape[1] < 4:
        raise ValueError(
            "scores and responses should be [B, T] of the same, at least 4, images, "
            f"got {list(x.T.shape)} and {list(y.T.shape)}"
        )
    for what, values in (("scores", x), ("responses", y)):
        constant = torch.nonzero((values == values[:, :1]).all(1))[:, 0]
        if len(constant):
            raise ValueError(f"the {what} of neurons {listed(constant)} are constant; leave those neurons out")
    scale = y.std(1, correction=0) / x.std(1, correction=0)
    z = x * scale[:, None]
    unbounded = torch.full_like(scale, torch.inf)
    low = torch.stack([torch.zeros_like(scale), z.amin(1) - 10.0, y.amin(1) - 10.0], dim=1)
    high = torch.stack([unbounded, z.amax(1), y.amax(1)], dim=1)

    def residuals(parameters: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        a, theta, b = (parameters[:, i : i + 1] for i in range(3))
        shifted = z[which] - theta
        level, slope = softplus(shifted), torch.sigmoid(shifted)
        jacobian = torch.stack([level, -a * slope, torch.ones_like(level)], dim=2)
        return a * level + b - y[which], jacobian

    published = torch.stack([torch.ones_like(scale), z.quantile(0.5, dim=1), y.amin(1)], dim=1)
    starts = (published, _best_on_grid(z, y, low, high))
    fits = [least_squares(residuals, start, low, high, iterations=iterations) for start in starts]
    second = (fits[1].cost < fits[0].cost)[:, None]
    best = torch.where(second, fits[1].parameters, fits[0].parameters)
    converged = torch.where(second[:, 0], fits[1].converged, fits[0].converged)
    return Softplus(best[:, 0], best[:, 1], best[:, 2], scale, converged)


def _best_on_grid(z: Tensor, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Parameters [T, 3]: the best of some thresholds, with the a >= 0 and b that are best for each."""
    best = y.new_zeros(len(y), 3)
    least = torch.full_like(best[:, 0], torch.inf)
    mean = y.mean(1)
    for fraction in torch.linspace(0.0, 1.0, _GRID, dtype=torch.float64):
        theta = low[:, 1] + fraction * (high[:, 1] - low[:, 1])
        level = softplus(z - theta[:, None])
        centre = level.mean(1)
        deviation = level - centre[:, None]
        a = (deviation * y).sum(1) / deviation.square().sum(1).clamp(min=1e-300)
        a = a.clamp(min=0)
        b = torch.minimum(torch.maximum(mean - a * centre, low[:, 2]), high[:, 2])
        cost = (a[:, None] * level + b[:, None] - y).square().sum(1)
        better = cost < least
        least = torch.where(better, cost, least)
        best = torch.where(better[:, None], torch.stack([a, theta, b], dim=1), best)
    return best
