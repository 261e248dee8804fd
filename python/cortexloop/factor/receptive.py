"""Receptive fields of weights in feature space: where they lie on the map, and on the image by back-projection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cortexloop.factor._checks import Array, floats
from cortexloop.factor.factors import Factors
from cortexloop.factor.gaussian import Gaussians, fit_gaussians
from cortexloop.factor.images import image_size
from cortexloop.factor.scores import Weights
from cortexloop.features import FeatureSource


def feature_field(weights: Weights) -> Tensor:
    """How much weight lies at each position of the feature map, [T, H, W].

    Factors: sum_f |w_f| |h_f|, in closed form and without any image; full weights: the norm over channels.
    """
    if isinstance(weights, Factors):
        return torch.einsum("tr,trhw->thw", weights.vectors.norm(dim=2), weights.masks.abs())
    field: Tensor = weights.norm(dim=1)
    return field


def back_projected(
    weights: Weights,
    source: FeatureSource,
    *,
    images: Array | None = None,
    count: int = 100,
    seed: int = 0,
    shape: tuple[int, int] | None = None,
    batch: int | None = None,
) -> Tensor:
    """Receptive fields on the image, [T, H, W]: mean over images of sum over colours |d <W, X(image)> / d image|.

    The gradient is taken through `source`, which has to be the network that the weights read from. (The published code
    takes it through the network of the neuron to be modelled, so that the model's field cannot come out wrong.) One
    forward pass serves all neurons of a batch of images.

    Args:
        images: [B, H, W, 3] levels 0..255; default `count` images of independent noise, uniform over 0..255.
        shape: height and width of the noise, where the source does not tell.
        batch: images at a time; default the source's.

    Raises:
        TypeError, ValueError: weights or images of a wrong shape.
    """
    found = weights.feature_shape if isinstance(weights, Factors) else tuple(weights.shape[1:])
    if tuple(found) != tuple(source.feature_shape()):
        raise ValueError(
            f"the maps of {source.name} are {list(source.feature_shape())}, the weights are for {list(found)}"
        )
    if images is None:
        if count < 1:
            raise ValueError(f"count should be at least 1 image, got {count}")
        h, w = image_size(source, shape)
        images = np.random.default_rng(seed).random((count, h, w, 3), dtype=np.float32) * 255.0
    shown = floats(images, "images", 4)
    if len(shown) == 0 or shown.shape[3] != 3:
        raise ValueError(f"images should be [B, H, W, 3] with at least one, got {list(shown.shape)}")
    moved = weights.to(source.device)
    total = torch.zeros(len(weights), *shown.shape[1:3], dtype=torch.float64, device=source.device)
    for part in torch.split(shown, batch or source.batch):
        x = part.to(source.device).requires_grad_()
        with torch.enable_grad():
            features = source.differentiable(x)
        for t in range(len(weights)):
            # The gradient with respect to the features is the weights themselves, the same for every image.
            one = moved.select([t]).tensor()[0] if isinstance(moved, Factors) else moved[t]
            cotangent = one.to(features).expand_as(features)
            (grad,) = torch.autograd.grad(features, x, cotangent, retain_graph=t + 1 < len(weights))
            total[t] += grad.abs().sum(-1).sum(0, dtype=torch.float64)
    return (total / len(shown)).float()


@dataclass(frozen=True, eq=False)
class Agreement:
    """How well receptive fields of models agree with true ones, of T neurons."""

    iou: Tensor
    """[T] overlap of {fit > offset + 0.3 amplitude}, intersection over union; 0 if there is neither."""
    distance: Tensor
    """[T] between the fitted centres, in pixels of the maps."""
    distance_degrees: Tensor | None
    """[T] the same in degrees of visual angle."""
    correlation: Tensor
    """[T] Pearson correlation of the maps; 0 for a flat one."""
    correlation_fitted: Tensor
    """[T] Pearson correlation of the fitted Gaussians; 0 for a flat map."""
    fits: tuple[Gaussians, Gaussians]
    """Of the first and the second maps."""


def compare_fields(
    first: Array, second: Array, *, level: float = 0.3, pixels_per_degree: float | None = None
) -> Agreement:
    """Agreement of receptive fields, neuron by neuron, by Gaussians fitted to both (Wang & Ponce).

    Args:
        first, second: [T, H, W].
        level: of the fitted amplitude above the offset at which a field ends.
        pixels_per_degree: to have distances in degrees, too.

    Raises:
        TypeError, ValueError: maps of different shapes or not finite, or a number that is not positive.
    """
    a, b = floats(first, "first maps", 3).double(), floats(second, "second maps", 3).double()
    if a.shape != b.shape:
        raise ValueError(
            f"the maps should be of one shape, got {list(a.shape)} and {list(b.shape)}: compare fields on the image, "
            "not on feature maps of different networks"
        )
    if pixels_per_degree is not None and not pixels_per_degree > 0:
        raise ValueError(f"pixels_per_degree should be positive, got {pixels_per_degree}")
    fits = fit_gaussians(a), fit_gaussians(b)
    distance = torch.hypot(fits[0].x - fits[1].x, fits[0].y - fits[1].y)
    return Agreement(
        iou=overlap(fits[0].inside(level), fits[1].inside(level)),
        distance=distance,
        distance_degrees=None if pixels_per_degree is None else distance / pixels_per_degree,
        correlation=_correlation(a, b),
        correlation_fitted=_correlation(fits[0].maps(), fits[1].maps()),
        fits=fits,
    )


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of bool maps [T, H, W], float64 [T]; 0 where both are empty.

    For raw maps, threshold them before: `overlap(a > 0.3 * a.amax((1, 2), keepdim=True), ...)`.
    """
    union = (first | second).sum((1, 2)).double()
    return (first & second).sum((1, 2)).double() / union.clamp(min=1.0)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    x, y = a.flatten(1), b.flatten(1)
    flat = (x == x[:, :1]).all(1) | (y == y[:, :1]).all(1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    norms = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return torch.where(flat, 0.0, (x * y).sum(1) / norms.clamp(min=1e-300)).clamp(-1.0, 1.0)
