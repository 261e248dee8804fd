"""Heatmaps of patches smoothed away or covered, and images with their most driving patches smoothed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.attribution.base import MEMORY, Method, Neurons, chunks
from cortexloop.attribution.targets import Target, as_target
from cortexloop.bank import ModelBank
from cortexloop.features.base import Images
from cortexloop.images import gaussian_blur

SHAPES = ("circle", "square")


@dataclass(frozen=True, eq=False)
class Patches:
    """Places of an image: patch p covers the pixels masks[p].

    Attributes:
        masks: bool [P, H, W].
        rows, columns: P = rows x columns, row by row.
        overlap: bool [P, P], whether two patches share a pixel.
    """

    masks: Tensor
    rows: int
    columns: int

    @property
    def overlap(self) -> Tensor:
        """bool [P, P]."""
        flat = self.masks.flatten(1).float()
        return flat @ flat.T > 0


def patches(height: int, width: int, *, radius: float = 10.0, stride: int = 4, shape: str = "circle") -> Patches:
    """Patches centred in the cells of a grid of `stride` pixels (28 x 28 of a 112 x 112 image for a stride of 4).

    Args:
        radius: of circles, or half the side of squares, in pixels: pixel centres at most so far away are covered.

    Raises:
        ValueError: a radius or stride that is not positive, an unknown shape, or patches that cover no pixel.
    """
    if not radius > 0 or stride < 1:
        raise ValueError(f"radius should be positive and stride at least 1, got {radius} and {stride}")
    if shape not in SHAPES:
        raise ValueError(f"shape should be one of {', '.join(SHAPES)}, got {shape!r}")
    y, x = (np.arange((n + stride - 1) // stride) * stride + (stride - 1) / 2 for n in (height, width))
    y, x = np.minimum(y, height - 1), np.minimum(x, width - 1)
    dy, dx = np.abs(np.arange(height) - y[:, None]), np.abs(np.arange(width) - x[:, None])
    if shape == "circle":
        inside = dy[:, None, :, None] ** 2 + dx[None, :, None, :] ** 2 <= radius**2
    else:
        inside = np.maximum(dy[:, None, :, None], dx[None, :, None, :]) <= radius
    masks = torch.from_numpy(inside.reshape(-1, height, width))
    if not bool(masks.any(dim=(1)).any(dim=1).all()):
        raise ValueError(f"a radius of {radius} around centres between pixels covers none; take at least 0.71")
    return Patches(masks, len(y), len(x))


class Occlusion(Method):
    """h = response to the image with a patch taken away - response to the image, for each place of the patch.

    Negative where the patch drives the neuron, positive where it holds it back. Smoothing a patch keeps its colours and
    takes its detail (Cowley et al., extended data figure 4d). The paper does not give patch and blur; the defaults here
    are choices: circles of radius 10 px, Gaussian of sigma 5 px, hard edges, every 4 px.

    Args: as of `Method`, and
        fill: "smooth" for the blurred image, "zero" for the levels that the network sees as 0, or a level 0..255.
        radius, stride, shape: see `patches`.
        sigma: of the blur, in pixels.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        target: Target | ModelBank,
        *,
        fill: str | float = "smooth",
        radius: float = 10.0,
        sigma: float = 5.0,
        stride: int = 4,
        shape: str = "circle",
        memory: int = MEMORY,
    ) -> None:
        super().__init__(target, memory=memory)
        _check_fill(fill, sigma)
        patches(8, 8, radius=radius, stride=stride, shape=shape)
        self.fill, self.radius, self.sigma, self.stride, self.shape = fill, radius, sigma, stride, shape

    def attribute(self, images: Images, neurons: Neurons | None = None, pairs: Neurons | None = None) -> Tensor:
        """Heatmaps: [B, K, rows, columns], or [B, rows, columns] with pairs, in response units.

        Args, Raises: as of `Method.attribute`.
        """
        levels, chosen = self._inputs(images, neurons, pairs)
        places = patches(*levels.shape[1:3], radius=self.radius, stride=self.stride, shape=self.shape)
        filled = _filled(levels, self.fill, self.sigma, self.target.zero)
        leading = (len(levels),) if chosen.paired else (len(levels), len(chosen.neurons))
        heat = levels.new_empty((*leading, places.rows * places.columns))
        for i in range(len(levels)):
            own = chosen.neurons[i : i + 1] if chosen.paired else chosen.neurons
            if len(own):
                change = _changes(self.target, levels[i], filled[i], places.masks, own, self.memory)  # [P, K]
                heat[i] = change[:, 0] if chosen.paired else change.T
        return heat.view(*leading, places.rows, places.columns)


@dataclass(frozen=True, eq=False)
class Smoothed:
    """Images with patches smoothed one after the other."""

    images: Tensor
    """[B, H, W, 3] levels after the last patch."""
    chosen: tuple[tuple[int, ...], ...]
    """For each image, the patches in the order in which they were smoothed (positions as in `patches`)."""
    responses: tuple[NDArray[np.float64], ...]
    """For each image, the response before and after each patch, [patches + 1]."""


def greedy_smoothing(
    target: Target | ModelBank,
    images: Images,
    pairs: Neurons,
    *,
    count: int | None = None,
    choose: str = "lowest",
    fill: str | float = "smooth",
    radius: float = 10.0,
    sigma: float = 5.0,
    stride: int = 4,
    shape: str = "circle",
    seed: int = 0,
    memory: int = MEMORY,
) -> Smoothed:
    """Smooth, again and again, the patch whose loss lowers (or raises) the response most (Cowley et al., fig. 4f).

    Patches do not overlap, and accumulate.

    Args:
        target, images: as for `Occlusion`.
        pairs: [B] the neuron of each image.
        count: patches per image; None: as long as a patch fits and changes the response in the wanted direction (with
            "random": as long as one fits).
        choose: "lowest" response, "highest", or "random" (the control).
        fill, radius, sigma, stride, shape: as for `Occlusion`.
        seed: of the random choice; image i draws from (seed, i).
        memory: see `Method`.

    Raises:
        ValueError: an option out of range.
    """
    aim = as_target(target)
    if choose not in ("lowest", "highest", "random"):
        raise ValueError(f'choose should be "lowest", "highest" or "random", got {choose!r}')
    if count is not None and count < 0:
        raise ValueError(f"count should not be negative, got {count}")
    method = Occlusion(aim, fill=fill, radius=radius, sigma=sigma, stride=stride, shape=shape, memory=memory)
    levels, which = method._inputs(images, None, pairs)
    places = patches(*levels.shape[1:3], radius=radius, stride=stride, shape=shape)
    overlap = places.overlap
    filled = _filled(levels, fill, sigma, aim.zero)
    out, orders, curves = levels.clone(), [], []
    for i in range(len(levels)):
        own = which.neurons[i : i + 1]
        rng = np.random.default_rng((seed, i))
        free = torch.ones(len(places.masks), dtype=torch.bool)
        order: list[int] = []
        curve = [float(aim.responses(out[i : i + 1], own, True)[0])]
        while bool(free.any()) and (count is None or len(order) < count):
            candidates = torch.nonzero(free)[:, 0]
            if choose == "random":
                best = int(candidates[int(rng.integers(len(candidates)))])
            else:
                change = _changes(aim, out[i], filled[i], places.masks[candidates], own, memory)[:, 0]
                at = int(change.argmin() if choose == "lowest" else change.argmax())
                if count is None and not (float(change[at]) < 0 if choose == "lowest" else float(change[at]) > 0):
                    break
                best = int(candidates[at])
            mask = places.masks[best].to(out.device)
            out[i] = torch.where(mask[..., None], filled[i], out[i])
            free &= ~overlap[best]
            order.append(best)
            curve.append(float(aim.responses(out[i : i + 1], own, True)[0]))
        orders.append(tuple(order))
        curves.append(np.asarray(curve))
    return Smoothed(out, tuple(orders), tuple(curves))


def _check_fill(fill: str | float, sigma: float) -> None:
    if isinstance(fill, str) and fill not in ("smooth", "zero"):
        raise ValueError(f'fill should be "smooth", "zero" or a level, got {fill!r}')
    if not sigma > 0:
        raise ValueError(f"sigma should be positive, got {sigma}")


def _filled(levels: Tensor, fill: str | float, sigma: float, zero: tuple[float, float, float]) -> Tensor:
    """What takes the place of patches, of the shape of the images."""
    if fill == "smooth":
        return gaussian_blur(levels, sigma)
    if fill == "zero":
        return levels.new_tensor(zero).expand_as(levels)
    return levels.new_tensor(float(fill)).expand_as(levels)


def _changes(target: Target, image: Tensor, filled: Tensor, masks: Tensor, neurons: Tensor, memory: int) -> Tensor:
    """Response with each patch filled minus response without: [P, K]."""
    base = target.responses(image[None], neurons, False)
    parts = []
    for rows, _ in chunks(len(masks), 1, 4 * image.nbytes, 8 * len(neurons), memory, paired=True):
        mask = masks[rows].to(image.device)[..., None]
        parts.append(target.responses(torch.where(mask, filled, image), neurons, False) - base)
    return torch.cat(parts)
