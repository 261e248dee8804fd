"""Two-dimensional Gaussians fitted to maps of receptive fields, all maps at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cortexloop.factor._checks import Array, floats
from cortexloop.factor.lm import least_squares

_MIN_SIGMA = 0.2  # pixels: below, the Gaussian falls between pixels and its width has no meaning


@dataclass(frozen=True, eq=False)
class Gaussians:
    """offset + amplitude exp(-u^2 / (2 sigma_u^2) - v^2 / (2 sigma_v^2)) on maps of H x W pixels, of N maps.

    u = cos(theta) (x - x0) + sin(theta) (y - y0), v = -sin(theta) (x - x0) + cos(theta) (y - y0); x counts columns to
    the right and y rows downwards, both from 0 at the centre of the first pixel. All float64 [N].
    """

    amplitude: Tensor
    """> 0, or 0 for a flat map, which has no Gaussian."""
    x: Tensor
    """Column of the centre, pixels."""
    y: Tensor
    """Row of the centre, pixels."""
    sigma_u: Tensor
    """The larger standard deviation, pixels."""
    sigma_v: Tensor
    """The smaller one."""
    theta: Tensor
    """Radians in [0, pi): of the longer axis, from the x axis towards the y axis."""
    offset: Tensor
    shape: tuple[int, int]
    """H, W."""
    r_squared: Tensor
    """Explained fraction of the map's variance; 0 for a flat map."""
    converged: Tensor
    """bool."""

    def maps(self) -> Tensor:
        """The fitted maps, float64 [N, H, W]."""
        columns = [self.amplitude, self.x, self.y, self.sigma_u, self.sigma_v, self.theta, self.offset]
        yy, xx = _grid(self.shape, self.x.device)
        return _model(torch.stack(columns, dim=1), xx, yy)[0].view(-1, *self.shape)

    def inside(self, level: float = 0.3) -> Tensor:
        """bool [N, H, W]: where the fit exceeds offset + level * amplitude (0.3: Wang & Ponce)."""
        bound = (self.offset + level * self.amplitude)[:, None, None]
        return (self.maps() > bound) & (self.amplitude > 0)[:, None, None]


def fit_gaussians(maps: Array, *, iterations: int = 200) -> Gaussians:
    """Fit a Gaussian with offset, of any orientation, to every map by least squares.

    Starts from the centroid and second moments of what exceeds the map's median, and from its highest point; the better
    end is kept. Centres may lie up to half a map outside.

    Args:
        maps: [N, H, W], finite, at least 3 x 3.

    Raises:
        TypeError, ValueError: not finite maps of that shape.
    """
    m = floats(maps, "maps", 3).double()
    count, h, w = m.shape
    if min(h, w) < 3:
        raise ValueError(f"maps should be at least 3 x 3 to have a Gaussian fitted, got {h} x {w}")
    unit = m.flatten(1).abs().amax(1).clamp(min=1e-300) if count else m.new_zeros(0)
    values = m.flatten(1) / unit[:, None]
    flat = (values == values[:, :1]).all(1)
    yy, xx = _grid((h, w), m.device)
    low = m.new_tensor([0.0, -w / 2, -h / 2, _MIN_SIGMA, _MIN_SIGMA, -math.inf, -math.inf]).expand(count, 7)
    high = m.new_tensor([math.inf, 1.5 * w, 1.5 * h, 2.0 * w, 2.0 * h, math.inf, math.inf]).clone()
    high[3:5] = 2.0 * max(h, w)
    high = high.expand(count, 7)

    def residuals(parameters: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        fit, jacobian = _model(parameters, xx, yy)
        return fit - values[which], jacobian

    fits = [
        least_squares(residuals, start, low, high, iterations=iterations) for start in _starts(values, xx, yy, (h, w))
    ]
    second = (fits[1].cost < fits[0].cost)[:, None]
    p = torch.where(second, fits[1].parameters, fits[0].parameters)
    cost = torch.where(second[:, 0], fits[1].cost, fits[0].cost)
    converged = torch.where(second[:, 0], fits[1].converged, fits[0].converged) | flat
    swap = p[:, 3] < p[:, 4]
    theta = torch.where(swap, p[:, 5] + math.pi / 2, p[:, 5]).remainder(math.pi)
    theta = torch.where(theta >= math.pi, 0.0, theta)
    total = (values - values.mean(1, keepdim=True)).square().sum(1)
    return Gaussians(
        amplitude=torch.where(flat, 0.0, p[:, 0] * unit),
        x=p[:, 1],
        y=p[:, 2],
        sigma_u=torch.maximum(p[:, 3], p[:, 4]),
        sigma_v=torch.minimum(p[:, 3], p[:, 4]),
        theta=theta,
        offset=torch.where(flat, m.flatten(1)[:, 0] if count else unit, p[:, 6] * unit),
        shape=(h, w),
        r_squared=torch.where(flat, 0.0, 1.0 - cost / total.clamp(min=1e-300)),
        converged=converged,
    )


def _grid(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel, float64 [H * W] each."""
    rows, columns = (torch.arange(n, dtype=torch.float64, device=device) for n in shape)
    yy, xx = torch.meshgrid(rows, columns, indexing="ij")
    return yy.flatten(), xx.flatten()


def _model(p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor]:
    """Values [k, H * W], and derivatives [k, H * W, 7] by amplitude, x0, y0, sigma_u, sigma_v, theta and offset."""
    a, x0, y0, su, sv, theta, offset = (p[:, i : i + 1] for i in range(7))
    cos, sin = torch.cos(theta), torch.sin(theta)
    dx, dy = xx - x0, yy - y0
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    e = torch.exp(-0.5 * ((u / su) ** 2 + (v / sv) ** 2))
    g = a * e
    pu, pv = u / su**2, v / sv**2
    jacobian = torch.stack(
        [
            e,
            g * (pu * cos - pv * sin),
            g * (pu * sin + pv * cos),
            g * u * pu / su,
            g * v * pv / sv,
            g * (pv * u - pu * v),
            torch.ones_like(g),
        ],
        dim=2,
    )
    return g + offset, jacobian


def _starts(values: Tensor, xx: Tensor, yy: Tensor, shape: tuple[int, int]) -> list[Tensor]:
    if len(values) == 0:
        return [values.new_zeros(0, 7)] * 2
    base = values.quantile(0.5, dim=1, keepdim=True)
    weight = (values - base).clamp(min=0)
    total = weight.sum(1).clamp(min=1e-300)
    top = values.amax(1)
    cx, cy = (weight * xx).sum(1) / total, (weight * yy).sum(1) / total
    dx, dy = xx - cx[:, None], yy - cy[:, None]
    cxx, cyy, cxy = ((weight * d).sum(1) / total for d in (dx * dx, dy * dy, dx * dy))
    theta = 0.5 * torch.atan2(2 * cxy, cxx - cyy)
    root = (((cxx - cyy) / 2) ** 2 + cxy**2).sqrt()
    su = ((cxx + cyy) / 2 + root).clamp(min=0.25).sqrt()
    sv = ((cxx + cyy) / 2 - root).clamp(min=0.25).sqrt()
    amplitude = (top - base[:, 0]).clamp(min=1e-6)
    moments = torch.stack([amplitude, cx, cy, su, sv, theta, base[:, 0]], dim=1)
    peak = values.argmax(1)
    width = torch.full_like(cx, max(1.0, min(shape) / 8))
    pointed = torch.stack(
        [amplitude, xx[peak], yy[peak], width * 1.05, width * 0.95, torch.zeros_like(cx), base[:, 0]], dim=1
    )
    return [moments, pointed]
